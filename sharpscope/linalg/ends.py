"""Which Ritz pairs are wanted, at one end of the spectrum or at both, and how two ends become one answer.

Each end is written outwards: its values are ``sign * lambda``, descending, so that what holds of the largest
eigenvalues of H holds of the smallest as the largest of -H.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sharpscope.linalg.bounds import ritz_bounds
from sharpscope.linalg.ritz import RitzPairs


@dataclass(frozen=True)
class End:
    """The wanted Ritz pairs at one end of a projected matrix.

    Attributes:
        sign: 1 for the largest, -1 for the smallest.
        values: ``sign * theta`` (c,), descending.
        bounds: on each (c,), from the recurrence.
        next_above: an estimate from above of the next value inwards, -inf where there is none.
        columns: (c,) where they stand among all Ritz values in descending order.
    """

    sign: float
    values: Tensor
    bounds: Tensor
    next_above: float
    columns: Tensor


def wanted_ends(values: Tensor, residuals: Tensor, k: int, which: str) -> list[End]:
    """The ends with their wanted pairs, of all m Ritz values, descending, and their residuals (b, m) in coordinates.

    ``which``: "largest", "both", or "magnitude" for the k of largest ``|theta|`` wherever they are.
    """
    counts = {"largest": (k, 0), "both": (k, k), "magnitude": shares(values, -values.flip(0), k)}[which]
    return [
        _end(sign, count, len(values), *((values, residuals) if sign > 0 else (-values.flip(0), residuals.flip(1))))
        for sign, count in zip((1.0, -1.0), counts, strict=True)
        if count
    ]


def shares(top: Tensor, bottom: Tensor, k: int) -> tuple[int, int]:
    """How many of the k values of largest magnitude are at each end, given both outwards, descending.

    Of +a and -a the positive one comes first. No value is counted at both ends, since one of its two is not positive.
    """
    first = last = 0
    for _ in range(k):
        if last >= len(bottom) or (first < len(top) and bool(top[first] >= bottom[last])):
            first += 1
        else:
            last += 1
    return first, last


def rival(values: Tensor, residuals: Tensor, ends: list[End], k: int) -> float:
    """``|theta| + ||r||`` of what was not chosen, at the end away from the k-th of the chosen values.

    One end of a spectrum may converge long before the other, whose Ritz values still grow: a ranking by magnitude
    is settled when this is below the k-th. Within one end the outermost come first.
    """
    least = min(ends, key=lambda end: float(end.values[-1]))
    if len(values) <= k:
        return float("-inf")
    if least.sign > 0:
        values, residuals = -values.flip(0), residuals.flip(1)
    other = k - len(least.values)
    return float(values[other] + residuals[:, other].norm())


def joined(parts: list[tuple[float, RitzPairs]], which: str) -> RitzPairs:
    """One answer from each end's pairs, given outwards with its sign; by ``|lambda|`` or, for "both", descending."""
    values = torch.cat([sign * pairs.values for sign, pairs in parts])
    order = torch.argsort(values.abs() if which == "magnitude" else values, descending=True, stable=True)
    every = [pairs for _, pairs in parts]
    return RitzPairs(
        values=values[order],
        vectors=torch.cat([pairs.vectors for pairs in every])[order.to(every[0].vectors.device)],
        residuals=torch.cat([pairs.residuals for pairs in every])[order],
        bounds=torch.cat([pairs.bounds for pairs in every])[order],
        converged=torch.cat([pairs.converged for pairs in every])[order],
        num_matvecs=every[-1].num_matvecs,
        num_products=every[-1].num_products,
    )


def leading(pairs: RitzPairs, count: int) -> RitzPairs:
    """The first ``count`` of some pairs."""
    return replace(
        pairs,
        values=pairs.values[:count],
        vectors=pairs.vectors[:count],
        residuals=pairs.residuals[:count],
        bounds=pairs.bounds[:count],
        converged=pairs.converged[:count],
    )


def ranked(pairs: RitzPairs, most: float, tol: float, floor: float) -> RitzPairs:
    """Pairs without the mark "converged" on those that a value of up to ``most`` elsewhere would displace."""
    return replace(pairs, converged=pairs.converged & (pairs.values.abs() * (1 + tol) + floor >= most))


def _end(sign: float, count: int, size: int, values: Tensor, residuals: Tensor) -> End:
    next_above = float(values[count] + residuals[:, count].norm()) if size > count else float("-inf")
    count = min(count, size)
    bounds = ritz_bounds(values[:count], residuals[:, :count].T @ residuals[:, :count], next_above)
    places = torch.arange(count)
    return End(sign, values[:count], bounds, next_above, places if sign > 0 else size - 1 - places)
