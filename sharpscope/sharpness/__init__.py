"""Sharpness of the loss around the weights: worst and average cases, m-sharpness, and what scaling does to them."""

from sharpscope.sharpness.invariance import rescaling_invariance
from sharpscope.sharpness.maximize import Ascent
from sharpscope.sharpness.measures import MEASURES, WORST, measure_sharpness

__all__ = ["MEASURES", "WORST", "Ascent", "measure_sharpness", "rescaling_invariance"]
