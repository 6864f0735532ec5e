"""The SAM family takes the same step under every recipe of training loops, or refuses it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sharpscope.cli import main
from sharpscope.errors import ArgumentError
from sharpscope.optim import ASAM, GSAM, SAM, FriendlySAM, LookSAM

RHO, LR = 0.3, 0.5
FAMILY: dict[str, type[SAM]] = {"sam": SAM, "asam": ASAM, "gsam": GSAM, "looksam": LookSAM, "friendlysam": FriendlySAM}
TWO_CALLS = [name for name in FAMILY if name != "looksam"]


def batches(steps: int, n: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    draw = [torch.randn(n, 5, generator=generator, dtype=torch.float64) for _ in range(steps)]
    return [(x, torch.where(torch.rand(n, generator=generator) < 0.5, 1.0, -1.0).double()) for x in draw]


def start() -> Tensor:
    return torch.linspace(-1, 1, 5, dtype=torch.float64)


def loss_of(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.softplus(-y * (x @ w)).mean()


def gradient(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The gradient of ``loss_of``, by hand."""
    return -(y * torch.sigmoid(-y * (x @ w))) @ x / len(y)


def direction(name: str, w: Tensor, x: Tensor, y: Tensor, memory: dict[str, Any]) -> Tensor:
    """What each optimizer hands to SGD, by its paper's equations and its default settings (k = 5 for LookSAM)."""
    g = gradient(w, x, y)
    if name == "looksam":
        t = memory["t"] = memory.get("t", -1) + 1
        if t % 5:
            return g + 0.7 * g.norm() * memory["v"] / memory["v"].norm()
    e = RHO * g / g.norm()
    if name == "asam":
        scale = w.abs() + 0.01
        e = RHO * scale**2 * g / (scale * g).norm()
    if name == "friendlysam":
        d = g - memory["mean"] if "mean" in memory else g
        memory["mean"] = 0.9 * memory["mean"] + 0.1 * g if "mean" in memory else g
        e = RHO * d / d.norm()
    g_e = gradient(w + e, x, y)
    if name == "gsam":
        return g_e - 0.4 * (g - (g @ g_e) / (g_e @ g_e) * g_e)
    if name == "looksam":
        memory["v"] = g_e - (g_e @ g) / (g @ g) * g
    return g_e


def straight(name: str, data: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The weights after a step of SGD on each batch."""
    w, memory = start(), {}
    for x, y in data:
        w = w - LR * direction(name, w, x, y, memory)
    return w


def optimizer_of(name: str, w: Tensor, **options: Any) -> SAM:
    return FAMILY[name]([w], torch.optim.SGD, rho=RHO, lr=LR, **options)


Recipe = Callable[[SAM, Tensor, Tensor, Tensor], object]


def backward_only(w: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    def closure(x: Tensor, y: Tensor) -> Tensor:
        loss = loss_of(w, x, y)
        loss.backward()
        return loss

    return closure


def backward_outside(optimizer: SAM, w: Tensor, x: Tensor, y: Tensor) -> None:
    loss_of(w, x, y).backward()
    optimizer.step(backward_only(w), x, y)
    optimizer.zero_grad()


def zeroed_afterwards(optimizer: SAM, w: Tensor, x: Tensor, y: Tensor) -> None:
    optimizer.step(backward_only(w), x, y)
    optimizer.zero_grad(set_to_none=False)


def zeroed_before(optimizer: SAM, w: Tensor, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad(set_to_none=False)
    optimizer.step(backward_only(w), x, y)


def zeroed_in_place(optimizer: SAM, w: Tensor, x: Tensor, y: Tensor) -> None:
    def closure(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=False)
        return backward_only(w)(x, y)

    optimizer.step(closure, x, y)


def accumulated_inside(optimizer: SAM, w: Tensor, x: Tensor, y: Tensor) -> None:
    def closure(x: Tensor, y: Tensor) -> None:
        for rows in (slice(0, 2), slice(2, None)):
            (loss_of(w, x[rows], y[rows]) * len(y[rows]) / len(y)).backward()

    optimizer.step(closure, x, y)
    optimizer.zero_grad()


def scaled_outside(optimizer: SAM, w: Tensor, x: Tensor, y: Tensor) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)

    def closure(x: Tensor, y: Tensor) -> None:
        scaler.scale(loss_of(w, x, y)).backward()

    closure(x, y)
    optimizer.step(closure, x, y, scaler=scaler)
    scaler.update()
    optimizer.zero_grad()


RECIPES: list[Recipe] = [
    backward_outside,
    zeroed_afterwards,
    zeroed_before,
    zeroed_in_place,
    accumulated_inside,
    scaled_outside,
]


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("recipe", RECIPES)
def test_both_passes_start_from_empty_gradients(name: str, recipe: Recipe) -> None:
    """Wherever gradients are zeroed, each step's direction is that of its two gradients alone."""
    data, w = batches(6), nn.Parameter(start())
    optimizer = optimizer_of(name, w)
    for x, y in data:
        recipe(optimizer, w, x, y)
    torch.testing.assert_close(w.detach(), straight(name, data), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", FAMILY)
def test_passes_over_chunks_start_from_empty_gradients(name: str) -> None:
    """With m, a closure that zeroes nothing and one that zeroes give the same bits."""
    ends = []
    for zeroes in (True, False):
        w = nn.Parameter(start())
        optimizer = optimizer_of(name, w, m=3)

        def closure(x: Tensor, y: Tensor, w: Tensor = w, zeroes: bool = zeroes, optimizer: SAM = optimizer) -> Tensor:
            if zeroes:
                optimizer.zero_grad()
            return backward_only(w)(x, y)

        for x, y in batches(3):
            optimizer.zero_grad()
            optimizer.step(closure, x, y)
        ends.append(w.detach())
    assert torch.equal(*ends)


@pytest.mark.parametrize("name", TWO_CALLS)
def test_two_calls_do_not_add_the_first_gradient_to_the_second(name: str) -> None:
    """first_step() without zero_grad=True takes the same step, also when the second pass is accumulated."""
    data, w = batches(4), nn.Parameter(start())
    optimizer = optimizer_of(name, w)
    for x, y in data:
        loss_of(w, x, y).backward()
        optimizer.first_step()
        for rows in (slice(0, 4), slice(4, 8)):
            (loss_of(w, x[rows], y[rows]) / 2).backward()
        optimizer.second_step(zero_grad=True)
    torch.testing.assert_close(w.detach(), straight(name, data), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("m", [None, 4])
def test_accumulated_gradients_of_other_examples_are_refused(name: str, m: int | None) -> None:
    """A gradient of an earlier batch in .grad is refused with a remedy; weights and .grad stay as they were."""
    (first, second), w = batches(2), nn.Parameter(start())
    optimizer = optimizer_of(name, w, m=m)
    loss_of(w, *first).backward()
    with pytest.raises(ArgumentError, match=r"optimizer.zero_grad\(\) in the closure.*in a trainer"):
        optimizer.step(backward_only(w), *second)
    assert torch.equal(w.detach(), start())
    torch.testing.assert_close(w.grad, gradient(start(), *first))


def test_a_gradient_under_another_dropout_mask_is_refused() -> None:
    """A backward outside draws masks that the closure does not: the error names zero_grad(), which helps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), nn.Dropout(0.5), nn.Linear(16, 1))
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=LR)
    x = batches(1)[0][0].float()

    def closure() -> None:
        model(x).pow(2).mean().backward()

    closure()
    with pytest.raises(ArgumentError, match="zero_grad"):
        optimizer.step(closure)

    def zeroing() -> None:
        optimizer.zero_grad()
        closure()

    optimizer.step(zeroing)
    assert optimizer.skipped_steps == 0


def test_a_stale_gradient_is_not_that_of_a_closure_without_backward() -> None:
    """A closure that never calls backward skips the step, whatever .grad held before."""
    w = nn.Parameter(start())
    optimizer = SAM([w], torch.optim.SGD, lr=LR)
    x, y = batches(1)[0]
    loss_of(w, x, y).backward()
    with pytest.warns(RuntimeWarning, match="Does the closure call backward"):
        optimizer.step(lambda: loss_of(w, x, y))
    assert torch.equal(w.detach(), start())


def test_a_parameter_without_second_gradient_keeps_none_of_the_first() -> None:
    """A parameter that only the first pass uses is not moved, although the closure zeroes nothing."""
    w, head, calls = nn.Parameter(start()), nn.Parameter(torch.ones(1)), 0
    optimizer = SAM([w, head], torch.optim.SGD, lr=LR)
    x, y = batches(1)[0]

    def closure() -> None:
        nonlocal calls
        calls += 1
        (loss_of(w, x, y) + (head.sum() if calls == 1 else 0.0)).backward()

    optimizer.step(closure)
    assert head.item() == 1.0
    assert not torch.equal(w.detach(), start())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightnings_accumulation_is_refused(accumulate: int) -> None:
    """accumulate_grad_batches=1 trains as written by hand; 2 is refused with that remedy."""
    lightning = pytest.importorskip("lightning.pytorch")
    data = batches(4)

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(start())

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            return loss_of(self.w, *batch)

        def configure_optimizers(self) -> SAM:
            return optimizer_of("sam", self.w)

    module = Module()
    quiet = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"),
        False,
    )
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", accumulate_grad_batches=accumulate, **quiet)
    loader = torch.utils.data.DataLoader(data, batch_size=None)  # type: ignore[arg-type]
    if accumulate == 2:
        with pytest.raises(ArgumentError, match="gradient accumulation to 1"):
            trainer.fit(module, loader)
        return
    trainer.fit(module, loader)
    torch.testing.assert_close(module.w.detach(), straight("sam", data))


# Options that share a name with the base optimizer


@pytest.mark.parametrize("name", FAMILY)
def test_a_base_with_a_radius_of_its_own_is_refused(name: str) -> None:
    """Adadelta's decay is called rho: the groups that both share cannot hold it and SAM's radius."""
    with pytest.raises(ArgumentError, match="Adadelta has a rho of its own"):
        FAMILY[name]([nn.Parameter(start())], torch.optim.Adadelta)


def test_train_refuses_sam_around_adadelta(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """sharpscope train --optimizer adadelta --rho 0.05 ends in one sentence, and writes nothing."""
    out = tmp_path / "net.pt"
    assert main(["train", "--model", "mlp", "--optimizer", "adadelta", "--rho", "0.05", "--out", str(out)]) == 1
    assert "rho of its own" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("name", ["gsam", "looksam"])
@pytest.mark.parametrize("way", ["base_options", "group"])
def test_alpha_of_rmsprop_and_of_the_variant_are_both_set(name: str, way: str) -> None:
    """With alpha = 0.4 or 0.7 of the variant, RMSprop's alpha = 0.8 is its smoothing constant."""
    data, w, square, memory = batches(4), start(), torch.zeros(5, dtype=torch.float64), {}
    for x, y in data:
        d = direction(name, w, x, y, memory)
        square = 0.8 * square + 0.2 * d**2
        w = w - 0.01 * d / (square.sqrt() + 1e-8)
    p = nn.Parameter(start())
    group = {"params": [p], **({"alpha": 0.8} if way == "group" else {})}
    given: dict[str, Any] = {"base_options": {"alpha": 0.8}} if way == "base_options" else {}
    optimizer = FAMILY[name]([group], torch.optim.RMSprop, rho=RHO, lr=0.01, **given)
    for x, y in data:
        backward_outside(optimizer, p, x, y)
    torch.testing.assert_close(p.detach(), w, rtol=1e-9, atol=1e-12)


def test_alpha_of_asgd_reaches_asgd() -> None:
    """base_options reaches any base, and an option that is given twice is refused."""
    w = nn.Parameter(start())
    optimizer = GSAM([w], torch.optim.ASGD, alpha=0.3, base_options={"alpha": 0.6})
    assert (optimizer.alpha, optimizer.param_groups[0]["alpha"]) == (0.3, 0.6)
    with pytest.raises(ArgumentError, match="lr must be given once"):
        SAM([w], torch.optim.SGD, lr=0.1, base_options={"lr": 0.2})


# Buffers


class Scale(nn.Module):
    """Divides by a running scale that the same forward pass has updated."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(5, 1)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        self.scale.mul_(0.5).add_(h.detach().abs().mean(), alpha=0.5)
        out: Tensor = h / self.scale
        return out


class Recurrent(nn.Module):
    """Goes on from the state of the last batch, kept as a buffer, an attribute, in a tuple, a list or a dict."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.cell, self.head, self.kind = nn.RNNCell(5, 4), nn.Linear(4, 1), kind
        if kind == "buffer":
            self.register_buffer("state", None)
        elif kind != "new attribute":
            starts = {"list": [torch.zeros(8, 4)], "list of None": [None], "growing list": [], "dict": {}}
            self.state: Any = starts.get(kind)

    def forward(self, x: Tensor) -> Tensor:
        last = getattr(self, "state", None)
        if isinstance(last, tuple | list | dict):
            last = (list(last.values()) if isinstance(last, dict) else [*last])[-1] if last else None
        h = self.cell(x, last if last is None else last.detach())
        if self.kind in ("list", "list of None"):
            self.state[0] = h.detach()
        elif self.kind == "growing list":
            self.state.append(h.detach())
        elif self.kind == "dict":
            self.state["h"] = h.detach()
        else:
            self.state = (h,) if self.kind == "tuple" else h if self.kind == "with its graph" else h.detach()
        out: Tensor = self.head(h)
        return out


def spectral() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(5, 4)), nn.Tanh(), nn.Linear(4, 1))


def normalised() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))


STATEFUL: dict[str, Callable[[], nn.Module]] = {
    "running scale": Scale,
    "spectral norm": spectral,
    "BatchNorm": normalised,
    "RNN, buffer": lambda: Recurrent("buffer"),
    "RNN, attribute": lambda: Recurrent("attribute"),
    "RNN, tuple": lambda: Recurrent("tuple"),
    "RNN, list": lambda: Recurrent("list"),
    "RNN, list of None": lambda: Recurrent("list of None"),
    "RNN, growing list": lambda: Recurrent("growing list"),
    "RNN, dict": lambda: Recurrent("dict"),
    "RNN, new attribute": lambda: Recurrent("new attribute"),
    "RNN, with its graph": lambda: Recurrent("with its graph"),
}


def stateful(model: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return STATEFUL[model]()


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("model", STATEFUL)
def test_rho_zero_is_the_base_on_models_with_state(name: str, model: str) -> None:
    """With rho = 0, seven steps give the weights and buffers of the base, bit for bit."""
    ours, theirs = stateful(model), stateful(model)
    sam = FAMILY[name](ours.parameters(), torch.optim.SGD, rho=0.0, lr=0.1, momentum=0.9)
    base = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    for net, optimizer in ((ours, sam), (theirs, base)):
        for x, y in batches(7):

            def closure(net: nn.Module = net, optimizer: Any = optimizer, x: Tensor = x, y: Tensor = y) -> Tensor:
                optimizer.zero_grad()
                loss = (net(x.float())[:, 0] - y.float()).pow(2).mean()
                loss.backward()
                return loss

            optimizer.step(closure)
    for left, right in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert left[0] == right[0]
        assert torch.equal(left[1], right[1]), left[0]


def test_pass_two_sees_the_running_scale_of_pass_one() -> None:
    """A step on a running scale equals two gradients written by hand from one scale, which then moves once."""
    model, (x, y) = Scale().double(), batches(1)[0]
    a, b = model.body.weight.detach()[0].clone(), model.body.bias.detach()[0].clone()
    w = torch.cat([a, b[None]])
    rows = torch.cat([x, torch.ones(len(x), 1).double()], 1)

    def by_hand(w: Tensor) -> tuple[Tensor, Tensor]:
        h = rows @ w
        scale = 0.5 + 0.5 * h.abs().mean()
        return 2 * ((h / scale - y) / scale) @ rows / len(y), scale

    g, scale = by_hand(w)
    expected = w - LR * by_hand(w + RHO * g / g.norm())[0]

    def closure() -> None:
        (model(x)[:, 0] - y).pow(2).mean().backward()

    SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR).step(closure)
    torch.testing.assert_close(torch.cat([model.body.weight.detach()[0], model.body.bias.detach()]), expected)
    torch.testing.assert_close(model.scale, scale)


@pytest.mark.parametrize("way", ["a method", "a compiled function"])
def test_state_is_seen_where_the_module_itself_is_not_called(way: str) -> None:
    """A step through a method of the module, or a compiled function that calls it, is that through the module."""
    ends = []
    for through in ("the module", way):
        model, (x, y) = Scale().double(), batches(1)[0]
        model.load_state_dict({"body.weight": start()[None], "body.bias": torch.zeros(1), "scale": torch.ones(())})
        if through == "a compiled function":
            call = torch.compile(lambda x, model=model: model(x), backend="eager")
        else:
            call = model.forward if through == "a method" else model
        optimizer = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR)
        for _ in range(2):

            def closure(call: Any = call, optimizer: SAM = optimizer, x: Tensor = x, y: Tensor = y) -> None:
                optimizer.zero_grad()
                (call(x)[:, 0] - y).pow(2).mean().backward()

            optimizer.step(closure)
        ends.append(model.state_dict())
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=1e-12, atol=0)


def test_a_model_that_another_thread_trains_keeps_its_updates() -> None:
    """What another thread's model does to its buffers during a step of SAM is not undone."""
    model, other, (x, y) = normalised().double(), nn.BatchNorm1d(5).double(), batches(1)[0]
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR)

    def closure() -> None:
        optimizer.zero_grad()
        thread = threading.Thread(target=lambda: other(x))
        thread.start()
        thread.join()
        (model(x)[:, 0] - y).pow(2).mean().backward()

    optimizer.step(closure)
    assert int(other.num_batches_tracked) == 2  # once in each pass
    assert int(model[1].num_batches_tracked) == 1


# Steps that must not be skipped, or not be taken


@pytest.mark.parametrize("options", [{"adaptive": "elementwise"}, {"adaptive": "filter"}])
def test_weights_that_are_zero_are_trained_under_an_adaptive_ball(options: dict[str, Any]) -> None:
    """Where D g is zero and g is not, e = 0: the step is the base's, and none is skipped."""
    model, (x, y) = nn.Linear(5, 1, bias=False).double(), batches(1)[0]
    nn.init.zeros_(model.weight)
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR, **options)

    def closure() -> None:
        optimizer.zero_grad()
        loss_of(model.weight[0], x, y).backward()

    optimizer.step(closure)
    torch.testing.assert_close(model.weight.detach()[0], -LR * gradient(torch.zeros(5).double(), x, y))
    assert optimizer.skipped_steps == 0


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("what", ["state", "param_groups", "a state dict of the base"])
def test_state_or_groups_that_the_base_no_longer_shares_are_refused(name: str, what: str) -> None:
    """Replaced by other objects they would be two: the step and state_dict() say how to change them in place."""
    w = start().requires_grad_()
    optimizer = FAMILY[name]([w], torch.optim.SGD, rho=RHO, lr=LR, momentum=0.9)
    if what == "state":
        optimizer.state = {}  # type: ignore[assignment]
    elif what == "param_groups":
        optimizer.param_groups = [dict(group) for group in optimizer.param_groups]
    else:
        optimizer.base_optimizer.load_state_dict(optimizer.base_optimizer.state_dict())
    for call in (lambda: optimizer.step(lambda: loss_of(w, *batches(1)[0]).backward()), optimizer.state_dict):
        with pytest.raises(ArgumentError, match="share state and param_groups"):
            call()


def test_two_calls_with_ddp_are_refused() -> None:
    """The gradient at w of GSAM is then each process's own, and the weights would part."""
    model = nn.Linear(2, 1)
    model.no_sync = lambda: None  # type: ignore[assignment]
    optimizer = GSAM(model.parameters(), torch.optim.SGD, lr=0.1, ddp=model)
    with pytest.raises(ArgumentError, match="not for m, ddp"):
        optimizer.first_step()


@pytest.mark.parametrize("name", TWO_CALLS)
@pytest.mark.parametrize("line", range(12))
def test_an_interrupt_amid_the_restore_leaves_the_weights_at_w(name: str, line: int) -> None:
    """Wherever in the first lines of the restore Ctrl-C comes, the weights are those of before the step."""
    w, (x, y) = start().requires_grad_(), batches(1)[0]
    optimizer = FAMILY[name]([w], torch.optim.SGD, rho=RHO, lr=LR)
    before, seen = w.detach().clone(), 0

    def trace(frame: Any, event: str, argument: object) -> Any:
        nonlocal seen
        restores = frame.f_code.co_name in ("restore", "copy_") and "sharpscope" in frame.f_code.co_filename
        if restores and event == "line":
            seen += 1
            if seen == line + 1:
                raise KeyboardInterrupt
        return trace if restores or event == "call" else None

    def closure() -> None:
        optimizer.zero_grad()
        loss_of(w, x, y).backward()

    sys.settrace(trace)
    try:
        optimizer.step(closure)
    except KeyboardInterrupt:
        assert torch.equal(w, before)
    finally:
        sys.settrace(None)
    assert not optimizer.is_perturbed


# Calls and what closures return


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("closed", [False, True])
def test_step_of_a_grad_scaler_names_the_call_that_works(name: str, closed: bool) -> None:
    """scaler.step(optimizer), with a closure or without, is refused with the call to make; that call trains."""
    w, (x, y) = nn.Parameter(start()), batches(1)[0]
    optimizer, scaler = optimizer_of(name, w), torch.amp.GradScaler("cpu", init_scale=64.0)

    def closure() -> None:
        optimizer.zero_grad()
        scaler.scale(loss_of(w, x, y)).backward()

    closure()
    with pytest.raises(ArgumentError, match=r"optimizer\.step\(closure, scaler=scaler\)"):
        scaler.step(optimizer, *([closure] if closed else []))
    assert torch.equal(w.detach(), start())
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    optimizer.step(closure, scaler=scaler)
    scaler.update()
    torch.testing.assert_close(w.detach(), straight(name, [(x, y)]))


@pytest.mark.parametrize(
    ("name", "options", "two_calls"),
    [
        *((name, {}, name != "looksam") for name in FAMILY),
        ("sam", {"m": 2}, False),
        ("gsam", {"ascent_steps": 2}, False),
    ],
)
def test_step_without_closure_names_two_calls_only_where_they_work(
    name: str, options: dict[str, Any], two_calls: bool
) -> None:
    """step() without a closure names first_step() exactly where first_step() runs."""
    w = nn.Parameter(start())
    optimizer = optimizer_of(name, w, **options)
    with pytest.raises(ArgumentError, match=r"step\(closure\).*scaler=scaler") as error:
        optimizer.step()
    assert ("first_step()" in str(error.value)) == two_calls
    w.grad = torch.ones_like(w)
    if not two_calls:
        with pytest.raises(ArgumentError):
            optimizer.first_step()
        return
    optimizer.first_step()
    with pytest.raises(ArgumentError, match=r"Call second_step\(\) first"):
        optimizer.step()


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("kind", [tuple, list])
@pytest.mark.parametrize("m", [None, 3, 8])
def test_closure_may_return_the_loss_and_more(name: str, kind: Any, m: int | None) -> None:
    """(loss, outputs) gives the steps of loss alone; with m the loss is the mean, the outputs a list over chunks."""
    ends, (x, y) = [], batches(1)[0]
    for more in (False, True):
        w = nn.Parameter(start())
        optimizer = optimizer_of(name, w, m=m)

        def closure(x: Tensor, y: Tensor, w: Tensor = w, more: bool = more, optimizer: SAM = optimizer) -> Any:
            optimizer.zero_grad()
            loss = loss_of(w, x, y)
            loss.backward()
            return kind((loss.detach(), (x @ w).detach())) if more else loss.detach()

        returned = optimizer.step(closure, x, y)
        ends.append(w.detach())
    loss, outputs = returned
    torch.testing.assert_close(loss, loss_of(start(), x, y))
    torch.testing.assert_close(outputs if m is None else torch.cat(outputs), x @ start())
    assert torch.equal(*ends)
