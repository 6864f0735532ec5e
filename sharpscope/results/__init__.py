"""Results: what was measured, how surely, at what cost, and where it came from. NumPy only."""

from sharpscope.results.blocks import BlockResult, block_table
from sharpscope.results.comparison import Comparison
from sharpscope.results.cost import Cost
from sharpscope.results.curve import Curve
from sharpscope.results.density import DensityResult, density_table
from sharpscope.results.eigen import EigenResult, Ratio
from sharpscope.results.eigen_table import table
from sharpscope.results.estimate import Estimate
from sharpscope.results.invariance import InvarianceResult, invariance_table
from sharpscope.results.loss_landscape import read_loss_landscape
from sharpscope.results.monitor import MonitorRecord, MonitorResult
from sharpscope.results.sharpness import Measure, SharpnessResult
from sharpscope.results.sharpness_table import sharpness_table
from sharpscope.results.side_by_side import Table, side_by_side
from sharpscope.results.slice import Mark, SliceResult
from sharpscope.results.slice_export import to_csv, to_vtk
from sharpscope.results.slice_table import slice_table
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
    "block_table",
    "density_table",
    "invariance_table",
    "read_loss_landscape",
    "sharpness_table",
    "side_by_side",
    "slice_table",
    "table",
    "to_csv",
    "to_vtk",
]
