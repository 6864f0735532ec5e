"""Eigensolvers for large symmetric operators that are known only by their products with a block of vectors."""

from sharpscope.linalg.eigenpairs import METHODS, Eigenpairs, require_arguments, top_eigenpairs

__all__ = ["METHODS", "Eigenpairs", "require_arguments", "top_eigenpairs"]
