"""sharpscope: how sharp is this minimum, and did SAM make it flatter?"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sharpscope.version import __version__

if TYPE_CHECKING:
    from sharpscope.comparing import compare
    from sharpscope.errors import (
        ArgumentError,
        AuditError,
        CheckpointError,
        ConvergenceWarning,
        DataError,
        OutputError,
        ProblemError,
        SharpscopeError,
    )
    from sharpscope.loading import load
    from sharpscope.monitor import SharpnessMonitor
    from sharpscope.objective import Objective, TokenCrossEntropy
    from sharpscope.problem import Problem
    from sharpscope.progress import progress_bar
    from sharpscope.results import (
        BlockResult,
        Comparison,
        Cost,
        DensityResult,
        EigenResult,
        Estimate,
        InvarianceResult,
        Mark,
        Measure,
        MonitorRecord,
        MonitorResult,
        Ratio,
        SharpnessResult,
        SliceResult,
        TraceResult,
        side_by_side,
    )
    from sharpscope.sharpness import Ascent, measure_sharpness, rescaling_invariance
    from sharpscope.slices import loss_slice, loss_surface
    from sharpscope.spectrum import block_spectra, spectral_density, top_eigenvalues
    from sharpscope.spectrum.trace import trace

__all__ = [
    "ArgumentError",
    "Ascent",
    "AuditError",
    "BlockResult",
    "CheckpointError",
    "Comparison",
    "ConvergenceWarning",
    "Cost",
    "DataError",
    "DensityResult",
    "EigenResult",
    "Estimate",
    "InvarianceResult",
    "Mark",
    "Measure",
    "MonitorRecord",
    "MonitorResult",
    "Objective",
    "OutputError",
    "Problem",
    "ProblemError",
    "Ratio",
    "SharpnessMonitor",
    "SharpnessResult",
    "SharpscopeError",
    "SliceResult",
    "TokenCrossEntropy",
    "TraceResult",
    "__version__",
    "block_spectra",
    "compare",
    "load",
    "loss_slice",
    "loss_surface",
    "measure_sharpness",
    "progress_bar",
    "rescaling_invariance",
    "side_by_side",
    "spectral_density",
    "top_eigenvalues",
    "trace",
]

# In a checkout cli/ lies beside this package, not in it as once installed; `python -m sharpscope` works there too.
_beside = Path(__file__).parent.parent
if (_beside / "setup.cfg").is_file() and (_beside / "cli" / "__init__.py").is_file():
    __path__.append(str(_beside))

# Public names are imported when first used: torch takes 1.5 s, which `sharpscope --help` need not wait for.
_HOMES = {"load": "loading", "Objective": "objective", "Problem": "problem"}
_HOMES |= {"SharpnessMonitor": "monitor", "TokenCrossEntropy": "objective"}
_HOMES |= {"compare": "comparing", "progress_bar": "progress"}
_HOMES |= dict.fromkeys(("block_spectra", "spectral_density", "top_eigenvalues", "trace"), "spectrum")
_HOMES |= dict.fromkeys(("loss_slice", "loss_surface"), "slices")
_HOMES |= dict.fromkeys(("Ascent", "measure_sharpness", "rescaling_invariance"), "sharpness")
_HOMES |= dict.fromkeys(
    (
        *("BlockResult", "Comparison", "Cost", "DensityResult", "EigenResult", "Estimate", "InvarianceResult"),
        *(
            "Mark",
            "Measure",
            "MonitorRecord",
            "MonitorResult",
            "Ratio",
            "SharpnessResult",
            "SliceResult",
            "TraceResult",
            "side_by_side",
        ),
    ),
    "results",
)


# Subpackages that the reference names in full are imported when first used too.
_SUBPACKAGES = (
    "comparing",
    "edge_of_stability",
    "edges",
    "linalg",
    "operators",
    "optim",
    "plot",
    "report",
    "results",
    "slices",
)


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return importlib.import_module(f"sharpscope.{name}")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"sharpscope.{_HOMES.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
