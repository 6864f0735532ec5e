"""Several checkpoints measured alike: loss, eigenvalues, density, m-sharpness, slices, and the way between them."""

from sharpscope.compare.assembling import Keep, compare
from sharpscope.compare.entrants import Entrant, Field, field_of
from sharpscope.compare.levels import LEVELS, Level, level_of
from sharpscope.compare.samples import sampled
from sharpscope.compare.steps import How

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
