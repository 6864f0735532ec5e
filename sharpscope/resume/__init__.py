"""Long runs whose finished passes outlive a kill."""

from sharpscope.resume.journal import Journal
from sharpscope.resume.passes import key_of, open_journal, resumable
from sharpscope.resume.points import PointLog

__all__ = ["Journal", "PointLog", "key_of", "open_journal", "resumable"]
