"""Results: what was measured, how surely, at what cost, and where it came from. NumPy only."""

from sharpscope.results.base import Cost, side_by_side
from sharpscope.results.comparison import Comparison
from sharpscope.results.density_and_trace import Curve, DensityResult, TraceResult
from sharpscope.results.eigen import EigenResult, Ratio
from sharpscope.results.layerwise import BlockResult
from sharpscope.results.monitor import MonitorRecord, MonitorResult
from sharpscope.results.sharpness import InvarianceResult, Measure, SharpnessResult
from sharpscope.results.slice import Mark, SliceResult
from sharpscope.results.slice_exchange import read_loss_landscape, to_csv, to_vtk
from sharpscope.results.statistics import Estimate
from sharpscope.results.table import Table

__all__ = [
    "BlockResult",
    "Comparison",
    "Cost",
    "Curve",
    "DensityResult",
    "EigenResult",
    "Estimate",
    "InvarianceResult",
    "Mark",
    "Measure",
    "MonitorRecord",
    "MonitorResult",
    "Ratio",
    "SharpnessResult",
    "SliceResult",
    "Table",
    "TraceResult",
    "read_loss_landscape",
    "side_by_side",
    "to_csv",
    "to_vtk",
]
