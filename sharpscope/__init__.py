"""sharpscope: how sharp is this minimum, and did SAM make it flatter?"""

from pathlib import Path
from typing import TYPE_CHECKING

from sharpscope.version import __version__ as __version__

# The public names, each written here alone. Type checkers read these imports; at run time each is carried out when its
# name is first used, because torch takes 1.5 s to import and `sharpscope --help` need not wait for it.
if TYPE_CHECKING:
    from sharpscope import comparing as comparing
    from sharpscope import edge_of_stability as edge_of_stability
    from sharpscope import edges as edges
    from sharpscope import linalg as linalg
    from sharpscope import operators as operators
    from sharpscope import optim as optim
    from sharpscope import plot as plot
    from sharpscope import report as report
    from sharpscope import results as results
    from sharpscope import slices as slices
    from sharpscope.comparing import compare as compare
    from sharpscope.errors import ArgumentError as ArgumentError
    from sharpscope.errors import AuditError as AuditError
    from sharpscope.errors import CheckpointError as CheckpointError
    from sharpscope.errors import ConvergenceWarning as ConvergenceWarning
    from sharpscope.errors import DataError as DataError
    from sharpscope.errors import OutputError as OutputError
    from sharpscope.errors import ProblemError as ProblemError
    from sharpscope.errors import SharpscopeError as SharpscopeError
    from sharpscope.loading import load as load
    from sharpscope.monitor import SharpnessMonitor as SharpnessMonitor
    from sharpscope.objective import Objective as Objective
    from sharpscope.objective import TokenCrossEntropy as TokenCrossEntropy
    from sharpscope.problem import Problem as Problem
    from sharpscope.progress import progress_bar as progress_bar
    from sharpscope.results import BlockResult as BlockResult
    from sharpscope.results import Comparison as Comparison
    from sharpscope.results import Cost as Cost
    from sharpscope.results import DensityResult as DensityResult
    from sharpscope.results import EigenResult as EigenResult
    from sharpscope.results import Estimate as Estimate
    from sharpscope.results import InvarianceResult as InvarianceResult
    from sharpscope.results import Mark as Mark
    from sharpscope.results import Measure as Measure
    from sharpscope.results import MonitorRecord as MonitorRecord
    from sharpscope.results import MonitorResult as MonitorResult
    from sharpscope.results import Ratio as Ratio
    from sharpscope.results import SharpnessResult as SharpnessResult
    from sharpscope.results import SliceResult as SliceResult
    from sharpscope.results import TraceResult as TraceResult
    from sharpscope.results import side_by_side as side_by_side
    from sharpscope.sharpness import Ascent as Ascent
    from sharpscope.sharpness import measure_sharpness as measure_sharpness
    from sharpscope.sharpness import rescaling_invariance as rescaling_invariance
    from sharpscope.slices import loss_slice as loss_slice
    from sharpscope.slices import loss_surface as loss_surface
    from sharpscope.spectrum import block_spectra as block_spectra
    from sharpscope.spectrum import spectral_density as spectral_density
    from sharpscope.spectrum import top_eigenvalues as top_eigenvalues
    from sharpscope.spectrum import trace as trace
else:
    import ast
    import importlib

    # {name: module} of the imports above, read from this file.
    _source = ast.parse(__spec__.loader.get_source(__spec__.name))
    _block = next(node for node in _source.body if isinstance(node, ast.If))
    _LAZY = {alias.name: line.module for line in _block.body for alias in line.names}
    _SUBPACKAGES = {name for name, module in _LAZY.items() if module == "sharpscope"}
    __all__ = sorted({*_LAZY, "__version__"} - _SUBPACKAGES)

    def __getattr__(name):
        if name in _SUBPACKAGES:
            return importlib.import_module(f"sharpscope.{name}")
        if name not in _LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value = getattr(importlib.import_module(_LAZY[name]), name)
        return value

    def __dir__():
        return __all__


# In a checkout cli/ lies next to this package, not inside it as once installed; `python -m sharpscope` works there too.
_checkout = Path(__file__).parent.parent
if (_checkout / "setup.cfg").is_file() and (_checkout / "cli" / "__init__.py").is_file():
    __path__.append(str(_checkout))
