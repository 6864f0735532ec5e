"""The mean loss of a data set, its gradient and its curvature products, in full passes over the data."""

from sharpscope.objective.losses import TokenCrossEntropy
from sharpscope.objective.objective import Objective
from sharpscope.progress import Progress

__all__ = ["Objective", "Progress", "TokenCrossEntropy"]
