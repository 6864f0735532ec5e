"""SAM's relatives do what their papers' equations say, leave nothing behind, and resume to the bit."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from sharpscope.errors import ArgumentError
from sharpscope.optim import ASAM, GSAM, SAM, FriendlySAM, LookSAM

INF = float("inf")
RHO, LR = 0.07, 0.1

FAMILY: dict[str, Callable[..., SAM]] = {
    "sam": SAM,
    "sam-inf": lambda *a, **k: SAM(*a, p="inf", **k),
    "three ascent steps": lambda *a, **k: SAM(*a, ascent_steps=3, **k),
    "not normalised": lambda *a, **k: SAM(*a, normalize=False, **k),
    "asam": ASAM,
    "asam by filters": lambda *a, **k: ASAM(*a, adaptive="filter", **k),
    "gsam": GSAM,
    "looksam": lambda *a, **k: LookSAM(*a, k=3, **k),
    "friendly": FriendlySAM,
}


class Net(nn.Module):
    """Dropout, BatchNorm, a convolution (with filters), and a head that only every other pass uses when ``fickle``."""

    def __init__(self, dropout: float = 0.0, batchnorm: bool = False, fickle: bool = False) -> None:
        super().__init__()
        self.body = nn.Conv1d(1, 3, 3)
        self.norm = nn.BatchNorm1d(3) if batchnorm else nn.Identity()
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(12, 2)
        self.extra = nn.Linear(12, 2)
        self.fickle, self.calls = fickle, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = self.drop(torch.tanh(self.norm(self.body(x[:, None])))).flatten(1)
        out: Tensor = self.head(h)
        return out + self.extra(h) if not self.fickle or self.calls % 2 else out


def network(dtype: torch.dtype = torch.float64, **kwargs: Any) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net(**kwargs).to(dtype)


def batches(steps: int, n: int = 12, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [
        (
            torch.randn(n, 6, generator=generator, dtype=torch.float64).to(dtype),
            torch.randint(2, (n,), generator=generator),
        )
        for _ in range(steps)
    ]


def closure_for(model: nn.Module, optimizer: Optimizer) -> Callable[[Tensor, Tensor], Tensor]:
    def closure(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x).float() if x.dtype == torch.bfloat16 else model(x), y)
        loss.backward()
        return loss

    return closure


def train(model: nn.Module, optimizer: Optimizer, data: list[tuple[Tensor, Tensor]]) -> None:
    closure = closure_for(model, optimizer)
    for x, y in data:
        optimizer.step(closure, x, y)  # type: ignore[call-arg]


def weights_of(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same_bits(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) and torch.equal(a.signbit(), b.signbit()) for a, b in zip(left, right, strict=True))


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


class Straight:
    """Gradients of the network's mean loss as a function of a flat vector, for algorithms written straight."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.named = model, dict(model.named_parameters())

    def gradient(self, w: Tensor, x: Tensor, y: Tensor) -> Tensor:
        w = w.clone().requires_grad_()
        pieces = torch.split(w, [p.numel() for p in self.named.values()])
        given = {name: piece.view_as(p) for (name, p), piece in zip(self.named.items(), pieces, strict=True)}
        loss = nn.functional.cross_entropy(torch.func.functional_call(self.model, given, (x,)), y)
        return torch.autograd.grad(loss, w)[0]

    def filter_norms(self, w: Tensor) -> Tensor:
        pieces, found = torch.split(w, [p.numel() for p in self.named.values()]), []
        for p, piece in zip(self.named.values(), pieces, strict=True):
            whole = piece.view_as(p)
            if p.dim() == 1:
                found.append(whole.abs())
            else:
                found += [part.norm().expand(part.numel()) for part in whole]
        return flat(found)


def unit(v: Tensor) -> Tensor:
    return v / v.norm()


# What each does in a step, written straight on flat vectors. ``memory`` is what it keeps from step to step.
Rule = Callable[[Straight, Tensor, Tensor, Tensor, dict[str, Any]], Tensor]


def sam(net: Straight, w: Tensor, x: Tensor, y: Tensor, memory: dict[str, Any]) -> Tensor:
    return net.gradient(w + RHO * unit(net.gradient(w, x, y)), x, y)


def sam_inf(net: Straight, w: Tensor, x: Tensor, y: Tensor, memory: dict[str, Any]) -> Tensor:
    return net.gradient(w + RHO * net.gradient(w, x, y).sign(), x, y)


def three_steps(net: Straight, w: Tensor, x: Tensor, y: Tensor, memory: dict[str, Any]) -> Tensor:
    at = w
    for _ in range(3):
        at = at + RHO / 3 * unit(net.gradient(at, x, y))
    return net.gradient(at, x, y)


def unnormalised(net: Straight, w: Tensor, x: Tensor, y: Tensor, memory: dict[str, Any]) -> Tensor:
    return net.gradient(w + RHO * net.gradient(w, x, y), x, y)


def asam(net: Straight, w: Tensor, x: Tensor, y: Tensor, memory: dict[str, Any]) -> Tensor:
    g, t = net.gradient(w, x, y), w.abs() + 0.01
    return net.gradient(w + RHO * t**2 * g / (t * g).norm(), x, y)


def asam_filter(net: Straight, w: Tensor, x: Tensor, y: Tensor, memory: dict[str, Any]) -> Tensor:
    g, t = net.gradient(w, x, y), net.filter_norms(w) + 0.01
    return net.gradient(w + RHO * t**2 * g / (t * g).norm(), x, y)


def gsam(net: Straight, w: Tensor, x: Tensor, y: Tensor, memory: dict[str, Any]) -> Tensor:
    g, e = net.gradient(w, x, y), sam(net, w, x, y, memory)
    return e - 0.4 * (g - (g @ unit(e)) * unit(e))


def looksam(net: Straight, w: Tensor, x: Tensor, y: Tensor, memory: dict[str, Any]) -> Tensor:
    g, t = net.gradient(w, x, y), memory.setdefault("t", 0)
    memory["t"] += 1
    if t % 3 == 0:
        e = sam(net, w, x, y, memory)
        memory["v"] = e - (e @ unit(g)) * unit(g)
        return e
    return g + 0.7 * g.norm() * unit(memory["v"])


def friendly(net: Straight, w: Tensor, x: Tensor, y: Tensor, memory: dict[str, Any]) -> Tensor:
    g = net.gradient(w, x, y)
    d = g - memory["m"] if "m" in memory else g
    memory["m"] = 0.9 * memory["m"] + 0.1 * g if "m" in memory else g
    return net.gradient(w + RHO * unit(d), x, y)


RULES: dict[str, Rule] = dict(
    zip(FAMILY, (sam, sam_inf, three_steps, unnormalised, asam, asam_filter, gsam, looksam, friendly), strict=True)
)


@pytest.mark.parametrize("name", FAMILY)
def test_seven_steps_match_the_equations_written_straight(name: str) -> None:
    """Seven steps on seven batches, with momentum, equal the paper's equations on flat vectors."""
    model = network()
    net, w, momentum, memory = Straight(model), flat(weights_of(model)), torch.zeros(()), {}
    data = batches(7)
    for x, y in data:
        momentum = 0.9 * momentum + RULES[name](net, w, x, y, memory)
        w = w - LR * momentum
    optimizer = FAMILY[name](model.parameters(), torch.optim.SGD, rho=RHO, lr=LR, momentum=0.9)
    train(model, optimizer, data)
    torch.testing.assert_close(flat(weights_of(model)), w, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["sam", "asam", "gsam", "friendly"])
def test_m_is_the_mean_over_pieces_with_a_perturbation_each(name: str) -> None:
    """With m = 5 a batch of 12 is cut into 5, 5 and 2, each moved by its own gradient; GSAM combines the means."""
    model = network()
    net, w, data, memory = Straight(model), flat(weights_of(model)), batches(3), {}
    pieces = [slice(0, 5), slice(5, 10), slice(10, 12)]
    shares = [5 / 12, 5 / 12, 2 / 12]
    inner = RULES["sam" if name == "gsam" else name]
    for x, y in data:
        e = sum(s * inner(net, w, x[p], y[p], memory) for p, s in zip(pieces, shares, strict=True))
        if name == "gsam":
            g = net.gradient(w, x, y)
            e = e - 0.4 * (g - (g @ unit(e)) * unit(e))
        w = w - LR * e
    optimizer = FAMILY[name](model.parameters(), torch.optim.SGD, rho=RHO, lr=LR, m=5)
    train(model, optimizer, data)
    torch.testing.assert_close(flat(weights_of(model)), w, rtol=1e-11, atol=1e-12)
    assert optimizer.effective_m == 5


def test_step_with_m_returns_the_mean_loss_at_w() -> None:
    """The value of step() is the loss of the whole batch before the step."""
    model = network()
    (x, y) = batches(1)[0]
    with torch.no_grad():
        expected = nn.functional.cross_entropy(model(x), y)
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=LR, m=5)
    torch.testing.assert_close(optimizer.step(closure_for(model, optimizer), x, y).detach(), expected)


def test_looksam_is_cheaper() -> None:
    """Of nine steps with k = 3, three take two gradients: 12 in all, where SAM takes 18."""
    for name, gradients in (("looksam", 12), ("sam", 18)):
        model = network()
        optimizer = FAMILY[name](model.parameters(), torch.optim.SGD, rho=RHO, lr=LR)
        train(model, optimizer, batches(9))
        assert (optimizer.num_gradients, model.calls) == (gradients, gradients)


@pytest.mark.parametrize("name", FAMILY)
def test_a_radius_that_float32_weights_round_away_warns_once(name: str) -> None:
    """w + e is w: said, also where a schedule lowers rho later; a usual radius and a tiny one in float64 are silent."""
    for dtype, rho, lost in ((torch.float32, 1e-12, True), (torch.float32, 0.05, False), (torch.float64, 1e-12, False)):
        model = network(dtype)
        optimizer = FAMILY[name](model.parameters(), torch.optim.SGD, rho=rho, lr=1e-3)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train(model, optimizer, batches(3, dtype=dtype))
            if not lost and dtype == torch.float32:
                assert not caught
                optimizer.param_groups[0]["rho"] = 1e-12
                train(model, optimizer, batches(6, dtype=dtype))
        said = [str(w.message) for w in caught]
        assert len(said) == (dtype == torch.float32), said
        assert all("Rounding to float32 weights" in one and "Raise rho" in one for one in said)


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("m", [None, 5])
def test_zero_learning_rate_leaves_every_weight_bitwise(name: str, dtype: torch.dtype, m: int | None) -> None:
    """With lr = 0 each weight keeps its bits over 40 steps: dropout, BatchNorm, and gradients lost, zero, inf, NaN."""
    model = network(dtype, dropout=0.5, batchnorm=True, fickle=True)
    before = weights_of(model)
    optimizer = FAMILY[name](model.parameters(), torch.optim.SGD, rho=0.3, lr=0.0, momentum=0.9, m=m)
    backward, calls = closure_for(model, optimizer), 0

    def closure(x: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        loss, calls = backward(x, y), calls + 1
        spoil = {2: 0.0, 5: math.inf, 9: math.nan}.get(calls % 13)
        assert model.body.weight.grad is not None
        if spoil == 0.0:
            optimizer.zero_grad(set_to_none=False)
        elif spoil is not None:
            model.body.weight.grad[1, 0, 1] = spoil
        return loss

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for x, y in batches(4, dtype=dtype) * 10:
            optimizer.step(closure, x, y)
    assert same_bits(before, weights_of(model))
    assert optimizer.skipped_steps > 3


@pytest.mark.parametrize("name", FAMILY)
def test_resume_is_bitwise(name: str) -> None:
    """Four steps, a checkpoint through a file, four more: the bits of eight steps, momentum and memory included."""
    data, file = batches(8, dtype=torch.float32), io.BytesIO()

    def make() -> tuple[Net, SAM]:
        model = network(torch.float32)
        return model, FAMILY[name](model.parameters(), torch.optim.SGD, rho=RHO, lr=LR, momentum=0.9)

    whole, optimizer = make()
    train(whole, optimizer, data)
    half, optimizer = make()
    train(half, optimizer, data[:4])
    torch.save({"model": half.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    kept = torch.load(file, weights_only=True)
    again, optimizer = make()
    again.load_state_dict(kept["model"])
    optimizer.load_state_dict(kept["optimizer"])
    train(again, optimizer, data[4:])
    assert same_bits(weights_of(whole), weights_of(again))


@pytest.mark.parametrize("name", FAMILY)
def test_state_loads_into_the_bare_base(name: str) -> None:
    """A checkpoint of any of them is one of the base optimizer too."""
    model = network()
    optimizer = FAMILY[name](model.parameters(), torch.optim.Adam, rho=RHO, lr=LR)
    train(model, optimizer, batches(2))
    torch.optim.Adam(model.parameters()).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("name", FAMILY)
def test_scheduler_reaches_both(name: str) -> None:
    """A scheduler changes the one learning rate that optimizer and base share."""
    model = network()
    optimizer = FAMILY[name](model.parameters(), torch.optim.SGD, rho=RHO, lr=LR)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    train(model, optimizer, batches(1))
    scheduler.step()
    assert optimizer.base_optimizer.param_groups[0]["lr"] == LR / 2


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("m", [None, 5])
def test_grad_scaler_changes_nothing(name: str, m: int | None) -> None:
    """With a GradScaler the steps are those without, to rounding; a clip in the base's hook sees true gradients."""
    ends, norms = [], []
    for scaled in (False, True):
        model = network(torch.float64)
        optimizer = FAMILY[name](model.parameters(), torch.optim.SGD, rho=RHO, lr=LR, momentum=0.9, m=m)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2, enabled=scaled)

        def clip(*_: Any, model: nn.Module = model) -> None:
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.3)))

        optimizer.base_optimizer.register_step_pre_hook(clip)

        def closure(
            x: Tensor, y: Tensor, model: Any = model, scaler: Any = scaler, optimizer: Any = optimizer
        ) -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            return loss

        for x, y in batches(6):
            optimizer.step(closure, x, y, scaler=scaler)
            scaler.update()
        ends.append(flat(weights_of(model)))
    torch.testing.assert_close(*ends, rtol=1e-10, atol=1e-12)
    assert max(norms) > 0.3
    torch.testing.assert_close(norms[:6], norms[6:], rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("when", [1, 2])
def test_grad_scaler_backs_off_after_infinite_gradients(when: int) -> None:
    """An overflow in either pass skips the step without a warning, and update() halves the scale."""
    model = network(torch.float32)
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR)
    scaler, before, calls = torch.amp.GradScaler("cpu", init_scale=8.0), weights_of(model), 0

    def closure(x: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        optimizer.zero_grad()
        loss, calls = nn.functional.cross_entropy(model(x), y), calls + 1
        scaler.scale(loss).backward()
        if calls == when:
            assert model.head.bias.grad is not None
            model.head.bias.grad[0] = math.inf
        return loss

    x, y = batches(1, dtype=torch.float32)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(closure, x, y, scaler=scaler)
    scaler.update()
    assert (scaler.get_scale(), optimizer.skipped_steps) == (4.0, 1)
    assert same_bits(before, weights_of(model))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda w: SAM(w, torch.optim.SGD, ascent_steps=0), "ascent_steps must be an integer of at least 1, got 0"),
        (lambda w: SAM(w, torch.optim.SGD, m=0), "m must be an integer of at least 1, got 0"),
        (lambda w: SAM(w, torch.optim.SGD, m=True), "m must be an integer of at least 1, got True"),
        (lambda w: SAM(w, torch.optim.SGD, adaptive="layer"), "must be one of elementwise, filter, got 'layer'"),
        (lambda w: SAM(w, torch.optim.SGD, eta=-1.0), "eta must be a finite number >= 0, got -1.0"),
        (lambda w: SAM(w, torch.optim.SGD, p="inf", normalize=False), "normalize=False needs p=2"),
        (lambda w: SAM(w, torch.optim.SGD, ddp=nn.Linear(1, 1)), "must be the DistributedDataParallel model, got Line"),
        (lambda w: GSAM(w, torch.optim.SGD, alpha=INF), "alpha must be a finite number >= 0, got inf"),
        (lambda w: LookSAM(w, torch.optim.SGD, k=0), "k must be an integer of at least 1, got 0"),
        (lambda w: FriendlySAM(w, torch.optim.SGD, lmbda=2.0), "lmbda must be from 0 to 1, got 2.0"),
        (lambda w: FriendlySAM(w, torch.optim.SGD, ascent_steps=2), "needs ascent_steps=1"),
    ],
)
def test_bad_argument_is_named(make: Callable[[Any], SAM], message: str) -> None:
    """Each argument outside its domain ends in an error that names it."""
    with pytest.raises(ArgumentError, match=message):
        make([nn.Parameter(torch.ones(2))])


def test_m_needs_the_batch() -> None:
    """With m, step() without tensors, or with some of other lengths, says what it needs."""
    model = network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, m=4)
    closure = closure_for(model, optimizer)
    with pytest.raises(ArgumentError, match=r"step\(closure, inputs, targets\), got none"):
        optimizer.step(closure)
    with pytest.raises(ArgumentError, match=r"got \(3, 6\), \(2,\)"):
        optimizer.step(closure, torch.ones(3, 6), torch.ones(2))
    for one in (
        optimizer,
        LookSAM(model.parameters(), torch.optim.SGD),
        SAM(model.parameters(), torch.optim.SGD, ascent_steps=2),
    ):
        with pytest.raises(ArgumentError, match="are for two gradients in every step"):
            one.first_step()


def test_closure_may_return_anything_where_nothing_is_averaged() -> None:
    """What step() returns is what the closure did; only with several pieces must that be a loss."""
    model = network()
    x, y = batches(1)[0]
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=LR)
    backward = closure_for(model, optimizer)
    for returned in (None, ("loss", 3)):

        def closure(x: Tensor, y: Tensor, returned: Any = returned) -> Any:
            backward(x, y)
            return returned

        assert optimizer.step(closure, x, y) == returned
    before = weights_of(model)
    pieces = SAM(model.parameters(), torch.optim.SGD, lr=LR, m=5)
    with pytest.raises(ArgumentError, match="got tuple whose first entry is str"):
        pieces.step(closure, x, y)
    assert same_bits(before, weights_of(model))


def test_skipped_step_leaves_friendly_mean_alone() -> None:
    """A gradient at w + e that is not finite changes neither weights nor the running mean."""
    model = network()
    optimizer = FriendlySAM(model.parameters(), torch.optim.SGD, lr=LR)
    data = batches(2)
    train(model, optimizer, data[:1])
    before = [state["friendlysam_mean"].clone() for state in optimizer.state.values()]
    backward, calls = closure_for(model, optimizer), 0

    def closure(x: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        loss, calls = backward(x, y), calls + 1
        if calls == 2:
            assert model.head.bias.grad is not None
            model.head.bias.grad[0] = math.inf
        return loss

    with pytest.warns(RuntimeWarning, match="not finite"):
        optimizer.step(closure, *data[1])
    after = [state["friendlysam_mean"] for state in optimizer.state.values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_step_hooks_run_once_a_step() -> None:
    """However many of the family there are, a hook of one runs once for its step."""
    for kind in (SAM, FriendlySAM, GSAM, LookSAM, FriendlySAM):
        model, calls = network(), []
        optimizer = kind(model.parameters(), torch.optim.SGD, lr=LR)
        optimizer.register_step_pre_hook(lambda *_, calls=calls: calls.append(1))
        train(model, optimizer, batches(1))
        assert calls == [1]


def test_friendly_sam_goes_on_where_batch_and_mean_agree() -> None:
    """A linear loss has one gradient: with nothing left to follow e is 0, and every step is SGD's."""
    w = nn.Parameter(torch.ones(2))
    optimizer = FriendlySAM([w], torch.optim.SGD, lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (w * torch.tensor([1.0, 2.0])).sum()
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)
    torch.testing.assert_close(w.detach(), torch.tensor([0.5, 0.0]))
    assert optimizer.skipped_steps == 0


@pytest.mark.parametrize(("kind", "options"), [(SAM, {"m": 2}), (GSAM, {"m": 2}), (LookSAM, {})])
def test_gradient_of_zeros_skips_the_step_of_all(kind: type[SAM], options: dict[str, Any]) -> None:
    """With pieces, and between looks: momentum and weight decay do not move what has no gradient."""
    w = nn.Parameter(torch.ones(2))
    optimizer = kind([w], torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1, **options)

    def closure(x: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = (w * x).pow(2).sum(1).mean()
        loss.backward()
        return loss

    optimizer.step(closure, torch.ones(4, 2))
    before = w.detach().clone()
    with pytest.warns(RuntimeWarning, match="is zero"):
        optimizer.step(closure, torch.zeros(4, 2))
    assert torch.equal(w.detach(), before)
    assert optimizer.skipped_steps == 1
