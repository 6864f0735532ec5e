"""The loss terms of one micro-batch, summed on the device and in the dtype of the computation."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sharpscope.errors import ProblemError, SharpscopeError, first_line, out_of_memory
from sharpscope.objective.data import MicroBatch, arguments, leaves, map_leaves, tensors
from sharpscope.objective.float64_mode import float64_mode
from sharpscope.objective.losses import described, output_tensor, term_loss
from sharpscope.precision import compute_dtype, converted, placed, usable, wide
from sharpscope.problem import Problem, require_problem
from sharpscope.weights import parameters

T = TypeVar("T")


class LossTerms:
    """``sum_i a_i l_i(w)`` and ``sum_i a_i`` over any micro-batch of ``problem``, differentiable in ``params``.

    ``preferred`` is the dtype where ``dtype`` is None and the device has it.

    Attributes:
        model, loss_function: the user's own, or copies in ``dtype`` on ``device``.
        loss: ``loss_function`` as a sum over its terms.
        params: the tensors that form w, and ``num_params``: how many numbers they hold.
        checked: set once every example has been seen. Later walks see the same data, and each check waits for the
            device.

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
        self.device = usable(device) if device is not None else next(iter(chosen.values())).device
        if dtype is None and self.device.type != "mps":  # which has no float64
            dtype = preferred
        self.dtype = compute_dtype(chosen.values(), dtype)
        self.model, self.loss_function = placed(problem.model, problem.loss, self.dtype, self.device)
        self.params: list[Tensor] = list(parameters.select(self.model, problem.params).values())
        self.num_params = sum(p.numel() for p in self.params)
        self.loss = term_loss(self.loss_function)
        self.checked = False
        self._differentiates = False
        self._accepts = _forward_names(problem.model)

    @property
    def batchnorm(self) -> str:
        """How BatchNorm is treated: "none" (there is none), "running statistics" or "batch statistics"."""
        norms = [m for m in self.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        if not norms:
            return "none"
        from_batch = any(self.problem.mode == "train" or m.running_mean is None for m in norms)
        return "batch statistics" if from_batch else "running statistics"

    def problem_with(self, data: Any) -> Problem:
        """The problem of ``data`` for the very tensors that are computed with, which share their weights with it."""
        return replace(self.problem, model=self.model, loss=self.loss_function, data=data)

    def forward(self, part: MicroBatch) -> tuple[Any, Any, Any]:
        """``(output, target, batch)`` of one micro-batch; cost one forward pass.

        Raises: ProblemError when the model cannot take the data.
        """
        return self.forward_on(self.placed(part.batch))

    def placed(self, batch: Any) -> Any:
        """A copy of ``batch`` on the device and in the dtype of the computation."""
        return map_leaves(batch, self._placed)

    def forward_on(self, batch: Any) -> tuple[Any, Any, Any]:
        """``forward`` of a batch that ``placed`` gave, which the model may write into."""
        args, kwargs, target = arguments(batch, self._accepts)
        try:
            with float64_mode(self.dtype):
                output = self.model(*args, **kwargs)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            if self.checked or out_of_memory(error):
                raise
            shapes = ", ".join(str(tuple(leaf.shape)) for leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor))
            raise ProblemError(
                f"The model cannot take the data, here inputs of shape {shapes}: {first_line(error)}. "
                f"Check that model and data belong together.{_if_examples(self.problem.data)}"
            ) from error
        return output, target, batch

    def sums(self, part: MicroBatch) -> tuple[Tensor, Tensor]:
        """``(sum_i a_i l_i, sum_i a_i)`` over one micro-batch, both times ``part.scale``, the first differentiable."""
        return self.sums_of(part, *self.forward(part))

    def sums_of(self, part: MicroBatch, output: Any, target: Any, batch: Any) -> tuple[Tensor, Tensor]:
        """``sums(part)`` of an output that ``forward(part)`` gave."""
        if not self.checked:
            self.loss.check(output, target, part.where)
        try:
            with float64_mode(self.dtype):
                value, weight = self.loss.sums(output, target, batch, part.size)
        except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
            known = isinstance(error, SharpscopeError) or out_of_memory(error)
            # What autograd says is told apart by those who differentiate.
            if (
                self.checked
                or known
                or any(word in str(error) for word in ("grad", "derivative", "backward", "differentiated"))
            ):
                raise
            raise ProblemError(
                f"The loss cannot take {described(output)} as output and {described(target)} as target: "
                f"{first_line(error)}. It is called as loss(output, target)."
            ) from error
        return (value, weight) if part.scale == 1 else (value * part.scale, weight * part.scale)

    def bare(self, work: Callable[[], T]) -> T:
        """``work()`` without autograd's graph, unless model or loss are seen to differentiate by themselves.

        A physics-informed loss takes derivatives in its inputs, which are there only with a graph.
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

    def answers(self, output: Any, target: Any) -> tuple[Tensor, Tensor]:
        """How many labels are the place of the largest output, and how many there are; none where a loss has none."""
        ignored = self.loss.ignored
        if ignored is None or not isinstance(target, Tensor) or target.is_floating_point():
            return (none := torch.zeros((), dtype=torch.long, device=self.device)), none
        target = self.loss.aligned(target)
        right = output_tensor(output).argmax(self.loss.class_dim) == target
        # A place of an output is never negative, so that a negative label that is ignored is never right.
        known = (target != ignored).sum()
        return (right if ignored < 0 else right & (target != ignored)).sum(), known

    @torch.no_grad()
    def decay(self) -> float:
        """``c/2 ||w||^2``, what a weight decay c adds to the mean loss."""
        if not self.problem.weight_decay:
            return 0.0
        squares = [p.detach().to(wide(self.device)).square().sum() for p in self.params]
        return self.problem.weight_decay / 2 * float(torch.stack(squares).sum())

    def _placed(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim():
            return leaf
        # A copy: a model may write into its input, or ask for its gradient, and the user's data must not change.
        return leaf.detach().to(self.device, converted(leaf, self.dtype), copy=True)


def _if_examples(data: Any) -> str:
    """A hint where the entries of a list look like single examples."""
    vectors = isinstance(data, list) and bool(data) and all(t.dim() == 1 for t in tensors(data[0]))
    return " If each entry of the list is one example, pass DataLoader(data, batch_size=32)." if vectors else ""


def _forward_names(model: nn.Module) -> Callable[[str], bool]:
    """Whether ``model.forward`` names an argument, so that a dict batch's target is passed on."""
    try:
        named = set(inspect.signature(model.forward).parameters)
    except (TypeError, ValueError):
        named = set()
    return named.__contains__
