"""The weighted mean loss of a data set, its gradient and its Hessian-vector products, in full passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor

from sharpscope.errors import ArgumentError, DataError
from sharpscope.objective import microbatch
from sharpscope.objective.accumulate import (
    PerBatch,
    Point,
    Sums,
    accumulate,
    locate_nonfinite,
    point_of,
    require_same_point,
)
from sharpscope.objective.data import MicroBatch, micro_batches, num_examples_hint, walkable
from sharpscope.objective.forward import LossTerms
from sharpscope.objective.graph import Curvature, Graph
from sharpscope.objective.guards import Meter, OOMHalving, guarded
from sharpscope.objective.hessian import HESSIAN
from sharpscope.problem import Problem
from sharpscope.progress import Progress
from sharpscope.weights.kernels import differentiable_kernels
from sharpscope.weights.restore import preserved


class Objective:
    """``L(w) = sum_i a_i l_i(w) / sum_i a_i`` over exactly the data of ``problem``, to be differentiated.

    Vectors are in ``dtype`` (the parameters' own by default, float32 for bfloat16 and float16 ones). Neither the
    loader's nor the micro-batch size changes L beyond rounding, unless BatchNorm takes its statistics from the batch:
    then the loader's batches are kept. The model, its buffers, modes and gradients and all random states are restored
    after each call, on exceptions too; parameters are written by finite differences alone, which put them back.

    Args:
        problem: model, loss and data.
        dtype: lift the whole computation, on a copy of the model, to this dtype.
        device: compute there, on a copy of the model when it is elsewhere.
        micro_batch: examples a graph; "loader" keeps the loader's batches; None measures which is fastest.
        curvature: the matrix whose products ``hvp`` gives, see ``sharpscope.operators``.

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
        self.terms = LossTerms(problem, dtype, device, curvature.dtype)
        self.problem, self.dtype, self.device = problem, self.terms.dtype, self.terms.device
        self.num_params = self.terms.num_params
        self.curvature = curvature
        self.data = walkable(problem.data)
        # Where the loss of an example depends on its neighbours, only the loader's own batches define L.
        kept = micro_batch is None and self.batchnorm == "batch statistics"
        self.micro_batch: int | str | None = "loader" if kept else micro_batch
        self.num_examples: int | None = num_examples_hint(self.data)
        self.point: Point | None = None
        self.meter = Meter()
        fixed = "micro_batch='loader' keeps the loader's batches" if self.keeps_batches else ""
        self._memory = OOMHalving(fixed=fixed, device=self.device)
        self._active = False

    @property
    def keeps_batches(self) -> bool:
        """Whether the loader's batches are micro-batches, since they define L."""
        return self.micro_batch == "loader"

    @property
    def loss_name(self) -> str:
        """The loss's name, for a result."""
        return self.terms.loss.name

    @property
    def batchnorm(self) -> str:
        """How BatchNorm was treated: "none" (there is none), "running statistics" or "batch statistics"."""
        return self.terms.batchnorm

    @property
    def loss(self) -> float | None:
        """``L(w)``, once a full pass has been done."""
        return None if self.point is None else self.point.loss

    @property
    def gradient(self) -> Tensor | None:
        """The gradient (n,) of L, once a full pass has been done."""
        return None if self.point is None else self.point.gradient

    @property
    def passes(self) -> int:
        """Full walks over the data so far."""
        return self.meter.passes

    @property
    def hvps(self) -> int:
        """Products with a vector over all the data so far."""
        return self.meter.hvps

    @property
    def seconds(self) -> float:
        """Wall-clock time so far, inside ``measuring()``."""
        return self.meter.seconds

    @property
    def gradients(self) -> float:
        """Everything done so far, in units of one gradient over the whole data set."""
        return self.meter.example_gradients / self.num_examples if self.num_examples else 0.0

    def loss_and_gradient(self, progress: Progress | None = None) -> tuple[float, Tensor]:
        """``L(w)`` and its gradient (n,), in one pass; cost 1 gradient.

        Raises: DataError when they are not finite, AuditError when they differ from the pass before.
        """
        self.products(self.no_vectors(), progress)
        assert self.point is not None
        return self.point.loss, self.point.gradient

    def hvp(self, block: Tensor, progress: Progress | None = None) -> Tensor:
        """``H V`` (n, K) for a block ``V`` (n, K), H the Hessian of L at w; cost 1 + 2K gradients and one pass.

        H is another matrix, at another cost, where ``curvature`` says so. Each micro-batch's graph is built once and
        every column is multiplied with it: see ``objective/hessian.py``.

        Raises: DataError when the products are not finite, AuditError when loss or gradient differ from the pass
        before, ProblemError when the model has no second derivative.
        """
        return self.products(self._rows(block), progress).T

    def hvp_partwise(self, block: Tensor, progress: Progress | None = None) -> tuple[Tensor, PerBatch]:
        """``hvp(block)``, and what each micro-batch contributes to it; cost as ``hvp``."""
        images, per_batch = self.products_per_batch(self._rows(block), progress)
        return images.T, per_batch

    def products(self, rows: Tensor, progress: Progress | None = None) -> Tensor:
        """The products (K, n) with the rows of a block (K, n): ``hvp`` for solvers, whose vectors are rows."""
        return self._mean_products(self._pass(rows, progress), rows)

    def products_per_batch(self, rows: Tensor, progress: Progress | None = None) -> tuple[Tensor, PerBatch]:
        """``products(rows)``, and what each micro-batch contributes to them; cost as ``products``."""
        sums = self._pass(rows, progress, per_batch=True)
        assert sums.per_batch is not None
        return self._mean_products(sums, rows), sums.per_batch

    @contextmanager
    def measuring(self, *, products: bool = True) -> Iterator[None]:
        """The model in its measuring mode, restored with all random states when the outermost block ends.

        Without ``products`` it looks no faster kernels for second derivatives up, which a bare forward pass need not.
        """
        if self._active:
            yield
            return
        with ExitStack() as stack:
            stack.enter_context(preserved(self.terms.model, self.terms.loss_function, data=self.data))
            stack.enter_context(differentiable_kernels(self.terms.model, self.device, faster=products))
            stack.enter_context(self.meter.timing())
            if self.problem.mode == "train":
                self.terms.model.train()
            else:
                # Not eval(): a module may answer it by writing into its weights, as merged adapters do.
                for module in self.terms.model.modules():
                    module.training = False
            self._active = True
            try:
                yield
            finally:
                self._active = False

    def first_examples(self, size: int) -> MicroBatch:
        """The first ``size`` examples (or the loader's first batch, where batches are kept) of a fresh walk."""
        first = next(micro_batches(self.data, None if self.keeps_batches else size), None)
        if first is None:
            raise _empty()
        return first

    def fitting(self, batch: MicroBatch) -> MicroBatch:
        """The first examples of ``batch``, as many as are known to fit into memory."""
        largest = self._memory.largest
        return batch if largest is None or largest >= batch.size else batch.part(0, largest)

    def no_vectors(self) -> Tensor:
        """A block (0, n), for loss and gradient alone."""
        return torch.empty(0, self.num_params, dtype=self.dtype, device=self.device)

    def graph(self, batch: MicroBatch, keep: bool = True) -> Graph:
        """One micro-batch's graph, with its guards; kept, while what this returns is, for products later.

        To be used within ``measuring()``. Cost: 1 gradient of the batch, and ``curvature.cost`` a product.
        """
        bare = partial(self.curvature.graph, self.terms)
        return guarded(bare, self.meter, self.curvature.cost)(batch, keep)

    def accumulate(
        self,
        batches: Iterable[MicroBatch],
        rows: Tensor,
        progress: Callable[[int], None] | None = None,
        per_batch: bool = False,
    ) -> Sums:
        """Sums over ``batches`` of loss, gradient and the products with ``rows`` (K, n), counted as cost."""
        sums = accumulate(self.graph, batches, rows, self._memory, progress, per_batch)
        if isinstance(self.micro_batch, int) and self._memory.largest is not None:
            self.micro_batch = min(self.micro_batch, self._memory.largest)
        return sums

    def charge(self, example_gradients: float) -> None:
        """Add work, in gradients of one example, to the bill."""
        self.meter.example_gradients += example_gradients

    def graph_bytes(self, size: int | None = None) -> int:
        """Bytes that the graph of ``size`` examples (default: the micro-batch's) keeps, from a count on 16 and 8.

        Cost: 1 gradient of 24 examples. Where the loader's batches are kept, its first is counted.
        """
        if size is None:
            size = self.micro_batch if isinstance(self.micro_batch, int) else microbatch.DEFAULT
        with self.measuring():
            first = self.fitting(self.first_examples(microbatch.SAMPLE))
            ours = [*self.terms.model.parameters(), *self.terms.model.buffers()]

            def count(examples: int) -> int:
                part = first if examples == first.size else first.part(0, examples)
                return microbatch.saved_bytes(lambda: self.graph(part), ours)

            if self.keeps_batches or not first.splittable:
                return count(first.size)
            return microbatch.extrapolated(count, first.size, size)

    def settle_micro_batch(self) -> int | None:
        """The examples a graph, chosen by measuring at first; None where batches are kept."""
        if self.micro_batch is None:
            with self.measuring():
                self.micro_batch = microbatch.autotuned(
                    self._one_product, self.first_examples, self.num_examples, self.graph_bytes
                )
        return self.micro_batch if isinstance(self.micro_batch, int) else None

    def locate_nonfinite(self) -> None:
        """Raise DataError for the first example whose loss or derivatives are not finite."""
        rows = torch.ones(1, self.num_params, dtype=self.dtype, device=self.device)
        singles = micro_batches(self.data, None if self.keeps_batches else 1)
        locate_nonfinite(singles, lambda batch: self.accumulate([batch], rows), self.curvature.title)

    def _pass(self, rows: Tensor, progress: Progress | None, per_batch: bool = False) -> Sums:
        """One full walk: the sums, whose loss and gradient must be those of the pass before."""
        label = f"pass {self.passes + 1}"
        report = None if progress is None else (lambda done: progress(label, done, self.num_examples))
        with self.measuring():
            sums = self.accumulate(micro_batches(self.data, self.settle_micro_batch()), rows, report, per_batch)
            if sums.examples == 0:
                raise _empty()
            if not sums.finite:
                self.locate_nonfinite()
            point = point_of(sums, self.terms)
            if self.point is not None:
                require_same_point(self.point, point)
        self.point, self.num_examples, self.terms.checked = point, sums.examples, True
        self.meter.passes += 1
        self.meter.hvps += len(rows)
        return sums

    def _mean_products(self, sums: Sums, rows: Tensor) -> Tensor:
        """Products with the matrix of the mean loss, weight decay included."""
        products = sums.products / sums.weight.to(self.dtype)
        if self.problem.weight_decay:
            products += self.problem.weight_decay * rows
        return products

    def _rows(self, block: Tensor) -> Tensor:
        """The columns of a user's ``block`` (n, K) as rows."""
        if block.dim() != 2 or block.shape[0] != self.num_params:
            raise ArgumentError(f"V must have shape ({self.num_params}, K), got {tuple(block.shape)}.")
        return block.to(self.device, self.dtype).T.contiguous()

    def _one_product(self, batches: Sequence[MicroBatch]) -> float:
        """A product with one vector, for timing."""
        rows = torch.ones(1, self.num_params, dtype=self.dtype, device=self.device)
        return float(self.accumulate(batches, rows).loss)  # reading it waits for an asynchronous device


def _empty() -> DataError:
    return DataError("The data must hold at least one example, got none. Check the data set and its filters.")
