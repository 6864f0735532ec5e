"""SAM on sharded parameters: two processes with ``fully_shard``, or with distributed tensors, are one process."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import processes
from sharpscope.errors import ArgumentError
from sharpscope.optim import ASAM, GSAM, SAM, FriendlySAM, LookSAM

RANKS, SIZE, STEPS, SAVED, RHO, LR = 2, 16, 20, 16, 0.1, 0.1

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or importlib.util.find_spec("torch.distributed.fsdp._fully_shard") is None,
    reason="torch without fully_shard",
)

FAMILY: dict[str, Callable[..., SAM]] = {
    "sam": SAM,
    "asam": lambda *a, **k: ASAM(*a, adaptive="filter", **k),
    "gsam": GSAM,
    "looksam": lambda *a, **k: LookSAM(*a, k=3, **k),
    "friendly": FriendlySAM,
}
FAILURES = ("forward", "loss", "backward")


def network() -> nn.Sequential:
    """Seven rows are four and three; the one row of the next layer leaves the second process without any."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1), nn.Linear(1, 3)).double()


def sharded(model: nn.Sequential, nested: bool = True) -> nn.Sequential:
    from torch.distributed.fsdp import fully_shard

    if nested:
        fully_shard(model[0])
    fully_shard(model)
    return model


def optimizer_of(name: str, model: nn.Module) -> SAM:
    return FAMILY[name](model.parameters(), torch.optim.SGD, rho=RHO, lr=LR, momentum=0.9)


def data(steps: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(steps, SIZE, 5, generator=generator, dtype=torch.float64)
    return list(zip(inputs, torch.randint(3, (steps, SIZE), generator=generator), strict=True))


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), y)


def zeroing(model: nn.Module, optimizer: SAM, factor: float = 1.0) -> Callable[[Tensor, Tensor], Tensor]:
    def closure(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, x, y) * factor
        loss.backward()
        return loss

    return closure


def train(model: nn.Module, optimizer: SAM, batches: list[tuple[Tensor, Tensor]], rows: Any = ..., **kw: Any) -> None:
    for x, y in batches:
        optimizer.step(zeroing(model, optimizer, **kw), x[rows], y[rows])


def whole(model: nn.Module) -> Tensor:
    parts = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return torch.cat([p.detach().flatten() for p in parts])


def gradients_left_alone(model: nn.Module, optimizer: SAM, how: str, rows: Any = ...) -> None:
    """Three steps with closures that zero the gradients in place, or not at all, after a backward outside or not."""
    for x, y in data(3):
        batch = x[rows], y[rows]

        def closure(batch: tuple[Tensor, Tensor] = batch) -> Tensor:
            if how == "in place":
                optimizer.zero_grad(set_to_none=False)
            loss = loss_of(model, *batch)
            loss.backward()
            return loss

        if how == "backward outside":
            loss_of(model, *batch).backward()
        optimizer.step(closure)
        if how != "in place":
            optimizer.zero_grad()


def two_calls(model: nn.Module, optimizer: SAM, rows: Any = ...) -> None:
    """Three steps whose second gradients come to the first, which nothing has zeroed."""
    for x, y in data(3):
        loss_of(model, x[rows], y[rows]).backward()
        optimizer.first_step()
        loss_of(model, x[rows], y[rows]).backward()
        optimizer.second_step(zero_grad=True)


def failing(model: nn.Sequential, optimizer: SAM, where: str) -> Callable[[Tensor, Tensor], Tensor]:
    """A closure whose second call raises."""
    calls = 0

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    def closure(x: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        hook = model[1].register_forward_hook(interrupt) if (calls, where) == (2, "forward") else None
        try:
            loss = loss_of(model, x, y)
        finally:
            if hook is not None:
                hook.remove()
        if (calls, where) == (2, "loss"):
            raise KeyboardInterrupt
        loss.backward()
        if (calls, where) == (2, "backward"):
            raise KeyboardInterrupt
        return loss

    return closure


def process(rank: int, folder: str) -> None:
    """One of two processes: every case in turn, the whole weights of all written for the test to compare."""
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=RANKS)
    rows = slice(rank * SIZE // RANKS, (rank + 1) * SIZE // RANKS)
    found: dict[str, Any] = {}

    for name in FAMILY:
        model = sharded(network(), nested=False)
        optimizer = optimizer_of(name, model)
        train(model, optimizer, data()[:SAVED], rows)
        saved = copy.deepcopy(get_state_dict(model, optimizer))
        plain = model.state_dict(), optimizer.state_dict()
        model = sharded(network(), nested=False)
        optimizer = optimizer_of(name, model)
        set_state_dict(model, optimizer, model_state_dict=saved[0], optim_state_dict=saved[1])
        train(model, optimizer, data()[SAVED:], rows)
        found[f"{name}, distributed checkpoint"] = whole(model)

        model = sharded(network(), nested=False)
        optimizer = optimizer_of(name, model)
        model.load_state_dict(plain[0])
        optimizer.load_state_dict(plain[1])
        train(model, optimizer, data()[SAVED:], rows)
        found[f"{name}, state dict"] = whole(model)

    for how in ("in place", "not", "backward outside"):
        model = sharded(network())
        gradients_left_alone(model, optimizer_of("friendly", model), how, rows)
        found[f"zeroed {how}"] = whole(model)

    model = sharded(network())
    two_calls(model, optimizer_of("gsam", model), rows)
    found["two calls"] = whole(model)

    model = sharded(network().bfloat16())
    optimizer = optimizer_of("sam", model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        train(model, optimizer, [(x.bfloat16(), y) for x, y in data(3)], rows)
    found["bfloat16"] = whole(model), optimizer.skipped_steps

    model = sharded(network())
    optimizer = optimizer_of("sam", model)
    loss_of(model, *data(1)[0]).backward()
    try:
        optimizer.step(lambda: loss_of(model, *data(2)[1]).backward())
    except ArgumentError as error:
        found["refused"] = str(error)

    model = sharded(network())
    optimizer = FAMILY["gsam"](model.parameters(), torch.optim.SGD, rho=RHO, lr=LR, m=4)
    train(model, optimizer, data(3), rows)
    found["m = 4"] = whole(model), optimizer.effective_m

    model = sharded(network())
    model.set_reshard_after_backward(False)  # type: ignore[operator]
    registered = list(model.parameters())
    train(model, optimizer_of("sam", model), data(3), rows)
    found["gathered weights kept"] = torch.cat([p.full_tensor().detach().flatten() for p in registered])  # type: ignore[attr-defined]

    model = sharded(network())
    train(model, optimizer_of("sam", model), data(3), rows, factor=1e-200)
    found["tiny"] = whole(model)

    for value in (torch.inf, torch.nan):
        model = sharded(network())
        optimizer = optimizer_of("sam", model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            train(model, optimizer, data(2), rows, factor=value if rank else 1.0)
        found[f"{value}"] = whole(model), optimizer.skipped_steps

    for where in FAILURES:
        model = sharded(network())
        optimizer = optimizer_of("sam", model)
        try:
            optimizer.step(failing(model, optimizer, where), *(t[rows] for t in data(1)[0]))
        except KeyboardInterrupt:
            x, y = data(1)[0]
            found[f"error in {where}"] = whole(model), loss_of(model, x, y).detach()

    mesh = init_device_mesh("cpu", (RANKS,))
    for name in FAMILY:
        placed = zip(matrices(), (Shard(1), Shard(0), Replicate()), strict=True)
        weights = [nn.Parameter(distribute_tensor(p, mesh, [placement])) for p, placement in placed]
        optimizer = FAMILY[name](weights, torch.optim.SGD, rho=RHO, lr=LR, momentum=0.9)
        descend(weights, optimizer)
        found[f"{name}, tensors"] = torch.cat([w.full_tensor().detach().flatten() for w in weights])

    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def matrices() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (4, 3, 5)]


def descend(weights: list[Any], optimizer: SAM) -> None:
    """Three steps on a function of products of the weights."""
    for _ in range(3):

        def closure() -> Tensor:
            optimizer.zero_grad()
            a, b, c = weights
            loss = torch.sin(a @ b.T).square().sum() + torch.cos(b @ c.T).sum()
            loss = loss.full_tensor() if hasattr(loss, "full_tensor") else loss
            loss.backward()
            return loss

        optimizer.step(closure)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return processes.saved_by_ranks(process, RANKS, tmp_path_factory.mktemp("ranks"))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("case", ["distributed checkpoint", "state dict"])
def test_two_processes_with_shards_are_one(ranks: list[dict[str, Any]], name: str, case: str) -> None:
    """Twenty steps with momentum on uneven and empty shards, resumed after 16, are those of one process to 1e-12."""
    model = network()
    train(model, optimizer_of(name, model), data())
    for rank in ranks:
        close(rank[f"{name}, {case}"], whole(model))


@pytest.mark.parametrize("how", ["in place", "not", "backward outside"])
def test_passes_over_shards_start_from_empty_gradients(ranks: list[dict[str, Any]], how: str) -> None:
    """Closures that zero the gradients in place or not at all take the steps of one process that zeroes them."""
    model = network()
    train(model, optimizer_of("friendly", model), data(3))
    for rank in ranks:
        close(rank[f"zeroed {how}"], whole(model))


def test_two_calls_over_shards_start_from_empty_gradients(ranks: list[dict[str, Any]]) -> None:
    """Without zero_grad the second gradient is not added to the first: the steps are those of step(closure)."""
    model = network()
    train(model, optimizer_of("gsam", model), data(3))
    for rank in ranks:
        close(rank["two calls"], whole(model))


def test_shards_of_bfloat16_weights_train_as_the_whole(ranks: list[dict[str, Any]]) -> None:
    """Both processes have the same weights, which are those of float64 training to bfloat16's rounding."""
    model = network()
    train(model, optimizer_of("sam", model), data(3))
    for rank in ranks:
        weights, skipped = rank["bfloat16"]
        assert skipped == 0
        assert torch.equal(weights, ranks[0]["bfloat16"][0])
        torch.testing.assert_close(weights.double(), whole(model), rtol=0.0, atol=0.02)


def test_gradients_of_other_examples_on_shards_are_refused(ranks: list[dict[str, Any]]) -> None:
    """What another batch left in ``.grad`` is not taken for the closure's, as on one process."""
    assert all("gradients of the closure's examples alone" in rank["refused"] for rank in ranks)


def test_chunks_of_all_processes_share_a_perturbation(ranks: list[dict[str, Any]]) -> None:
    """With m = 4 the i-th chunks of both processes are one chunk of 8."""
    model = network()
    optimizer = FAMILY["gsam"](model.parameters(), torch.optim.SGD, rho=RHO, lr=LR, m=8)
    order = torch.arange(SIZE).reshape(RANKS, 2, 4).transpose(0, 1).flatten()
    train(model, optimizer, data(3), order)
    for rank in ranks:
        close(rank["m = 4"][0], whole(model))
        assert rank["m = 4"][1] == 8


def test_the_second_pass_gathers_the_perturbed_weights(ranks: list[dict[str, Any]]) -> None:
    """Also where the gathered weights are kept after a backward: the steps are those of one process."""
    model = network()
    train(model, optimizer_of("sam", model), data(3))
    for rank in ranks:
        close(rank["gathered weights kept"], whole(model))


def test_norms_of_shards_whose_squares_underflow(ranks: list[dict[str, Any]]) -> None:
    """Gradients of 1e-200, also on the process that has none, perturb by rho as on one process."""
    model = network()
    train(model, optimizer_of("sam", model), data(3), factor=1e-200)
    for rank in ranks:
        close(rank["tiny"], whole(model))


@pytest.mark.parametrize("value", ["inf", "nan"])
def test_one_process_without_a_finite_gradient_stops_both(ranks: list[dict[str, Any]], value: str) -> None:
    """Both skip the step, and neither waits for the other."""
    for rank in ranks:
        weights, skipped = rank[value]
        assert torch.equal(weights, whole(network()))
        assert skipped == 2


@pytest.mark.parametrize("where", FAILURES)
def test_an_error_at_w_plus_e_leaves_the_model_at_w(ranks: list[dict[str, Any]], where: str) -> None:
    """The shards have the bits of w, and the model's loss is that at w, not at weights gathered before."""
    model = network()
    for rank in ranks:
        weights, loss = rank[f"error in {where}"]
        assert torch.equal(weights, whole(model))
        close(loss, loss_of(model, *data(1)[0]).detach())


@pytest.mark.parametrize("name", FAMILY)
def test_distributed_tensors_are_one_tensor(ranks: list[dict[str, Any]], name: str) -> None:
    """Shards along rows or columns, replicas, gradients placed otherwise: three steps are those of whole tensors."""
    weights = [nn.Parameter(w) for w in matrices()]
    descend(weights, FAMILY[name](weights, torch.optim.SGD, rho=RHO, lr=LR, momentum=0.9))
    for rank in ranks:
        close(rank[f"{name}, tensors"], torch.cat([w.detach().flatten() for w in weights]))
