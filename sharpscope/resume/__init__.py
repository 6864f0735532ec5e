"""Long runs whose finished passes outlive a kill."""

from sharpscope.resume.journal import Journal, discard
from sharpscope.resume.passes import open_journal, resumable

__all__ = ["Journal", "discard", "open_journal", "resumable"]
