"""Results: what was measured, how surely, at what cost, and where it came from. NumPy only."""

from sharpscope.results.blocks import BlockResult
from sharpscope.results.comparison import Comparison
from sharpscope.results.cost import Cost
from sharpscope.results.curve import Curve
from sharpscope.results.density import DensityResult
from sharpscope.results.eigen import EigenResult, Ratio
from sharpscope.results.estimate import Estimate
from sharpscope.results.invariance import InvarianceResult
from sharpscope.results.loss_landscape import read_loss_landscape
from sharpscope.results.monitor import MonitorRecord, MonitorResult
from sharpscope.results.sharpness import Measure, SharpnessResult
from sharpscope.results.side_by_side import side_by_side
from sharpscope.results.slice import Mark, SliceResult
from sharpscope.results.slice_export import to_csv, to_vtk
from sharpscope.results.table import Table
from sharpscope.results.trace import TraceResult

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
