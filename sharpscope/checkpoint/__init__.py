"""Checkpoint files: reading them without running their code, writing them, and fitting weights into a model."""

from sharpscope.checkpoint.bundled import write_checkpoint
from sharpscope.checkpoint.contents import Checkpoint
from sharpscope.checkpoint.files import read_checkpoint, sha256_of
from sharpscope.checkpoint.weights import load_weights

__all__ = ["Checkpoint", "load_weights", "read_checkpoint", "sha256_of", "write_checkpoint"]
