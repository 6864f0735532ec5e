"""What a computation has cost so far."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Meter:
    """The bill, added to as work is done.

    Attributes:
        passes: full walks over the data, and ``hvps``: products with a vector over all of them.
        example_gradients: everything done, in units of one gradient (forward and backward) of one example.
        seconds: wall-clock time inside ``timing()``.
    """

    passes: int = 0
    hvps: int = 0
    example_gradients: float = 0.0
    seconds: float = 0.0

    @contextmanager
    def timing(self) -> Iterator[None]:
        """Add the block's wall-clock time, however it ends."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - started
