"""What BatchNorm's running statistics do while the weights move."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from sharpscope.errors import ArgumentError

Walked = Callable[[Callable[[int], None]], None]

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
    - "recalibrate": the means over the micro-batches of the data, each by its examples, of what BatchNorm in train mode
      sees at the point; one more forward pass a point. As in SWA (Izmailov et al. 2018, section 3.2).

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
        self.treatment, self._changes = treatment, changes
        self._centre = running_statistics(model) if treatment == "interpolate" else {}
        if self._centre:
            self._require_changes()
        buffers = dict(model.named_buffers())
        self._written = [buffers[name] for name in self._centre]

    def _require_changes(self) -> None:
        if not all(self._changes):
            raise ArgumentError(
                "batchnorm='interpolate' needs directions towards other checkpoints, whose statistics are known. "
                "Pass batchnorm='recalibrate'."
            )
        if any(set(change) != set(self._centre) for change in self._changes):
            raise ArgumentError(
                "batchnorm='interpolate' needs running statistics in the same layers of all networks, but one lacks "
                "some. Pass batchnorm='recalibrate'."
            )

    @torch.no_grad()
    def move_to(self, coefficients: Sequence[float], walk: Walked) -> None:
        """Set the statistics for the point; ``walk(before)`` runs the model on the data, see ``Evaluation.run``."""
        if self.treatment == "interpolate":
            for (name, centre), buffer in zip(self._centre.items(), self._written, strict=True):
                value = centre + sum(c * change[name] for c, change in zip(coefficients, self._changes, strict=True))
                buffer.copy_(value.clamp(min=0) if name.endswith("running_var") else value)
        elif self.treatment == "recalibrate":
            self._recalibrate(walk)

    def _recalibrate(self, walk: Walked) -> None:
        before = [(norm, norm.momentum, norm.track_running_stats) for norm in self._norms]
        seen = 0

        def weigh(examples: int) -> None:
            nonlocal seen
            seen += examples
            for norm in self._norms:
                norm.momentum = examples / seen  # the first takes the place of what was there

        try:
            for norm in self._norms:
                norm.track_running_stats = norm.training = True
            walk(weigh)
        finally:
            for norm, momentum, tracks in before:
                norm.momentum, norm.track_running_stats, norm.training = momentum, tracks, False
