"""Several checkpoints measured alike, and what the numbers show."""

from sharpscope.results.comparison.comparison import Comparison
from sharpscope.results.comparison.subject import ANALYSES, Analysis, Performance, Subject

__all__ = ["ANALYSES", "Analysis", "Comparison", "Performance", "Subject"]
