"""What must hold before a number is worth computing, checked on a few examples."""

from sharpscope.audit.audit import audit
from sharpscope.audit.twin import rounding_of

__all__ = ["audit", "rounding_of"]
