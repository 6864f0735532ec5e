"""A fully connected network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import nn


def mlp(shape: Sequence[int] = (1, 8, 8), classes: int = 10, hidden: Sequence[int] = (64,)) -> nn.Sequential:
    """ReLU layers of the widths ``hidden`` on the flattened input; no hidden layer makes a linear classifier."""
    layers: list[nn.Module] = [nn.Flatten()]
    widths = (math.prod(shape), *hidden)
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], classes))
