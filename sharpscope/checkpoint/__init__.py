"""Read checkpoint files without running their code, write them, and load their weights into a model."""

from sharpscope.checkpoint.bundled import Checkpoint, write_checkpoint
from sharpscope.checkpoint.fitting import load_weights
from sharpscope.checkpoint.reading import digest_of, read_checkpoint

__all__ = ["Checkpoint", "digest_of", "load_weights", "read_checkpoint", "write_checkpoint"]
