"""Long runs whose finished passes outlive a kill."""

from sharpscope.resume.journal import discard
from sharpscope.resume.passes import key_of, open_journal, resumable
from sharpscope.resume.points import PointLog, discard_points

__all__ = ["PointLog", "discard", "discard_points", "key_of", "open_journal", "resumable"]
