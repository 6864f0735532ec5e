"""The mean loss of a data set, its gradient and its curvature products, in full passes over the data."""

from sharpscope.objective.objective import Objective, Progress

__all__ = ["Objective", "Progress"]
