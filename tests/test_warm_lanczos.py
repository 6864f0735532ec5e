"""A few products from the last vectors on: the largest eigenvalue, exact where the space is exhausted."""

from __future__ import annotations

import pytest
import torch

from conftest import quadratic
from sharpscope.linalg.warm_lanczos import NUM_KEPT, warm_lanczos


@pytest.mark.parametrize("seed", range(5))
def test_tracking_is_exact_once_the_space_is_exhausted(seed: int) -> None:
    """A multiple eigenvalue, a negative spectrum, a zero and a single dimension each end in their exact lambda_max."""
    generator = torch.Generator().manual_seed(seed)
    for spectrum in ([3, 3, 3, 1, 0, -9], [-1, -2, -3, -4, -5, -6], [0] * 6, [1, -1, 0, 0, 0, 0]):
        values = torch.tensor(spectrum, dtype=torch.float64)
        h = quadratic(values, generator)
        found = warm_lanczos(
            lambda rows, h=h: rows @ h,
            torch.empty(0, 6, dtype=torch.float64),
            None,
            tol=1e-9,
            max_products=50,
            generator=generator,
        )
        assert found.converged
        assert found.value == pytest.approx(max(spectrum), abs=1e-12)
        assert found.lower <= max(spectrum) + 1e-13
        assert found.upper >= max(spectrum) - 1e-13
        gram = found.vectors @ found.vectors.T
        torch.testing.assert_close(gram, torch.eye(len(gram), dtype=torch.float64))
        assert len(found.vectors) <= NUM_KEPT
    alone = warm_lanczos(
        lambda rows: 2 * rows, torch.empty(0, 1), None, tol=0.1, max_products=9, generator=torch.Generator()
    )
    assert (alone.value, alone.products) == (pytest.approx(2), 1)


def test_tracking_outlives_its_restarts() -> None:
    """An eigenvalue that takes more products than there are vectors kept is found to the tolerance."""
    values = torch.linspace(0, 1, 3000, dtype=torch.float64)
    values[-1] = 1.002
    like = torch.empty(0, 3000, dtype=torch.float64)
    found = warm_lanczos(
        lambda rows: rows * values, like, None, tol=1e-5, max_products=500, generator=torch.Generator().manual_seed(0)
    )
    assert found.converged
    assert found.products > 48
    assert found.value == pytest.approx(1.002, rel=1e-5)
