"""What BatchNorm's running statistics do while the weights move."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sharpscope.errors import ArgumentError

TREATMENTS = ("frozen", "interpolate", "recalibrate")


def running_norms(model: nn.Module) -> dict[str, nn.modules.batchnorm._BatchNorm]:
    """The modules that normalise by running statistics in eval mode, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
    }


def running_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Running means and variances by name, float64 on the CPU."""
    return {
        f"{name}.{kind}" if name else kind: getattr(module, kind).detach().to("cpu", torch.float64, copy=True)
        for name, module in running_norms(model).items()
        for kind in ("running_mean", "running_var")
    }


class Statistics:
    """The running statistics at the point ``w + sum_k c_k d_k``.

    - "frozen": those at w. Away from w the network normalises by the statistics of another one.
    - "interpolate": ``s(w) + sum_k c_k ds_k`` where d_k leads to another checkpoint, whose statistics are known; a
      variance that would be negative beyond it is 0.
    - "recalibrate": means over the micro-batches of the data, each layer's in train mode, at the point; one more
      forward pass a point. What SWA does (Izmailov et al. 2018, section 3.2).

    ``model``'s buffers are written in place; ``sharpscope.preserve`` puts them back.

    Raises: ArgumentError for an unknown treatment, or one that the model or the directions have no statistics for.
    """

    def __init__(
        self, model: nn.Module, treatment: str, changes: Sequence[Mapping[str, Tensor]], mode: str = "eval"
    ) -> None:
        if treatment not in TREATMENTS:
            raise ArgumentError(f"batchnorm must be one of {', '.join(TREATMENTS)}, got {treatment!r}.")
        self._norms = list(running_norms(model).values())
        if treatment != "frozen" and not self._norms:
            raise ArgumentError(
                f"batchnorm={treatment!r} needs running statistics, but the model has none. Leave it out."
            )
        if treatment != "frozen" and mode != "eval":
            raise ArgumentError(
                f"batchnorm={treatment!r} is for eval mode; in train mode the batch decides. Leave it out."
            )
        if treatment == "interpolate" and not all(changes):
            raise ArgumentError(
                "batchnorm='interpolate' needs directions towards other checkpoints, whose statistics are known. "
                "Pass batchnorm='recalibrate'."
            )
        self.treatment = treatment
        buffers = dict(model.named_buffers())
        self._centre = running_statistics(model) if treatment == "interpolate" else {}
        self._written = [buffers[name] for name in self._centre]
        self._changes = changes

    @torch.no_grad()
    def move_to(self, coefficients: Sequence[float], walk: Callable[[], Iterable[Any]]) -> None:
        """Set the statistics for the point; ``walk()`` runs the model on one micro-batch of the data after another."""
        if self.treatment == "interpolate":
            for (name, centre), buffer in zip(self._centre.items(), self._written, strict=True):
                value = centre + sum(c * change[name] for c, change in zip(coefficients, self._changes, strict=True))
                buffer.copy_(value.clamp(min=0) if name.endswith("running_var") else value)
        elif self.treatment == "recalibrate":
            self._recalibrate(walk)

    def _recalibrate(self, walk: Callable[[], Iterable[Any]]) -> None:
        momenta = [norm.momentum for norm in self._norms]
        try:
            for norm in self._norms:
                norm.reset_running_stats()
                norm.momentum = None  # a mean over the micro-batches in place of a decaying one
                norm.train()
            for _ in walk():
                pass
        finally:
            for norm, momentum in zip(self._norms, momenta, strict=True):
                norm.momentum = momentum
                norm.eval()
