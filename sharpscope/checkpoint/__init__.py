"""Checkpoint files: reading them without running their code, writing them, and fitting weights into a model."""

from sharpscope.checkpoint.bundled import write_checkpoint
from sharpscope.checkpoint.contents import Checkpoint
from sharpscope.checkpoint.files import digest_of, read_checkpoint
from sharpscope.checkpoint.weights import load_weights

__all__ = ["Checkpoint", "digest_of", "load_weights", "read_checkpoint", "write_checkpoint"]
