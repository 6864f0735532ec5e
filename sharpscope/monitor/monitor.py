"""SharpnessMonitor: lambda_max of the training loss while a model is trained, on a sample that is kept."""

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
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, SequentialSampler, Subset

from sharpscope.errors import ArgumentError, DataError, first_line, require_count
from sharpscope.importing import is_missing_module
from sharpscope.linalg.warm_lanczos import LargestEigenvalue, warm_lanczos
from sharpscope.measurement import Measurement, provenance, seeded
from sharpscope.monitor.unwrap import eager_mode, stability_edges, unwrapped, without_wrappers
from sharpscope.objective import Objective
from sharpscope.objective.accumulate import MAX_CACHED_BYTES, CachedGraphs, LossAndGradient, mean_loss_and_gradient
from sharpscope.objective.graph_wrappers import OOMHalving
from sharpscope.objective.micro_batches import MicroBatch, as_batches, map_tensors, micro_batches, rows
from sharpscope.problem import Problem, require_problem
from sharpscope.results import MonitorRecord, MonitorResult
from sharpscope.sampling.subsample import underlying_dataset
from sharpscope.weights.restore import preserved

# Examples in the sample unless told otherwise.
EXAMPLES = 32

# Products after which a measurement without known eigenvectors gives up.
COLD = 100

# What is logged, under "sharpness/" and its name.
LOGGED = (
    *("lambda_max", "lower", "upper", "two_over_eta", "momentum_edge", "sam_edge"),
    *("loss", "gradient_norm", "learning_rate"),
)

# What decides the sample and the function that is measured on it.
SAMPLED = ("num_examples", "split_examples", "seed", "dtype", "mode", "params", "weight_decay")


class SharpnessMonitor:
    """``lambda_max(H)`` of the training loss every some steps of your own loop, H its Hessian on one sample.

    The first measurement starts from noise and runs until ``||Hv - theta v|| <= tol theta``; later ones start from the
    last eigenvectors with a little fresh noise and take a few products. The interval is
    ``theta <= lambda_max <= theta + ||Hv - theta v||`` with rounding. It presumes that theta stands for the largest:
    right after a new direction has become the sharpest, a few products may still show the one before it.

    Weights, buffers, modes, gradients, optimizer and all random states are bit for bit what they would be without it,
    also when a measurement fails or is interrupted. What a module or a Dataset keeps elsewhere (an attribute that its
    forward pass writes, a random generator of its own) is seen by nobody, and moves. A measurement that fails warns the
    first time and leaves a record of NaN with the reason; it never ends the training. In a run of several processes
    only rank 0 measures, on the whole sample. The wrappers of DistributedDataParallel and ``torch.compile`` are passed
    by; forward hooks of your own do run.

    Beside lambda_max stand the loss and the gradient norm of the sample, and, with an optimizer, the learning rate of
    the next step and what its sharpness is held against: ``2/eta``, the edge of plain gradient descent;
    ``2 (1 + beta) / eta`` for torch's SGD with momentum beta (``sharpscope.edges`` has dampening and Nesterov too); for
    plain ``SAM`` of sharpscope around SGD, p = 2, ``(||g|| / (2 rho)) (sqrt(1 + 4 rho E / ||g||) - 1)`` at the sample's
    gradient norm, E that edge of SGD (Long and Bartlett 2024).
    They bound lambda_max of what the optimizer descends: its weight decay is in H only if ``problem.weight_decay`` says
    so, and for Adam and its like none of them is the edge.

    Args:
        problem: the live model, the loss, and the training data. A DataLoader may shuffle: the sample is drawn once,
            without its workers, and kept. In eval mode by default, so without dropout and with running statistics.
        optimizer: for learning rate and edges; the adapters find it themselves.
        every: steps from one measurement to the next.
        examples: in the sample; None for all. The default costs 6 to 7 % of training the bundled ``cnn`` in batches of
            64; 64 examples cost 13 %, and 7 % of batches of 128 (benchmarks/MONITOR_RESULTS.md). lambda_max of few
            examples is above that of all: in 1,200 steps of that ``cnn`` that of 64 was 1.1 to 2.9 times that of 8,192,
            of 256 1.0 to 1.6 times, and of 1,024 within 10 %. For the number itself take 1,024, less often.
        log: where numbers go: has ``add_scalar(tag, value, step)`` (TensorBoard), ``log_metrics(dict, step)``
            (Lightning), ``log(dict)`` (wandb), or is called with a dict. Tags: "sharpness/lambda_max" and others.
        seed: of the sample and the solver's noise, or a ``torch.Generator`` of its own.
        tol: relative to lambda_max.
        max_products: of a measurement that starts from known eigenvectors; what has not met ``tol`` by then is marked.
        dtype, device: of the computation, as in ``Objective``.

    Cost of a measurement: 1 gradient of the sample and 2 for each product: some 5, at most ``max_products``, and up to
    100 from noise. No pass over the data.

    Raises: ArgumentError, ProblemError and DataError for what cannot be measured, by a look at the first two examples.

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
        require_count("max_products", max_products, 2)  # a step and its check
        if isinstance(tol, bool) or not isinstance(tol, float | int) or not 0 < tol < 1:
            raise ArgumentError(f"tol must be a number between 0 and 1, got {tol!r}.")
        if not isinstance(seed, torch.Generator):
            require_count("seed", seed, 0)
            seed = torch.Generator().manual_seed(seed)
        self.optimizer, self.every, self._tol, self._max_products = unwrapped(optimizer), every, tol, max_products
        self._log = log_function(log)
        self._options: dict[str, Any] = {"dtype": dtype, "device": device, "micro_batch": SIZE}
        self._generator, self._seed = seeded(seed)
        self._sample: Sample = draw_sample(problem.data, examples, self._generator)
        self._problem = replace(problem, data=self._sample.batches)  # the data themselves may be let go
        self._known: Tensor | None = None
        self._most_kept: int | None = None
        self._records: list[MonitorRecord] = []
        self._steps, self._warned = 0, False
        self._provenance: Mapping[str, Any] = {}
        self._try()

    @property
    def sample(self) -> list[Any]:
        """The examples that are measured, in batches: ``data`` of a Problem for a closer look at the same number."""
        return self._sample.batches

    def step(self, number: int | None = None) -> MonitorRecord | None:
        """Count a step of the optimizer, after it, and measure every ``every`` of them; what was measured, or None.

        Args:
            number: of steps so far, where something else counts them.
        """
        self._steps = self._steps + 1 if number is None else number
        return self.measure() if self._steps % self.every == 0 else None

    def measure(self, step: int | None = None) -> MonitorRecord | None:
        """Measure now, at the weights after ``step`` steps; by default those counted. None on ranks other than 0."""
        if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank():
            return None
        number, started = self._steps if step is None else step, time.perf_counter()
        with preserved():
            try:
                record = self._measured(number)
            # Whatever it is, it is no reason to lose a training run.
            except Exception as error:
                record = MonitorRecord(step=number, reason=first_line(error))
                self._warn(f"No sharpness at step {number}, and training goes on: {first_line(error)}")
            record = replace(record, seconds=time.perf_counter() - started)
            self._records.append(record)
            try:
                self._log(number, _logged(record))
            except Exception as error:
                self._warn(f"The log= of the sharpness monitor failed, and training goes on: {first_line(error)}")
        return record

    def result(self) -> MonitorResult:
        """Everything measured so far."""
        return MonitorResult(tuple(self._records), self._provenance)

    def resume(self, result: MonitorResult, step: int) -> None:
        """Go on after ``step`` steps with the records of an earlier run up to there; the next starts from noise.

        Raises: ArgumentError where those are of another sample, whose lambda_max is another number.
        """
        for key in SAMPLED if result.records else ():
            ours, theirs = self._provenance.get(key), result.provenance.get(key)
            if ours != theirs:
                raise ArgumentError(
                    f"Records go on with the sample that they began with, but {key} is {ours!r} and was {theirs!r}. "
                    "Pass what it was, or start anew."
                )
        self._records = [record for record in result.records if record.step <= step]
        self._steps, self._known = step, None

    def lightning(self) -> Any:
        """A ``lightning.pytorch.Callback`` that measures every ``every`` optimizer steps, by ``trainer.global_step``.

        Of ``pytorch_lightning`` where that is what is imported or installed.

        Raises: ArgumentError when neither is installed.
        """
        return lightning_callback(self.step, self._offer)

    def huggingface(self) -> Any:
        """A ``transformers.TrainerCallback`` that measures every ``every`` optimizer steps, by ``state.global_step``.

        Raises: ArgumentError when transformers is not installed.
        """
        return huggingface_callback(self.step, self._offer)

    def _offer(self, optimizer: Any) -> None:
        """Take a trainer's optimizer where none was given."""
        if self.optimizer is None:
            self.optimizer = unwrapped(optimizer)

    def _measurement(self, **changes: Any) -> Measurement:
        """A measurement at the weights as they are now."""
        problem = without_wrappers(replace(self._problem, **changes))
        return Measurement(problem, self._generator, audited=False, **self._options)

    def _try(self) -> None:
        """One product on the first two examples, so that what can never be measured is said before the training."""
        first = next(micro_batches(self._sample.batches, 2))
        m = self._measurement(data=[first.batch])
        objective = m.objective
        with eager_mode(objective.terms.model), m:
            objective.graph(first).products(torch.ones(1, objective.num_params).to(objective.empty_block()), last=True)
        self._note(objective)

    def _note(self, objective: Objective) -> None:
        said = provenance(
            self._problem,
            objective,
            self._seed,
            split_examples=self._sample.drawn_from,
            every=self.every,
            tol=self._tol,
            max_products=self._max_products,
        )
        self._provenance = {**said, "num_examples": self._sample.examples}

    def _measured(self, step: int) -> MonitorRecord:
        m = self._measurement()
        objective = m.objective
        with eager_mode(objective.terms.model), m:
            graphs = self._graphs(objective)
            point = mean_loss_and_gradient(graphs.sums, objective.terms)
            if not (math.isfinite(point.loss) and bool(torch.isfinite(point.gradient).all())):
                raise DataError(f"The loss and its gradient must be finite, got a loss of {point.loss:g}.")
            found = self._top(objective, graphs)
        self._known = found.vectors
        self._note(objective)
        return self._record(step, point, found, objective.gradients)

    def _graphs(self, objective: Objective) -> CachedGraphs:
        """The graphs of the sample; at most MAX_CACHED_BYTES bytes of them are kept for the next product."""
        if self._most_kept is None:
            # Of one micro-batch any pass holds the graph, and to count its bytes costs 24 examples.
            several = self._sample.examples > SIZE
            each = objective.graph_bytes(SIZE) // SIZE if several else 0
            self._most_kept = MAX_CACHED_BYTES // max(1, each)
        parts: list[MicroBatch] = list(micro_batches(objective.data, SIZE))
        room = OOMHalving(device=objective.device)
        return CachedGraphs(objective.graph, parts, objective.empty_block(), room, self._most_kept)

    def _top(self, objective: Objective, graphs: CachedGraphs) -> LargestEigenvalue:
        weight, decay = float(graphs.sums.weight), objective.problem.weight_decay

        def products(rows: Tensor) -> Tensor:
            found = graphs(rows) / weight + decay * rows
            if not bool(torch.isfinite(found).all()):
                raise DataError("The Hessian's products must be finite, got NaN or infinity.")
            return found

        like, known = objective.empty_block(), self._known
        if known is not None and known.shape[1] != like.shape[1]:
            known = None  # parameters were frozen or thawed
        return warm_lanczos(
            products,
            like,
            None if known is None else known.to(like),
            tol=self._tol,
            max_products=COLD if known is None else self._max_products,
            generator=self._generator,
        )

    def _record(self, step: int, point: LossAndGradient, found: LargestEigenvalue, gradients: float) -> MonitorRecord:
        norm = float(torch.linalg.vector_norm(point.gradient))
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
            said = f"{text} Later ones are silent; the result counts them."
            with contextlib.suppress(RuntimeWarning):  # where warnings are errors, training goes on all the same
                warnings.warn(said, RuntimeWarning, stacklevel=level)


def _logged(record: MonitorRecord) -> dict[str, float]:
    values = {f"sharpness/{name}": float(getattr(record, name)) for name in LOGGED}
    return {tag: value for tag, value in values.items() if math.isfinite(value)}


LIGHTNING = ("lightning.pytorch", "pytorch_lightning")


def lightning_callback(step: Callable[[int], object], offer: Callable[[Any], None]) -> Any:
    """``step(number)`` after each optimizer step on rank 0, and ``offer(optimizer)`` before the first of them."""
    # The two packages have classes of their own, so the one whose Trainer is in use comes first.
    names = sorted(LIGHTNING, key=lambda name: name not in sys.modules)
    base = _imported(names, "lightning").Callback

    class Callback(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()
            self._seen = 0

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self._seen = trainer.global_step
            if trainer.optimizers:
                offer(trainer.optimizers[0])

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *batch: Any, **options: Any) -> None:
            # While gradients accumulate, batches end without a step.
            if trainer.is_global_zero and trainer.global_step != self._seen:
                self._seen = trainer.global_step
                step(self._seen)

    return Callback()


def huggingface_callback(step: Callable[[int], object], offer: Callable[[Any], None]) -> Any:
    """As ``lightning_callback``."""
    base = _imported(("transformers",), "transformers").TrainerCallback

    class Callback(base):  # type: ignore[misc, valid-type]
        def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **options: Any) -> None:
            offer(optimizer)
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
    """``sink(step, {tag: value})`` that writes to ``log``.

    ``log`` has ``add_scalar(tag, value, step)``, ``log_metrics(dict, step)`` or ``log(dict)``, looked for in this
    order, or is called with a dict; None drops everything. Where no step can be passed it is in the dict, as
    "sharpness/step".

    Raises: ArgumentError when it is none of these.
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


# Examples a graph.
SIZE = 256


@dataclass(frozen=True)
class Sample:
    """Examples in batches of at most SIZE where they can be cut.

    Attributes:
        batches: as the problem's data have them.
        examples: in them, and ``drawn_from``: in the data.
    """

    batches: list[Any]
    examples: int
    drawn_from: int


def draw_sample(data: Any, examples: int | None, generator: torch.Generator) -> Sample:
    """``examples`` of the data at random without replacement, in their order, or all of them.

    Of a Dataset, and of a DataLoader that takes one in order or shuffles it, only those drawn are read, in this
    process. Other data are walked once. Batches that cannot be cut are drawn whole until there are enough examples.
    Every random state is left as it was, those of the loader's generators too.

    Raises: DataError for data that cannot be walked, or hold no example.
    """
    with preserved(data=data):
        dataset = underlying_dataset(data, SequentialSampler, RandomSampler, DistributedSampler)
        if dataset is None:
            found, total = _walked(micro_batches(as_batches(data), None), examples, generator)
        else:
            total, collate = len(dataset), data.collate_fn if isinstance(data, DataLoader) else None
            chosen = torch.arange(total) if examples is None else torch.randperm(total, generator=generator)[:examples]
            own = Subset(dataset, chosen.sort().values.tolist())
            found = list(micro_batches(DataLoader(own, SIZE, collate_fn=collate), None))
    if not found:
        raise DataError("The data must hold at least one example, got none. Check the data set and its filters.")
    parts = list(micro_batches([part.batch for part in found], SIZE))
    return Sample([part.batch for part in parts], sum(part.size for part in parts), total)


def _walked(
    parts: Iterator[MicroBatch], examples: int | None, generator: torch.Generator
) -> tuple[list[MicroBatch], int]:
    """Copies of the examples of smallest random key, or of whole batches that cannot be cut; and how many came."""
    total, held = 0, list[tuple[Tensor, MicroBatch]]()
    for part in parts:
        total += part.size
        keys = torch.rand(part.size if part.splittable else 1, generator=generator, dtype=torch.float64)
        held.append((keys, part))
        # A loader may fill the same tensors again, so the copy is taken before the next batch is asked for.
        held = _smallest(held, total if examples is None else examples)
    return [part for _, part in held], total


def _smallest(held: Sequence[tuple[Tensor, MicroBatch]], examples: int) -> list[tuple[Tensor, MicroBatch]]:
    """What comes first by key until there are ``examples``; a batch with a single key counts whole."""
    keys = torch.cat([own for own, _ in held])
    sizes = torch.cat([torch.full((len(own),), part.size // len(own)) for own, part in held])
    order = keys.argsort()
    before = sizes[order].cumsum(0) - sizes[order]
    last = keys[order[before < examples]].max()
    found = []
    for own, part in held:
        places = (own <= last).nonzero()[:, 0]
        if len(places):
            found.append((own[places], _copied(part, places, whole=len(own) != part.size)))
    return found


def _copied(part: MicroBatch, places: Tensor, whole: bool) -> MicroBatch:
    """The examples at ``places``, or the whole batch, as copies."""
    if whole:
        return MicroBatch(map_tensors(part.batch, lambda t: t.detach().clone()), part.size, ())
    return MicroBatch(rows(part.batch, places), len(places), ())
