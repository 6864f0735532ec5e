"""What every figure of a slice says beneath it, and what several slices must share to stand in one figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sharpscope.results import SliceResult
from sharpscope.results.origin import names_of
from sharpscope.results.slice import DIVERGED, PENDING, also_said, described, misleads


def caption(
    results: Sequence[SliceResult],
    *,
    splits: Sequence[str] | None = None,
    scale: str = "",
    clip: float | None = None,
    also: Sequence[str] = (),
) -> str:
    """Which examples, mode, BatchNorm, directions, seed and range a figure shows, on which scale, and what it cuts off.

    Args:
        results: in the figure; what they have in common is said once.
        splits: shown; by default all.
        scale: as "logarithmic scale".
        clip: the loss above which nothing is told apart.
        also: sentences of the figure's own.
    """
    shown = list(results[0].splits if splits is None else splits)
    said = [f"{_shared(_examples(r, shown) for r in results)}; {_shared(also_said(r) for r in results)}"]
    said.append(f"{_shared(_directions(r) for r in results)}; {_shared(_range(r) for r in results)}")
    said.append("; ".join([*([scale] if scale else []), "not clipped" if clip is None else f"clipped at {clip:g}"]))
    said += also
    said += [f"barrier {b}" for b in [_shared(_barrier(r, shown[0]) for r in results)] if b]
    left = sum(int((r.status == PENDING).sum()) for r in results)
    if left:
        said.append(f"preview: {left} points still to be measured")
    if any(abs(r.provenance.get("cosine") or 0) > 1e-6 for r in results):
        said.append(f"axes drawn at right angles, their cosine is {_shared(_cosine(r) for r in results)}")
    if any(misleads(r) for r in results):
        said.append("BatchNorm keeps the centre's statistics, which misleads away from it")
    return ". ".join(s[:1].upper() + s[1:] for s in said) + "."


def labels_of(results: Sequence[SliceResult]) -> list[str]:
    """The checkpoints' names, as short as tells them apart."""
    names = names_of([r.provenance for r in results])
    short = list(map(short_name, names))
    return short if len(set(short)) == len(set(names)) else names


def short_name(name: str) -> str:
    """A checkpoint's name as a figure has room for it."""
    return name.removesuffix(".pt")


def diverged(result: SliceResult, split: int, line: int = 0) -> Any:
    """Which points of a line or plane have no finite loss in any of the splits, or not in this one."""
    wrong = (result.status[line] == DIVERGED) | ~np.isfinite(result.loss[split, line])
    return wrong & (result.status[line] != PENDING)


def _shared(values: Any) -> str:
    """The one value, or all of them in order."""
    return " | ".join(dict.fromkeys(values))


def _told(value: Any) -> str:
    return "unknown" if value is None else str(value)


def _examples(result: SliceResult, splits: Sequence[str]) -> str:
    known = result.provenance
    counts = {result.splits[0]: known.get("num_examples"), **(known.get("also") or {})}
    all_of_them = known.get("split_examples")
    parts = []
    for split in splits:
        count = counts.get(split)
        told = "an unknown number of" if count is None else f"{count:,}"
        if split == result.splits[0] and count is not None and all_of_them is not None:
            told = f"{told} of {all_of_them:,}" if count < all_of_them else f"all {told}"
        parts.append(f"{told} {split}")
    data = f" of {known['data']}" if known.get("data") else ""
    seed = known.get("examples_seed")
    drawn = f" (drawn with seed {seed})" if seed is not None and known.get("num_examples") != all_of_them else ""
    return f"{' and '.join(parts)} examples{data}{drawn}"


def _directions(result: SliceResult) -> str:
    kinds = {d.get("kind") for line in result.directions for d in line}
    if kinds == {"random"}:
        many = "s" if result.dimensions > 1 or result.directions[1:] else ""
        return f"{described(result).rpartition(', seed ')[0]} direction{many}, {_seeds(result)}"
    lines = [described(result, i) for i in range(len(result.directions))]
    unit = ", of length 1" if kinds == {"eigenvector"} else ""
    return ("along " if result.dimensions == 1 and kinds != {"checkpoint"} else "") + ", ".join(lines) + unit


def _seeds(result: SliceResult) -> str:
    seeds: list[Any] = list(dict.fromkeys(d.get("seed") for line in result.directions for d in line))
    if len(seeds) == 1:
        return f"seed {_told(seeds[0])}"
    if all(isinstance(s, int) for s in seeds) and seeds == list(range(seeds[0], seeds[0] + len(seeds))):
        return f"seeds {seeds[0]} to {seeds[-1]}"
    return f"seeds {', '.join(map(_told, seeds))}"


def _range(result: SliceResult) -> str:
    points = " x ".join(str(len(a)) for a in result.axes)
    spans = [f"{a[0]:.3g} to {a[-1]:.3g}" for a in result.axes]
    if result.dimensions == 1:
        return f"{points} points, t from {spans[0]}"
    both = f"x and y from {spans[0]}" if spans[0] == spans[1] else f"x from {spans[0]}, y from {spans[1]}"
    return f"{points} points, {both}"


def _barrier(result: SliceResult, split: str) -> str:
    height = result.barrier(split)
    return "" if height is None else f"{height:.3g} ({split})"


def _cosine(result: SliceResult) -> str:
    return f"{result.provenance.get('cosine') or 0:.2g}"
