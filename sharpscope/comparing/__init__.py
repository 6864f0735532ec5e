"""Several checkpoints measured alike: loss, eigenvalues, density, m-sharpness, slices, and the way between them."""

from sharpscope.comparing.run import compare
from sharpscope.comparing.steps import LEVELS, Level

__all__ = ["LEVELS", "Level", "compare"]
