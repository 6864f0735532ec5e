"""Bundled networks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from sharpscope.errors import ArgumentError


def mlp(shape: Sequence[int] = (1, 8, 8), classes: int = 10, hidden: Sequence[int] = (64,)) -> nn.Sequential:
    """Multilayer perceptron: flattened input, ReLU layers of widths ``hidden`` (() for none), linear classifier."""
    layers: list[nn.Module] = [nn.Flatten()]
    widths = (math.prod(shape), *hidden)
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], classes))


def cnn(
    shape: Sequence[int] = (1, 8, 8), classes: int = 10, channels: Sequence[int] = (8, 16), hidden: int = 64
) -> nn.Sequential:
    """CNN: per entry of ``channels`` a padded 3x3 convolution, ReLU and 2x2 max-pooling; then Linear, ReLU, Linear.

    Without BatchNorm, so the loss is the same function of the weights in train and eval mode.

    Raises: ArgumentError if the images are too small for the number of poolings.
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
    """Pre-activation residual block: twice norm, ReLU and 3x3 convolution, added to the shortcut."""

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
        # If the shape changes, the shortcut starts after the first activation, as in the authors' code.
        straight = x if self.shortcut is None else self.shortcut(active)
        residual: Tensor = self.conv2(self.norm2(self.conv1(active)).relu())
        return residual + straight


class WideResNet(nn.Module):
    """Stem, three groups of blocks of widths 1, 2 and 4 times ``base * widen``, mean pooling, linear classifier."""

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
            # Without a norm, He initialisation doubles the variance at every block and training diverges. Zero
            # initialisation of the last convolution makes each block equal to its shortcut (Zhang, Dauphin and Ma
            # 2019, "Fixup").
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
    """Wide residual network WRN-``depth``-``widen`` (Zagoruyko and Komodakis 2016).

    Args:
        shape: (channels, height, width) of an input.
        classes: number of outputs.
        depth: 6n + 4 with n >= 1.
        widen: factor of the widths.
        norm: "batch", or "none" for convolutions with biases and no BatchNorm.
        base: width of the stem, 16 in the paper.

    Raises: ArgumentError for another ``depth`` or ``norm``.
    """
    if depth < 10 or (depth - 4) % 6:
        raise ArgumentError(f"depth must be 6n + 4 (10, 16, 22, 28, ...), got {depth}.")
    if norm not in NORMS:
        raise ArgumentError(f"norm must be 'batch' or 'none', got {norm!r}.")
    return WideResNet(shape[0], classes, (depth - 4) // 6, widen, norm, base)
