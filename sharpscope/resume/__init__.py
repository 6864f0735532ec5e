"""Long runs that resume after a kill."""

from sharpscope.resume.journal import Journal, PointLog, journaled_hvp, once_with_cost
from sharpscope.resume.key import key_of

__all__ = ["Journal", "PointLog", "journaled_hvp", "key_of", "once_with_cost"]
