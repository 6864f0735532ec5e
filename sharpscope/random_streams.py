"""Random streams: every use of random numbers has its own, derived from the user's seed and the purpose.

Two streams of one seed are independent: a sample is not the examples whose labels were made wrong. No stream is the one
that ``torch.manual_seed``, ``numpy.random.default_rng`` or ``random.seed`` give for a small seed, from
which the user's data or weights may come.
"""

from __future__ import annotations

import numpy as np
import torch


def derived_seed(seed: int, purpose: str, *index: int) -> int:
    """A seed from 0 to 2^63 - 1 for a purpose, by NumPy's SeedSequence with ``purpose`` and ``index`` as spawn key.

    Args:
        seed: the user's, at least 0.
        purpose: what the numbers are for, as "label noise".
        index: numbers that distinguish streams of one purpose, as an epoch.
    """
    name = purpose.encode()
    words = np.random.SeedSequence(seed, spawn_key=(len(name), *name, *index)).generate_state(1, np.uint64)
    return int(words[0]) >> 1


def stream(seed: int, purpose: str, *index: int) -> torch.Generator:
    """A new generator on the CPU, seeded with ``derived_seed(seed, purpose, *index)``."""
    return torch.Generator().manual_seed(derived_seed(seed, purpose, *index))


def stream_from(generator: torch.Generator | None, purpose: str) -> torch.Generator:
    """A new generator for a purpose, seeded by one number from ``generator``; None is a generator of seed 0."""
    source = generator if generator is not None else torch.Generator().manual_seed(0)
    return stream(int(torch.randint(2**62, (), generator=source)), purpose)
