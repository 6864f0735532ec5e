"""Figures: functions of results that draw on matplotlib Axes. matplotlib is imported when one is called."""

from sharpscope.plot.density import density_curve
from sharpscope.plot.figure import COLOURS
from sharpscope.plot.interactive import interactive_surface
from sharpscope.plot.sharpness import m_sharpness_curves, sharpness_over_steps, sharpness_over_training
from sharpscope.plot.slice import slice_curves
from sharpscope.plot.surface import surface_3d, surface_contour, surfaces_side_by_side

__all__ = [
    "COLOURS",
    "density_curve",
    "interactive_surface",
    "m_sharpness_curves",
    "sharpness_over_steps",
    "sharpness_over_training",
    "slice_curves",
    "surface_3d",
    "surface_contour",
    "surfaces_side_by_side",
]
