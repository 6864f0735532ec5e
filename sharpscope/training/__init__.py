"""Train a bundled network, with or without SAM, into a checkpoint that describes itself."""

from sharpscope.training.recipe import Recipe, monitor_path, parse_epochs, snapshot_path
from sharpscope.training.train import evaluate, train

__all__ = ["Recipe", "evaluate", "monitor_path", "parse_epochs", "snapshot_path", "train"]
