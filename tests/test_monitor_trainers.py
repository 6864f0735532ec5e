"""The monitor in other libraries' loops: loggers are given its records, and trainers end in the same bits."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sharpscope import ArgumentError, MonitorResult, SharpnessMonitor
from sharpscope.optim import SAM
from watched import X, Y, adam, everything, net, problem, seed_everything


class Scalars:
    def __init__(self) -> None:
        self.seen: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.seen.append((tag, value, step))


class Metrics:
    def __init__(self) -> None:
        self.seen: list[tuple[str, float, int]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.seen += [(tag, value, step) for tag, value in metrics.items()]


class Wandb:
    def __init__(self) -> None:
        self.seen: list[tuple[str, float, int]] = []

    def log(self, values: dict[str, float]) -> None:
        step = int(values.pop("sharpness/step"))
        self.seen += [(tag, value, step) for tag, value in values.items()]


class Function(Wandb):
    log = None  # type: ignore[assignment]

    def __call__(self, values: dict[str, float]) -> None:
        Wandb.log(self, values)


@pytest.mark.parametrize("kind", [Scalars, Metrics, Wandb, Function])
def test_each_kind_of_logger_is_given_the_record(kind: Callable[[], Any]) -> None:
    """Tags, values and step are the record's; what is NaN is left out."""
    model, log = net(), kind()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.25)
    monitor = SharpnessMonitor(problem(model), optimizer, log=log)
    record = monitor.measure(70)
    assert record is not None
    assert {step for _, _, step in log.seen} == {70}
    values = {tag: value for tag, value, _ in log.seen}
    assert values["sharpness/lambda_max"] == record.lambda_max
    assert values["sharpness/two_over_eta"] == 8
    assert values["sharpness/sam_edge"] == record.sam_edge
    assert "sharpness/momentum_edge" not in values


def test_a_logger_that_fails_is_told_once_and_random_numbers_it_drew_are_put_back() -> None:
    """The record is kept, the run goes on, and its random state too."""

    def log(values: dict[str, float]) -> None:
        torch.rand(1)
        raise OSError("disk full")

    monitor = SharpnessMonitor(problem(net()), every=1, log=log)
    state = torch.get_rng_state()
    with pytest.warns(RuntimeWarning, match="log= of the sharpness monitor failed.*disk full"):
        monitor.step()
    monitor.step()
    assert torch.equal(state, torch.get_rng_state())
    assert len(monitor.result().records) == 2


def lightning_run(monitored: bool, callback_of: Any, folder: Path) -> tuple[dict[str, Any], list[int]]:
    pl = pytest.importorskip("lightning.pytorch")

    class Lit(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = net(True)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)  # type: ignore[no-any-return]

        def training_step(self, batch: Any, index: int) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return adam(self)

    seed_everything()
    lit = Lit()
    loader = DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=True)
    monitor = SharpnessMonitor(problem(lit, data=loader), every=2)
    trainer = pl.Trainer(
        max_epochs=2,
        accumulate_grad_batches=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[callback_of(monitor)] if monitored else [],
    )
    trainer.fit(lit, loader)
    found = everything(lit, trainer.optimizers[0])
    found.pop("python")  # what Lightning draws for file names is its own
    return found, monitor.result().steps.tolist()


@pytest.mark.filterwarnings("ignore")
def test_lightning_trains_to_the_same_bits(tmp_path: Path) -> None:
    """The callback measures at every second optimizer step, not batch, and the run is the one without it."""
    watched, steps = lightning_run(True, SharpnessMonitor.lightning, tmp_path)
    bare, none = lightning_run(False, None, tmp_path)
    assert watched == bare
    assert (steps, none) == ([2, 4, 6, 8], [])


@pytest.mark.filterwarnings("ignore")
def test_huggingface_trains_to_the_same_bits(tmp_path: Path) -> None:
    """The callback measures by the Trainer's global step with its own optimizer, and the run is the one without it."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net(True)

        def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
            logits = self.net(x)
            loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
            return {"loss": loss, "logits": logits}

    rows = [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)]

    def trained(monitored: bool) -> tuple[dict[str, Any], MonitorResult]:
        seed_everything()
        model = Head()
        monitor = SharpnessMonitor(problem(model, data={"x": X, "labels": Y}), every=2)
        arguments = transformers.TrainingArguments(
            str(tmp_path / "out"),
            max_steps=6,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            learning_rate=0.1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        callbacks = [monitor.huggingface()] if monitored else []
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, callbacks=callbacks)
        trainer.train()
        return everything(model, trainer.optimizer), monitor.result()

    (watched, result), (bare, _) = trained(True), trained(False)
    assert watched == bare
    assert result.steps.tolist() == [2, 4, 6]
    # A linear schedule from 0.1 to 0 in 6 steps, as it stands for the step to come.
    assert result.column("learning_rate").tolist() == pytest.approx([0.1 * (1 - i / 6) for i in (2, 4, 6)])


def test_missing_trainers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the other library the sentence says which to install."""
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    monitor = SharpnessMonitor(problem(net()))
    with pytest.raises(ArgumentError, match=r"lightning\.pytorch or pytorch_lightning must be"):
        monitor.lightning()
    with pytest.raises(ArgumentError, match="pip install transformers"):
        monitor.huggingface()
