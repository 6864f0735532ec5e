"""The problems that the eigensolvers are compared on: trained once, then kept in the work folder."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformer import Transformer, text_bytes

import sharpscope
from sharpscope.zoo import load_data, make_model


@dataclass(frozen=True)
class Case:
    """A trained model, its loss and its data, in memory."""

    model: nn.Module
    inputs: Tensor
    targets: Tensor
    about: str
    loss: nn.Module = field(default_factory=nn.CrossEntropyLoss)

    @property
    def num_params(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def problem(self) -> sharpscope.Problem:
        return sharpscope.Problem(model=self.model, loss=self.loss, data=(self.inputs, self.targets))


def load(path: Path) -> Case:
    """The case that ``build`` wrote. Reading it takes no more memory than it holds, unlike decoding images."""
    kept = torch.load(path, weights_only=True)
    model = make(kept["kind"], kept["args"])
    model.load_state_dict(kept["state"])
    return Case(model.eval(), kept["inputs"], kept["targets"], kept["about"])


def build(name: str, path: Path, quick: bool) -> None:
    """Train the case ``name`` and write it to ``path``, unless it is there."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = CASES[name](path, quick)
    temporary = path.with_suffix(".tmp")
    torch.save(kept, temporary)
    temporary.replace(path)


def make(kind: str, args: dict[str, Any]) -> nn.Module:
    if kind != "transformer":
        return make_model(kind, seed=0, **args)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return Transformer(**args)


def _by_command(kind: str, args: list[str], quick: bool, path: Path, *options: str) -> dict[str, Any]:
    """What ``sharpscope train`` makes of Fashion-MNIST in 3 epochs, on all its training images."""
    checkpoint = path.with_name(f"{path.stem}-checkpoint.pt")
    data, epochs = ("digits", "1") if quick else ("fashion-mnist", "3")
    command = [sys.executable, "-m", "sharpscope", "train", "--out", str(checkpoint), "--resume", "--model", kind]
    command += [*(["--model-args", *args] if args else []), "--data", data, "--epochs", epochs, "--seed", "0", *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    problem = sharpscope.load(checkpoint)
    inputs, targets = problem.data
    if quick:
        inputs, targets = inputs[:480].clone(), targets[:480].clone()
    made = dict(problem.provenance["model_args"])
    model, by = problem.model, " ".join(["sharpscope train", *options]).strip()
    about = f"{kind} {' '.join(args)}".strip() + f", {len(targets):,} images of {data}, {by}, {epochs} epochs"
    return _kept(kind, made, model, inputs, targets, about)


def _wide_resnet(path: Path, quick: bool) -> dict[str, Any]:
    """WRN-10-2 without norm on the first 5,000 images, trained on just those."""
    data = load_data("digits" if quick else "fashion-mnist")
    size, steps = (96, 5) if quick else (5000, 800)
    inputs, targets = data.inputs[:size].clone(), data.targets[:size].clone()
    args: dict[str, Any] = {"shape": data.shape, "classes": data.classes, "depth": 10, "widen": 2, "norm": "none"}
    model = make("wide_resnet", args)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    loss = fit(model, optimizer, inputs, targets, steps)
    about = f"wide_resnet 10-2 without norm, {size:,} images of {data.name}, SGD, {steps} steps, loss {loss:.3g}"
    return _kept("wide_resnet", args, model, inputs, targets, about)


def _transformer(path: Path, quick: bool) -> dict[str, Any]:
    """Two layers on 262,144 bytes."""
    sequences, context, steps = (64, 16, 20) if quick else (4096, 64, 600)
    args = {"width": 16, "layers": 1, "heads": 2, "context": context} if quick else {"context": context}
    inputs, targets, digest = text_bytes(sequences, context)
    model = make("transformer", args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loss = fit(model, optimizer, inputs, targets, steps)
    text = f"{sequences * context:,} bytes of Python {sys.version_info.major}.{sys.version_info.minor}'s library"
    about = f"transformer, {text} (sha256 {digest[:8]}), AdamW, {steps} steps, loss {loss:.3g} nats"
    return _kept("transformer", args, model, inputs, targets, about)


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, targets: Tensor, steps: int) -> float:
    """Train for so many steps of 64 examples, the rate falling to zero on a cosine; the mean loss of the last tenth."""
    generator = torch.Generator().manual_seed(0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    model.train()
    for _ in range(steps):
        chosen = torch.randint(len(targets), (min(64, len(targets)),), generator=generator)
        loss = nn.functional.cross_entropy(model(inputs[chosen]), targets[chosen])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    last = losses[-max(steps // 10, 1) :]
    return sum(last) / len(last)


def _kept(
    kind: str, args: dict[str, Any], model: nn.Module, inputs: Tensor, targets: Tensor, about: str
) -> dict[str, Any]:
    count = sum(p.numel() for p in model.parameters())
    about = f"{about}, {count:,} parameters"
    state = model.state_dict()
    return {"kind": kind, "args": args, "state": state, "inputs": inputs, "targets": targets, "about": about}


CASES: dict[str, Callable[[Path, bool], dict[str, Any]]] = {
    "cnn-sgd": lambda path, quick: _by_command("cnn", [], quick, path),
    "cnn-sam": lambda path, quick: _by_command("cnn", [], quick, path, "--optimizer", "sam"),
    "wrn": _wide_resnet,
    "mlp": lambda path, quick: _by_command("mlp", ["hidden=32,32"] if quick else ["hidden=256,256"], quick, path),
    "transformer": _transformer,
}
