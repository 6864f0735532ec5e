"""Slices through the loss along lines and over planes of weight space."""

from sharpscope.slices.between import plane_through, span_of, towards, trajectory_plane
from sharpscope.slices.direction import Direction, orthonormalised
from sharpscope.slices.grid import axis
from sharpscope.slices.measure import loss_slice, loss_surface
from sharpscope.slices.measured import eigenvector_directions, gradient_directions
from sharpscope.slices.random import random_directions

__all__ = [
    "Direction",
    "axis",
    "eigenvector_directions",
    "gradient_directions",
    "loss_slice",
    "loss_surface",
    "orthonormalised",
    "plane_through",
    "random_directions",
    "span_of",
    "towards",
    "trajectory_plane",
]
