"""Several checkpoints measured alike: loss, eigenvalues, density, m-sharpness, slices, and the way between them."""

from sharpscope.comparing.assembling import Keep, compare
from sharpscope.comparing.entrants import Entrant, Field, field_of
from sharpscope.comparing.levels import LEVELS, Level, level_of
from sharpscope.comparing.samples import sampled
from sharpscope.comparing.steps import How

__all__ = [
    "LEVELS",
    "Entrant",
    "Field",
    "How",
    "Keep",
    "Level",
    "compare",
    "field_of",
    "level_of",
    "sampled",
]
