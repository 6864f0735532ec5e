"""State of SAM and its variants: what is saved, loaded, and shared with a trainer's wrapper; weights after failures."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sharpscope.errors import ArgumentError
from sharpscope.optim import ASAM, GSAM, SAM, FriendlySAM, LookSAM

RHO, LR = 0.3, 0.05

FAMILY: dict[str, Callable[..., SAM]] = {
    "sam": SAM,
    "asam": ASAM,
    "gsam": GSAM,
    "looksam": lambda *a, **k: LookSAM(*a, k=3, **k),
    "friendly": FriendlySAM,
}
BASES: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "adam": (torch.optim.Adam, {}),
    "adagrad": (torch.optim.Adagrad, {}),
}


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def batches(count: int, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 8, 4, generator=generator, dtype=torch.float64).to(dtype)
    return list(zip(inputs, torch.randint(3, (count, 8), generator=generator), strict=True))


def optimizer_of(name: str, model: nn.Module, base: str = "momentum", **options: Any) -> SAM:
    kind, chosen = BASES[base]
    return FAMILY[name](model.parameters(), kind, rho=RHO, lr=LR, **chosen, **options)


def closure_for(model: nn.Module, optimizer: Any) -> Callable[[Tensor, Tensor], Tensor]:
    def closure(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return closure


def train(model: nn.Module, optimizer: SAM, data: list[tuple[Tensor, Tensor]]) -> None:
    for batch in data:
        optimizer.step(closure_for(model, optimizer), *batch)


def two_calls(model: nn.Module, optimizer: Any, data: list[tuple[Tensor, Tensor]]) -> None:
    for batch in data:
        closure = closure_for(model, optimizer)
        closure(*batch)
        optimizer.first_step(zero_grad=True)
        closure(*batch)
        optimizer.second_step(zero_grad=True)


def weights_of(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same_bits(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) and torch.equal(a.signbit(), b.signbit()) for a, b in zip(left, right, strict=True))


# torch.distributed.checkpoint

distributed = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")


@distributed
@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("base", BASES)
def test_distributed_checkpoint_initialises_the_state_and_changes_nothing_else(name: str, base: str) -> None:
    """Asked for the state of a fresh optimizer, weights, learning rate and the following SGD steps keep their bits."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model, straight = network(), network()
    optimizer = optimizer_of(name, model, base)
    get_optimizer_state_dict(model, optimizer)
    assert same_bits(weights_of(model), weights_of(straight))
    assert [group["lr"] for group in optimizer.param_groups] == [LR]
    assert (optimizer.num_gradients, optimizer.skipped_steps) == (0, 0)
    if base != "adam":  # torch's own Adam counts that step
        train(model, optimizer, batches(4))
        train(straight, optimizer_of(name, straight, base), batches(4))
        assert same_bits(weights_of(model), weights_of(straight))


@distributed
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("flat", [False, True])
def test_distributed_checkpoint_resumes_bitwise(name: str, base: str, flat: bool, tmp_path: Path) -> None:
    """Four steps, saved to a folder and loaded into a fresh model, then four more: the bits of eight steps."""
    from torch.distributed.checkpoint import load, save
    from torch.distributed.checkpoint import state_dict as functions

    options = functions.StateDictOptions(flatten_optimizer_state_dict=flat)
    data, whole, half = batches(8), network(), network()
    train(whole, optimizer_of(name, whole, base), data)
    optimizer = optimizer_of(name, half, base)
    train(half, optimizer, data[:4])
    model_state, state = functions.get_state_dict(half, optimizer, options=options)
    save({"model": model_state, "optimizer": state}, checkpoint_id=tmp_path, no_dist=True)

    fresh = network()
    optimizer = optimizer_of(name, fresh, base)
    model_state, state = functions.get_state_dict(fresh, optimizer, options=options)
    loaded = {"model": model_state, "optimizer": state}
    load(loaded, checkpoint_id=tmp_path, no_dist=True)
    functions.set_state_dict(
        fresh, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"], options=options
    )
    train(fresh, optimizer, data[4:])
    assert same_bits(weights_of(whole), weights_of(fresh))


@pytest.mark.parametrize("name", FAMILY)
def test_step_without_closure_is_refused_after_the_first_step(name: str) -> None:
    """A learning rate of 0 alone does not make a forgotten closure pass: there are gradients, or state."""
    model = network()
    optimizer = optimizer_of(name, model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    with pytest.raises(ArgumentError, match="needs a closure"):
        optimizer.step()
    closure_for(model, optimizer)(*batches(1)[0])
    with pytest.raises(ArgumentError, match="needs a closure"):
        optimizer.step()


# State dicts of others, and of ours in another precision


@pytest.mark.parametrize("name", ["looksam", "friendly"])
def test_memory_in_bfloat16_training_resumes_bitwise(name: str) -> None:
    """What a variant remembers of bfloat16 weights is float32, and is not rounded to the weights' precision."""
    data, ends = batches(6, torch.bfloat16), []
    for split in (False, True):
        model = network(torch.bfloat16)
        optimizer = optimizer_of(name, model, "sgd")
        train(model, optimizer, data[:2])
        if split:
            state, optimizer = optimizer.state_dict(), optimizer_of(name, model, "sgd")
            optimizer.load_state_dict(state)
        train(model, optimizer, data[2:])
        ends.append(weights_of(model))
    assert same_bits(*ends)


@pytest.mark.parametrize("name", ["looksam", "friendly"])
@pytest.mark.parametrize("other", FAMILY)
@pytest.mark.parametrize("base", ["sgd", "adam"])
def test_memory_is_not_taken_for_state_of_the_base_or_of_another_variant(name: str, other: str, base: str) -> None:
    """A state dict with a variant's memory and no other state loads around any base; other variants start anew."""
    model, resumed, fresh = network(), network(), network()
    optimizer = optimizer_of(name, model, "sgd")
    train(model, optimizer, batches(2))
    resumed_optimizer, fresh_optimizer = optimizer_of(other, resumed, base), optimizer_of(other, fresh, base)
    groups = [{**group, "sam_steps": 2} for group in fresh_optimizer.state_dict()["param_groups"]]
    resumed_optimizer.load_state_dict({"state": optimizer.state_dict()["state"], "param_groups": groups})
    train(resumed, resumed_optimizer, batches(3))
    train(fresh, fresh_optimizer, batches(3))
    assert same_bits(weights_of(resumed), weights_of(fresh)) == (other != name)


class TwoStep(Optimizer):
    """SAM as two steps around a base optimizer, which keeps its state to itself or shares it."""

    def __init__(self, params: Any, base: type[Optimizer], adaptive: bool = False, share: bool = False, **options: Any):
        super().__init__(params, {"rho": RHO, "adaptive": adaptive, **options})
        self.base_optimizer = base(self.param_groups, **options)  # type: ignore[call-arg]
        self.param_groups = self.base_optimizer.param_groups
        if share:
            self.state = self.base_optimizer.state

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        params = [p for group in self.param_groups for p in group["params"]]
        norm = torch.cat([p.grad.flatten() for p in params]).norm()
        for p in params:
            self.state[p]["old_p"] = p.clone()
            p.add_(RHO * p.grad / norm)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.copy_(self.state[p]["old_p"])
        self.base_optimizer.step()
        self.zero_grad()


def two_step(model: nn.Module, base: str, **options: Any) -> TwoStep:
    kind, chosen = BASES[base]
    return TwoStep(model.parameters(), kind, lr=LR, **chosen, **options)


@pytest.mark.parametrize("base", ["sgd", "momentum", "adagrad"])
def test_state_dict_of_a_two_step_recipe_with_the_state_of_its_base_continues(base: str) -> None:
    """Where both share one state, old_p is left out, and the next steps are those of that recipe."""
    whole, half = network(), network()
    two_calls(whole, two_step(whole, base, share=True), batches(6))
    theirs = two_step(half, base, share=True)
    two_calls(half, theirs, batches(6)[:3])
    state = theirs.state_dict()
    if base == "sgd":
        state = {**state, "state": {}}
    ours = optimizer_of("sam", half, base)
    ours.load_state_dict(state)
    assert all("old_p" not in kept for kept in ours.state.values())
    train(half, ours, batches(6)[3:])
    for a, b in zip(weights_of(half), weights_of(whole), strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=1e-13)


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("base", BASES)
def test_state_dict_of_a_two_step_recipe_without_the_state_of_its_base_is_refused(name: str, base: str) -> None:
    """Momentum and moments are not in it: the refusal names the state dict that has them, which loads and continues."""
    whole, half = network(), network()
    two_calls(whole, two_step(whole, base), batches(4))
    theirs = two_step(half, base)
    two_calls(half, theirs, batches(4)[:2])
    ours = optimizer_of(name, half, base)
    with pytest.raises(ArgumentError, match=r"state_dict\(\) of its base_optimizer"):
        ours.load_state_dict(theirs.state_dict())
    assert not any("old_p" in kept for kept in ours.state.values())
    ours.load_state_dict({**theirs.state_dict(), "state": {}})
    ours.load_state_dict(theirs.base_optimizer.state_dict())
    train(half, ours, batches(4)[2:])
    if name == "sam":
        for a, b in zip(weights_of(half), weights_of(whole), strict=True):
            torch.testing.assert_close(a, b, rtol=0.0, atol=1e-13)


def test_state_dict_of_an_adaptive_two_step_recipe_needs_an_adaptive_one() -> None:
    """adaptive=True lies in its groups, where ours would pass over it."""
    model = network()
    state = two_step(model, "sgd", adaptive=True).state_dict()
    with pytest.raises(ArgumentError, match='Build it with adaptive="elementwise"'):
        optimizer_of("sam", model, "sgd").load_state_dict(state)
    optimizer_of("sam", model, "sgd", adaptive="elementwise").load_state_dict(state)
    optimizer_of("asam", model, "sgd").load_state_dict(state)


# Trainers' wrappers


def forwarding(optimizer: SAM) -> Any:
    """A wrapper of a subclass, which looks up in the optimizer what it does not have itself."""

    class Wrapper:
        def __getattr__(self, name: str) -> Any:
            return getattr(optimizer, name)

        def step(self, closure: Any = None, *args: Any) -> Any:
            return optimizer.step(closure, *args)

    wrapper: Any = Wrapper()
    wrapper.__class__ = type("Wrapped", (Wrapper, type(optimizer)), {})
    return wrapper


def copying(optimizer: SAM) -> Any:
    """A wrapper of a subclass with copies of the attributes, and a step of its own."""

    class Wrapper:
        def step(self, closure: Any = None, *args: Any) -> Any:
            return optimizer.step(closure, *args)

    wrapper: Any = Wrapper()
    wrapper.__class__ = type("Wrapped", (Wrapper, type(optimizer)), {})
    wrapper.__dict__.update({name: value for name, value in vars(optimizer).items() if name != "step"})
    return wrapper


@pytest.mark.parametrize("name", [name for name in FAMILY if name != "looksam"])
@pytest.mark.parametrize("wrap", [forwarding, copying])
def test_two_calls_of_a_wrapper_are_those_of_the_optimizer(name: str, wrap: Callable[[SAM], Any]) -> None:
    """Weights, counts, the saved state and the scheduler are those without a wrapper, and a run resumes from them."""
    data, plain, wrapped = batches(6), network(), network()
    optimizer = optimizer_of(name, plain)
    two_calls(plain, optimizer, data)
    inner = optimizer_of(name, wrapped)
    wrapper = wrap(inner)
    scheduler = torch.optim.lr_scheduler.StepLR(inner, step_size=100)
    two_calls(wrapped, wrapper, data[:2])
    scheduler.step()
    two_calls(wrapped, inner, data[2:3])
    train(wrapped, wrapper, data[3:4])
    for seen in (inner, wrapper):
        assert (seen.num_gradients, seen.skipped_steps) == (8, 0)

    state = copy.deepcopy(inner.state_dict())
    assert str(state) == str(wrapper.state_dict())
    resumed = network()
    resumed.load_state_dict(wrapped.state_dict())
    resumed_optimizer = optimizer_of(name, resumed)
    resumed_optimizer.load_state_dict(state)
    two_calls(resumed, resumed_optimizer, data[4:])
    assert same_bits(weights_of(plain), weights_of(resumed))


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("wrap", [forwarding, copying])
def test_steps_of_a_wrapper_are_those_of_the_optimizer(name: str, wrap: Callable[[SAM], Any]) -> None:
    """step(closure) and load_state_dict through a wrapper reach the optimizer."""
    data, plain, wrapped = batches(6), network(), network()
    train(plain, optimizer_of(name, plain), data)
    first = optimizer_of(name, wrapped)
    train(wrapped, wrap(first), data[:2])
    second = optimizer_of(name, wrapped)
    wrapper = wrap(second)
    wrapper.load_state_dict(first.state_dict())
    train(wrapped, second, data[2:4])
    train(wrapped, wrap(second), data[4:])
    assert same_bits(weights_of(plain), weights_of(wrapped))


# Restoring the weights


def failing(error: type[BaseException]) -> Callable[..., None]:
    def fail(*_: Any, **__: Any) -> None:
        raise error("no such operation")

    return fail


@pytest.mark.parametrize("name", FAMILY)
def test_steps_do_not_need_the_foreach_copy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it fails, the weights are restored one by one, and the steps are the same to the bit."""
    plain, other = network(), network()
    train(plain, optimizer_of(name, plain), batches(4))
    monkeypatch.setattr(torch, "_foreach_copy_", failing(NotImplementedError))
    train(other, optimizer_of(name, other), batches(4))
    assert same_bits(weights_of(plain), weights_of(other))


FAILURES = [
    *((NotImplementedError, operations) for operations in (["_foreach_add_"], ["_foreach_add_", "_foreach_copy_"])),
    *((KeyboardInterrupt, [operation]) for operation in ("_foreach_add_", "_foreach_copy_", "_foreach_norm")),
]


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize(("error", "operations"), FAILURES)
def test_a_failing_operation_leaves_the_weights_at_w(
    name: str, error: type[BaseException], operations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever operation fails or is interrupted, the restoring one too: the bits are those of w, and steps go on."""
    model, straight = network(), network()
    optimizer = optimizer_of(name, model)
    before = weights_of(model)
    with monkeypatch.context() as patch:
        for operation in operations:
            patch.setattr(torch, operation, failing(error))
        with pytest.raises(error):
            optimizer.step(closure_for(model, optimizer), *batches(1)[0])
    assert same_bits(before, weights_of(model))
    train(model, optimizer, batches(3))
    train(straight, optimizer_of(name, straight), batches(3))
    assert same_bits(weights_of(model), weights_of(straight))


@pytest.mark.parametrize("name", [name for name in FAMILY if name != "looksam"])
def test_a_failing_first_step_leaves_the_weights_at_w(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bits are those of w, and the next two calls are a step."""
    model = network()
    optimizer = optimizer_of(name, model)
    before = weights_of(model)
    closure_for(model, optimizer)(*batches(1)[0])
    with monkeypatch.context() as patch:
        patch.setattr(torch, "_foreach_add_", failing(RuntimeError))
        patch.setattr(torch, "_foreach_copy_", failing(RuntimeError))
        with pytest.raises(RuntimeError, match="no such operation"):
            optimizer.first_step()
    assert same_bits(before, weights_of(model))
    two_calls(model, optimizer, batches(1))


class Lone(Tensor):
    """A tensor without foreach functions."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_foreach_" in getattr(func, "__name__", ""):
            raise NotImplementedError(f"{func.__name__} is not implemented for Lone")
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("p", [2, "inf"])
def test_tensor_subclasses_without_foreach_take_the_same_steps(name: str, p: Any) -> None:
    """A subclass of which torch has no foreach functions trains, among plain parameters, as a plain tensor does."""
    plain, other = network(), network()
    other[2].weight = nn.Parameter(other[2].weight.detach().as_subclass(Lone))
    with pytest.raises(NotImplementedError):
        torch._foreach_mul([other[2].weight], 2.0)
    for model in (plain, other):
        train(model, optimizer_of(name, model, p=p), batches(4))
    for a, b in zip(weights_of(plain), weights_of(other), strict=True):
        torch.testing.assert_close(a, torch.Tensor(b), rtol=0.0, atol=1e-13)


@pytest.mark.parametrize("name", FAMILY)
def test_a_parameter_elsewhere_without_gradient_does_not_matter(name: str) -> None:
    """With a parameter on the meta device, which has no data, the others take their steps."""
    plain, other = network(), network()
    train(plain, optimizer_of(name, plain), batches(4))
    optimizer = optimizer_of(name, other)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3, device="meta"))]})
    train(other, optimizer, batches(4))
    assert same_bits(weights_of(plain), weights_of(other))


def test_fully_sharded_flat_parameters_are_refused() -> None:
    """The older FullyShardedDataParallel marks its parameters, whose norms SAM could not sum over the processes."""
    model = network()
    model[0].weight._fsdp_flattened = True  # type: ignore[union-attr]
    with pytest.raises(ArgumentError, match="fully_shard"):
        optimizer_of("sam", model)
