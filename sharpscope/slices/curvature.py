"""Slope and curvature of the loss at w along the directions of a slice."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from sharpscope.objective import Objective
from sharpscope.resume import Journal
from sharpscope.slices.axes import Array
from sharpscope.slices.direction import Direction


def slopes_and_curvatures(
    objective: Objective, lines: Sequence[Sequence[Direction]], wanted: bool | None, journal: Journal
) -> tuple[Array, Array]:
    """``g'd`` (lines, q) and ``d'Hd`` (lines, q, q) for the q directions of each line or plane, in float64.

    NaN where they are not ``wanted``; None wants them where a direction is an eigenvector. Cost: 1 + 2 gradients a
    direction, in one pass; none where ``journal`` has them.
    """
    q = len(lines[0])
    if wanted is None:
        wanted = any(d.settings.get("kind") == "eigenvector" for line in lines for d in line)
    if not wanted:
        return np.full((len(lines), q), np.nan), np.full((len(lines), q, q), np.nan)
    entry = journal.once("curvature", lambda: _measured(objective, lines))
    return entry["slopes"].numpy(), entry["curvatures"].numpy()


def _measured(objective: Objective, lines: Sequence[Sequence[Direction]]) -> dict[str, torch.Tensor]:
    d = torch.stack([torch.stack([direction.vector for direction in line]) for line in lines])
    rows = d.flatten(0, 1).to(objective.device, objective.dtype)
    images = objective.products(rows).cpu().double().reshape(d.shape)
    assert objective.gradient is not None
    h = d @ images.transpose(1, 2)
    return {"slopes": d @ objective.gradient.cpu().double(), "curvatures": (h + h.transpose(1, 2)) / 2}
