"""The weighted mean loss of a data set, its gradient and its Hessian-vector products."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sharpscope import params
from sharpscope.batches import MicroBatch, arguments, leaves, map_tensors, micro_batches, num_examples_hint, walkable
from sharpscope.derivatives import GRADIENT, PRODUCT, Sums, accumulate
from sharpscope.errors import ArgumentError, AuditError, DataError, ProblemError
from sharpscope.losses import term_loss
from sharpscope.precision import compute_dtype, converted, placed, usable, wide
from sharpscope.preserve import preserved
from sharpscope.problem import Problem

Progress = Callable[[str, int, int | None], None]

# Sizes tried when the micro-batch is chosen by measuring, on this many examples, and the choice where the data
# set is too small for the measurement to pay.
CANDIDATES = (64, 128, 256, 512)
SMALL_DATA = 4096
DEFAULT_MICRO_BATCH = 256


class Objective:
    """``L(w) = sum_i a_i l_i(w) / sum_i a_i`` over exactly the data of ``problem``, to be differentiated.

    Vectors are in ``dtype`` (the parameters' own by default, float32 for bfloat16 and float16 ones). Neither the
    loader's nor the micro-batch size changes L beyond rounding, unless BatchNorm takes its statistics from the batch:
    then the loader's batches are kept. The model, its buffers, modes and gradients and all random states are restored
    after each call, on exceptions too; parameters are never written.

    Args:
        problem: model, loss and data.
        dtype: lift the whole computation, on a copy of the model, to this dtype.
        device: compute there, on a copy of the model when it is elsewhere.
        micro_batch: examples a graph; "loader" keeps the loader's batches; None measures which is fastest.

    Raises: ArgumentError, ProblemError, DataError.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        micro_batch: int | str | None = None,
    ) -> None:
        if not (micro_batch in (None, "loader") or (isinstance(micro_batch, int) and micro_batch >= 1)):
            raise ArgumentError(f"micro_batch must be a positive integer, 'loader' or None, got {micro_batch!r}.")
        if not isinstance(problem, Problem):
            raise ProblemError(f"A Problem(model=, loss=, data=) is needed, got {type(problem).__name__}.")
        chosen = params.select(problem.model, problem.params)
        self.problem = problem
        self.dtype = compute_dtype(chosen.values(), dtype)
        self.device = usable(device) if device is not None else next(iter(chosen.values())).device
        self.model, loss = placed(problem.model, problem.loss, self.dtype, self.device)
        self.params: list[Tensor] = list(params.select(self.model, problem.params).values())
        self.num_params = sum(p.numel() for p in self.params)
        self.data = walkable(problem.data)
        # Where the loss of an example depends on its neighbours, only the loader's own batches define L.
        self.micro_batch = "loader" if micro_batch is None and self.batchnorm == "batch statistics" else micro_batch
        self.num_examples: int | None = num_examples_hint(self.data)
        self.loss: float | None = None
        self.gradient: Tensor | None = None
        self.passes = 0
        self.hvps = 0
        self.seconds = 0.0
        self.loss_function = loss
        self._loss = term_loss(loss)
        self._accepts = _forward_names(problem.model)
        self._spread = 0.0
        self.example_gradients = 0.0
        self._active = False

    @property
    def loss_name(self) -> str:
        """The loss's name, for a result."""
        return self._loss.name

    @property
    def counts_terms(self) -> bool:
        """Whether the loss is one whose terms are counted here, so that they cannot be miscounted by its author."""
        return self._loss.counted

    @property
    def batchnorm(self) -> str:
        """How BatchNorm was treated: "none" (there is none), "running statistics" or "batch statistics"."""
        norms = [m for m in self.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        if not norms:
            return "none"
        from_batch = any(self.problem.mode == "train" or m.running_mean is None for m in norms)
        return "batch statistics" if from_batch else "running statistics"

    @property
    def gradients(self) -> float:
        """Everything done so far, in units of one gradient over the whole data set."""
        return self.example_gradients / self.num_examples if self.num_examples else 0.0

    def loss_and_gradient(self, progress: Progress | None = None) -> tuple[float, Tensor]:
        """``L(w)`` and its gradient (n,), in one pass; cost 1 gradient.

        Raises: DataError when they are not finite, AuditError when they differ from the pass before.
        """
        self._pass(torch.empty(0, self.num_params, dtype=self.dtype, device=self.device), progress)
        assert self.loss is not None
        assert self.gradient is not None
        return self.loss, self.gradient

    def hvp(self, block: Tensor, progress: Progress | None = None) -> Tensor:
        """``H V`` (n, K) for a block ``V`` (n, K), H the Hessian of L at w; cost 1 + 2K gradients and one pass.

        Each micro-batch's graph is built once and every column is pushed through it (Pearlmutter 1994, by double
        backprop).

        Raises: DataError when the products are not finite, AuditError when loss or gradient differ from the pass
        before, ProblemError when the model has no second derivative.
        """
        if block.dim() != 2 or block.shape[0] != self.num_params:
            raise ArgumentError(f"V must have shape ({self.num_params}, K), got {tuple(block.shape)}.")
        return self._pass(block.to(self.device, self.dtype).T.contiguous(), progress).T

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """The model in its measuring mode, restored with all random states when the outermost block ends."""
        if self._active:
            yield
            return
        with ExitStack() as stack:
            stack.enter_context(preserved(self.model, self.loss_function, data=self.data))
            # Fused attention kernels have no second derivative; autocast would round it.
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(torch.autocast(self.device.type, enabled=False))
            stack.enter_context(torch.enable_grad())
            self.model.train(self.problem.mode == "train")
            self._active = True
            started = time.perf_counter()
            try:
                yield
            finally:
                self._active = False
                self.seconds += time.perf_counter() - started

    def first_examples(self, size: int) -> MicroBatch:
        """The first ``size`` examples (or the loader's first batch, where batches are kept) of a fresh walk."""
        limit = None if self.micro_batch == "loader" else size
        first = next(micro_batches(self.data, limit), None)
        if first is None:
            raise DataError("The data must hold at least one example, got none. Check the data set and its filters.")
        return first

    def accumulate(
        self, parts: Iterable[MicroBatch], block: Tensor, progress: Callable[[int], None] | None = None
    ) -> Sums:
        """Sums over ``parts`` of loss, gradient and the products with the rows of ``block`` (K, n), counted as cost."""
        sums = accumulate(self.term_sums, parts, self.params, block, progress)
        self.charge(sums.examples * (GRADIENT + PRODUCT * len(block)))
        return sums

    def charge(self, example_gradients: float) -> None:
        """Add work done outside ``accumulate``, in gradients of one example, to the bill."""
        self.example_gradients += example_gradients

    def _pass(self, block: Tensor, progress: Progress | None) -> Tensor:
        """One full walk: sets loss and gradient, returns the products (K, n)."""
        label = f"pass {self.passes + 1}"
        report = None if progress is None else (lambda done: progress(label, done, self.num_examples))
        with self.measuring():
            size = self.micro_batch if isinstance(self.micro_batch, int) else None
            if self.micro_batch is None:
                size = self.micro_batch = self._fastest_micro_batch()
            sums = self.accumulate(micro_batches(self.data, size), block, report)
            self._record(sums)
        self.passes += 1
        self.hvps += len(block)
        products = sums.products / sums.weight.to(self.dtype)
        if self.problem.weight_decay:
            products += self.problem.weight_decay * block
        return products

    def _record(self, sums: Sums) -> None:
        """Keep loss and gradient, after holding them against the pass before."""
        if sums.examples == 0:
            raise DataError("The data must hold at least one example, got none. Check the data set and its filters.")
        weight = float(sums.weight)
        if not sums.finite:
            self.blame()
        if weight <= 0:
            raise DataError(
                f"The loss must have terms of positive total weight, got {weight:g}: every target is ignored, "
                "or the class weights are zero."
            )
        loss, gradient, spread = float(sums.loss) / weight, sums.gradient / weight, float(sums.spread) / weight
        if self.problem.weight_decay:
            flat = torch.cat([p.detach().reshape(-1) for p in self.params])
            loss += self.problem.weight_decay / 2 * float(flat.to(wide(self.device)).square().sum())
            gradient += self.problem.weight_decay * flat
        if self.gradient is not None and self.loss is not None:
            if sums.examples != self.num_examples:
                raise AuditError(
                    f"Every pass must see the same data, but one had {self.num_examples} examples and the next "
                    f"{sums.examples}. Fix the loader's order and length."
                )
            # The order of summation is the same in every pass, so only nondeterministic kernels may differ.
            eps = torch.finfo(self.dtype).eps
            apart = float(torch.linalg.vector_norm(gradient - self.gradient))
            moved = abs(loss - self.loss) > 1e-3 * abs(self.loss) + 1e3 * eps
            if moved or apart > 1e3 * eps * max(spread, self._spread):
                raise AuditError(
                    f"Every pass must see the same loss, but it was {self.loss:.6g} and is {loss:.6g} and the gradient "
                    f"moved by {apart:.2g}: the data change from pass to pass. Turn off shuffling and augmentation."
                )
        self.num_examples, self.loss, self.gradient, self._spread = sums.examples, loss, gradient, spread

    def forward(self, part: MicroBatch) -> tuple[Any, Any, Any]:
        """``(output, target, batch)`` of one micro-batch, on the device and in the dtype of the computation."""
        batch = map_tensors(part.batch, self._placed)
        args, kwargs, target = arguments(batch, self._accepts)
        try:
            output = self.model(*args, **kwargs)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            if self.loss is not None:
                raise
            shapes = ", ".join(str(tuple(leaf.shape)) for leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor))
            raise ProblemError(
                f"The model cannot take the data, here inputs of shape {shapes}: {str(error).splitlines()[0]}. "
                "Check that model and data belong together."
            ) from error
        return output, target, batch

    def term_sums(self, part: MicroBatch) -> tuple[Tensor, Tensor]:
        """``(sum_i a_i l_i, sum_i a_i)`` over one micro-batch, the first differentiable; cost one forward pass."""
        output, target, batch = self.forward(part)
        if self.loss is None:  # the first pass: later ones see the same data, and each check waits for the device
            self._loss.check(output, target, part.where)
        return self._loss.sums(output, target, batch, part.size)

    def _placed(self, tensor: Tensor) -> Tensor:
        # A copy: a model may write into its input, or ask for its gradient, and the user's data are his.
        return tensor.detach().to(self.device, converted(tensor, self.dtype), copy=True)

    def blame(self) -> None:
        """Name the first example whose loss or derivatives are not finite."""
        block = torch.ones(1, self.num_params, dtype=self.dtype, device=self.device)
        kept = self.micro_batch == "loader"
        for part in micro_batches(self.data, None if kept else 1):
            where = f"batch {part.pieces[0][0]}" if kept else part.where(0)
            if any(isinstance(leaf, Tensor) and not bool(torch.isfinite(leaf).all()) for leaf in leaves(part.batch)):
                raise DataError(f"The data must be finite, but {where} holds NaN or infinity. Drop or mend it.")
            sums = self.accumulate([part], block)
            for name, value in (("loss", sums.loss), ("gradient", sums.gradient), ("Hessian", sums.products)):
                if not bool(torch.isfinite(value).all()):
                    raise DataError(
                        f"The {name} must be finite, but that of {where} is NaN or infinite at these weights."
                    )
        raise DataError(
            "Loss and derivatives must be finite: those of each example are, but not their sum. Lift dtype."
        )

    def _fastest_micro_batch(self) -> int:
        """The size in CANDIDATES with the least time an example, growing while it helps."""
        if self.num_examples is None or self.num_examples < SMALL_DATA:
            return DEFAULT_MICRO_BATCH
        sample = self.first_examples(CANDIDATES[-1])
        if not sample.splittable:
            return DEFAULT_MICRO_BATCH
        block = torch.ones(1, self.num_params, dtype=self.dtype, device=self.device)
        best, fastest = DEFAULT_MICRO_BATCH, float("inf")
        for size in CANDIDATES:
            if size > sample.size:
                break
            started = time.perf_counter()
            parts = (sample.part(i, min(i + size, sample.size)) for i in range(0, sample.size, size))
            float(self.accumulate(parts, block).loss)  # the read waits for an asynchronous device
            seconds = time.perf_counter() - started
            if seconds > 1.2 * fastest:
                break
            if seconds < fastest:
                best, fastest = size, seconds
        return best


def _forward_names(model: nn.Module) -> Callable[[str], bool]:
    """Whether ``model.forward`` names an argument, so that a dict batch's target is passed on."""
    try:
        named = set(inspect.signature(model.forward).parameters)
    except (TypeError, ValueError):
        named = set()
    return named.__contains__
