"""lambda_max of the training loss while a model is trained, without touching the training."""

from sharpscope.monitor.monitor import SharpnessMonitor

__all__ = ["SharpnessMonitor"]
