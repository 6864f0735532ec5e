"""The forward pass: the loss terms of one micro-batch, summed on the device and in the dtype of the computation."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sharpscope.errors import ProblemError, SharpscopeError, cause_of, dead_worker, out_of_memory, worker_died
from sharpscope.objective.losses import described, output_tensor, summed_loss
from sharpscope.objective.micro_batches import MicroBatch, forward_arguments, leaves, map_leaves, tensors
from sharpscope.precision import available_device, cast_model, compute_dtype, float64_mode, matching_dtype, wide
from sharpscope.problem import Problem, require_problem
from sharpscope.weights import parameters

T = TypeVar("T")


class ForwardLoss:
    """``sum_i a_i l_i(w)`` and ``sum_i a_i`` over any micro-batch of ``problem``, differentiable in ``params``.

    Args:
        problem: model, loss and data.
        dtype: of the computation. Default: ``preferred``, or that of the parameters.
        device: of the computation. Default: that of the parameters.
        preferred: the dtype where ``dtype`` is None and the device supports it.

    Attributes:
        model: the user's model, or a copy in ``dtype`` on ``device``.
        loss_function: the user's loss, or such a copy.
        loss: ``loss_function`` as a sum over its terms.
        params: the tensors that form w.
        num_params: number of entries of w.
        checked: whether a whole pass has validated the data. Later passes skip the checks, which wait for the device.

    Raises: ArgumentError, ProblemError.
    """

    def __init__(
        self,
        problem: Problem,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        preferred: torch.dtype | None = None,
    ) -> None:
        require_problem(problem)
        chosen = parameters.select(problem.model, problem.params)
        self.problem = problem
        self.device = available_device(device) if device is not None else next(iter(chosen.values())).device
        if dtype is None and self.device.type != "mps":  # MPS has no float64
            dtype = preferred
        self.dtype = compute_dtype(chosen.values(), dtype)
        self.model, self.loss_function = cast_model(problem.model, problem.loss, self.dtype, self.device)
        self.params: list[Tensor] = list(parameters.select(self.model, problem.params).values())
        self.num_params = sum(p.numel() for p in self.params)
        self.loss = summed_loss(self.loss_function)
        self.checked = False
        self._differentiates = False
        self._accepts = _accepts_argument(problem.model)

    @property
    def batchnorm(self) -> str:
        """How BatchNorm is treated: "none" (there is none), "running statistics" or "batch statistics"."""
        norms = [m for m in self.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        if not norms:
            return "none"
        from_batch = any(self.problem.mode == "train" or m.running_mean is None for m in norms)
        return "batch statistics" if from_batch else "running statistics"

    def problem_with(self, data: Any) -> Problem:
        """The problem with other ``data`` for the same model and loss objects that this object computes with."""
        return replace(self.problem, model=self.model, loss=self.loss_function, data=data)

    def forward(self, micro_batch: MicroBatch) -> tuple[Any, Any, Any]:
        """``(output, target, batch)`` of one micro-batch; cost one forward pass.

        Raises: ProblemError when the model cannot take the data.
        """
        return self.forward_on(self.to_device(micro_batch.batch))

    def to_device(self, batch: Any) -> Any:
        """A copy of ``batch`` on the device and in the dtype of the computation."""
        return map_leaves(batch, self._to_device)

    def forward_on(self, batch: Any) -> tuple[Any, Any, Any]:
        """``forward`` for a batch from ``to_device``, which the model may write into."""
        args, kwargs, target = forward_arguments(batch, self._accepts)
        try:
            with float64_mode(self.dtype):
                output = self.model(*args, **kwargs)
        except Exception as error:
            if worker_died(error):
                raise dead_worker(error) from error
            if _is_for_others(error):
                raise
            shapes = ", ".join(str(tuple(leaf.shape)) for leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor))
            raise ProblemError(
                f"The model cannot take the data, here inputs of shape {shapes}: {cause_of(error)}. "
                f"Check that model and data belong together.{_if_examples(self.problem.data)}{_if_exported(self.model)}"
            ) from error
        return output, target, batch

    def sums(self, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """``(sum_i a_i l_i, sum_i a_i)`` over one micro-batch, times its ``scale``; the first is differentiable."""
        return self.sums_from_output(micro_batch, *self.forward(micro_batch))

    def sums_from_output(self, micro_batch: MicroBatch, output: Any, target: Any, batch: Any) -> tuple[Tensor, Tensor]:
        """``sums(micro_batch)`` from the results of ``forward(micro_batch)``."""
        if not self.checked:
            self.loss.check(output, target, micro_batch.where)
        try:
            with float64_mode(self.dtype):
                value, weight = self.loss.sums(output, target, batch, micro_batch.size)
        except Exception as error:
            if worker_died(error):
                raise dead_worker(error) from error
            if _is_for_others(error):
                raise
            raise ProblemError(
                f"The loss must return a number for each batch, but raised {cause_of(error)}. It is called as "
                f"loss(output, target), here with {described(output)} and {described(target)}."
            ) from error
        return (value, weight) if micro_batch.scale == 1 else (value * micro_batch.scale, weight * micro_batch.scale)

    def without_graph(self, work: Callable[[], T]) -> T:
        """``work()`` under ``torch.no_grad``, unless model or loss compute derivatives themselves.

        For example, a physics-informed loss takes derivatives in its inputs, which need a graph.
        """
        if not self._differentiates:
            try:
                with torch.no_grad():
                    return work()
            except (RuntimeError, ProblemError) as error:
                if "does not require grad" not in str(error):
                    raise
            self._differentiates = True
        with torch.enable_grad():
            return work()

    def count_correct(self, output: Any, target: Any) -> tuple[Tensor, Tensor]:
        """The number of correct argmax predictions and the number of labels; 0 for losses without labels."""
        ignore_index = self.loss.ignore_index
        if ignore_index is None or not isinstance(target, Tensor) or target.is_floating_point():
            return (zero := torch.zeros((), dtype=torch.long, device=self.device)), zero
        target = self.loss.aligned(target)
        correct = output_tensor(output).argmax(self.loss.class_dim) == target
        labels = (target != ignore_index).sum()
        # An argmax is never negative, so a negative ignored label is never counted as correct.
        return (correct if ignore_index < 0 else correct & (target != ignore_index)).sum(), labels

    @torch.no_grad()
    def decay(self) -> float:
        """``c/2 ||w||^2``, the term that a weight decay c adds to the mean loss."""
        if not self.problem.weight_decay:
            return 0.0
        squares = [p.detach().to(wide(self.device)).square().sum() for p in self.params]
        return self.problem.weight_decay / 2 * float(torch.stack(squares).sum())

    def _to_device(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim():
            return leaf
        # A copy, since a model may write to its input or require its gradient, and the user's data must not change.
        return leaf.detach().to(self.device, matching_dtype(leaf, self.dtype), copy=True)


# Errors of autograd that ``cost_and_out_of_memory`` and ``operators/jacobian.py`` recognise and translate.
_OF_AUTOGRAD = (
    "does not require grad",
    "derivative for",
    "once_differentiable",
    "double backward",
    "used in the graph",
)


def _is_for_others(error: Exception) -> bool:
    """Whether model or loss are not the cause of ``error``, or others translate it.

    A function that raised it again would stay in its traceback and keep the graph alive.
    """
    of_autograd = isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _OF_AUTOGRAD)
    return isinstance(error, SharpscopeError) or out_of_memory(error) or of_autograd


def _if_examples(data: Any) -> str:
    """A hint for a message where the entries of a list look like single examples."""
    single_examples = isinstance(data, list) and bool(data) and all(t.dim() == 1 for t in tensors(data[0]))
    return " If each entry of the list is one example, pass DataLoader(data, batch_size=32)." if single_examples else ""


def _if_exported(model: nn.Module) -> str:
    """A hint for a message where the model may take batches of one size only."""
    if not any(isinstance(module, torch.fx.GraphModule) for module in model.modules()):
        return ""
    return (
        " An exported program takes batches of the size that it was exported with: export it with dynamic_shapes for "
        "the first dimension, or make all batches of that size and pass micro_batch='loader'."
    )


def _accepts_argument(model: nn.Module) -> Callable[[str], bool]:
    """A function that tells whether ``model.forward`` has an argument of a given name."""
    try:
        names = set(inspect.signature(model.forward).parameters)
    except (TypeError, ValueError):
        names = set()
    return names.__contains__
