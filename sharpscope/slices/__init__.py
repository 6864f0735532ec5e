"""Slices of the loss along lines and planes in weight space."""

from sharpscope.slices.checkpoint_directions import plane_through, span_of, towards, trajectory_plane
from sharpscope.slices.directions import (
    Direction,
    eigenvector_directions,
    gradient_directions,
    orthonormalised,
    random_directions,
    read_directions,
    write_directions,
)
from sharpscope.slices.measure import loss_slice, loss_surface

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
