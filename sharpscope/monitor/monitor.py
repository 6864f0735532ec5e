"""SharpnessMonitor: lambda_max of the training loss during training, on a fixed sample."""

from __future__ import annotations

import contextlib
import importlib
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, SequentialSampler, Subset

from sharpscope.errors import ArgumentError, DataError, first_line, require_count
from sharpscope.fingerprint import fingerprint, state_of
from sharpscope.importing import is_missing_module
from sharpscope.linalg.warm_lanczos import LargestEigenvalue, warm_lanczos
from sharpscope.measurement import Measurement, provenance, seeded
from sharpscope.monitor.unwrap import stability_edges, unwrapped, without_wrappers
from sharpscope.objective import Objective
from sharpscope.objective.accumulate import MAX_CACHED_BYTES, CachedGraphs, LossAndGradient, mean_loss_and_gradient
from sharpscope.objective.audit import require_slope
from sharpscope.objective.cost_and_out_of_memory import OOMHalving
from sharpscope.objective.micro_batches import MicroBatch, as_batches, map_tensors, micro_batches, rows
from sharpscope.problem import Problem, require_problem
from sharpscope.random_streams import stream
from sharpscope.results import MonitorRecord, MonitorResult
from sharpscope.results.serialization import as_json
from sharpscope.sampling.subsample import underlying_dataset
from sharpscope.weights.norm_ball import norm_of
from sharpscope.weights.restore import preserved

# Default number of examples in the sample.
EXAMPLES = 32

# Maximum number of products of a measurement that starts from a random vector.
MAX_PRODUCTS_RANDOM_START = 100

# Fields that are logged, with the prefix "sharpness/".
LOGGED = (
    *("lambda_max", "lower", "upper", "two_over_eta", "momentum_edge", "sam_edge"),
    *("loss", "gradient_norm", "learning_rate"),
)

# Entries of the provenance that determine the run, the sample, and the loss measured on it.
RUN_KEYS = (
    *("recipe", "data", "split", "label_noise", "num_examples", "split_examples", "sample", "seed"),
    *("num_params", "params", "loss_function", "loss_settings", "weight_decay", "mode", "dtype"),
)

# Those that are hashes.
HASHES = ("sample", "loss_settings")


class SharpnessMonitor:
    """Measure ``lambda_max(H)`` every few steps of a training loop, H the Hessian of the loss on a fixed sample.

    The first measurement starts from a random vector and runs until ``||Hv - theta v|| <= tol theta``. Later ones start
    from the last eigenvectors plus a little noise and need a few products. The interval is
    ``theta <= lambda_max <= theta + ||Hv - theta v||``, plus rounding. It assumes that theta approximates the largest
    eigenvalue: when another direction has just become the sharpest, a few products may not find it yet.

    Weights, buffers, modes, gradients, optimizer and random states stay bit-identical to training without the monitor,
    even if a measurement fails or is interrupted. State that a module or Dataset keeps elsewhere (a plain attribute
    written in forward, a random generator of its own) is not detected and does change. A failed measurement never ends
    the training: it warns once and records NaN with the reason. With several processes, only rank 0 measures, on the
    whole sample. DistributedDataParallel and ``torch.compile`` are bypassed; forward hooks do run.

    A record also has the loss and gradient norm on the sample and, with an optimizer, the learning rate of the next
    step and the edges of stability to compare lambda_max with:

    - ``2/eta`` of plain gradient descent;
    - ``E = 2 (1 + beta) / eta`` of torch's SGD with momentum beta (see ``sharpscope.edge_of_stability`` for dampening
      and Nesterov momentum);
    - ``(||g|| / (2 rho)) (sqrt(1 + 4 rho E / ||g||) - 1)`` of plain ``sharpscope.optim.SAM`` around SGD, p = 2, with
      the sample's gradient norm (Long and Bartlett 2024).

    They apply to the function that the optimizer minimises: include its weight decay by ``problem.weight_decay``. None
    of them is the edge of adaptive optimizers such as Adam.

    Args:
        problem: the live model, the loss, and the training data. A DataLoader may shuffle: the sample is drawn once,
            without its workers. Eval mode by default: no dropout, running statistics.
        optimizer: for learning rate and edges; the callbacks of the trainers find it themselves.
        every: steps between measurements.
        examples: size of the sample; None: all data. The default costs 6 to 7 % of training the bundled ``cnn`` in
            batches of 64; 64 examples cost 13 %, or 7 % with batches of 128 (benchmarks/MONITOR_RESULTS.md). Few
            examples overestimate lambda_max: over 1,200 steps of that ``cnn``, 64 examples gave 1.1 to 2.9 times the
            value of 8,192, 256 gave 1.0 to 1.6 times, and 1,024 were within 10 %. For accurate values use 1,024, less
            often.
        log: a logger with ``add_scalar(tag, value, step)`` (TensorBoard), ``log_metrics(dict, step)`` (Lightning) or
            ``log(dict)`` (wandb), or a callable that takes a dict. Tags are "sharpness/lambda_max" etc.
        seed: seed or ``torch.Generator`` of the sample and the solver's noise.
        tol: tolerance relative to lambda_max.
        max_products: Hessian-vector products of a measurement that starts from known eigenvectors; if ``tol`` is not
            met by then, the record is marked as not converged.
        dtype, device: as for ``Objective``.

    Cost of a measurement: 1 gradient of the sample plus 2 for each product: typically 5 products, at most
        ``max_products``, and up to 100 from a random start. No pass over the data.

    Raises: ArgumentError, ProblemError or DataError if the first two examples cannot be measured.

    >>> import sharpscope
    >>> import torch
    >>> data = torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.zeros(3, 1)
    >>> model = torch.nn.Linear(3, 1, bias=False)  # H = diag(6, 8/3, 2/3)
    >>> problem = sharpscope.Problem(model=model, loss=torch.nn.MSELoss(), data=data)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> monitor = sharpscope.SharpnessMonitor(problem, optimizer, every=2, tol=1e-3)
    >>> for _ in range(4):
    ...     optimizer.zero_grad()
    ...     torch.nn.functional.mse_loss(model(data[0]), data[1]).backward()
    ...     optimizer.step()
    ...     record = monitor.step()
    >>> monitor.result().lambda_max.round(2), record.two_over_eta
    (array([6., 6.]), 20.0)
    """

    def __init__(
        self,
        problem: Problem,
        optimizer: Any = None,
        *,
        every: int = 100,
        examples: int | None = EXAMPLES,
        log: Any = None,
        seed: int | torch.Generator = 0,
        tol: float = 0.1,
        max_products: int = 10,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        require_problem(problem)
        for name, count in (("every", every), ("examples", 1 if examples is None else examples)):
            require_count(name, count)
        require_count("max_products", max_products, 2)  # one step and its verification
        if isinstance(tol, bool) or not isinstance(tol, float | int) or not 0 < tol < 1:
            raise ArgumentError(f"tol must be a number between 0 and 1, got {tol!r}.")
        if not isinstance(seed, torch.Generator):
            require_count("seed", seed, 0)
            seed = torch.Generator().manual_seed(seed)
        self.optimizer, self.every, self._tol, self._max_products = unwrapped(optimizer), every, tol, max_products
        self._log = log_function(log)
        self._options: dict[str, Any] = {"dtype": dtype, "device": device, "micro_batch": SIZE}
        self._generator, self._seed = seeded(seed, "monitor")
        self._sample: Sample = draw_sample(problem.data, examples, self._generator)
        self._fingerprint: str | None = None
        with contextlib.suppress(ArgumentError):  # batches of other objects than tensors, arrays, numbers and text
            self._fingerprint = fingerprint(self._sample.batches)
        self._problem = replace(problem, data=self._sample.batches)  # so that the data can be freed
        self._known: Tensor | None = None
        self._max_cached: int | None = None
        self._records: list[MonitorRecord] = []
        self._steps, self._warned = 0, False
        self._provenance: Mapping[str, Any] = {}
        self._check()

    @property
    def sample(self) -> list[Any]:
        """The measured examples, in batches; usable as ``data`` of a Problem to analyse the same sample further."""
        return self._sample.batches

    def step(self, number: int | None = None) -> MonitorRecord | None:
        """Call this after each optimizer step; every ``every`` steps it measures.

        Args:
            number: steps so far; None counts the calls.

        Returns: the record, or None if this step is not measured.
        """
        self._steps = self._steps + 1 if number is None else number
        return self.measure() if self._steps % self.every == 0 else None

    def measure(self, step: int | None = None) -> MonitorRecord | None:
        """Measure now and record it as ``step``, by default the steps so far; return None on ranks other than 0."""
        if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank():
            return None
        number, started = self._steps if step is None else step, time.perf_counter()
        with preserved():
            try:
                record = self._measured(number)
            # No failure of the monitor may end a training run.
            except Exception as error:
                record = MonitorRecord(step=number, reason=first_line(error))
                self._warn(f"Sharpness could not be measured at step {number}; training goes on: {first_line(error)}")
            record = replace(record, seconds=time.perf_counter() - started)
            self._records.append(record)
            try:
                self._log(number, _logged(record))
            except Exception as error:
                self._warn(f"The log= of the sharpness monitor failed; training goes on: {first_line(error)}")
        return record

    def result(self) -> MonitorResult:
        """All records so far, with their provenance."""
        return MonitorResult(tuple(self._records), self._provenance)

    def resume(self, result: MonitorResult, step: int) -> None:
        """Continue an earlier run after ``step`` steps: keep its records up to there; restart from a random vector.

        Raises: ArgumentError if those records are of another run (recipe), sample or loss.
        """
        for key in RUN_KEYS if result.records else ():
            ours, theirs = (as_json(known.get(key)) for known in (self._provenance, result.provenance))
            if ours != theirs and not (key in HASHES and theirs is None):  # of a version that did not store it
                raise ArgumentError(
                    f"Resuming the monitor needs the same run and sample, but {key} is {ours!r} and was {theirs!r}. "
                    "Change it back, or start a new run."
                )
        self._records = [record for record in result.records if record.step <= step]
        self._steps, self._known = step, None

    def lightning(self) -> Any:
        """A ``lightning.pytorch`` callback that measures every ``every`` optimizer steps (``trainer.global_step``).

        It is of ``pytorch_lightning`` if that package is imported, or only that is installed.

        Raises: ArgumentError if neither is installed.
        """
        return lightning_callback(self.step, self._set_optimizer)

    def huggingface(self) -> Any:
        """A ``transformers.TrainerCallback`` that measures every ``every`` optimizer steps (``state.global_step``).

        Raises: ArgumentError if transformers is not installed.
        """
        return huggingface_callback(self.step, self._set_optimizer)

    def _set_optimizer(self, optimizer: Any) -> None:
        """Use a trainer's optimizer if none was given."""
        if self.optimizer is None:
            self.optimizer = unwrapped(optimizer)

    def _measurement(self, **changes: Any) -> Measurement:
        """A measurement at the current weights."""
        problem = without_wrappers(replace(self._problem, **changes))
        return Measurement(problem, self._generator, audited=False, **self._options)

    def _check(self) -> None:
        """Compute one product on the first two examples, so that errors are raised before the training.

        Their gradient must be the slope of their loss: where it is cut off, products are wrong and no error says so.
        """
        first = next(micro_batches(self._sample.batches, 2))
        m = self._measurement(data=[first.batch])
        objective = m.objective
        with m:
            objective.graph(first).products(torch.ones(1, objective.num_params).to(objective.empty_block()), last=True)
            require_slope(objective, first, stream(self._generator.initial_seed(), "audit"))
        self._set_provenance(objective)

    def _set_provenance(self, objective: Objective) -> None:
        entries = provenance(
            self._problem,
            objective,
            self._seed,
            split_examples=self._sample.drawn_from,
            sample=self._fingerprint,
            loss_settings=_settings_of(self._problem.loss),
            every=self.every,
            tol=self._tol,
            max_products=self._max_products,
        )
        self._provenance = {**entries, "num_examples": self._sample.examples}

    def _measured(self, step: int) -> MonitorRecord:
        if getattr(self.optimizer, "is_perturbed", False):
            raise ArgumentError("The weights are at w + e, between first_step() and second_step(). Measure after both.")
        m = self._measurement()
        objective = m.objective
        with m:
            graphs = self._graphs(objective)
            point = mean_loss_and_gradient(graphs.sums, objective.terms)
            if not (math.isfinite(point.loss) and bool(torch.isfinite(point.gradient).all())):
                raise DataError(f"The loss and its gradient must be finite, got a loss of {point.loss:g}.")
            found = self._top(objective, graphs)
        self._known = found.vectors
        self._set_provenance(objective)
        return self._record(step, point, found, objective.gradients)

    def _graphs(self, objective: Objective) -> CachedGraphs:
        """The graphs of the sample, at most MAX_CACHED_BYTES of which are kept for further products."""
        if self._max_cached is None:
            # A single micro-batch is always kept; measuring its bytes would cost 24 examples.
            several = self._sample.examples > SIZE
            bytes_per_example = objective.graph_bytes(SIZE) // SIZE if several else 0
            self._max_cached = MAX_CACHED_BYTES // max(1, bytes_per_example)
        parts: list[MicroBatch] = list(micro_batches(objective.data, SIZE))
        oom_halving = OOMHalving(device=objective.device)
        return CachedGraphs(objective.graph, parts, objective.empty_block(), oom_halving, self._max_cached)

    def _top(self, objective: Objective, graphs: CachedGraphs) -> LargestEigenvalue:
        weight, decay = float(graphs.sums.weight), objective.problem.weight_decay

        def products(rows: Tensor) -> Tensor:
            found = graphs(rows) / weight + decay * rows
            if not bool(torch.isfinite(found).all()):
                raise DataError("The Hessian's products must be finite, got NaN or infinity.")
            return found

        like, known = objective.empty_block(), self._known
        if known is not None and known.shape[1] != like.shape[1]:
            known = None  # parameters were frozen or unfrozen
        return warm_lanczos(
            products,
            like,
            None if known is None else known.to(like),
            tol=self._tol,
            max_products=MAX_PRODUCTS_RANDOM_START if known is None else self._max_products,
            generator=self._generator,
        )

    def _record(self, step: int, point: LossAndGradient, found: LargestEigenvalue, gradients: float) -> MonitorRecord:
        norm = norm_of([point.gradient])
        return MonitorRecord(
            step=step,
            lambda_max=found.value,
            lower=found.lower,
            upper=found.upper,
            converged=found.converged,
            loss=point.loss,
            gradient_norm=norm,
            **asdict(stability_edges(self.optimizer, norm)),
            products=found.products,
            gradients=gradients,
        )

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            frame, level = sys._getframe().f_back, 2
            while frame is not None and frame.f_code.co_filename == __file__:
                frame, level = frame.f_back, level + 1
            message = f"{text} Further failures do not warn; the result counts them."
            with contextlib.suppress(RuntimeWarning):  # if warnings are errors
                warnings.warn(message, RuntimeWarning, stacklevel=level)


def _logged(record: MonitorRecord) -> dict[str, float]:
    values = {f"sharpness/{name}": float(getattr(record, name)) for name in LOGGED}
    return {tag: value for tag, value in values.items() if math.isfinite(value)}


LIGHTNING = ("lightning.pytorch", "pytorch_lightning")


def lightning_callback(step: Callable[[int], object], set_optimizer: Callable[[Any], None]) -> Any:
    """A callback that calls ``step(number)`` after each optimizer step on rank 0; ``set_optimizer`` before training."""
    # The two packages have separate classes; prefer the package that is imported already.
    names = sorted(LIGHTNING, key=lambda name: name not in sys.modules)
    base = _imported(names, "lightning").Callback

    class Callback(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()
            self._seen = 0

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self._seen = trainer.global_step
            if trainer.optimizers:
                set_optimizer(trainer.optimizers[0])

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *batch: Any, **options: Any) -> None:
            # With gradient accumulation, not every batch ends with a step.
            if trainer.is_global_zero and trainer.global_step != self._seen:
                self._seen = trainer.global_step
                step(self._seen)

    return Callback()


def huggingface_callback(step: Callable[[int], object], set_optimizer: Callable[[Any], None]) -> Any:
    """As ``lightning_callback``, for transformers."""
    base = _imported(("transformers",), "transformers").TrainerCallback

    class Callback(base):  # type: ignore[misc, valid-type]
        def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **options: Any) -> None:
            set_optimizer(optimizer)
            if state.is_world_process_zero:
                step(state.global_step)

    return Callback()


def _imported(names: Sequence[str], package: str) -> Any:
    for name in names:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if not is_missing_module(error, name):
                raise
    raise ArgumentError(f"{' or '.join(names)} must be installed for this callback. Install it: pip install {package}.")


Sink = Callable[[int, Mapping[str, float]], None]


def log_function(log: Any) -> Sink:
    """Return ``sink(step, {tag: value})``, which writes to ``log``.

    ``log`` has, in order of preference, ``add_scalar(tag, value, step)``, ``log_metrics(dict, step)`` or ``log(dict)``,
    or is called with a dict; None discards everything. A dict without a step argument has the entry "sharpness/step".

    Raises: ArgumentError for another object.
    """
    if log is None:
        return lambda step, values: None
    if callable(getattr(log, "add_scalar", None)):

        def scalars(step: int, values: Mapping[str, float]) -> None:
            for tag, value in values.items():
                log.add_scalar(tag, value, step)

        return scalars
    if callable(getattr(log, "log_metrics", None)):
        return lambda step, values: log.log_metrics(dict(values), step)
    take = log.log if callable(getattr(log, "log", None)) else log
    if not callable(take):
        raise ArgumentError(
            "log must have add_scalar(tag, value, step), log_metrics(dict, step) or log(dict), or be callable with a "
            f"dict, got {type(log).__name__}."
        )
    return lambda step, values: take({"sharpness/step": step, **values})


# Examples per autograd graph.
SIZE = 256


@dataclass(frozen=True)
class Sample:
    """Examples in batches of at most SIZE, if the batches can be split.

    Attributes:
        batches: in the form of the problem's data.
        examples: number of examples in the sample.
        drawn_from: number of examples in the data.
    """

    batches: list[Any]
    examples: int
    drawn_from: int


def draw_sample(data: Any, examples: int | None, generator: torch.Generator) -> Sample:
    """Draw ``examples`` of the data uniformly without replacement, in their order; None takes all.

    From a Dataset, or a DataLoader that reads one in order or shuffled, only the chosen examples are read, in this
    process. Other data are iterated over once. Batches that cannot be split are drawn whole until there are enough
    examples. All random states are restored, including those of the loader's generators.

    Raises: DataError for data that cannot be iterated over, or are empty.
    """
    with preserved(data=data):
        dataset = underlying_dataset(data, SequentialSampler, RandomSampler, DistributedSampler)
        if dataset is None:
            found, total = _reservoir(micro_batches(as_batches(data), None), examples, generator)
        else:
            total, collate = len(dataset), data.collate_fn if isinstance(data, DataLoader) else None
            chosen = torch.arange(total) if examples is None else torch.randperm(total, generator=generator)[:examples]
            own = Subset(dataset, chosen.sort().values.tolist())
            found = list(micro_batches(DataLoader(own, SIZE, collate_fn=collate), None))
    if not found:
        raise DataError("The data must hold at least one example, got none. Check the data set and its filters.")
    parts = list(micro_batches([part.batch for part in found], SIZE))
    return Sample([part.batch for part in parts], sum(part.size for part in parts), total)


def _reservoir(
    parts: Iterator[MicroBatch], examples: int | None, generator: torch.Generator
) -> tuple[list[MicroBatch], int]:
    """Copies of the examples (or unsplittable batches) of smallest random key, and the number of all examples."""
    total, chosen = 0, list[tuple[Tensor, MicroBatch]]()
    for part in parts:
        total += part.size
        keys = torch.rand(part.size if part.splittable else 1, generator=generator, dtype=torch.float64)
        chosen.append((keys, part))
        # Copied before the next batch is read, since a loader may reuse its tensors.
        chosen = _smallest_keys(chosen, total if examples is None else examples)
    return [part for _, part in chosen], total


def _smallest_keys(keyed: Sequence[tuple[Tensor, MicroBatch]], examples: int) -> list[tuple[Tensor, MicroBatch]]:
    """Copies of the first ``examples`` by key; a batch with a single key is taken whole."""
    keys = torch.cat([own for own, _ in keyed])
    sizes = torch.cat([torch.full((len(own),), part.size // len(own)) for own, part in keyed])
    order = keys.argsort()
    before = sizes[order].cumsum(0) - sizes[order]
    last = keys[order[before < examples]].max()
    found = []
    for own, part in keyed:
        indices = (own <= last).nonzero()[:, 0]
        if len(indices):
            found.append((own[indices], _copied(part, indices, whole=len(own) != part.size)))
    return found


def _copied(part: MicroBatch, indices: Tensor, whole: bool) -> MicroBatch:
    """Copies of the examples at ``indices``, or of the whole batch."""
    if whole:
        return MicroBatch(map_tensors(part.batch, lambda t: t.detach().clone()), part.size, ())
    return MicroBatch(rows(part.batch, indices), len(indices), ())


def _settings_of(loss: Any) -> str | None:
    """A hash of the plain attributes and buffers of a loss; None for a function, or a loss with parameters."""
    if not isinstance(loss, nn.Module) or any(True for _ in loss.parameters()):
        return None
    _, buffers, attributes, _ = state_of(loss)
    return fingerprint(buffers, attributes)
