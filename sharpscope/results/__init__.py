"""Results: what was measured, how surely, at what cost, and where it came from. NumPy only."""

from sharpscope.results.cost import Cost
from sharpscope.results.eigen import EigenResult, Ratio, table

__all__ = ["Cost", "EigenResult", "Ratio", "table"]
