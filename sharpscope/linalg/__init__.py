"""Eigensolvers for large symmetric operators that are known only by their products with a block of vectors."""

from sharpscope.linalg.eigenpairs import METHODS, Eigenpairs, top_eigenpairs

__all__ = ["METHODS", "Eigenpairs", "top_eigenpairs"]
