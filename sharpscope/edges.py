"""The former name of ``sharpscope.edge_of_stability``."""

import warnings

from sharpscope.edge_of_stability import descent_edge, sam_edge

__all__ = ["descent_edge", "sam_edge"]

warnings.warn("sharpscope.edges is now sharpscope.edge_of_stability. Import from there.", FutureWarning, stacklevel=2)
