"""Checkpoint files: reading them without running their code, writing them, and fitting weights into a model."""

from sharpscope.checkpoint.bundled import Checkpoint, write_checkpoint
from sharpscope.checkpoint.fitting import load_weights
from sharpscope.checkpoint.reading import digest_of, read_checkpoint

__all__ = ["Checkpoint", "digest_of", "load_weights", "read_checkpoint", "write_checkpoint"]
