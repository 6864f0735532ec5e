"""Random directions whose size follows the weights'."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sharpscope import params
from sharpscope.errors import ArgumentError
from sharpscope.measurement import seeded
from sharpscope.problem import Problem
from sharpscope.slices.direction import Direction

NORMALISATIONS = ("filter", "layer", "model", "none")
ONE_DIMENSIONAL = ("fixed", "scaled")


def random_directions(
    problem: Problem,
    count: int = 1,
    generator: torch.Generator | None = None,
    *,
    normalisation: str = "filter",
    one_dimensional: str = "fixed",
) -> list[Direction]:
    """``count`` orthogonal directions of normal numbers, sized by the weights (Li et al. 2018, section 4).

    With "filter" each filter f, a slice of a tensor's first dimension (a neuron's weights in a linear layer), is scaled
    to ``||d_f|| = ||w_f||``; with "layer" each tensor, with "model" all together; "none" leaves standard normal
    numbers. Only where directions are sized so can slices of two networks be compared.

    Orthogonality is made within each filter (tensor, model), by float64 Gram-Schmidt, so that both hold: the cosine is
    0 and every filter has its size. Li et al. leave their second direction at whatever small angle chance gives it.
    A tensor whose filters are single weights counts as one filter; a filter with fewer weights than directions
    stands still along the directions that have no room in it.

    Args:
        problem: whose weights, as far as they are selected.
        count: number of directions.
        generator: source of the numbers; by default one seeded with 0. Networks of one architecture get the same
            numbers from the same seed, before they are sized.
        normalisation: "filter", "layer", "model" or "none".
        one_dimensional: what biases and the weights of norms, tensors of one dimension or none, do: "fixed", the rule
            of Li et al., leaves them where they are; with "scaled" each is one filter.

    Cost: none.

    Raises: ArgumentError for an argument outside its domain, or where nothing may move.

    >>> import sharpscope
    >>> import torch
    >>> from sharpscope.slices import random_directions
    >>> data = torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.zeros(3, 1)
    >>> model = torch.nn.Linear(3, 1, bias=False)  # H = diag(6, 8/3, 2/3)
    >>> problem = sharpscope.Problem(model=model, loss=torch.nn.MSELoss(), data=data)
    >>> one, two = random_directions(problem, 2)  # each as long as w
    >>> abs(one.length / float(model.weight.detach().norm()) - 1) < 1e-6, abs(float(one.vector @ two.vector)) < 1e-9
    (True, True)
    """
    if normalisation not in NORMALISATIONS:
        raise ArgumentError(f"normalisation must be one of {', '.join(NORMALISATIONS)}, got {normalisation!r}.")
    if one_dimensional not in ONE_DIMENSIONAL:
        raise ArgumentError(f"one_dimensional must be one of {', '.join(ONE_DIMENSIONAL)}, got {one_dimensional!r}.")
    if count < 1:
        raise ArgumentError(f"The number of directions must be at least 1, got {count}.")
    source, seed = seeded(generator)
    weights = [w.detach().cpu().double() for w in params.select(problem.model, problem.params).values()]
    n = sum(w.numel() for w in weights)
    # All of a direction before the next, so that the first is the same whatever the count.
    drawn = [torch.randn(n, generator=source, dtype=torch.float64) for _ in range(count)]
    vectors = [torch.zeros(n, dtype=torch.float64) for _ in range(count)]
    for where, sizes in _groups(weights, normalisation, one_dimensional == "scaled"):
        for vector, group in zip(vectors, _orthogonal([d[where].reshape(len(sizes), -1) for d in drawn]), strict=True):
            sized = group if normalisation == "none" else group / _lengths(group) * sizes[:, None]
            vector[where] = sized.reshape(-1)
    settings = {"kind": "random", "normalisation": normalisation, "one_dimensional": one_dimensional, "seed": seed}
    if not all(float(v.abs().max()) for v in vectors):
        hint = " Pass one_dimensional='scaled'." if one_dimensional == "fixed" else ""
        raise ArgumentError(f"Random directions must have weights to move, but all are fixed or zero.{hint}")
    return [
        Direction(vector, f"random direction {i}" if count > 1 else "random direction", {**settings, "index": i})
        for i, vector in enumerate(vectors, start=1)
    ]


def _groups(weights: Sequence[Tensor], normalisation: str, scaled: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Indices (groups x size) flat, and each group's norm of w, for groups of one size at a time."""
    start = 0
    all_of_them = []
    for w in weights:
        where = torch.arange(start, start + w.numel())
        start += w.numel()
        if not w.numel() or (w.dim() <= 1 and not scaled):
            continue
        if normalisation in ("model", "none"):
            all_of_them.append((where, w.reshape(-1)))
            continue
        by_filter = normalisation == "filter" and w.dim() > 1 and w.numel() > len(w)
        rows = w.reshape(len(w), -1) if by_filter else w.reshape(1, -1)
        yield where, torch.linalg.vector_norm(rows, dim=1)
    if all_of_them:
        whole = torch.cat([w for _, w in all_of_them])
        yield torch.cat([where for where, _ in all_of_them]), torch.linalg.vector_norm(whole).reshape(1)


def _orthogonal(drawn: Sequence[Tensor]) -> list[Tensor]:
    """Each row of each of ``drawn`` (groups, size) without its part along the same row of those before it."""
    done: list[Tensor] = []
    for i, rows in enumerate(drawn):
        # Rows as long as there are rows before them have nothing left but rounding.
        rest = rows if rows.shape[1] > i else torch.zeros_like(rows)
        for _ in range(2):
            for before in done:
                rest = rest - (rest * before).sum(1, keepdim=True) / _lengths(before) ** 2 * before
        done.append(rest)
    return done


def _lengths(rows: Tensor) -> Tensor:
    """The 2-norm (groups, 1) of each row, 1 for rows of zeros, to divide by."""
    lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return torch.where(lengths > 0, lengths, torch.ones_like(lengths))
