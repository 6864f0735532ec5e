"""A small convolutional network without normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from sharpscope.errors import ArgumentError


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
