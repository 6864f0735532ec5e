"""The monitor: counts steps, measures, and keeps what it measured."""

from __future__ import annotations

import contextlib
import math
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from sharpscope.errors import ArgumentError, DataError, first_line, require_count
from sharpscope.linalg.warm_lanczos import LargestEigenvalue, warm_lanczos
from sharpscope.measurement import Measurement, provenance, seeded
from sharpscope.monitor.loggers import huggingface_callback, lightning_callback, log_function
from sharpscope.monitor.sample import SIZE, Sample, draw_sample
from sharpscope.monitor.unwrap import eager_mode, stability_edges, unwrapped, without_wrappers
from sharpscope.objective import Objective
from sharpscope.objective.accumulate import MAX_CACHED_BYTES, CachedGraphs, LossAndGradient, mean_loss_and_gradient
from sharpscope.objective.graph_wrappers import OOMHalving
from sharpscope.objective.micro_batches import MicroBatch, micro_batches
from sharpscope.problem import Problem, require_problem
from sharpscope.results import MonitorRecord, MonitorResult
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
