"""The former name of ``sharpscope.training``."""

import warnings

from sharpscope.training import Recipe, evaluate, monitor_path, parse_epochs, snapshot_path, train

__all__ = ["Recipe", "evaluate", "monitor_path", "parse_epochs", "snapshot_path", "train"]

warnings.warn("sharpscope.train is now sharpscope.training. Import from there.", FutureWarning, stacklevel=2)
