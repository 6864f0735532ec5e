"""Figures: functions of results that draw on matplotlib Axes. matplotlib is imported when one is called."""

from sharpscope.plot.density import density_curve
from sharpscope.plot.sharpness import m_sharpness_curves
from sharpscope.plot.training import COLOURS, sharpness_over_training

__all__ = ["COLOURS", "density_curve", "m_sharpness_curves", "sharpness_over_training"]
