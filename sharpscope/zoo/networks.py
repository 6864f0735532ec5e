"""The bundled networks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from sharpscope.errors import ArgumentError


def mlp(shape: Sequence[int] = (1, 8, 8), classes: int = 10, hidden: Sequence[int] = (64,)) -> nn.Sequential:
    """ReLU layers of the widths ``hidden`` on the flattened input; no hidden layer makes a linear classifier."""
    layers: list[nn.Module] = [nn.Flatten()]
    widths = (math.prod(shape), *hidden)
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], classes))


def cnn(
    shape: Sequence[int] = (1, 8, 8), classes: int = 10, channels: Sequence[int] = (8, 16), hidden: int = 64
) -> nn.Sequential:
    """Per entry of ``channels`` a padded 3x3 convolution, ReLU and 2x2 max-pooling; then Linear, ReLU, Linear.

    No BatchNorm, so that its loss is one function of the weights, the same in train and eval mode.

    Raises: ArgumentError when the pooling leaves no pixel.
    """
    planes, height, width = shape
    height, width = height >> len(channels), width >> len(channels)
    if not height or not width:
        raise ArgumentError(f"channels must be few enough for {shape[1]}x{shape[2]} images, got {len(channels)}.")
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise((planes, *channels)):
        layers += [nn.Conv2d(fan_in, fan_out, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    last = channels[-1] if channels else planes
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(last * height * width, hidden), nn.ReLU(), nn.Linear(hidden, classes)
    )


NORMS = ("batch", "none")


def _norm(kind: str, planes: int) -> nn.Module:
    return nn.BatchNorm2d(planes) if kind == "batch" else nn.Identity()


class Block(nn.Module):
    """A pre-activation block: norm, ReLU, 3x3 convolution, twice, added to the shortcut."""

    def __init__(self, planes: int, width: int, stride: int, norm: str) -> None:
        super().__init__()
        bias = norm == "none"
        self.norm1 = _norm(norm, planes)
        self.conv1 = nn.Conv2d(planes, width, 3, stride, padding=1, bias=bias)
        self.norm2 = _norm(norm, width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=bias)
        same = planes == width and stride == 1
        self.shortcut = None if same else nn.Conv2d(planes, width, 1, stride, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        active = self.norm1(x).relu()
        # Where the shape changes, the shortcut starts after the first activation, as in the authors' network.
        straight = x if self.shortcut is None else self.shortcut(active)
        residual: Tensor = self.conv2(self.norm2(self.conv1(active)).relu())
        return residual + straight


class WideResNet(nn.Module):
    """The stem, three groups of blocks at widths 1, 2 and 4 times ``base * widen``, mean pooling, one linear layer."""

    def __init__(self, planes: int, classes: int, blocks: int, widen: int, norm: str, base: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(planes, base, 3, padding=1, bias=norm == "none")
        groups: list[nn.Module] = []
        before = base
        for width, stride in ((base * widen, 1), (2 * base * widen, 2), (4 * base * widen, 2)):
            for i in range(blocks):
                groups.append(Block(before, width, stride if i == 0 else 1, norm))
                before = width
        self.blocks = nn.Sequential(*groups)
        self.norm = _norm(norm, before)
        self.head = nn.Linear(before, classes)
        self._initialise(norm)

    def _initialise(self, norm: str) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if norm == "none":
            # Nothing rescales the sum of residuals here, so with He's start its variance would double at every block
            # and training would blow up; a branch that starts at zero leaves each block equal to its shortcut
            # (Zhang, Dauphin and Ma 2019, "Fixup").
            for module in self.modules():
                if isinstance(module, Block):
                    nn.init.zeros_(module.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        features = self.norm(self.blocks(self.stem(x))).relu()
        logits: Tensor = self.head(features.mean((2, 3)))
        return logits


def wide_resnet(
    shape: Sequence[int] = (1, 8, 8),
    classes: int = 10,
    depth: int = 10,
    widen: int = 2,
    norm: str = "batch",
    base: int = 16,
) -> WideResNet:
    """WRN-``depth``-``widen``; ``norm="none"`` leaves BatchNorm out and gives the convolutions biases instead.

    ``base`` is the width of the stem, 16 in the paper.

    Raises: ArgumentError unless depth = 6n + 4 with n >= 1 and norm is "batch" or "none".
    """
    if depth < 10 or (depth - 4) % 6:
        raise ArgumentError(f"depth must be 6n + 4 (10, 16, 22, 28, ...), got {depth}.")
    if norm not in NORMS:
        raise ArgumentError(f"norm must be 'batch' or 'none', got {norm!r}.")
    return WideResNet(shape[0], classes, (depth - 4) // 6, widen, norm, base)
