"""Measure lambda_max of the training loss during training, without affecting the training."""

from sharpscope.monitor.monitor import EXAMPLES, SharpnessMonitor

__all__ = ["EXAMPLES", "SharpnessMonitor"]
