"""SAM does Algorithm 1 of Foret et al. 2021, and leaves nothing behind when it cannot."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from sharpscope.errors import ArgumentError, SharpscopeError
from sharpscope.optim import SAM, frozen_buffers

INF = float("inf")


class Net(nn.Module):
    """Dropout, BatchNorm and a head that only the first pass of a step uses when ``fickle``."""

    def __init__(self, dropout: float = 0.5, batchnorm: bool = True, fickle: bool = False) -> None:
        super().__init__()
        self.body = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6) if batchnorm else nn.Identity()
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(6, 2)
        self.extra = nn.Linear(6, 2)
        self.fickle = fickle
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = self.drop(torch.tanh(self.norm(self.body(x))))
        out: Tensor = self.head(h)
        return out + self.extra(h) if not self.fickle or self.calls % 2 else out


def batch(n: int = 16, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(2, (n,), generator=generator)


def network(dtype: torch.dtype = torch.float32, **kwargs: Any) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net(**kwargs).to(dtype)


def closure_for(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x).float() if x.dtype == torch.bfloat16 else model(x), y)
        loss.backward()
        return loss

    return closure


def train(model: nn.Module, optimizer: Optimizer, steps: int) -> list[float]:
    x, y = batch(dtype=next(model.parameters()).dtype)
    return [optimizer.step(closure_for(model, optimizer, x, y)).item() for _ in range(steps)]


def weights_of(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same_bits(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) and torch.equal(a.signbit(), b.signbit()) for a, b in zip(left, right, strict=True))


def leaf(*values: float, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=dtype))


# Algorithm 1


@pytest.mark.parametrize("p", [2, INF, "inf"])
@pytest.mark.parametrize("base", ["momentum", "adam"])
def test_step_matches_algorithm_1_written_straight(p: Any, base: str) -> None:
    """Eight steps equal Algorithm 1 written straight, with momentum or Adam written straight too."""
    rho, lr = 0.07, 0.1
    model = network(torch.float64, dropout=0.0, batchnorm=False)
    x, y = batch(dtype=torch.float64)
    names = [name for name, _ in model.named_parameters()]
    w = [v.clone() for v in weights_of(model)]

    def gradient(at: list[Tensor]) -> list[Tensor]:
        at = [v.clone().requires_grad_() for v in at]
        out = torch.func.functional_call(model, dict(zip(names, at, strict=True)), (x,))
        return list(torch.autograd.grad(nn.functional.cross_entropy(out, y), at))

    first = [torch.zeros_like(v) for v in w]
    second = [torch.zeros_like(v) for v in w]
    for t in range(1, 9):
        g = gradient(w)
        if p == 2:
            norm = math.sqrt(sum(float((v * v).sum()) for v in g))
            e = [rho * v / norm for v in g]
        else:
            e = [rho * v.sign() for v in g]
        g = gradient([v + d for v, d in zip(w, e, strict=True)])
        for i in range(len(w)):
            if base == "momentum":
                d = g[i] + 0.01 * w[i]
                first[i] = d if t == 1 else 0.9 * first[i] + d
                w[i] = w[i] - lr * first[i]
            else:
                first[i] = 0.9 * first[i] + 0.1 * g[i]
                second[i] = 0.999 * second[i] + 0.001 * g[i] ** 2
                w[i] = w[i] - lr * (first[i] / (1 - 0.9**t)) / ((second[i] / (1 - 0.999**t)).sqrt() + 1e-8)

    if base == "momentum":
        optimizer = SAM(model.parameters(), torch.optim.SGD, rho, p=p, lr=lr, momentum=0.9, weight_decay=0.01)
    else:
        optimizer = SAM(model.parameters(), torch.optim.Adam, rho, p=p, lr=lr)
    train(model, optimizer, 8)
    for mine, straight in zip(weights_of(model), w, strict=True):
        torch.testing.assert_close(mine, straight, rtol=1e-12, atol=1e-12)


def test_closure_sees_w_then_w_plus_e_and_step_returns_the_loss_at_w() -> None:
    """The closure runs exactly twice, at w and at w + rho g / ||g||, and step returns the first loss."""
    w = leaf(3.0, 4.0, dtype=torch.float64)
    optimizer = SAM([w], torch.optim.SGD, rho=0.5, lr=0.1)
    seen = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        seen.append(w.detach().clone())
        loss = 0.5 * (w * w).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 12.5
    torch.testing.assert_close(
        torch.stack(seen), torch.tensor([[3.0, 4.0], [3.3, 4.4]], dtype=torch.float64), rtol=1e-15, atol=0.0
    )
    torch.testing.assert_close(w.detach(), torch.tensor([2.67, 3.56], dtype=torch.float64), rtol=1e-15, atol=0.0)


def test_norm_runs_over_all_groups_and_each_group_has_its_own_rho() -> None:
    """One norm over both groups scales each group's gradient by its own rho."""
    a, b = leaf(0.0), leaf(0.0)
    optimizer = SAM([{"params": [a]}, {"params": [b], "rho": 0.5}], torch.optim.SGD, rho=0.1, lr=0.1)
    a.grad, b.grad = torch.tensor([3.0]), torch.tensor([4.0])
    optimizer.first_step()
    assert a.item() == pytest.approx(0.1 * 0.6)
    assert b.item() == pytest.approx(0.5 * 0.8)
    optimizer.second_step()


def test_rho_zero_is_the_base_optimizer() -> None:
    """With rho = 0 the weights follow the base optimizer bit for bit."""
    mine, plain = network(dropout=0.0), network(dropout=0.0)
    train(mine, SAM(mine.parameters(), torch.optim.SGD, rho=0.0, lr=0.1, momentum=0.9), 5)
    train(plain, torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9), 5)
    assert same_bits(weights_of(mine), weights_of(plain))


def test_maximize_perturbs_downwards() -> None:
    """Maximising L gives the weights of minimising -L."""
    up, down = leaf(1.0, 2.0, dtype=torch.float64), leaf(1.0, 2.0, dtype=torch.float64)
    for w, sign in ((up, 1.0), (down, -1.0)):
        optimizer = SAM([w], torch.optim.SGD, lr=0.1, maximize=sign > 0)

        def closure(w: Tensor = w, sign: float = sign, optimizer: SAM = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = sign * w.sin().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
    assert same_bits([up.detach()], [down.detach()])


def test_accumulated_micro_batches_equal_one_large_batch() -> None:
    """Several backward calls in the closure give the perturbation and the step of the whole batch."""
    whole, split = (network(torch.float64, dropout=0.0, batchnorm=False) for _ in range(2))
    x, y = batch(dtype=torch.float64)
    train(whole, SAM(whole.parameters(), torch.optim.SGD, rho=0.2, lr=0.1, momentum=0.9), 3)
    optimizer = SAM(split.parameters(), torch.optim.SGD, rho=0.2, lr=0.1, momentum=0.9)

    def closure() -> float:
        optimizer.zero_grad()
        total = 0.0
        for rows in (slice(0, 5), slice(5, 16)):
            loss = nn.functional.cross_entropy(split(x[rows]), y[rows], reduction="sum") / len(x)
            loss.backward()
            total += loss.item()
        return total

    for _ in range(3):
        optimizer.step(closure)
    for a, b in zip(weights_of(whole), weights_of(split), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_two_calls_equal_step_with_closure() -> None:
    """first_step and second_step around one's own passes give the weights and buffers of step(closure)."""
    mine, other = network(dropout=0.0), network(dropout=0.0)
    train(mine, SAM(mine.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9), 4)
    optimizer = SAM(other.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    x, y = batch()
    for _ in range(4):
        nn.functional.cross_entropy(other(x), y).backward()
        optimizer.first_step(zero_grad=True)
        assert all(p.grad is None for p in other.parameters())
        with frozen_buffers():
            nn.functional.cross_entropy(other(x), y).backward()
        optimizer.second_step(zero_grad=True)
    assert same_bits(weights_of(mine), weights_of(other))
    assert same_bits([b.double() for b in mine.buffers()], [b.double() for b in other.buffers()])


# An optimizer among optimizers


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam, torch.optim.Adagrad])
def test_resume_keeps_momentum(base: type[Optimizer]) -> None:
    """Resuming from a saved state_dict continues bit for bit: momentum, moments and rho included."""
    options = {"lr": 0.05, "momentum": 0.9} if base is torch.optim.SGD else {"lr": 0.05}
    straight = network(dropout=0.0)
    optimizer = SAM(straight.parameters(), base, rho=0.1, **options)
    train(straight, optimizer, 3)
    file = io.BytesIO()
    torch.save({"model": straight.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(straight, optimizer, 3)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = network(dropout=0.0)
    resumed.load_state_dict(saved["model"])
    optimizer = SAM(resumed.parameters(), base, rho=0.7, **options)
    optimizer.load_state_dict(saved["optimizer"])
    assert optimizer.param_groups[0]["rho"] == 0.1
    train(resumed, optimizer, 3)
    assert same_bits(weights_of(straight), weights_of(resumed))


def test_checkpoint_of_the_base_loads_and_back() -> None:
    """A plain optimizer's state_dict loads into SAM, which keeps its rho, and SAM's loads into the plain one."""
    model = network()
    plain = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    train(model, plain, 1)
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.2, lr=0.1, momentum=0.9)
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.param_groups[0]["rho"] == 0.2
    assert optimizer.param_groups[0]["lr"] == 0.3
    assert len(optimizer.base_optimizer.state) == len(list(model.parameters()))
    plain.load_state_dict(optimizer.state_dict())


def linked(optimizer: SAM) -> bool:
    base = optimizer.base_optimizer
    return (
        optimizer.param_groups is base.param_groups
        and optimizer.state is base.state
        and optimizer.defaults is base.defaults
    )


def test_groups_stay_linked_to_the_base() -> None:
    """Groups and state are the base's own objects, also after load_state_dict, add_param_group, copy and pickle."""
    model = network()
    optimizer = SAM(model.body.parameters(), torch.optim.SGD, rho=0.2, p="inf", lr=0.1, momentum=0.9)
    assert linked(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    assert linked(optimizer)
    optimizer.add_param_group({"params": model.head.parameters(), "lr": 0.2, "rho": 0.3})
    optimizer.add_param_group({"params": model.norm.parameters()})
    assert linked(optimizer)
    assert [group["rho"] for group in optimizer.base_optimizer.param_groups] == [0.2, 0.3, 0.2]
    train(model, optimizer, 1)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert linked(twin)
        assert (twin.p, twin.skipped_steps, len(twin.state)) == (INF, 0, len(optimizer.state))
        assert twin.base_optimizer is not optimizer.base_optimizer


def test_copied_model_and_optimizer_train_alike() -> None:
    """A deep copy of model and optimizer together takes the same steps."""
    model = network(dropout=0.0)
    optimizer = SAM(model.parameters(), torch.optim.Adam, lr=0.05)
    train(model, optimizer, 2)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    train(model, optimizer, 2)
    train(twin, twin_optimizer, 2)
    assert same_bits(weights_of(model), weights_of(twin))


def test_scheduler_changes_both_learning_rates() -> None:
    """A scheduler on SAM moves the learning rate with which the base steps, after load_state_dict too."""
    model = network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    for expected in (0.5, 0.25):
        train(model, optimizer, 1)
        scheduler.step()
        assert optimizer.param_groups[0]["lr"] == optimizer.base_optimizer.param_groups[0]["lr"] == expected
    optimizer.load_state_dict(optimizer.state_dict())
    train(model, optimizer, 1)
    scheduler.step()
    assert optimizer.base_optimizer.param_groups[0]["lr"] == 0.125


def test_scheduler_accepts_the_two_call_form() -> None:
    """second_step counts as the step that a scheduler wants to have seen."""
    w = leaf(1.0)
    optimizer = SAM([w], torch.optim.SGD, lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    w.grad = torch.ones(1)
    optimizer.first_step()
    optimizer.second_step()
    scheduler.step()
    assert optimizer.base_optimizer.param_groups[0]["lr"] == 0.5


def test_step_hooks_run_once_a_step() -> None:
    """Pre and post hooks of SAM run once around the two passes."""
    model = network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    order: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: order.append("pre"))
    optimizer.register_step_post_hook(lambda *_: order.append("post"))
    optimizer.base_optimizer.register_step_post_hook(lambda *_: order.append("base"))
    train(model, optimizer, 2)
    assert order == ["pre", "base", "post"] * 2


def test_defaults_hold_rho_and_the_options_of_the_base() -> None:
    """defaults lists rho beside every option of the base optimizer."""
    optimizer = SAM([leaf(1.0)], torch.optim.SGD, rho=0.3, lr=0.2, momentum=0.8)
    assert isinstance(optimizer, Optimizer)
    assert {k: optimizer.defaults[k] for k in ("rho", "lr", "momentum")} == {"rho": 0.3, "lr": 0.2, "momentum": 0.8}
    assert optimizer.defaults.keys() == torch.optim.SGD([leaf(1.0)]).defaults.keys() | {"rho"}


# Weights are put back


@pytest.mark.parametrize("p", [2, "inf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("fickle", [False, True])
@pytest.mark.parametrize("spoil", [None, 0.0, math.inf, -math.inf, math.nan])
def test_zero_learning_rate_leaves_every_weight_bitwise(
    p: Any, dtype: torch.dtype, fickle: bool, spoil: float | None
) -> None:
    """With lr = 0 each weight keeps its bits: dropout, BatchNorm, a lost gradient, spoiled gradients, bfloat16."""
    model = network(dtype, fickle=fickle)
    with torch.no_grad():
        model.head.weight.mul_(1e-4)
    before = weights_of(model)
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.3, p=p, lr=0.0, momentum=0.9)
    x, y = batch(dtype=dtype)
    backward = closure_for(model, optimizer, x, y)

    def closure() -> Tensor:
        loss = backward()
        if spoil is not None:
            assert model.body.weight.grad is not None
            if spoil == 0.0:
                optimizer.zero_grad(set_to_none=False)
            else:
                model.body.weight.grad[1, 1] = spoil
        return loss

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for _ in range(3):
            optimizer.step(closure)
    assert same_bits(before, weights_of(model))
    assert optimizer.skipped_steps == (0 if spoil is None else 3)


def test_parameter_without_second_gradient_is_restored() -> None:
    """A parameter whose gradient is gone in the second pass is put back all the same."""
    model = network(fickle=True)
    with torch.no_grad():
        model.extra.weight[0, 0] = -0.0
    before = weights_of(model.extra)
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1)
    train(model, optimizer, 1)
    assert model.extra.weight.grad is None
    assert same_bits(before, weights_of(model.extra))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_weights_and_buffers_are_restored_when_the_closure_raises(error: type[BaseException]) -> None:
    """An error or Ctrl-C in the second pass leaves the weights at w, the buffers after pass one, and no hook."""
    model = network()
    before = weights_of(model)
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    x, y = batch()
    backward = closure_for(model, optimizer, x, y)
    buffers: list[list[Tensor]] = []

    def closure() -> Tensor:
        loss = backward()
        buffers.append([b.double() for b in model.buffers()])
        if len(buffers) == 2:
            raise error
        return loss

    with pytest.raises(error):
        optimizer.step(closure)
    assert same_bits(before, weights_of(model))
    assert same_bits(buffers[0], [b.double() for b in model.buffers()])
    assert not torch.nn.modules.module._global_forward_pre_hooks
    assert not optimizer.state
    train(model, optimizer, 1)


# Gradients that cannot be used


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("when", [1, 2])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
def test_one_infinite_gradient_does_not_spoil_weights(value: float, when: int, base: type[Optimizer]) -> None:
    """One inf or NaN in either pass: weights and base state keep their bits, a warning says so, training goes on."""
    options = {"momentum": 0.9} if base is torch.optim.SGD else {}
    model = network(dropout=0.0)
    optimizer = SAM(model.parameters(), base, lr=0.1, **options)
    train(model, optimizer, 2)
    before, state = weights_of(model), copy.deepcopy(optimizer.state_dict())
    x, y = batch()
    backward = closure_for(model, optimizer, x, y)
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        loss = backward()
        if calls == when:
            assert model.head.bias.grad is not None
            model.head.bias.grad[0] = value
        return loss

    with pytest.warns(RuntimeWarning, match="not finite") as caught:
        loss = optimizer.step(closure)
    assert caught[0].filename == __file__
    assert math.isfinite(loss.item())
    assert (calls, optimizer.skipped_steps) == (when, 1)
    assert same_bits(before, weights_of(model))
    after = optimizer.state_dict()
    for index, entry in state["state"].items():
        for key, saved in entry.items():
            assert torch.equal(torch.as_tensor(saved), torch.as_tensor(after["state"][index][key]))
    train(model, optimizer, 1)
    assert not same_bits(before, weights_of(model))
    assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("grad", [0.0, None])
def test_zero_gradient_skips_the_step(grad: float | None) -> None:
    """With nothing to climb there is no division by zero: weights stay, the step is counted, the loss returned."""
    w = leaf(1.0)
    optimizer = SAM([w], torch.optim.SGD, lr=0.1, weight_decay=0.5)

    def closure() -> float:
        w.grad = None if grad is None else torch.tensor([grad])
        return 3.0

    with pytest.warns(RuntimeWarning, match="is zero"):
        assert optimizer.step(closure) == 3.0
    assert (w.item(), optimizer.skipped_steps, len(optimizer.state)) == (1.0, 1, 0)


def test_skipped_first_step_makes_second_step_skip() -> None:
    """In the two-call form a skipped ascent skips the descent too, and the next step is an ordinary one."""
    w = leaf(1.0)
    optimizer = SAM([w], torch.optim.SGD, lr=0.1)
    w.grad = torch.tensor([math.nan])
    with pytest.warns(RuntimeWarning, match="gradient at w is not finite"):
        optimizer.first_step(zero_grad=True)
    w.grad = torch.ones(1)
    optimizer.second_step(zero_grad=True)
    assert (w.item(), w.grad) == (1.0, None)
    w.grad = torch.ones(1)
    optimizer.first_step()
    optimizer.second_step()
    assert w.item() == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        (1e-30, torch.float32),
        (1e-42, torch.float32),
        (1e37, torch.float32),
        (1e-200, torch.float64),
        (1e300, torch.float64),
        (6e-8, torch.float16),
        (3e4, torch.float16),
        (1e-30, torch.bfloat16),
    ],
)
def test_perturbation_has_length_rho_for_any_gradient(size: float, dtype: torch.dtype) -> None:
    """No epsilon, underflow or overflow: ||e|| = rho for gradients near both ends of the dtype's range."""
    w = nn.Parameter(torch.zeros(16, dtype=dtype))
    optimizer = SAM([w], torch.optim.SGD, rho=0.25, lr=0.1)
    w.grad = torch.full((16,), size, dtype=dtype)
    optimizer.first_step()
    torch.testing.assert_close(w.detach().double(), torch.full((16,), 0.0625, dtype=torch.float64), rtol=1e-6, atol=0)
    optimizer.second_step()
    assert optimizer.skipped_steps == 0


# Low precision


def test_bfloat16_perturbation_is_rounded_once_and_lost_directions_warn_once() -> None:
    """bfloat16 weights become round(w + e) with the sum in float32; a lost direction warns once with its cosine."""
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(2000, generator=generator).bfloat16()
    grad = torch.randn(2000, generator=generator).bfloat16()
    w = nn.Parameter(start.clone())
    optimizer = SAM([w], torch.optim.SGD, rho=0.05, lr=0.0)
    e = grad.float() * (0.05 / float(grad.double().norm()))
    achieved = (start.float() + e).bfloat16().float() - start.float()
    cosine = float(torch.dot(achieved, e) / achieved.norm() / e.norm())
    assert cosine < 0.9

    w.grad = grad
    optimizer.first_step()
    assert torch.equal(w.detach(), (start.float() + e).bfloat16())
    with pytest.warns(RuntimeWarning, match=rf"{cosine:.2f}.*float32.*torch\.autocast"):
        optimizer.second_step()
    assert torch.equal(w.detach(), start)
    optimizer.first_step()
    optimizer.second_step()


def test_bfloat16_perturbation_that_survives_rounding_is_silent() -> None:
    """A radius well above the weights' rounding unit gives no warning."""
    model = network(torch.bfloat16)
    train(model, SAM(model.parameters(), torch.optim.SGD, rho=1.0, lr=0.1), 2)


def test_enclosing_autocast_does_not_hide_the_perturbation() -> None:
    """Under an autocast around the whole step, the second pass sees w + e and not w's cached low-precision copy."""
    x, y = batch()
    finals = []
    for outside in (True, False):
        model = network(dropout=0.0, batchnorm=False)
        optimizer = SAM(model.parameters(), torch.optim.SGD, rho=2.0, lr=0.1)
        closure = closure_for(model, optimizer, x, y)
        if outside:
            with torch.autocast("cpu", torch.bfloat16):
                optimizer.step(closure)
        else:
            optimizer.step(torch.autocast("cpu", torch.bfloat16)(closure))
        finals.append(weights_of(model))
    assert same_bits(*finals)


# Both passes see one function


def test_dropout_masks_are_replayed() -> None:
    """Both passes of a step draw the same masks, and two steps draw different ones."""
    model = network(batchnorm=False)
    masks: list[Tensor] = []
    model.drop.register_forward_hook(lambda module, args, out: masks.append(out == 0.0))
    torch.manual_seed(1)
    train(model, SAM(model.parameters(), torch.optim.SGD, lr=0.1), 2)
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[2], masks[3])
    assert not torch.equal(masks[0], masks[2])


def test_random_state_after_a_step_is_that_of_one_pass() -> None:
    """A step consumes the random numbers of one forward and backward."""
    model = network()
    x, y = batch()
    torch.manual_seed(1)
    nn.functional.cross_entropy(model(x), y).backward()
    once = torch.get_rng_state()
    torch.manual_seed(1)
    train(model, SAM(model.parameters(), torch.optim.SGD, lr=0.1), 1)
    assert torch.equal(torch.get_rng_state(), once)


def test_batchnorm_statistics_update_once() -> None:
    """After a step BatchNorm has counted one batch, and its statistics are those of the pass at w."""
    model, reference = network(dropout=0.0), network(dropout=0.0)
    reference(batch()[0])
    train(model, SAM(model.parameters(), torch.optim.SGD, rho=1.0, lr=0.1), 1)
    assert isinstance(model.norm.num_batches_tracked, Tensor)
    assert int(model.norm.num_batches_tracked) == 1
    assert same_bits([b.double() for b in model.buffers()], [b.double() for b in reference.buffers()])


@pytest.mark.filterwarnings("ignore:Using .torch.compile:UserWarning")
@pytest.mark.parametrize("inplace", [True, False])
def test_compiled_model_takes_the_same_steps(inplace: bool) -> None:
    """Under torch.compile the perturbation is seen and BatchNorm counts once: weights and buffers match eager ones."""
    eager, other = network(dropout=0.0), network(dropout=0.0)
    train(eager, SAM(eager.parameters(), torch.optim.SGD, rho=0.5, lr=0.1), 3)
    optimizer = SAM(other.parameters(), torch.optim.SGD, rho=0.5, lr=0.1)
    if inplace:
        other.compile(backend="eager")  # type: ignore[no-untyped-call]
        train(other, optimizer, 3)
    else:
        train(torch.compile(other, backend="eager"), optimizer, 3)  # type: ignore[arg-type]
    torch.testing.assert_close(eager.state_dict(), other.state_dict())


def test_frozen_buffers_undoes_shared_and_replaced_buffers() -> None:
    """A buffer replaced instead of written, one shared by two modules, and an empty slot come back as they were."""

    class Counter(nn.Module):
        def __init__(self, count: Tensor) -> None:
            super().__init__()
            self.register_buffer("count", count)
            self.register_buffer("last", None)

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            self.count = self.count + 1
            self.last = x
            return x

    count = torch.zeros(())
    first, second = Counter(count), Counter(count)
    with frozen_buffers():
        first(torch.ones(1))
        second(torch.ones(1))
    assert first.count is second.count is count
    assert count.item() == 0.0
    assert first.last is None


def test_frozen_buffers_leaves_eval_mode_alone() -> None:
    """A module in eval mode may write its buffers inside."""

    class Cache(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            return x

    cache = Cache().eval()
    with frozen_buffers():
        cache(torch.ones(1))
    assert cache.seen.item() == 1.0


# Arguments


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda w: SAM([w], torch.optim.SGD, rho=-0.1), "rho must be a finite number >= 0, got -0.1"),
        (lambda w: SAM([w], torch.optim.SGD, rho=math.nan), "got nan"),
        (lambda w: SAM([w], torch.optim.SGD, rho=INF), "got inf"),
        (lambda w: SAM([w], torch.optim.SGD, rho="0.1"), "got '0.1'"),  # type: ignore[arg-type]
        (lambda w: SAM([{"params": [w], "rho": -1}], torch.optim.SGD), "got -1"),
        (lambda w: SAM([w], torch.optim.SGD, p=1), "p must be 2 or inf, got 1"),
        (lambda w: SAM([w], "SGD"), "the string 'SGD'"),  # type: ignore[arg-type]
        (lambda w: SAM([w], torch.optim.SGD([w])), r"an instance of SGD.*SAM\(params, SGD"),  # type: ignore[arg-type]
        (lambda w: SAM([w], nn.Linear), "must be an optimizer class"),  # type: ignore[arg-type]
        (lambda w: SAM([w], torch.optim.LBFGS), "LBFGS, whose step needs a closure"),
        (lambda w: SAM([w], SAM), "SAM, whose step needs a closure"),
        (lambda w: SAM([torch.zeros(2, dtype=torch.complex64, requires_grad=True)], torch.optim.SGD), "view_as_real"),
    ],
)
def test_bad_argument_is_named(make: Callable[[Tensor], SAM], message: str) -> None:
    """Each argument outside its domain raises an ArgumentError that says what came."""
    with pytest.raises(ArgumentError, match=message):
        make(leaf(1.0))


def test_refused_group_is_not_added() -> None:
    """A group that add_param_group refuses is in neither optimizer."""
    optimizer = SAM([leaf(1.0)], torch.optim.SGD)
    for bad in ({"params": [leaf(1.0)], "rho": -1.0}, {"params": [torch.zeros(1, dtype=torch.complex64)]}):
        with pytest.raises(ArgumentError):
            optimizer.add_param_group(bad)
    assert len(optimizer.param_groups) == len(optimizer.base_optimizer.param_groups) == 1


def test_step_without_closure_says_what_to_do() -> None:
    """step() names the closure and the two-call form."""
    optimizer = SAM([leaf(1.0)], torch.optim.SGD)
    with pytest.raises(ArgumentError, match=r"closure.*first_step"):
        optimizer.step()


def test_calls_out_of_order_are_refused_and_harmless() -> None:
    """While the weights are perturbed nothing may save, copy or climb again; second_step needs a first_step."""
    w = leaf(1.0)
    optimizer = SAM([w], torch.optim.SGD, lr=0.1)
    with pytest.raises(ArgumentError, match=r"must follow first_step"):
        optimizer.second_step()
    state = optimizer.state_dict()
    w.grad = torch.ones(1)
    optimizer.first_step()
    refused: list[Callable[[], object]] = [
        optimizer.first_step,
        optimizer.state_dict,
        lambda: optimizer.load_state_dict(state),
        lambda: optimizer.step(lambda: 0.0),
        lambda: copy.deepcopy(optimizer),
        lambda: pickle.dumps(optimizer),
    ]
    for call in refused:
        with pytest.raises(ArgumentError, match=r"perturbed.*second_step"):
            call()
    optimizer.second_step()
    assert w.item() == pytest.approx(0.9)
    with pytest.raises(ArgumentError):
        optimizer.second_step()


@pytest.mark.parametrize("when", [1, 2])
def test_sparse_gradient_is_refused_with_the_weights_in_place(when: int) -> None:
    """A sparse gradient in either pass raises, names the remedy, and leaves the weights at w."""
    table = nn.Embedding(5, 2)
    before = weights_of(table)
    optimizer = SAM(table.parameters(), torch.optim.SGD, lr=0.1)
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        table.sparse = calls == when
        optimizer.zero_grad()
        loss = (table(torch.tensor([1, 3])) ** 2).sum()
        loss.backward()
        return loss

    with pytest.raises(SharpscopeError, match="sparse=False"):
        optimizer.step(closure)
    assert same_bits(before, weights_of(table))
    optimizer.state_dict()


@pytest.mark.filterwarnings("ignore:Using .torch.compile:UserWarning")
def test_a_compiled_model_is_compiled_once() -> None:
    """Five steps around a compiled model with BatchNorm compile it once: the hooks of all steps are the same."""
    compiled: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    call = torch.compile(model, backend=backend)
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1)
    x, y = torch.randn(16, 4), torch.arange(16) % 3

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(call(x), y)
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)
    assert len(compiled) == 1
