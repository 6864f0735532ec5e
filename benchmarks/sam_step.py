"""What a step of SAM costs, in steps of SGD: ours, pytorch_optimizer's, and the two-step recipe parameter by parameter.

Rounds of steps on one batch, all optimizers in turn with the order reversed every second round; the ratio to SGD is
taken within each round, and its median (least to most) is reported. Then the memory of each by itself in an interpreter
of its own: the most that was resident from its second step on, less the same of SGD.

    pip install -c constraints.txt '.[bench]'
    python benchmarks/sam_step.py [--rounds 15] [--batch 128] [--results benchmarks/SAM_RESULTS.md]
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from report import aligned, machine
from torch import Tensor, nn

from sharpscope.optim import ASAM, GSAM, SAM, FriendlySAM, LookSAM
from sharpscope.zoo import load_data, make_model

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "cnn": ("cnn", {}),
    "wide_resnet 10-2": ("wide_resnet", {"depth": 10, "widen": 2}),
    "mlp": ("mlp", {"hidden": (256, 256)}),
}
SGD_OPTIONS = {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}
Step = Callable[[], Any]
RHO = 0.05


class TwoSteps:
    """SAM as public repositories share it, written afresh: a loop over parameters, e kept and taken off again."""

    def __init__(self, model: nn.Module) -> None:
        self.params = list(model.parameters())
        self.base = torch.optim.SGD(self.params, **SGD_OPTIONS)

    @torch.no_grad()
    def ascend(self) -> None:
        norm = torch.norm(torch.stack([p.grad.norm(p=2) for p in self.params if p.grad is not None]), p=2)
        self.moves = []
        for p in self.params:
            if p.grad is not None:
                move = p.grad * (RHO / (norm + 1e-12))
                p.add_(move)
                self.moves.append((p, move))

    @torch.no_grad()
    def descend(self) -> None:
        for p, move in self.moves:
            p.sub_(move)
        self.base.step()


def steps(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Callable[[], Step]]:
    """What makes a training step of each, on a model of its own."""

    def closure_of(net: nn.Module, optimizer: Any) -> Step:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = nn.functional.cross_entropy(net(x), y)
            loss.backward()
            return loss

        return closure

    def sgd() -> Step:
        net = copy.deepcopy(model)
        optimizer = torch.optim.SGD(net.parameters(), **SGD_OPTIONS)
        closure = closure_of(net, optimizer)
        return lambda: (closure(), optimizer.step())

    def ours(kind: Callable[..., SAM], **options: Any) -> Step:
        net = copy.deepcopy(model)
        optimizer = kind(net.parameters(), torch.optim.SGD, rho=RHO, **SGD_OPTIONS, **options)
        closure = closure_of(net, optimizer)
        return lambda: optimizer.step(closure)

    def rival(foreach: bool | None) -> Step:
        from pytorch_optimizer import SAM as Rival

        net = copy.deepcopy(model)
        optimizer = Rival(net.parameters(), torch.optim.SGD, rho=RHO, foreach=foreach, **SGD_OPTIONS)
        closure = closure_of(net, optimizer)
        return lambda: (closure(), optimizer.step(closure))

    def recipe() -> Step:
        net = copy.deepcopy(model)
        optimizer = TwoSteps(net)
        closure = closure_of(net, optimizer.base)
        return lambda: (closure(), optimizer.ascend(), closure(), optimizer.descend())

    return {
        "SGD": sgd,
        "sharpscope SAM": lambda: ours(SAM),
        "pytorch_optimizer SAM": lambda: rival(None),
        "pytorch_optimizer SAM, foreach": lambda: rival(True),
        "two-step recipe": recipe,
        "sharpscope ASAM": lambda: ours(ASAM),
        "sharpscope GSAM": lambda: ours(GSAM),
        "sharpscope LookSAM, k = 5": lambda: ours(LookSAM),
        "sharpscope FriendlySAM": lambda: ours(FriendlySAM),
    }


def batch_of(kind: str, options: dict[str, Any], size: int) -> tuple[nn.Module, Tensor, Tensor]:
    data = load_data("fashion-mnist")
    model = make_model(kind, seed=0, shape=data.shape, classes=data.classes, **options)
    return model, data.inputs[:size].clone(), data.targets[:size].clone()


def timed(made: dict[str, Step], rounds: int, least: float = 0.2) -> dict[str, list[float]]:
    """Seconds a step of each in each round; LookSAM's over five steps, of which one looks."""
    count: dict[str, int] = {}
    for name, step in made.items():
        for _ in range(5):
            step()
        started = time.perf_counter()
        step()
        count[name] = 5 * max(1, round(least / 5 / max(time.perf_counter() - started, 1e-6)))
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(rounds):
        for name in list(made) if turn % 2 == 0 else list(made)[::-1]:
            started = time.perf_counter()
            for _ in range(count[name]):
                made[name]()
            seconds[name].append((time.perf_counter() - started) / count[name])
    return seconds


def peak(kind: str, name: str, size: int) -> None:
    """Print the most bytes resident while ``name`` makes steps; run in an interpreter of its own, on Linux."""
    architecture, options = MODELS[kind]
    model = make_model(architecture, seed=0, shape=(1, 28, 28), classes=10, **options)
    step = steps(model, torch.randn(size, 1, 28, 28), torch.randint(10, (size,)))[name]()
    step()
    Path("/proc/self/clear_refs").write_text("5")  # the mark of the most begins here
    for _ in range(5):
        step()
    status = Path("/proc/self/status").read_text().splitlines()
    print(next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--only", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "SAM_RESULTS.md")
    parser.add_argument("--peak", nargs=2, metavar=("MODEL", "OPTIMIZER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        peak(*args.peak, args.batch)
        return
    text = ["# A step of SAM", "", *(f"- {k}: {v}" for k, v in machine(torch.get_num_threads()).items())]
    text += ["", __doc__.split("\n\n")[1].replace("\n", " "), ""]
    for kind in args.only:
        model, x, y = batch_of(*MODELS[kind], args.batch)
        seconds = timed({name: make() for name, make in steps(model, x, y).items()}, args.rounds)
        params = sum(p.numel() for p in model.parameters())
        rows = [["optimizer", "ms a step", "steps of SGD", "MiB beyond SGD"]]
        memory = {name: most(kind, name, args.batch) for name in seconds}
        for name, each in seconds.items():
            ratios = [a / b for a, b in zip(each, seconds["SGD"], strict=True)]
            ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            extra = (memory[name] - memory["SGD"]) / 2**20
            rows.append([name, f"{1e3 * statistics.median(each):.2f}", ratio, f"{extra:.1f}"])
        text += [f"## {kind}, {params:,} parameters, batch of {args.batch}", "", "```", aligned(rows), "```", ""]
        print("\n".join(text[-6:]), flush=True)
    args.results.write_text("\n".join(text), encoding="utf-8")


def most(kind: str, name: str, size: int) -> int:
    """Median of three interpreters."""
    command = [sys.executable, __file__, "--batch", str(size), "--peak", kind, name]
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    return int(
        statistics.median(
            int(subprocess.run(command, check=True, capture_output=True, env=env).stdout) for _ in range(3)
        )
    )


if __name__ == "__main__":
    main()
