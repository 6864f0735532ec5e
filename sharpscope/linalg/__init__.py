"""Eigenvalues, trace and density of large symmetric operators known only by their products with a block of vectors.

Start with ``block_lanczos.py``. ``ritz.py`` has the bounds, ``top_eigenpairs.py`` the public function and the choice of
solver, ``missed_eigenvalues.py`` the probability that an eigenvalue was missed.
"""

from sharpscope.linalg.quadrature import Quadrature, lanczos_quadrature
from sharpscope.linalg.top_eigenpairs import METHODS, Eigenpairs, top_eigenpairs
from sharpscope.linalg.trace_and_frobenius import TraceEstimate, trace_and_frobenius

__all__ = [
    "METHODS",
    "Eigenpairs",
    "Quadrature",
    "TraceEstimate",
    "lanczos_quadrature",
    "top_eigenpairs",
    "trace_and_frobenius",
]
