"""Long runs whose finished passes outlive a kill."""

from sharpscope.resume.journal import discard
from sharpscope.resume.passes import open_journal, resumable

__all__ = ["discard", "open_journal", "resumable"]
