"""Cheap operators that resemble a data set's curvature and guide the few-pass solver."""

from sharpscope.guide.subset import Subset, sample, worthwhile

__all__ = ["Subset", "sample", "worthwhile"]
