"""Long runs that resume after a kill."""

from sharpscope.resume.journal import Journal
from sharpscope.resume.journaled_hvp import journaled_hvp, once_charged
from sharpscope.resume.key import key_of
from sharpscope.resume.points import PointLog

__all__ = ["Journal", "PointLog", "journaled_hvp", "key_of", "once_charged"]
