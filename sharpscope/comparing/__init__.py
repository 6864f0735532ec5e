"""Several checkpoints measured alike: loss, eigenvalues, density, m-sharpness, slices, and the way between them."""

from sharpscope.comparing.levels import LEVELS, Level
from sharpscope.comparing.run import compare

__all__ = ["LEVELS", "Level", "compare"]
