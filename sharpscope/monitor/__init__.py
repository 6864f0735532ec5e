"""lambda_max of the training loss while a model is trained, without touching the training."""

from sharpscope.monitor.monitor import EXAMPLES, SharpnessMonitor

__all__ = ["EXAMPLES", "SharpnessMonitor"]
