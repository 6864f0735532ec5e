"""The mean loss of a data set, its gradient and its curvature products, in full passes over the data."""

from sharpscope.objective.objective import Objective, Progress
from sharpscope.objective.tokens import TokenCrossEntropy

__all__ = ["Objective", "Progress", "TokenCrossEntropy"]
