"""The weighted mean loss of a data set, its gradient and its Hessian-vector products, in full passes over the data."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sharpscope.errors import ArgumentError, DataError
from sharpscope.objective import fastest_micro_batch
from sharpscope.objective.accumulate import (
    LossAndGradient,
    PerBatch,
    Sums,
    accumulate,
    locate_nonfinite,
    mean_loss_and_gradient,
    require_same_loss,
)
from sharpscope.objective.cost_and_out_of_memory import CostCounter, OOMHalving, guarded
from sharpscope.objective.curvature_interface import Curvature, Graph
from sharpscope.objective.double_backprop import HESSIAN
from sharpscope.objective.forward_loss import ForwardLoss
from sharpscope.objective.micro_batches import MicroBatch, as_batches, micro_batches, num_examples_hint
from sharpscope.precision import full_float32
from sharpscope.problem import Problem
from sharpscope.progress import Progress
from sharpscope.weights.kernels import differentiable_kernels
from sharpscope.weights.restore import preserved

NO_EXAMPLES = "The data must hold at least one example, got none. Check the data set and its filters."

# Former names of attributes and methods, which warn.
RENAMED = {
    "charge": "add_cost",
    "fitting": "fit_to_memory",
    "hvp_partwise": "hvp_per_batch",
    "meter": "cost_counter",
    "no_vectors": "empty_block",
    "point": "last_pass",
    "settle_micro_batch": "choose_micro_batch",
}


class Objective:
    """``L(w) = sum_i a_i l_i(w) / sum_i a_i`` over exactly the data of ``problem``, with its derivatives.

    Vectors are in ``dtype``. Neither the loader's batch size nor the micro-batch size changes L beyond rounding, unless
    BatchNorm takes its statistics from the batch: then the loader's batches are the micro-batches. Each call restores
    the model, its buffers, modes and gradients and all random states, on exceptions too. Only finite differences
    write to the parameters, and they restore them.

    Args:
        problem: model, loss and data.
        dtype: torch.float32 or torch.float64, the precision of the whole computation, on a copy of the model if it
            differs. Default: the parameters' own, float32 for bfloat16 and float16 parameters.
        device: where to compute, on a copy of the model if that is elsewhere. Default: where the parameters are.
        micro_batch: examples per autograd graph; "loader" keeps the loader's batches. Default: auto-tuned.
        curvature: the matrix that ``hvp`` multiplies with, see ``sharpscope.operators``. Default: the Hessian.

    Raises: ArgumentError, ProblemError, DataError.

    >>> import sharpscope
    >>> import torch
    >>> data = torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.zeros(3, 1)
    >>> model = torch.nn.Linear(3, 1, bias=False)  # H = diag(6, 8/3, 2/3)
    >>> problem = sharpscope.Problem(model=model, loss=torch.nn.MSELoss(), data=data)
    >>> objective = sharpscope.Objective(problem)
    >>> objective.hvp(torch.eye(3))
    tensor([[6.0000, 0.0000, 0.0000],
            [0.0000, 2.6667, 0.0000],
            [0.0000, 0.0000, 0.6667]])
    >>> objective.passes, objective.gradients  # 1 + 2K
    (1, 7.0)
    """

    def __init__(
        self,
        problem: Problem,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        micro_batch: int | str | None = None,
        curvature: Curvature = HESSIAN,
    ) -> None:
        if not (micro_batch in (None, "loader") or (isinstance(micro_batch, int) and micro_batch >= 1)):
            raise ArgumentError(f"micro_batch must be a positive integer, 'loader' or None, got {micro_batch!r}.")
        self.terms = ForwardLoss(problem, dtype, device, curvature.dtype)
        self.problem, self.dtype, self.device = problem, self.terms.dtype, self.terms.device
        self.num_params = self.terms.num_params
        self.curvature = curvature
        self.data = as_batches(problem.data)
        # Where the loss of an example depends on the others in its batch, the loader's batches define L.
        kept = micro_batch is None and self.batchnorm == "batch statistics"
        self.micro_batch: int | str | None = "loader" if kept else micro_batch
        self.num_examples: int | None = num_examples_hint(self.data)
        self.last_pass: LossAndGradient | None = None
        self.cost_counter = CostCounter()
        fixed = "micro_batch='loader' keeps the loader's batches" if self.keeps_batches else ""
        self._memory = OOMHalving(fixed=fixed, device=self.device)
        self._active = False

    if not TYPE_CHECKING:  # mypy would take every unknown attribute for Any

        def __getattr__(self, name: str) -> Any:
            if name not in RENAMED:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            new = RENAMED[name]
            warnings.warn(f"Objective.{name} is now Objective.{new}. Use that.", FutureWarning, stacklevel=2)
            return getattr(self, new)

    @property
    def keeps_batches(self) -> bool:
        """Whether the loader's own batches are the micro-batches, because they define L."""
        return self.micro_batch == "loader"

    @property
    def loss_name(self) -> str:
        """The name of the loss, as results state it."""
        return self.terms.loss.name

    @property
    def batchnorm(self) -> str:
        """How BatchNorm is treated: "none" (there is none), "running statistics" or "batch statistics"."""
        return self.terms.batchnorm

    @property
    def loss(self) -> float | None:
        """``L(w)`` of the last full pass, None before the first."""
        return None if self.last_pass is None else self.last_pass.loss

    @property
    def gradient(self) -> Tensor | None:
        """The gradient (n,) of L of the last full pass, None before the first."""
        return None if self.last_pass is None else self.last_pass.gradient

    @property
    def passes(self) -> int:
        """Number of full passes over the data so far."""
        return self.cost_counter.passes

    @property
    def hvps(self) -> int:
        """Number of products with a vector over all the data so far."""
        return self.cost_counter.hvps

    @property
    def seconds(self) -> float:
        """Wall-clock seconds inside ``measuring()`` so far."""
        return self.cost_counter.seconds

    @property
    def gradients(self) -> float:
        """Cost of all work so far, in units of one gradient over the whole data set."""
        return self.cost_counter.example_gradients / self.num_examples if self.num_examples else 0.0

    def loss_and_gradient(self, progress: Progress | None = None) -> tuple[float, Tensor]:
        """``L(w)`` and its gradient (n,), in one pass; cost 1 gradient.

        Raises: DataError when they are not finite, AuditError when they differ from the pass before.
        """
        self.products(self.empty_block(), progress)
        assert self.last_pass is not None
        return self.last_pass.loss, self.last_pass.gradient

    def hvp(self, block: Tensor, progress: Progress | None = None) -> Tensor:
        """``H V`` (n, K) for a block ``V`` (n, K), H the Hessian of L at w; cost 1 + 2K gradients and one pass.

        H is another matrix, at another cost, where ``curvature`` says so. Each micro-batch's graph is built once and
        every column is multiplied with it: see ``objective/double_backprop.py``.

        Raises: DataError when the products are not finite, AuditError when loss or gradient differ from the pass
        before, ProblemError when the model has no second derivative.
        """
        return self.products(self._rows(block), progress).T

    def hvp_per_batch(self, block: Tensor, progress: Progress | None = None) -> tuple[Tensor, PerBatch]:
        """``hvp(block)`` and the contribution of each micro-batch to it; cost as ``hvp``."""
        images, per_batch = self.products_per_batch(self._rows(block), progress)
        return images.T, per_batch

    def products(self, rows: Tensor, progress: Progress | None = None) -> Tensor:
        """The products (K, n) with the rows of a block (K, n): ``hvp`` for solvers, whose vectors are rows."""
        return self._mean_products(self._pass(rows, progress), rows)

    def products_per_batch(self, rows: Tensor, progress: Progress | None = None) -> tuple[Tensor, PerBatch]:
        """``products(rows)`` and the contribution of each micro-batch to them; cost as ``products``."""
        sums = self._pass(rows, progress, per_batch=True)
        assert sums.per_batch is not None
        return self._mean_products(sums, rows), sums.per_batch

    @contextmanager
    def measuring(self, *, products: bool = True) -> Iterator[None]:
        """Put the model into measuring mode; restore it and all random states when the outermost block ends.

        Inside, float32 is float32: TF32, which cuDNN's convolutions round to by default, is off, see ``full_float32``.

        Args:
            products: set False for forward-only use; skips the fast double-backward kernels.
        """
        if self._active:
            yield
            return
        with ExitStack() as stack:
            stack.enter_context(preserved(self.terms.model, self.terms.loss_function, data=self.data))
            stack.enter_context(full_float32())
            stack.enter_context(differentiable_kernels(self.terms.model, self.device, faster=products))
            stack.enter_context(self.cost_counter.timing())
            if self.problem.mode == "train":
                self.terms.model.train()
            else:
                # Not eval(), in which some modules write to their weights, for example merged adapters.
                for module in self.terms.model.modules():
                    module.training = False
            self._active = True
            try:
                yield
            finally:
                self._active = False

    def first_examples(self, size: int) -> MicroBatch:
        """The first ``size`` examples of the data, or the loader's first batch where the loader's batches are kept."""
        first = next(micro_batches(self.data, None if self.keeps_batches else size), None)
        if first is None:
            raise DataError(NO_EXAMPLES)
        return first

    def fit_to_memory(self, batch: MicroBatch) -> MicroBatch:
        """``batch``, cut to the largest size known to fit into memory."""
        largest = self._memory.largest
        return batch if largest is None or largest >= batch.size else batch.slice(0, largest)

    def empty_block(self) -> Tensor:
        """A block (0, n) of no vectors, to compute loss and gradient only."""
        return torch.empty(0, self.num_params, dtype=self.dtype, device=self.device)

    def graph(self, batch: MicroBatch, keep: bool = True) -> Graph:
        """The graph of one micro-batch, with error translation and cost counting. Use it within ``measuring()``.

        Cost: 1 gradient of the batch, and ``curvature.cost`` per product.
        """
        return guarded(partial(self.curvature.graph, self.terms), self.cost_counter, self.curvature.cost)(batch, keep)

    def accumulate(
        self,
        batches: Iterable[MicroBatch],
        rows: Tensor,
        progress: Callable[[int], None] | None = None,
        per_batch: bool = False,
    ) -> Sums:
        """Loss, gradient and products with ``rows`` (K, n), summed over ``batches``; the work is added to the cost."""
        sums = accumulate(self.graph, batches, rows, self._memory, progress, per_batch)
        if isinstance(self.micro_batch, int) and self._memory.largest is not None:
            self.micro_batch = min(self.micro_batch, self._memory.largest)
        return sums

    def add_cost(self, example_gradients: float) -> None:
        """Add work to the cost, in units of one example's gradient."""
        self.cost_counter.example_gradients += example_gradients

    def graph_bytes(self, size: int | None = None) -> int:
        """Bytes that the graph of ``size`` examples holds, extrapolated from the graphs of 16 and of 8 examples.

        Args:
            size: number of examples, by default the micro-batch size. Ignored where the loader's batches are kept:
                then the first batch is measured.

        Cost: 1 gradient of 24 examples.
        """
        if size is None:
            size = self.micro_batch if isinstance(self.micro_batch, int) else fastest_micro_batch.DEFAULT
        with self.measuring():
            first = self.fit_to_memory(self.first_examples(fastest_micro_batch.COUNTED_EXAMPLES))
            ours = [*self.terms.model.parameters(), *self.terms.model.buffers()]

            def count(examples: int) -> int:
                batch = first if examples == first.size else first.slice(0, examples)
                return fastest_micro_batch.saved_bytes(lambda: self.graph(batch), ours)

            if self.keeps_batches or not first.splittable:
                return count(first.size)
            return fastest_micro_batch.extrapolate(count, first.size, size)

    def choose_micro_batch(self) -> int | None:
        """The micro-batch size, auto-tuned on the first call; None where the loader's batches are kept."""
        if self.micro_batch is None:
            with self.measuring():
                self.micro_batch = fastest_micro_batch.autotune(
                    self._one_product, self.first_examples, self.num_examples, self.graph_bytes
                )
        return self.micro_batch if isinstance(self.micro_batch, int) else None

    def locate_nonfinite(self) -> None:
        """Find the first example whose loss or derivatives are not finite, and raise DataError for it."""
        rows = torch.ones(1, self.num_params, dtype=self.dtype, device=self.device)
        singles = micro_batches(self.data, None if self.keeps_batches else 1)
        locate_nonfinite(singles, lambda batch: self.accumulate([batch], rows), self.curvature.title)

    def _pass(self, rows: Tensor, progress: Progress | None, per_batch: bool = False) -> Sums:
        """One full pass. Its loss and gradient must agree with the previous pass."""
        label = f"pass {self.passes + 1}"
        report = None if progress is None else (lambda done: progress(label, done, self.num_examples))
        with self.measuring():
            sums = self.accumulate(micro_batches(self.data, self.choose_micro_batch()), rows, report, per_batch)
            if sums.examples == 0:
                raise DataError(NO_EXAMPLES)
            if not sums.finite:
                self.locate_nonfinite()
            this_pass = mean_loss_and_gradient(sums, self.terms)
            if self.last_pass is not None:
                require_same_loss(self.last_pass, this_pass)
        self.last_pass, self.num_examples, self.terms.checked = this_pass, sums.examples, True
        self.cost_counter.passes += 1
        self.cost_counter.hvps += len(rows)
        return sums

    def _mean_products(self, sums: Sums, rows: Tensor) -> Tensor:
        """Products with the curvature of the mean loss, including weight decay."""
        products = sums.products / sums.weight.to(self.dtype)
        if self.problem.weight_decay:
            products += self.problem.weight_decay * rows
        return products

    def _rows(self, block: Tensor) -> Tensor:
        """A user's ``block`` (n, K) as contiguous rows (K, n)."""
        if block.dim() != 2 or block.shape[0] != self.num_params:
            raise ArgumentError(f"V must have shape ({self.num_params}, K), got {tuple(block.shape)}.")
        return block.to(self.device, self.dtype).T.contiguous()

    def _one_product(self, batches: Sequence[MicroBatch]) -> float:
        """Multiply one vector, for timing."""
        rows = torch.ones(1, self.num_params, dtype=self.dtype, device=self.device)
        return float(self.accumulate(batches, rows).loss)  # float() waits for an asynchronous device
