"""SAM under DistributedDataParallel: what each process perturbs with, and that all agree."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import processes
from sharpscope.optim import ASAM, GSAM, SAM, FriendlySAM, LookSAM

RANKS, SIZE, STEPS = 4, 16, 3

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")

FAMILY: dict[str, Callable[..., SAM]] = {
    "sam": SAM,
    "asam": ASAM,
    "gsam": GSAM,
    "friendly": FriendlySAM,
    "looksam": lambda *a, **k: LookSAM(*a, k=2, **k),
    "two ascent steps": lambda *a, **k: SAM(*a, ascent_steps=2, **k),
}


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


class Branch(nn.Module):
    """A part that the first process alone uses."""

    def __init__(self, used: bool) -> None:
        super().__init__()
        self.body, self.extra, self.used = network(), nn.Linear(5, 3).double(), used
        nn.init.zeros_(self.extra.weight)
        nn.init.zeros_(self.extra.bias)
        self.never = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out + self.extra(x) if self.used else out


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    count = RANKS * SIZE * STEPS
    inputs = torch.randn(count, 5, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(3, (count,), generator=generator)


def trained(model: nn.Module, optimizer: SAM, own: Callable[[Tensor], Tensor], spoil: bool = False) -> Tensor:
    """The weights after STEPS steps on this process's rows of each batch."""

    dtype = next(model.parameters()).dtype

    def closure(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x.to(dtype)).double(), y)
        (loss * math.inf if spoil else loss).backward()
        return loss

    x, y = data()
    for batch in torch.arange(len(y)).reshape(STEPS, RANKS * SIZE):
        rows = own(batch)
        optimizer.step(closure, x[rows], y[rows])
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def process(rank: int, folder: str) -> None:
    """One of RANKS processes: every case in turn, the weights of all written for the test to compare."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=RANKS)
    found: dict[str, Any] = {}

    def run(case: str, make: Callable[..., SAM], local: bool, net: nn.Module | None = None, **options: Any) -> None:
        model = DistributedDataParallel(network() if net is None else net)
        spoil = options.pop("spoil", False)
        optimizer = make(model.parameters(), torch.optim.SGD, rho=0.2, lr=0.3, ddp=model if local else None, **options)
        weights = trained(model, optimizer, lambda batch: batch.reshape(RANKS, SIZE)[rank], spoil and rank == 1)
        found[case] = (weights, optimizer.effective_m, optimizer.skipped_steps)

    for name, make in FAMILY.items():
        run(f"{name}, m of all", make, False)
        if name != "friendly":  # whose mean is each rank's own
            run(f"{name}, m a rank", make, True)
        if name not in ("looksam", "friendly"):
            run(f"{name}, m = 8", make, True, m=8)
    run("bfloat16", SAM, True, network().bfloat16(), m=8, weight_decay=0.1)
    run("branch", SAM, True, Branch(rank == 0), m=16, weight_decay=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        run("one rank not finite", SAM, True, spoil=True)
        run("one rank not finite, m = 8", SAM, True, spoil=True, m=8)
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return processes.saved_by_ranks(process, RANKS, tmp_path_factory.mktemp("ranks"))


def alone(name: str, m: int | None) -> Tensor:
    model = network()
    return trained(model, FAMILY[name](model.parameters(), torch.optim.SGD, rho=0.2, lr=0.3, m=m), lambda batch: batch)


CASES = [("m a rank", 16, 16), ("m of all", None, 64), ("m = 8", 8, 8)]


# LookSAM's steps between looks take the gradient of a whole rank, in whichever pieces; FriendlySAM's mean is a rank's.
EXCEPT = ("looksam, m = 8", "friendly, m a rank", "friendly, m = 8")


@pytest.mark.parametrize(
    ("name", "case", "m", "said"),
    [(name, *case) for name in FAMILY for case in CASES if f"{name}, {case[0]}" not in EXCEPT],
)
def test_ranks_equal_one_device(ranks: list[dict[str, Any]], name: str, case: str, m: int | None, said: int) -> None:
    """4 ranks of 16 are one device with batch 64 and m = 16; without ddp= all 64 share a perturbation."""
    found = [rank[f"{name}, {case}"] for rank in ranks]
    assert all(torch.equal(found[0][0], other[0]) for other in found[1:])
    torch.testing.assert_close(found[0][0], alone(name, m), rtol=1e-10, atol=1e-12)
    assert [effective for _, effective, _ in found] == [said] * RANKS


@pytest.mark.parametrize("case", ["bfloat16", "branch"])
def test_ranks_stay_alike(ranks: list[dict[str, Any]], case: str) -> None:
    """In low precision, and where one process alone has a gradient: all have the same weights after their steps."""
    assert all(torch.equal(ranks[0][case][0], rank[case][0]) for rank in ranks[1:])
    if case == "branch":  # what no process uses does not decay
        assert ranks[0][case][0][:2].tolist() == [1.0, 1.0]
        assert float(ranks[0][case][0][-18:].abs().max()) > 0


@pytest.mark.parametrize("case", ["one rank not finite", "one rank not finite, m = 8"])
def test_one_rank_without_a_finite_gradient_stops_the_step_of_all(ranks: list[dict[str, Any]], case: str) -> None:
    """No process waits for ever, and none steps: the weights are the first ones on all of them."""
    start = torch.cat([p.detach().flatten() for p in network().parameters()])
    for rank in ranks:
        weights, _, skipped = rank[case]
        assert torch.equal(weights, start)
        assert skipped == STEPS
