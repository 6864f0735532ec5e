"""Several checkpoints measured alike: loss, eigenvalues, density, m-sharpness, slices, and the way between them."""

from sharpscope.comparing.assembling import compare
from sharpscope.comparing.levels import LEVELS, Level

__all__ = ["LEVELS", "Level", "compare"]
