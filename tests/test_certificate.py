"""What a random start supports about missed eigenvalues, against operators whose eigenvalues are known."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from sharpscope import ArgumentError
from sharpscope.linalg.missed_eigenvalues import (
    Certificate,
    certificate,
    kuczynski_wozniakowski,
    missed_probability,
    upper_limit,
)


def diagonal(values: Sequence[float] | Tensor, dtype: torch.dtype = torch.float64) -> Callable[[Tensor], Tensor]:
    """The product of rows with a diagonal operator."""
    entries = torch.as_tensor(values, dtype=dtype)
    return lambda block: block * entries


def nothing(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """No vectors found yet, in dimension n."""
    return torch.empty(0, n, dtype=dtype)


def run(values: Sequence[float] | Tensor, above: float, seed: int = 0, **options: object) -> Certificate:
    """A certificate on a diagonal operator, nothing found."""
    generator = torch.Generator().manual_seed(seed)
    return certificate(diagonal(values), nothing(len(values)), above=above, generator=generator, **options)  # type: ignore[arg-type]


def monic(alphas: Sequence[float], betas: Sequence[float], order: int, above: float) -> float:
    """The bound of van Dorsselaer, Hochstenbach and van der Vorst from the last polynomial, for small numbers."""
    t = torch.diag(torch.tensor(alphas).double())
    off = torch.tensor(betas[:-1]).double()
    ritz = torch.linalg.eigvalsh(t + torch.diag(off, 1) + torch.diag(off, -1))
    return math.prod(betas) / float((above - ritz).prod())


SPECTRA = {
    "rank one": [1.0, *[0.0] * 29],
    "rank three": [1.0, 0.5, -0.7, *[0.0] * 17],
    "above a bulk": [1.0, *[0.9 * i / 40 for i in range(40)]],
    "above a negative bulk": [1.0, *[-3.0 * i / 20 for i in range(20)]],
    "a power law": [(1 + i) ** -1.0 for i in range(60)],
    "two dimensions": [1.0, 0.0],
}


@pytest.mark.parametrize("name", SPECTRA)
def test_no_more_runs_miss_than_they_claim(name: str) -> None:
    """Of 300 runs on an operator with an eigenvalue hardly above t, at most p claim at level p that there is none."""
    generator = torch.Generator().manual_seed(1)
    spectrum = SPECTRA[name]
    wrong = {0.2: 0, 0.05: 0}
    for _ in range(300):
        supported = [1.0]
        got = certificate(
            diagonal(spectrum),
            nothing(len(spectrum)),
            above=1 - 1e-9,
            probability=min(wrong),
            max_steps=8,
            generator=generator,
            progress=lambda _, probability, seen=supported: seen.append(probability),  # type: ignore[misc]
        )
        assert got.vector is not None or got.probability < 1 or got.steps == 8
        for level in wrong:
            wrong[level] += min(supported) <= level
    for level, count in wrong.items():
        assert count <= 300 * level + 3 * math.sqrt(300 * level)


def test_the_claim_is_as_strong_as_can_be() -> None:
    """On a rank-one operator, t at its eigenvalue, the probability of the first step is uniform on (0, 1)."""
    probabilities = torch.tensor(
        [run(SPECTRA["rank one"], 1 - 1e-12, seed, max_steps=1).probability for seed in range(600)]
    )
    expected = (torch.arange(600) + 0.5) / 600
    # Kolmogorov's distance at the level 0.001 is 1.95 / sqrt(N).
    assert float((probabilities.sort().values - expected).abs().max()) < 1.95 / math.sqrt(600)


def test_the_limit_covers() -> None:
    """The largest eigenvalue exceeds the limit at 0.1 of a short run in at most a tenth of 400 runs."""
    spectrum = SPECTRA["a power law"]
    exceeded = sum(run(spectrum, 2.0, seed, max_steps=3, probability=1e-12).upper_limit(0.1) < 1 for seed in range(400))
    assert exceeded <= 40 + 3 * math.sqrt(40)


def test_the_bound_does_not_grow_with_the_steps() -> None:
    """More steps support no less, and the sum over the polynomials never says less than the last of them."""
    generator = torch.Generator().manual_seed(2)
    for trial in range(20):
        spectrum = torch.randn(40, generator=generator, dtype=torch.float64)
        spectrum[0] = -30.0  # for the last polynomial alone, such an outlier makes a step's bound grow
        above = float(spectrum.max()) + 0.3
        got = run(spectrum, above, seed=trial, probability=1e-30, max_steps=20)
        steps = [missed_probability(got.alphas[:j], got.betas[:j], 40, above) for j in range(got.steps + 1)]
        assert steps[0] == 1
        assert all(later <= earlier for earlier, later in itertools.pairwise(steps))
        for j in range(1, got.steps + 1):
            last = monic(got.alphas[:j], got.betas[:j], 40, above)
            assert upper_limit(got.alphas[:j], got.betas[:j], 40, 0.01) > 0
            assert steps[j] <= min(1.0, last * math.sqrt(2 * 40 / math.pi) * 1.01)


def test_full_depth_is_exact() -> None:
    """After n steps the largest Ritz value is the largest eigenvalue, and nothing above it is left to chance."""
    spectrum = torch.linspace(-1, 1, 12, dtype=torch.float64)
    above = run(spectrum, 1 + 1e-9, probability=1e-300)
    below = run(spectrum, 1 - 1e-9, probability=1e-300)
    assert above.steps <= 12
    assert above.probability <= 1e-300
    assert abs(above.largest_ritz - 1) < 1e-13
    assert below.vector is not None
    assert abs(abs(float(below.vector[-1])) - 1) < 1e-3
    assert upper_limit(above.alphas, above.betas, 12, 0.5) == pytest.approx(1, abs=1e-12)


def test_in_two_dimensions_the_bound_is_the_angle() -> None:
    """For diag(1, 0) and x at the angle phi, t = 1: P(|<u, x>| <= |cos phi|) = 1 - 2 phi / pi, and its inverse."""
    for phi in (0.1, 0.7, 1.2, 1.5):
        c, s = math.cos(phi), math.sin(phi)
        probability = missed_probability([c * c], [c * s], 2, 1.0)
        assert probability == pytest.approx(1 - 2 * phi / math.pi, rel=1e-12)
        assert upper_limit([c * c], [c * s], 2, probability) == pytest.approx(1.0, rel=1e-11)


def test_the_limit_inverts_the_probability() -> None:
    """At the limit the probability is what was asked for, however small and in whatever dimension."""
    got = run(SPECTRA["above a bulk"], 2.0, max_steps=6, probability=1e-12)
    for order in (2, 3, 41, 25_000_000):
        for probability in (0.9, 0.1, 1e-6, 1e-40, 1e-200):
            limit = upper_limit(got.alphas, got.betas, order, probability)
            again = missed_probability(got.alphas, got.betas, order, limit)
            assert again <= probability * (1 + 1e-11)
            # Just above the Ritz value the earlier polynomials may support more than was asked for already.
            assert again == pytest.approx(probability, rel=1e-9) or limit < got.largest_ritz + 1e-9


@pytest.mark.parametrize("exponent", [-100, -30, 30, 150])
def test_the_scale_does_not_matter(exponent: int) -> None:
    """Operator and threshold scaled by powers of ten from 1e-100 to 1e150 give the same probability and steps."""
    scale = 10.0**exponent
    spectrum = torch.linspace(-1, 1, 50, dtype=torch.float64)
    plain, scaled = run(spectrum, 1.1), run(scale * spectrum, 1.1 * scale)
    assert scaled.steps == plain.steps
    assert scaled.probability == pytest.approx(plain.probability, rel=1e-9)
    assert scaled.upper_limit(0.01) / scale == pytest.approx(plain.upper_limit(0.01), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_rank_that_is_exhausted_leaves_nothing_to_chance_but_rounding(dtype: torch.dtype) -> None:
    """With all of a low rank found one step certifies, and 0 is claimed only where the rest vanishes exactly."""
    n = 300
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(n, 3, generator=generator, dtype=torch.float64))
    rows = basis.T.to(dtype)
    weights = torch.tensor([3.0, 2.0, 1.0], dtype=dtype)

    def low_rank(block: Tensor) -> Tensor:
        return (block @ rows.T * weights) @ rows

    got = certificate(low_rank, rows, above=0.5, scale=3.0, generator=generator)
    assert got.steps == 1
    assert 0 < got.probability < 1e-3
    one_left = certificate(low_rank, rows[:2], above=1.01, scale=3.0, generator=generator)
    assert 0 < one_left.probability <= 0.01
    hidden = certificate(low_rank, rows[:2], above=0.99, scale=3.0, generator=generator)
    assert hidden.vector is not None
    assert abs(float(hidden.vector.double() @ rows[2].double())) == pytest.approx(1, abs=1e-2)
    vanishing = certificate(lambda block: 0 * block, rows, above=1e-300, generator=generator)
    assert (vanishing.steps, vanishing.probability) == (1, 0.0)
    assert vanishing.upper_limit(0.01) == 0.0


def test_a_rank_one_rest_certifies_nothing_before_it_is_seen() -> None:
    """A breakdown with a Ritz value at the threshold, to rounding, is neither proof nor certificate."""
    for seed in range(20):
        got = run([1.0, *[0.0] * 20], 1.0 - 1e-16, seed, probability=1e-6)
        assert got.vector is None
        assert got.probability == 1.0
        assert got.steps <= 3


def test_vectors_that_are_only_nearly_eigenvectors_hide_nothing() -> None:
    """With found vectors that are off by a tenth the limit still covers lambda_{k+1}."""
    generator = torch.Generator().manual_seed(3)
    spectrum = torch.tensor([5.0, 4.0, *[1 / (1 + i) for i in range(80)]], dtype=torch.float64)
    for _ in range(50):
        rough = torch.eye(2, 82, dtype=torch.float64) + 0.01 * torch.randn(2, 82, generator=generator).double()
        found = torch.linalg.qr(rough.T)[0].T.contiguous()
        got = certificate(diagonal(spectrum), found, above=2.0, probability=1e-4, generator=generator)
        assert got.order == 80
        assert got.probability <= 1e-4
        assert got.upper_limit(1e-4) >= 1


def test_the_vector_that_is_found_can_be_taken_in_and_the_run_go_on() -> None:
    """Taking in what is found until nothing is ends with all eigenvalues above t, multiplicity included."""
    generator = torch.Generator().manual_seed(4)
    spectrum = torch.tensor([2.0, 2.0, 1.5, *[0.5 * i / 50 for i in range(50)]], dtype=torch.float64)
    found = nothing(53)
    while True:
        got = certificate(diagonal(spectrum), found, above=1.2, probability=1e-3, generator=generator)
        if got.vector is None:
            break
        found = torch.cat([found, got.vector[None]])
    assert got.probability <= 1e-3
    assert len(found) == 3
    assert float((found.square() @ spectrum).sum()) > 3 * 1.2


def test_the_a_priori_bound_covers() -> None:
    """Of 200 runs of 6 steps, no more miss a tenth of the spread than the a-priori bound allows, nor 0.9 of it."""
    spectrum = torch.cat([torch.ones(1), torch.linspace(0, 0.85, 399)]).double()
    for fraction in (0.1, 0.9):
        missed = sum(
            run(spectrum, 2.0, seed, max_steps=6, probability=1e-12).largest_ritz < 1 - fraction for seed in range(200)
        )
        bound = kuczynski_wozniakowski(400, 6, fraction)
        assert missed <= 200 * bound + 3 * math.sqrt(200 * bound)


def test_kuczynski_wozniakowski_in_numbers() -> None:
    """The a-priori bound at the numbers of its own formula: weak after two steps, exact in full dimension."""
    assert kuczynski_wozniakowski(52_138, 2, 0.1) == 1.0
    assert kuczynski_wozniakowski(10_000, 40, 0.1) == pytest.approx(164.8 * math.exp(-(0.1**0.5) * 79))
    assert kuczynski_wozniakowski(30, 30, 0.1) == 0.0
    assert kuczynski_wozniakowski(30, 0, 0.1) == 1.0


def test_nothing_left_is_certain_and_no_step_supports_nothing() -> None:
    """All n vectors found leave probability 0 at no cost, one dimension is exact, and no step bounds nothing."""
    generator = torch.Generator().manual_seed(0)
    whole = certificate(diagonal([1.0, 2.0]), torch.eye(2).double(), above=0.0, generator=generator)
    assert (whole.probability, whole.steps, whole.upper_limit(0.1)) == (0.0, 0, float("-inf"))
    one = certificate(diagonal([1.0, 2.0]), torch.eye(2).double()[:1], above=2.1, generator=generator)
    assert (one.probability, one.steps) == (0.0, 1)
    assert missed_probability([], [], 10, 5.0) == 1.0
    assert upper_limit([], [], 10, 0.1) == float("inf")


def test_progress_reports_each_step() -> None:
    """progress gets the step and what is supported so far, which ends at the result's."""
    seen: list[tuple[int, float]] = []
    got = run(SPECTRA["above a bulk"], 1.2, progress=lambda step, p: seen.append((step, p)))
    assert [step for step, _ in seen] == list(range(1, got.steps + 1))
    assert seen[-1][1] == got.probability


@pytest.mark.parametrize(
    ("found", "options", "message"),
    [
        (torch.ones(2, 5).double(), {}, "orthonormal"),
        (torch.eye(5), {"above": float("nan")}, "finite"),
        (torch.eye(5)[0], {}, "rows"),
        (torch.eye(5).bfloat16(), {}, "float32 or float64"),
        (torch.eye(5)[:1], {"probability": 0.0}, "probability"),
        (torch.eye(5)[:1], {"max_steps": 0}, "max_steps"),
    ],
)
def test_arguments_out_of_range_are_refused(found: Tensor, options: dict[str, float], message: str) -> None:
    """Each bad argument is an ArgumentError that says what must hold."""
    given = {"above": 1.0, "generator": torch.Generator(), **options}
    with pytest.raises(ArgumentError, match=message):
        certificate(diagonal(torch.ones(5), found.dtype), found, **given)  # type: ignore[arg-type]


def test_products_that_are_not_symmetric_or_finite_are_refused() -> None:
    """A shift and a NaN are told apart by name."""
    for matmat, message in (
        (lambda row: torch.roll(row, 1, 1), "symmetric"),
        (lambda row: row * float("nan"), "finite"),
    ):
        with pytest.raises(ArgumentError, match=message):
            certificate(matmat, nothing(30), above=1.0, generator=torch.Generator().manual_seed(0))
