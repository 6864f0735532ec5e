"""The guided solver: few products where the guide is good, the truth where it is not."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sharpscope import ArgumentError
from sharpscope.linalg import Eigenpairs, top_eigenpairs

Matmat = Callable[[Tensor], Tensor]

LEADING = [9.2, 4.5, 2.5, 2.4, 2.1, 1.5, 1.35, 1.2]


def product(matrix: Tensor) -> Matmat:
    return lambda block: matrix @ block


def counted(matrix: Tensor) -> tuple[Matmat, list[int]]:
    """Products with ``matrix``, and the width of each block in the order of the calls."""
    widths: list[int] = []

    def matmat(block: Tensor) -> Tensor:
        widths.append(block.shape[1])
        return matrix @ block

    return matmat, widths


def symmetric(n: int, generator: torch.Generator) -> Tensor:
    """A random symmetric matrix of norm 1, nearly."""
    noise = torch.randn(n, n, generator=generator, dtype=torch.float64)
    return (noise + noise.T) / (8 * n) ** 0.5


def network(seed: int, n: int = 400, off: float = 0.03) -> tuple[Tensor, Tensor, Tensor]:
    """An operator with a network's spectrum, LEADING above a decaying bulk, a guide that is off by that share, values.

    The error is relative to the curvature itself, as that of a sample of the data is: ``H^1/2 (1 + E) H^1/2``.
    """
    generator = torch.Generator().manual_seed(seed)
    values = torch.cat([torch.tensor(LEADING), 0.9 / torch.arange(1, n - 7) ** 0.7]).double()
    basis = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    root = basis * values.sqrt()
    guide = root @ (torch.eye(n, dtype=torch.float64) + 2 * off * symmetric(n, generator)) @ root.T
    return (basis * values) @ basis.T, guide, values


def solved(matrix: Tensor, guide: Matmat | Tensor | None, k: int = 5, **options: Any) -> Eigenpairs:
    given = [] if guide is None else [product(guide) if isinstance(guide, Tensor) else guide]
    return top_eigenpairs(product(matrix), len(matrix), k, **{"method": "guided", "guides": given, **options})


def holds(pairs: Eigenpairs, true: Tensor) -> bool:
    """Whether the true eigenvalue is in the interval of every converged pair, but for the dense solver's rounding."""
    rounding = 16 * torch.finfo(torch.float64).eps * true.abs().max()
    inside = (pairs.lower - rounding <= true) & (true <= pairs.upper + rounding)
    return bool(inside[pairs.converged].all())


@pytest.mark.parametrize("off", [0.01, 0.03, 0.05])
def test_a_good_guide_needs_two_products(off: float) -> None:
    """Off by some percent it takes 2 products, with at most 2(k + 2) vectors in all, to prove five to a thousandth."""
    for seed in range(4):
        matrix, guide, values = network(seed, off=off)
        matmat, widths = counted(matrix)
        pairs = top_eigenpairs(matmat, 400, 5, tol=1e-3, guides=[product(guide)])
        assert pairs.method == "guided"
        assert bool(pairs.converged.all())
        assert holds(pairs, values[:5])
        assert len(widths) == pairs.num_products == 2
        assert sum(widths) == pairs.num_matvecs <= 2 * (5 + 2)
        assert torch.allclose(pairs.eigenvalues, values[:5], rtol=1e-3)


def test_a_perfect_guide_is_not_taken_at_its_word() -> None:
    """With the operator for its own guide it still takes the second product, the first where random vectors speak."""
    matrix, _, values = network(0, n=150)
    pairs = solved(matrix, matrix, tol=1e-2)
    assert pairs.num_products == 2
    assert holds(pairs, values[:5])


def test_the_model_is_the_operator_on_the_space_and_the_guide_outside() -> None:
    """Its pairs are those of ``QQ'H + HQQ' - QQ'HQQ' + PGP`` built dense, with images by that matrix, to rounding."""
    import sharpscope.linalg.guided_by_cheap_operator as module

    matrix, guide, _ = network(0, n=60, off=0.2)
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(60, 8, generator=generator, dtype=torch.float64))[0].T
    space = module._extended(basis, basis @ matrix, None, 10.0)
    q = space.vectors.T @ space.vectors
    p = torch.eye(60, dtype=torch.float64) - q
    dense = q @ matrix + matrix @ q - q @ matrix @ q + p @ guide @ p
    rows = torch.randn(4, 60, generator=generator, dtype=torch.float64)
    needed = torch.full((4,), 1e-9, dtype=torch.float64)
    model = module._model_ritz_pairs(lambda block: block @ guide, space, rows, 4, needed, 60, generator)
    assert torch.allclose(model.values, torch.linalg.eigvalsh(dense).flip(0)[:4], rtol=1e-10)
    assert torch.allclose(model.images, model.vectors @ dense, atol=1e-10)
    assert float(model.residuals.norm(dim=1).max()) < 1e-8


def test_the_better_the_guide_the_fewer_the_products() -> None:
    """Products do not fall as the guide gets worse, and no guide at all costs no more than twice block Lanczos."""
    counts = []
    for off in (0.02, 0.2, 0.6):
        matrix, guide, values = network(1, off=off)
        counts.append(solved(matrix, guide).num_products)
    assert counts == sorted(counts)
    nothing = solved(matrix, torch.zeros_like)
    lanczos = top_eigenpairs(product(matrix), 400, 5)
    assert holds(nothing, values[:5])
    assert bool(nothing.converged.all())
    assert counts[-1] <= nothing.num_products <= 2 * lanczos.num_products


def test_few_products_with_the_guide() -> None:
    """A guide off by 3 % is asked for some 40 products, and no more than 80, with blocks of at most 2(k + 1)."""
    for seed in range(3):
        matrix, guide, _ = network(seed)
        matmat, widths = counted(guide)
        solved(matrix, matmat)
        assert len(widths) <= 80
        assert max(widths) <= 12


# Sums of many small terms s_i a_i a_i', as a network's curvature is one.


def classes(n: int, terms: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Six directions of decreasing size that most terms share, and noise."""
    centres = torch.randn(6, n, generator=generator, dtype=torch.float64) * 3 * 0.7 ** torch.arange(6)[:, None]
    label = torch.randint(0, 6, (terms,), generator=generator)
    share = torch.rand(terms, 1, generator=generator, dtype=torch.float64)
    vectors = centres[label] * share + 0.5 * torch.randn(terms, n, generator=generator, dtype=torch.float64)
    return vectors, torch.rand(terms, generator=generator, dtype=torch.float64)


def decaying(n: int, terms: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A covariance with a power law, few terms of which count."""
    scale = 3 / (1 + torch.arange(n, dtype=torch.float64)).sqrt()
    vectors = torch.randn(terms, n, generator=generator, dtype=torch.float64) * scale
    return vectors, torch.rand(terms, generator=generator, dtype=torch.float64) ** 3


def signed(n: int, terms: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Terms of both signs, more of them positive."""
    scale = (1 + torch.arange(n, dtype=torch.float64)) ** -0.25
    vectors = torch.randn(terms, n, generator=generator, dtype=torch.float64) * scale
    return vectors, torch.randn(terms, generator=generator, dtype=torch.float64) + 0.3


def heavy(n: int, terms: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A few terms that are as large as all others together."""
    vectors = torch.randn(terms, n, generator=generator, dtype=torch.float64)
    return vectors, torch.rand(terms, generator=generator, dtype=torch.float64) ** -0.7


def sparse(n: int, terms: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Terms of four entries each, so that a sample lacks directions; a dense top without gaps."""
    places = torch.randint(0, n, (terms, 4), generator=generator)
    entries = torch.randn(terms, 4, generator=generator, dtype=torch.float64)
    vectors = torch.zeros(terms, n, dtype=torch.float64).scatter_(1, places, entries)
    return vectors, torch.rand(terms, generator=generator, dtype=torch.float64)


KINDS = (classes, decaying, signed, heavy, sparse)


def sampled(vectors: Tensor, sizes: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """The mean of the terms from a priority sample of ``size``, weighted by importance as in use."""
    importance = sizes.abs() * (vectors**2).sum(1)
    importance = torch.exp2(torch.log2((importance / importance.mean()).clamp_min(0.1)).round())
    priority = importance / torch.rand(len(sizes), generator=generator, dtype=torch.float64)
    order = priority.topk(size + 1).indices
    weights = (priority[order[-1]] / importance[order[:-1]]).clamp_min(1.0)
    chosen = vectors[order[:-1]]
    return (chosen.T * (sizes[order[:-1]] * weights)) @ chosen / len(sizes)


@pytest.mark.parametrize("kind", KINDS)
def test_no_interval_misses_over_sampled_guides(kind: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Of 40 sums with guides from 5 to 60 % of their terms, all converge, to their intervals, from tol 0.01 to 1e-6."""
    generator = torch.Generator().manual_seed(KINDS.index(kind))
    for trial in range(40):
        n, terms = (int(torch.randint(*span, (1,), generator=generator)) for span in ((60, 201), (300, 1200)))
        vectors, sizes = kind(n, terms, generator)
        matrix = (vectors.T * sizes) @ vectors / terms
        guide = sampled(vectors, sizes, max(20, int(terms * (0.05, 0.15, 0.3, 0.6)[trial % 4])), generator)
        true = torch.linalg.eigvalsh(matrix).flip(0)[:5]
        tol = (1e-2, 1e-3, 1e-6)[trial % 3]
        pairs = solved(matrix, guide, tol=tol, generator=generator)
        assert bool(pairs.converged.all()), trial
        assert holds(pairs, true), trial
        assert bool(((pairs.eigenvalues - true).abs() <= tol * true.abs()).all()), trial


@pytest.mark.parametrize("hidden", [0, 2, 4])
def test_what_the_guide_does_not_see_is_found_by_the_random_vectors(hidden: int) -> None:
    """A guide that is good but blind to one eigenvector hides it in few of 15 runs, and those claim no certainty."""
    missed = 0
    for seed in range(15):
        matrix, guide, values = network(seed, n=150)
        vector = torch.linalg.eigh(matrix)[1].flip(1)[:, hidden]
        pairs = solved(matrix, guide - values[hidden] * torch.outer(vector, vector))
        wrong = not holds(pairs, values[:5])
        missed += wrong
        assert pairs.missed_bound is not None
        assert not wrong or pairs.missed_bound.probability(float(values[hidden])) > 0.01
    assert missed <= 4


def test_every_residual_is_that_of_the_returned_vector() -> None:
    """residuals equal ||H v - lambda v|| recomputed here, converged or not, and the vectors are orthonormal."""
    matrix, guide, _ = network(0, n=150, off=0.2)
    for dtype in (torch.float64, torch.float32):
        for options in ({"tol": 1e-2}, {"tol": 1e-5}, {"tol": 1e-6, "max_products": 2}):
            pairs = top_eigenpairs(
                product(matrix.to(dtype)),
                150,
                5,
                method="guided",
                guides=[product(guide.to(dtype))],
                dtype=dtype,
                **options,  # type: ignore[arg-type]
            )
            v = pairs.eigenvectors.double()
            again = torch.linalg.vector_norm(matrix.to(dtype).double() @ v - v * pairs.eigenvalues, dim=0)
            eps = torch.finfo(dtype).eps
            assert torch.allclose(pairs.residuals, again, rtol=1e-3, atol=100 * eps)
            assert torch.allclose(v.T @ v, torch.eye(5, dtype=torch.float64), atol=100 * eps)


def test_max_products_is_kept_and_what_has_not_converged_said() -> None:
    """Of what takes more, 2 to 4 products are made as asked, k values come back, and not all are called converged."""
    matrix, _, values = network(2, n=150)
    for most in (2, 3, 4):
        matmat, widths = counted(matrix)
        pairs = top_eigenpairs(
            matmat, 150, 5, tol=1e-6, method="guided", guides=[product(0 * matrix)], max_products=most
        )
        assert len(widths) == pairs.num_products == most
        assert len(pairs.eigenvalues) == 5
        assert not bool(pairs.converged[-1])
        assert holds(pairs, values[:5])


def test_max_basis_is_kept_and_finds_the_same() -> None:
    """The smallest basis allowed gives the eigenvalues of an unbounded one, and no block of rows exceeds it."""
    matrix, guide, values = network(3, n=150, off=0.5)
    for given in (guide, 0 * guide):
        wide = solved(matrix, given, k=3, tol=1e-8, max_basis=150)
        narrow = solved(matrix, given, k=3, tol=1e-8, max_basis=16)
        assert torch.allclose(wide.eigenvalues, values[:3], rtol=1e-8)
        assert torch.allclose(narrow.eigenvalues, values[:3], rtol=1e-8)
        assert bool(narrow.converged.all())


def test_no_more_rows_than_max_basis_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the search space nor the model's basis, with what it is made from, ever exceeds max_basis rows."""
    import sharpscope.linalg.guided_by_cheap_operator as module

    held = [0]
    inner = module.inner

    def watched(left: Tensor, right: Tensor) -> Tensor:
        held[0] = max(held[0], len(left), len(right))
        return inner(left, right)

    project_out = module.project_out

    def projected(block: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
        held[0] = max(held[0], len(basis))
        return project_out(block, basis)

    monkeypatch.setattr(module, "inner", watched)
    monkeypatch.setattr(module, "project_out", projected)
    for off in (0.1, 0.5):
        matrix, guide, _ = network(3, n=150, off=off)
        for limit in (16, 20, 40):
            held[0] = 0
            solved(matrix, guide, k=3, tol=1e-9, max_basis=limit)
            assert 8 < held[0] <= limit


def test_smallest_mirrors_largest() -> None:
    """The smallest of -H with the guide -G are the negated largest of H with G, bit for bit."""
    matrix, guide, _ = network(4, n=150)
    high = solved(matrix, guide)
    low = solved(-matrix, -guide, which="smallest")
    assert torch.equal(low.eigenvalues, -high.eigenvalues)
    assert torch.equal(low.lower, -high.upper)
    assert low.num_products == high.num_products == 2


def test_the_same_generator_gives_the_same_bits() -> None:
    """Two runs from equal generators agree bit for bit, another seed differs, and the global state is not used."""
    matrix, guide, _ = network(5, n=150)
    before = torch.get_rng_state()
    runs = [solved(matrix, guide, generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
    assert torch.equal(runs[0].eigenvalues, runs[1].eigenvalues)
    assert torch.equal(runs[0].eigenvectors, runs[1].eigenvectors)
    assert not torch.equal(runs[0].eigenvectors, runs[2].eigenvectors)
    assert torch.equal(before, torch.get_rng_state())


def test_auto_is_guided_where_there_is_a_guide_and_room_for_it() -> None:
    """With a guide the largest are found by it, unless n is a few blocks; the smallest are not, unless asked."""
    matrix, guide, _ = network(6, n=150)
    assert solved(matrix, guide, method="auto").method == "guided"
    assert solved(matrix, guide, method="auto", which="smallest").method == "lanczos"
    assert solved(matrix, None, method="auto").method == "lanczos"
    few, near = matrix[:40, :40], guide[:40, :40]
    assert solved(few, near, method="auto").method == "lanczos"
    assert solved(few, near).method == "guided"


def test_any_number_of_eigenvalues_up_to_all_is_found() -> None:
    """In a space of 27, or of 60, each k up to n converges to the eigenvalues, by a near guide and by the exact one."""
    for n in (27, 60):
        matrix, guide, values = network(8, n=n)
        for near, k in itertools.product((guide, matrix), (n // 2, 2 * n // 3, n - 2, n - 1, n)):
            pairs = solved(matrix, near, k, tol=1e-6)
            assert bool(pairs.converged.all())
            assert torch.allclose(pairs.eigenvalues, values[:k], rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guides": []}, "needs guides="),
        ({"which": "both"}, "one end of the spectrum"),
        ({"which": "magnitude"}, "one end of the spectrum"),
        ({"max_basis": 23}, "max_basis must be at least 24"),
        ({"guides": [lambda block: block[:-1]]}, "shape"),
        ({"guides": [lambda block: block / 0]}, "finite"),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    """No guide, the wrong ends, too small a basis, and a guide of wrong shape or of NaN are told apart by name."""
    matrix, guide, _ = network(7, n=60)
    with pytest.raises(ArgumentError, match=message):
        solved(matrix, guide, **options)


@pytest.mark.parametrize("guide", ["unsymmetric", "random each time", "huge", "tiny"])
def test_a_guide_that_is_no_guide_is_harmless(guide: str) -> None:
    """One that is not symmetric, never the same, or of quite another scale costs products, never the truth."""
    matrix, near, values = network(8, n=120)
    generator = torch.Generator().manual_seed(0)
    given: Matmat = {
        "unsymmetric": lambda block: torch.roll(block, 1, 0),
        "random each time": lambda block: torch.randn(block.shape, generator=generator, dtype=torch.float64),
        "huge": lambda block: 1e8 * (near @ block),
        "tiny": lambda block: 1e-8 * (near @ block),
    }[guide]
    pairs = solved(matrix, given, max_products=60)
    assert bool(pairs.converged.all())
    assert holds(pairs, values[:5])
    assert torch.allclose(pairs.eigenvalues, values[:5], rtol=1e-3)


def test_a_small_space_is_no_trouble() -> None:
    """From n = 1 on, k up to n, the values are those of the matrix."""
    generator = torch.Generator().manual_seed(0)
    for n in range(1, 14):
        for k in {1, (n + 1) // 2, n}:
            matrix, guide = symmetric(n, generator), symmetric(n, generator)
            true = torch.linalg.eigvalsh(matrix).flip(0)[:k]
            for given in (guide, matrix, 0 * matrix):
                pairs = solved(matrix, given, k=k, tol=1e-3)
                assert bool(pairs.converged.all()), (n, k)
                assert holds(pairs, true), (n, k)


def test_progress_reports_every_product() -> None:
    """progress gets the number of products so far and the largest relative bound, which ends within the tolerance."""
    matrix, guide, _ = network(9, n=150, off=0.3)
    seen: list[tuple[int, float]] = []
    pairs = solved(matrix, guide, progress=lambda products, worst: seen.append((products, worst)))
    assert [products for products, _ in seen] == list(range(1, pairs.num_products + 1))
    assert seen[-1][1] <= 1e-3 < seen[0][1]
