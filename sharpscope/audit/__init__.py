"""What must hold before a number is worth computing, checked on a few examples."""

from sharpscope.audit.audit import audit

__all__ = ["audit"]
