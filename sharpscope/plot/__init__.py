"""Figures: functions of results that draw on matplotlib Axes. matplotlib is imported when one is called."""

from sharpscope.plot.training import sharpness_over_training

__all__ = ["sharpness_over_training"]
