"""Cheap operators that resemble a data set's curvature and guide the few-pass solver."""
