"""sharpscope: how sharp is this minimum, and did SAM make it flatter?"""

from pathlib import Path

# In a checkout cli/ lies beside this package, not in it as once installed; `python -m sharpscope` works there too.
_beside = Path(__file__).parent.parent
if (_beside / "setup.cfg").is_file() and (_beside / "cli" / "__init__.py").is_file():
    __path__.append(str(_beside))

from sharpscope.errors import (  # noqa: E402
    ArgumentError,
    AuditError,
    CheckpointError,
    ConvergenceWarning,
    DataError,
    OutputError,
    ProblemError,
    SharpscopeError,
)
from sharpscope.loading import load  # noqa: E402
from sharpscope.objective import Objective  # noqa: E402
from sharpscope.problem import Problem  # noqa: E402
from sharpscope.results import Cost, EigenResult, Ratio  # noqa: E402
from sharpscope.spectrum import top_eigenvalues  # noqa: E402
from sharpscope.version import __version__  # noqa: E402

__all__ = [
    "ArgumentError",
    "AuditError",
    "CheckpointError",
    "ConvergenceWarning",
    "Cost",
    "DataError",
    "EigenResult",
    "Objective",
    "OutputError",
    "Problem",
    "ProblemError",
    "Ratio",
    "SharpscopeError",
    "__version__",
    "load",
    "top_eigenvalues",
]
