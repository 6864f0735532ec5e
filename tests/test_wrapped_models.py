"""Models inside of other people's frameworks, and models with more in them than weights that the loss sees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sharpscope
from command import Call, each_class, eigenvalues, printed, reference, saved
from dense import dense_hessian, top
from sharpscope import Problem

COUNT = 12


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labelled(seed: int = 0) -> tuple[Tensor, Tensor]:
    return drawn(seed, COUNT, 4), torch.randint(0, 3, (COUNT,), generator=torch.Generator().manual_seed(seed))


def inner(width: int = 6) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Dropout(0.3), nn.Linear(width, 3))


def lightning_module(width: int = 6) -> Any:
    """A LightningModule around the inner network, whose metrics and loss are buffers of its own."""
    import lightning

    class Lit(lightning.LightningModule):
        def __init__(self, width: int = 6, lr: float = 0.1) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net = inner(width)
            self.loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5]))

        def forward(self, x: Tensor) -> Any:
            return self.net(x)

        def training_step(self, batch: Any, index: int) -> Tensor:
            x, y = batch
            found: Tensor = self.loss(self(x), y)
            self.log("loss", found)
            return found

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.hparams["lr"])

    return Lit(width)


WEIGHT = torch.tensor([1.0, 2.0, 0.5])


def lit_inner() -> Problem:
    """The inner network alone."""
    return Problem(model=inner(), loss=nn.CrossEntropyLoss(weight=WEIGHT), data=labelled())


def lit_whole() -> Problem:
    """The LightningModule, measured by its own loss module."""
    model = lightning_module()
    return Problem(model=model, loss=model.loss, data=labelled())


def weighted(call: Call, data: Any) -> Tensor:
    """The weighted mean over examples."""
    x, y = data
    each = [-call(x[i : i + 1])[0].log_softmax(0)[int(y[i])] * WEIGHT[int(y[i])] for i in range(COUNT)]
    return torch.stack(each).sum() / WEIGHT[y].sum()


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """A checkpoint that Trainer has written after a few steps, and the network that it is of."""
    lightning = pytest.importorskip("lightning")
    folder = tmp_path_factory.mktemp("lightning")
    model = lightning_module()
    callback = lightning.pytorch.callbacks.ModelCheckpoint(dirpath=folder, filename="last", save_top_k=1)
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=1,
        logger=False,
        callbacks=[callback],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    data = torch.utils.data.TensorDataset(*labelled())
    trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=4))
    trainer.save_checkpoint(folder / "saved.ckpt")
    return folder, model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["last.ckpt", "saved.ckpt"])
@pytest.mark.parametrize("problem", [lit_inner, lit_whole])
def test_a_lightning_checkpoint_is_measured(
    problem: Callable[[], Problem], name: str, fitted: tuple[Path, nn.Module]
) -> None:
    """As the callback and as save_checkpoint write it, for the inner network and for the module around it."""
    folder, trained = fitted
    network = inner()
    network.load_state_dict(trained.net.state_dict())
    data = [t.double() if t.is_floating_point() else t for t in labelled()]
    exact = top(dense_hessian(network, lambda call: weighted(call, data)))
    assert eigenvalues(folder / name, problem) == pytest.approx(exact.tolist(), rel=1e-6)


def lora() -> Problem:
    """Adapters of rank 2 with dropout, on two layers of a frozen network."""
    import peft

    config = peft.LoraConfig(r=2, lora_alpha=4, lora_dropout=0.3, target_modules=["0", "3"], init_lora_weights=False)
    return Problem(model=peft.get_peft_model(inner(), config), loss=nn.CrossEntropyLoss(), data=labelled(1))


def test_lora_is_measured_in_its_adapters(tmp_path: Path) -> None:
    """The adapters alone are w; what they adapt are constants, and their dropout is off."""
    pytest.importorskip("peft")
    path = saved(tmp_path, lora)
    found = printed("eigen", path, lora, "--dtype", "float64", "--tol", "1e-8")
    assert found["num_params"] == 2 * (4 + 6) + 2 * (6 + 3)
    assert found["eigenvalues"] == pytest.approx(reference(path, lora, each_class), rel=1e-6)


class Odd(nn.Module):
    """Complex, integer and empty buffers, a frozen layer, one that is not used, hooks, and a dict that it returns."""

    def __init__(self, watched: bool = True) -> None:
        super().__init__()
        self.register_buffer("phase", torch.exp(1j * torch.arange(4.0)))
        self.register_buffer("order", torch.tensor([2, 0, 3, 1]))
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.register_buffer("nothing", None)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.body = nn.Linear(4, 5)
        self.head, self.unused = nn.Linear(5, 3), nn.Linear(5, 2)
        self.head.gain = nn.Parameter(torch.ones(()))
        self.body.register_forward_hook(lambda module, inputs, output: torch.tanh(output))
        self.head.register_forward_pre_hook(lambda module, inputs: (inputs[0] * module.gain,))
        if watched:
            self.head.register_full_backward_hook(lambda module, before, after: None)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.step = self.step + 1
        x = self.frozen(x[:, self.order])
        x = (x * self.phase).real + torch.fft.fft(x, dim=1).imag
        return {"logits": self.head(self.body(x)), "step": self.step}


def odd() -> Problem:
    """All of it at once."""
    return Problem(model=Odd(), loss=nn.CrossEntropyLoss(), data=labelled(2))


def odd_unwatched() -> Problem:
    """Without the hook in backward, which is none of forward-mode's."""
    return replace(odd(), model=Odd(False))


def test_buffers_hooks_and_unused_layers_are_no_weights(tmp_path: Path) -> None:
    """What is frozen or a buffer is a constant, what is not used has no curvature, hooks run, and logits are found."""
    path = saved(tmp_path, odd)
    exact = reference(path, odd_unwatched, lambda call, data: each_class(lambda *x: call(*x)["logits"], data))
    found = printed("eigen", path, odd, "--dtype", "float64", "--tol", "1e-8")
    assert found["num_params"] == 25 + 18 + 12 + 1
    assert found["eigenvalues"] == pytest.approx(exact, rel=1e-6)


def test_a_compiled_model_is_measured_as_the_model() -> None:
    """torch.compile's wrapper, which runs eagerly here, gives the same eigenvalues."""
    torch.manual_seed(0)
    given = lit_inner()
    compiled = replace(given, model=torch.compile(given.model, backend="eager"))
    one, two = (sharpscope.top_eigenvalues(p, tol=1e-8, dtype=torch.float64) for p in (given, compiled))
    assert two.eigenvalues == pytest.approx(one.eigenvalues, rel=1e-9)
