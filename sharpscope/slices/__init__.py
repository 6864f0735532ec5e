"""Slices through the loss along lines and over planes of weight space."""

from sharpscope.slices.checkpoint_directions import plane_through, span_of, towards, trajectory_plane
from sharpscope.slices.direction import Direction, orthonormalised, read_directions, write_directions
from sharpscope.slices.loss_directions import eigenvector_directions, gradient_directions
from sharpscope.slices.measure import loss_slice, loss_surface
from sharpscope.slices.random_directions import random_directions

__all__ = [
    "Direction",
    "eigenvector_directions",
    "gradient_directions",
    "loss_slice",
    "loss_surface",
    "orthonormalised",
    "plane_through",
    "random_directions",
    "read_directions",
    "span_of",
    "towards",
    "trajectory_plane",
    "write_directions",
]
