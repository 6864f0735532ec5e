"""Evaluate loss and accuracy at the points of a slice, with BatchNorm statistics for each point."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sharpscope.errors import ArgumentError, AuditError, ProblemError, out_of_memory
from sharpscope.objective import Objective
from sharpscope.objective.audit import require_representable_loss
from sharpscope.objective.cost_and_out_of_memory import FORWARD, OOMHalving
from sharpscope.objective.micro_batches import MicroBatch, map_tensors, micro_batches, tensors
from sharpscope.precision import wide
from sharpscope.slices.directions import Direction
from sharpscope.weights.parameters import views
from sharpscope.weights.perturbation import Perturbation, require_kept
from sharpscope.weights.restore import strided

# Data up to this many bytes are kept on the device between points.
KEPT = 1 << 31

# Bytes of the largest activation of a micro-batch. On the CPU it should fit into a cache: of sizes from 32 to 2,048,
# those near this were fastest for a cnn (128 to 1,000 alike), a WRN (64) and an mlp (512 and more).
CPU_BYTES, GPU_BYTES = 1 << 23, 1 << 28
SIZES = (32, 2048)


def default_micro_batch(objective: Objective) -> int:
    """Examples per forward pass, from the size of the largest output of a module.

    It does not depend on timings, so that equal runs give equal bits. Use it within ``objective.measuring()``.

    Cost: a forward pass of 4 examples.
    """
    part = objective.first_examples(4)
    largest = 1

    def record_size(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal largest
        if isinstance(output, Tensor):
            largest = max(largest, output.numel() * output.element_size() // part.size)

    # Scripted modules take no hooks.
    modules = [m for m in objective.terms.model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    handles = [module.register_forward_hook(record_size) for module in modules]
    try:
        objective.terms.forward(part)
    finally:
        for handle in handles:
            handle.remove()
    fits = (CPU_BYTES if objective.device.type == "cpu" else GPU_BYTES) / largest
    size = int(min(max(2 ** round(math.log2(fits)), SIZES[0]), SIZES[1]))
    # The same number of micro-batches, of equal sizes: BatchNorm statistics of a small last one would be noisy.
    count = objective.num_examples
    return size if count is None else math.ceil(count / math.ceil(count / size))


class Evaluation:
    """Compute ``L(w)`` and the accuracy (top 1) at the current weights.

    Use it within ``objective.measuring()``. The data are moved to the device once if they fit (KEPT), and passed to the
    model without a copy unless it modified them in the first evaluation. Autograd is off, unless the loss needs it.

    Args:
        objective: loss and data.
        micro_batch: examples per forward pass; ignored if the objective keeps the loader's batches.

    Raises: AuditError if a second evaluation of a micro-batch gives another loss.
    """

    def __init__(self, objective: Objective, micro_batch: int) -> None:
        self._objective, self._terms = objective, objective.terms
        self._size = None if objective.keeps_batches else micro_batch
        fixed = "the loader's batches are kept" if objective.keeps_batches else ""
        self._oom_halving = OOMHalving(fixed=fixed, device=objective.device)
        self._kept: list[MicroBatch] | None = None
        self._mode: Callable[[], AbstractContextManager[Any]] = torch.enable_grad
        self._model_writes = False
        self._check_writes = True
        self.examples = self.answers = 0
        self._choose_grad_mode()

    def __call__(self) -> tuple[float, float]:
        """Loss, including weight decay, and accuracy, NaN for a loss without labels; cost: a forward pass."""
        columns: tuple[list[Tensor], ...] = ([], [], [], [])
        self.examples = 0
        for part in self.parts():
            for values in self._oom_halving.run(part, self._values):
                for column, value in zip(columns, values, strict=True):
                    column.append(value)
            self.examples += part.size
        self._terms.checked = True
        self._check_writes = False
        loss, weight, correct, counted = (_total(column) for column in columns)
        mean = (loss / weight if weight else math.nan) + self._terms.decay()
        self.answers = int(counted)
        # NaN outputs have no largest entry.
        return mean, correct / counted if counted and math.isfinite(mean) else math.nan

    def parts(self) -> Iterator[MicroBatch]:
        """Yield the micro-batches, on the device."""
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[MicroBatch] | None = []
        room = KEPT
        for part in micro_batches(self._objective.data, self._size):
            placed = self._placed(part)
            room -= sum(t.numel() * t.element_size() for t in tensors(placed.batch))
            kept = None if room < 0 else kept
            if kept is not None:
                kept.append(placed)
            yield placed
        self._kept = kept

    def run(self, before: Callable[[int], None]) -> None:
        """Run the model on all data to update its buffers; call ``before(examples)`` before each micro-batch."""

        def work(part: MicroBatch) -> None:
            before(part.size)
            self._forward(part)

        for part in self.parts():
            for _ in self._oom_halving.run(part, work):
                pass

    def _placed(self, part: MicroBatch) -> MicroBatch:
        return replace(part, batch=self._terms.to_device(part.batch))

    def _forward(self, part: MicroBatch) -> Any:
        """Output, target and batch; cached data are copied if the model modifies them."""
        share = not self._check_writes and not (self._model_writes and self._kept is not None)
        batch = part.batch if share else map_tensors(part.batch, torch.clone)
        with self._mode():
            found = self._terms.forward_on(batch)
        if self._check_writes and not self._model_writes:
            # By value: not every write counts up a tensor's version.
            before, after = ([own for t in tensors(one) for own in strided(t)] for one in (part.batch, batch))
            pairs = zip(before, after, strict=True)
            self._model_writes = not all(bool(((a == b) | ((a != a) & (b != b))).all()) for a, b in pairs)
        return found

    def _values(self, part: MicroBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sum of the loss, its weight, number of correct predictions and of labels, of one micro-batch."""
        output, target, batch = self._forward(part)
        with self._mode():
            loss, weight = self._terms.sums_from_output(part, output, target, batch)
            correct, labels = self._terms.count_correct(output, target)
        return loss.detach(), weight, correct, labels

    def _choose_grad_mode(self) -> None:
        """Turn autograd off if this does not change the loss; raise AuditError if two evaluations differ."""
        wanted, state = self._values(self._first()), torch.get_rng_state()
        if not float(wanted[0]):
            require_representable_loss(self._objective, self._objective.first_examples(8))
        if not _same(wanted, self._values(self._first())):
            raise AuditError(
                "The loss must be a fixed function of the weights, but a second evaluation of the first examples gives "
                "another loss. Measure in eval mode, without dropout, turn off augmentation of the data, and use no "
                "random numbers in the loss."
            )
        # Not inference mode: tensors that a model caches in it, such as a mask, could not be used in training later.
        self._mode = torch.no_grad
        torch.set_rng_state(state)
        try:
            no_grad_works = _same(wanted, self._values(self._first()))
        except (RuntimeError, ProblemError) as error:
            if out_of_memory(error):
                raise
            no_grad_works = False
        if not no_grad_works:
            self._mode = torch.enable_grad

    def _first(self) -> MicroBatch:
        """The first examples of a new pass over the data."""
        return self._placed(self._objective.first_examples(8))


def _total(values: list[Tensor]) -> float:
    """Sum in float64, with one device synchronisation."""
    if not values:
        return 0.0
    if values[0].device.type == "cpu":
        return float(sum(value.item() for value in values))  # faster than kernels for few numbers
    return float(torch.stack(values).to(wide(values[0].device)).sum())


def _same(one: Sequence[Tensor], two: Sequence[Tensor]) -> bool:
    """Whether two evaluations agree, up to the rounding of different kernels."""
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-8, equal_nan=True) for a, b in zip(one, two, strict=True))


RunModel = Callable[[Callable[[int], None]], None]

BATCHNORM_MODES = ("frozen", "interpolate", "recalibrate")


def running_norms(model: nn.Module) -> dict[str, nn.modules.batchnorm._BatchNorm]:
    """BatchNorm modules with running statistics, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
    }


def running_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Running means and variances by name, in float64 on the CPU."""
    return {
        f"{name}.{kind}" if name else kind: getattr(module, kind).detach().to("cpu", torch.float64, copy=True)
        for name, module in running_norms(model).items()
        for kind in ("running_mean", "running_var")
    }


class BatchNormStatistics:
    """Set BatchNorm's running statistics for the point ``w + sum_k c_k d_k``.

    - "frozen": those at w. They do not match the weights of other points.
    - "interpolate": ``s(w) + sum_k c_k ds_k``, for directions to other checkpoints, whose statistics are known.
      Negative variances are set to 0.
    - "recalibrate": mean batch statistics of the data at the point, weighted by examples, as in SWA (Izmailov et al.
      2018, section 3.2). One more forward pass per point.

    The buffers of ``model`` are changed in place; ``sharpscope.weights.restore`` restores them.

    Raises: ArgumentError for an unknown treatment, or if the model or the directions lack the statistics.
    """

    def __init__(
        self, model: nn.Module, treatment: str, changes: Sequence[Mapping[str, Tensor]], mode: str = "eval"
    ) -> None:
        if treatment not in BATCHNORM_MODES:
            raise ArgumentError(f"batchnorm must be one of {', '.join(BATCHNORM_MODES)}, got {treatment!r}.")
        self._norms = list(running_norms(model).values())
        if treatment != "frozen" and not self._norms:
            raise ArgumentError(
                f"batchnorm={treatment!r} needs running statistics, but the model has none. Leave it out."
            )
        if treatment != "frozen" and mode != "eval":
            raise ArgumentError(
                f"batchnorm={treatment!r} needs eval mode; train mode uses batch statistics. Leave it out."
            )
        self.treatment, self._changes = treatment, changes
        self._centre = running_statistics(model) if treatment == "interpolate" else {}
        buffers = dict(model.named_buffers())
        self._written = [buffers[name] for name in self._centre]
        if self._centre and not all(changes):
            raise ArgumentError(
                "batchnorm='interpolate' needs directions towards other checkpoints, whose statistics are known. "
                "Pass batchnorm='recalibrate'."
            )
        if self._centre and any(set(change) != set(self._centre) for change in changes):
            raise ArgumentError(
                "batchnorm='interpolate' needs running statistics in the same layers of all networks, but one lacks "
                "some. Pass batchnorm='recalibrate'."
            )

    @torch.no_grad()
    def move_to(self, coefficients: Sequence[float], run_model: RunModel) -> None:
        """Set the statistics for the point; ``run_model`` is ``Evaluation.run``."""
        if self.treatment == "interpolate":
            for (name, centre), buffer in zip(self._centre.items(), self._written, strict=True):
                value = centre + sum(c * change[name] for c, change in zip(coefficients, self._changes, strict=True))
                buffer.copy_(value.clamp(min=0) if name.endswith("running_var") else value)
        elif self.treatment == "recalibrate":
            self._recalibrate(run_model)

    def _recalibrate(self, run_model: RunModel) -> None:
        before = [(norm, norm.momentum, norm.track_running_stats) for norm in self._norms]
        seen = 0

        def set_momentum(examples: int) -> None:
            nonlocal seen
            seen += examples
            for norm in self._norms:
                norm.momentum = examples / seen  # 1 at the first micro-batch: it replaces the old statistics

        try:
            for norm in self._norms:
                norm.track_running_stats = norm.training = True
            run_model(set_momentum)
        finally:
            for norm, momentum, tracks in before:
                norm.momentum, norm.track_running_stats, norm.training = momentum, tracks, False


class PointEvaluator:
    """Compute loss and accuracy of each split at points ``w + sum_k c_k d_k``.

    Use it within ``measuring()`` of each objective. Each point is computed from a copy of w, so rounding errors do not
    accumulate. Memory: a copy of each direction.

    Args:
        objectives: by name of the split, all with the same model.
        lines: directions of each line or plane.
        batchnorm: see ``BatchNormStatistics``.
        micro_batch: examples per forward pass.
        perturbation: of the model's weights; the caller restores them.
    """

    def __init__(
        self,
        objectives: Mapping[str, Objective],
        lines: Sequence[Sequence[Direction]],
        batchnorm: str,
        micro_batch: int,
        perturbation: Perturbation,
    ) -> None:
        self._objectives = list(objectives.values())
        first, terms = self._objectives[0], self._objectives[0].terms
        self._evaluations = [Evaluation(objective, micro_batch) for objective in self._objectives]
        changes = [[d.statistics for d in line] for line in lines]
        self._statistics = [
            BatchNormStatistics(terms.model, batchnorm, change, first.problem.mode) for change in changes
        ]
        # As tensors like the weights.
        self._lines = [[views(d.vector.to(terms.device, terms.dtype), terms.params) for d in line] for line in lines]
        self._perturbation = perturbation

    def require_resolved(self, axes: Sequence[NDArray[np.float64]]) -> None:
        """Raise ArgumentError where even the farthest point of an axis is lost in rounding; the weights stay at w."""
        for line in self._lines:
            for direction, axis in zip(line, axes, strict=True):
                farthest = float(np.abs(axis).max())
                lost = self._perturbation.lost(direction, farthest)
                self._perturbation.restore()
                require_kept(lost, f"A range up to {farthest:g}", self._objectives[0].dtype)

    def evaluate(self, line: int, coefficients: Sequence[float]) -> list[float]:
        """Loss and accuracy of each split, in turn; cost: a forward pass over each, one more with "recalibrate"."""
        self._move(line, coefficients)
        statistics = self._statistics[line]
        statistics.move_to(coefficients, self._evaluations[0].run)
        values = [value for evaluation in self._evaluations for value in evaluation()]
        for objective, evaluation in zip(self._objectives, self._evaluations, strict=True):
            objective.num_examples = evaluation.examples
            objective.add_cost(FORWARD * evaluation.examples)
            objective.cost_counter.passes += 1
        if statistics.treatment == "recalibrate":
            self._objectives[0].add_cost(FORWARD * self._evaluations[0].examples)
            self._objectives[0].cost_counter.passes += 1
        return values

    @torch.no_grad()
    def _move(self, line: int, coefficients: Sequence[float]) -> None:
        moves = [(d, c) for d, c in zip(self._lines[line], coefficients, strict=True) if c]
        if not moves:
            self._perturbation.restore()
            return
        (direction, scale), *others = moves
        self._perturbation.move_to(direction, scale)
        for direction, scale in others:
            self._perturbation.add(self._perturbation.weights, direction, scale)
