"""Loss, gradient and products summed over micro-batches, and statistics of each micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sharpscope.errors import AuditError, DataError
from sharpscope.objective.cost_and_out_of_memory import OOMHalving
from sharpscope.objective.curvature_interface import Graph
from sharpscope.objective.forward_loss import ForwardLoss
from sharpscope.objective.micro_batches import MicroBatch, leaves
from sharpscope.precision import CHUNK, wide
from sharpscope.weights.parameters import views
from sharpscope.weights.restore import strided

# Limit for the bytes of cached graphs. The others are rebuilt for every block, at a cost of 1 gradient.
MAX_CACHED_BYTES = 1 << 30


class Sums:
    """Running sums over examples, not means; ``add`` adds one micro-batch.

    Args:
        rows: the vectors (K, n) to multiply; (0, n) for loss and gradient only.

    Attributes:
        loss: ``sum_i a_i l_i``, in float64 where the device has it.
        weight: ``sum_i a_i``, in float64 where the device has it.
        gradient: (n,), of the loss.
        products: (K, n), with the curvature of the loss.
        spread: the sum of the micro-batches' gradient norms, the scale of the gradient's rounding errors.
        examples: number of examples.
        per_batch: statistics of each micro-batch, None if not asked for.
    """

    def __init__(self, rows: Tensor) -> None:
        self.loss = torch.zeros((), dtype=wide(rows.device), device=rows.device)
        self.weight, self.spread = torch.zeros_like(self.loss), torch.zeros_like(self.loss)
        self.gradient = torch.zeros(rows.shape[1], dtype=rows.dtype, device=rows.device)
        self.products = torch.zeros_like(rows)
        self.examples = 0
        self.per_batch: PerBatch | None = None

    def add(
        self, loss: Tensor, weight: Tensor, gradient: Sequence[Tensor], examples: int, products: Tensor | None = None
    ) -> None:
        """Add the sums of one micro-batch; the gradient is a tensor for each parameter."""
        self.loss += loss
        self.weight += weight
        torch._foreach_add_(views(self.gradient, gradient), list(gradient))
        self.spread += torch.stack(torch._foreach_norm(list(gradient))).to(self.loss).norm()
        self.examples += examples
        if products is not None:
            self.products += products

    @property
    def finite(self) -> bool:
        """Whether loss, gradient and products are all finite."""
        return all(bool(torch.isfinite(t).all()) for t in (self.loss, self.gradient, self.products))


def accumulate(
    graph: Callable[[MicroBatch, bool], Graph],
    batches: Iterable[MicroBatch],
    rows: Tensor,
    memory: OOMHalving,
    progress: Callable[[int], None] | None = None,
    per_batch: bool = False,
) -> Sums:
    """Loss, gradient and products with ``rows`` (K, n), summed over ``batches``.

    The graph of each micro-batch is built once, multiplied with every row, and freed. Memory: one graph, and
    3 (1 + K) vectors besides the block.

    Args:
        graph: ``graph(batch, keep)``, see ``Graph``.
        batches: in the order of summation.
        rows: vectors to multiply; (0, n) for loss and gradient only.
        memory: halves a micro-batch that does not fit into memory.
        progress: called with the number of examples so far.
        per_batch: also collect statistics of each micro-batch, see ``PerBatch``.

    Raises: ProblemError, see ``graph`` and ``OOMHalving``.
    """
    total = Sums(rows)
    record = PerBatchRecord(rows) if per_batch else None

    def differentiate(batch: MicroBatch) -> tuple[Tensor, Tensor, list[Tensor], int, Tensor]:
        # All results of the micro-batch before any of them is added, without a reference to its graph.
        built = graph(batch, len(rows) > 0)
        return built.loss, built.weight, list(built.gradient), batch.size, built.products(rows, last=True)

    for batch in batches:
        for loss, weight, gradient, examples, products in memory.run(batch, differentiate):
            total.add(loss, weight, gradient, examples, products)
            if record is not None:
                record.add(weight, products, examples)
        if progress is not None:
            progress(total.examples)
    total.per_batch = None if record is None else record.result()
    return total


class CachedGraphs:
    """Products ``sum_b (sum_i a_i H_i) rows`` (K, n) over ``batches`` whose graphs are cached between calls.

    Cost of the first call: 1 + 2K gradients; of later calls 2K, and 1 more of the examples whose graphs are not cached.

    Args:
        graph: differentiates a micro-batch.
        batches: in the order of summation; references to them are held.
        like: an empty block (0, n), for n, dtype and device.
        memory: halves a micro-batch that does not fit into memory.
        max_examples: number of examples whose graphs may be cached.
    """

    def __init__(
        self,
        graph: Callable[[MicroBatch], Graph],
        batches: Iterable[MicroBatch],
        like: Tensor,
        memory: OOMHalving,
        max_examples: int,
    ) -> None:
        self._graph, self._memory, self._capacity = graph, memory, max_examples
        self._rebuilt = list(batches)
        self._cached: list[Graph] = []
        self._like = like
        self._sums: Sums | None = None

    @property
    def sums(self) -> Sums:
        """Loss and gradient from the graphs of the first call; costs 1 gradient if there was none."""
        if self._sums is None:
            self(self._like)
        assert self._sums is not None
        return self._sums

    def __call__(self, rows: Tensor) -> Tensor:
        total = torch.zeros_like(rows)
        for cached in self._cached:
            total += cached.products(rows)
        first = Sums(self._like) if self._sums is None else None
        batches, self._rebuilt = self._rebuilt, []
        for whole in batches:
            for batch, graph, keep, products in self._memory.run(whole, lambda batch: self._multiply(batch, rows)):
                total += products
                if first is not None:
                    first.add(graph.loss, graph.weight, graph.gradient, batch.size)
                if keep:
                    self._capacity -= batch.size
                    self._cached.append(graph)
                else:
                    self._rebuilt.append(batch)
        if first is not None:
            self._sums = first
        return total

    def _multiply(self, batch: MicroBatch, rows: Tensor) -> tuple[MicroBatch, Graph, bool, Tensor]:
        """A micro-batch, its graph, whether to cache it, and its products."""
        graph, keep = self._graph(batch), batch.size <= self._capacity
        return batch, graph, keep, graph.products(rows, last=not keep)


@dataclass(frozen=True)
class PerBatch:
    """Statistics of B micro-batches for K vectors ``v_k``, where ``H_b = sum_i a_i H_i`` over micro-batch b.

    Their scatter gives sampling errors. In float64, on the device (float32 on MPS). Weight decay is not included. A
    micro-batch that did not fit into memory counts as its halves.

    Attributes:
        weights: (B,), ``A_b = sum_i a_i``.
        forms: (B, K, K), ``v_j' H_b v_k``.
        squares: (B, K), ``||H_b v_k||^2``.
        sizes: the number of examples of each micro-batch.
    """

    weights: Tensor
    forms: Tensor
    squares: Tensor
    sizes: tuple[int, ...]


class PerBatchRecord:
    """Collects ``PerBatch`` for ``rows`` (K, n), with K^2 + K inner products a micro-batch and no device sync."""

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows
        self._dtype = wide(rows.device)
        self._batches: list[tuple[Tensor, ...]] = []
        self._sizes: list[int] = []

    def add(self, weight: Tensor, products: Tensor, size: int) -> None:
        """Add the sums of one micro-batch; ``products`` is (K, n)."""
        count = len(self._rows)
        forms = torch.zeros(count, count, dtype=self._dtype, device=self._rows.device)
        squares = forms.new_zeros(count)
        for start in range(0, self._rows.shape[1], CHUNK):
            columns = slice(start, start + CHUNK)
            vectors, images = (t[:, columns].to(self._dtype) for t in (self._rows, products))
            forms += vectors @ images.T
            squares += images.square().sum(1)
        self._batches.append((weight.to(self._dtype), forms, squares))
        self._sizes.append(size)

    def result(self) -> PerBatch:
        """The statistics of all micro-batches added so far."""
        columns = [torch.stack(column) for column in zip(*self._batches, strict=True)]
        if not columns:
            count, empty = len(self._rows), torch.zeros(0, dtype=self._dtype, device=self._rows.device)
            columns = [empty, empty.view(0, count, count), empty.view(0, count)]
        weights, forms, squares = columns
        return PerBatch(weights, forms, squares, tuple(self._sizes))


@dataclass(frozen=True)
class LossAndGradient:
    """Loss and gradient at w from one pass over all the data, weight decay included.

    Attributes:
        loss: ``L(w)``.
        gradient: (n,) of L.
        spread: the scale of the gradient's rounding errors.
        examples: number of examples.
    """

    loss: float
    gradient: Tensor
    spread: float
    examples: int


def mean_loss_and_gradient(sums: Sums, terms: ForwardLoss) -> LossAndGradient:
    """The means of ``sums``, including weight decay.

    Raises: DataError when the total weight is not positive.
    """
    weight = float(sums.weight)
    if weight <= 0:
        raise DataError(
            f"The loss must have terms of positive total weight, got {weight:g}: every target is ignored, "
            "or the class weights are zero."
        )
    loss, gradient, decay = float(sums.loss) / weight, sums.gradient / weight, terms.problem.weight_decay
    if decay:
        loss += terms.decay()
        gradient += decay * torch.cat([p.detach().reshape(-1) for p in terms.params])
    return LossAndGradient(loss, gradient, float(sums.spread) / weight, sums.examples)


def require_same_loss(before: LossAndGradient, now: LossAndGradient) -> None:
    """Two passes over the same data must give the same loss and gradient, up to nondeterministic kernels.

    Raises: AuditError.
    """
    if now.examples != before.examples:
        raise AuditError(
            f"Every pass must see the same data, but one had {before.examples} examples and the next "
            f"{now.examples}. Fix the loader's order and length."
        )
    # The order of summation is the same in every pass, so only nondeterministic kernels may differ.
    eps = torch.finfo(now.gradient.dtype).eps
    difference = float(torch.linalg.vector_norm(now.gradient - before.gradient))
    changed = abs(now.loss - before.loss) > 1e-3 * abs(before.loss) + 1e3 * eps
    if changed or difference > 1e3 * eps * max(now.spread, before.spread):
        raise AuditError(
            f"Every pass must see the same loss, but it was {before.loss:.6g} and is {now.loss:.6g} and the gradient "
            f"moved by {difference:.2g}: the data change from pass to pass. Turn off shuffling and augmentation."
        )


def locate_nonfinite(batches: Iterable[MicroBatch], sums: Callable[[MicroBatch], Sums], products: str) -> None:
    """Raise DataError for the first of ``batches`` whose data, loss or derivatives are not finite.

    Args:
        batches: single examples, or the loader's batches where those are kept.
        sums: computes loss, gradient and a product of one of them.
        products: the name of the products in messages.
    """
    for batch in batches:
        where = batch.where(0) if batch.size == 1 else f"batch {batch.sources[0][0]}"
        parts = [part for leaf in leaves(batch.batch) if isinstance(leaf, Tensor) for part in strided(leaf)]
        if not all(bool(torch.isfinite(part).all()) for part in parts):
            raise DataError(f"The data must be finite, but {where} holds NaN or infinity. Drop or mend it.")
        result = sums(batch)
        for name, value in (("loss", result.loss), ("gradient", result.gradient), (products, result.products)):
            if not bool(torch.isfinite(value).all()):
                raise DataError(f"The {name} must be finite, but that of {where} is NaN or infinite at these weights.")
    raise DataError("Loss and derivatives must be finite: those of each example are, but not their sum. Lift dtype.")
