"""Models whose weights ``torch.autograd.grad`` does not see: gradient checkpoints, torch's own and others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import sharpscope
from command import each_class, printed, reference, saved
from conftest import tiny_mlp
from dense import dense_hessian, top
from sharpscope import Problem, ProblemError
from sharpscope.slices import gradient_directions

# Models that leave use_reentrant out are warned by torch, at each call.
pytestmark = pytest.mark.filterwarnings("ignore:.*use_reentrant")

COUNT = 24


def data(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(COUNT, 4, generator=draw).to(dtype), torch.randint(3, (COUNT,), generator=draw)


class Net(nn.Module):
    """4-8-8-3 with tanh, run by ``run(net, x)``."""

    def __init__(self, run: Callable[[nn.Sequential, Tensor], Tensor] = lambda net, x: net(x)) -> None:
        super().__init__()
        self.net, self.run = tiny_mlp(4, 8, 8, 3), run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.net, x)


def by_name(net: nn.Sequential, x: Tensor) -> Tensor:
    """All the weights inside, through the function that was imported by name, which reads use_reentrant as True."""
    return checkpoint(net, x.requires_grad_())


def by_module(net: nn.Sequential, x: Tensor) -> Tensor:
    """As transformers calls it: an attribute of the module, in a partial."""
    run = partial(torch.utils.checkpoint.checkpoint, use_reentrant=True)
    return run(net.__call__, x.requires_grad_())


def sequential(net: nn.Sequential, x: Tensor) -> Tensor:
    return checkpoint_sequential(list(net), 2, x.requires_grad_(), use_reentrant=True)


def first_layers(net: nn.Sequential, x: Tensor) -> Tensor:
    """The head is outside, and alone would have a gradient."""
    return net[4](checkpoint(net[:4], x.requires_grad_(), use_reentrant=True))


def middle(net: nn.Sequential, x: Tensor) -> Tensor:
    """Between two layers with gradients, where torch itself would raise."""
    return net[4](checkpoint(net[1:4], net[0](x), use_reentrant=True))


def not_reentrant(net: nn.Sequential, x: Tensor) -> Tensor:
    return checkpoint(net, x, use_reentrant=False)


class Rebuild(torch.autograd.Function):
    """A reentrant checkpoint of one's own, as other libraries have."""

    @staticmethod
    def forward(ctx: Any, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(x)
        return function(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None]:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            out = ctx.function(x)
        torch.autograd.backward(out, grad)
        return None, x.grad


def rebuilt(net: nn.Sequential, x: Tensor) -> Tensor:
    out: Tensor = Rebuild.apply(net, x.requires_grad_())
    return out


def rebuilt_first_layers(net: nn.Sequential, x: Tensor) -> Tensor:
    out: Tensor = net[4](Rebuild.apply(net[:4], x.requires_grad_()))
    return out


def problem_of(run: Callable[[nn.Sequential, Tensor], Tensor], **given: Any) -> Problem:
    return Problem(model=Net(run), loss=nn.CrossEntropyLoss(), data=data(), **given)


def exact(names: str = "") -> Tensor:
    x, y = data(torch.float64)
    return dense_hessian(Net(), lambda call: F.cross_entropy(call(x), y), names)


@pytest.mark.parametrize("run", [by_name, by_module, sequential, first_layers, middle, not_reentrant])
def test_weights_inside_gradient_checkpoints_have_their_curvature(run: Callable[..., Tensor]) -> None:
    """Eigenvalues and gradient norm are the network's, wherever it is checkpointed; torch stays as it was."""
    before = dict(vars(torch.utils.checkpoint))
    found = sharpscope.top_eigenvalues(problem_of(run), k=3, tol=1e-8, dtype=torch.float64)
    assert found.eigenvalues == pytest.approx(top(exact(), 3).tolist(), rel=1e-6)
    plain, (x, y) = Net().double(), data(torch.float64)
    F.cross_entropy(plain(x), y).backward()
    norm = torch.stack([p.grad.square().sum() for p in plain.parameters() if p.grad is not None]).sum().sqrt()
    assert found.gradient_norm == pytest.approx(float(norm), rel=1e-9)
    assert dict(vars(torch.utils.checkpoint)) == before


def test_chosen_weights_inside_a_gradient_checkpoint_have_their_curvature() -> None:
    """``params`` that lie inside a checkpoint are differentiated though others outside of it are constants."""
    found = sharpscope.top_eigenvalues(problem_of(middle, params="net.2.*"), k=2, tol=1e-8, dtype=torch.float64)
    assert found.eigenvalues == pytest.approx(top(exact("net.2."), 2).tolist(), rel=1e-6)


class Trained(Net):
    """Checkpointed in train mode alone, as transformers does after ``gradient_checkpointing_enable()``."""

    def forward(self, x: Tensor) -> Tensor:
        return by_module(self.net, x) if self.training else self.net(x)


def test_train_mode_with_gradient_checkpointing_is_the_plain_network() -> None:
    """Measured in train mode, the checkpoints that a model switches on there change nothing."""
    problem = replace(problem_of(by_name, mode="train"), model=Trained())
    found = sharpscope.top_eigenvalues(problem, k=2, tol=1e-8, dtype=torch.float64)
    assert found.eigenvalues == pytest.approx(top(exact(), 2).tolist(), rel=1e-6)


def of_all(problem: Problem) -> dict[str, Any]:
    """Numbers of each analysis, in float64."""
    double: Any = {"dtype": torch.float64}
    along = gradient_directions(problem, **double)
    monitor = sharpscope.SharpnessMonitor(problem, every=1, tol=1e-6, max_products=40, **double)
    record = monitor.step()
    assert record is not None
    return {
        "trace": sharpscope.trace(problem, **double).trace.value,
        "density": sharpscope.spectral_density(problem, probes=2, **double).trace.value,
        "sharpness": [m.value for m in sharpscope.measure_sharpness(problem, rho=[0.05], **double).measures],
        "layers": sharpscope.block_spectra(problem, tol=1e-8, **double).lambda_max.tolist(),
        "slice": sharpscope.loss_slice(problem, along, points=3, curvature=True, **double).curvatures.ravel().tolist(),
        "monitor": [record.lambda_max, record.gradient_norm],
    }


def test_every_analysis_differentiates_through_gradient_checkpoints() -> None:
    """Trace, density, sharpness, layers, slices along the gradient and the monitor give the plain network's numbers."""
    plain, hidden = (of_all(problem_of(run)) for run in (lambda net, x: net(x), by_name))
    for name, value in plain.items():
        assert hidden[name] == pytest.approx(value, rel=1e-6), name
    assert hidden["monitor"][0] == pytest.approx(float(top(exact(), 1)), rel=1e-5)


def hidden_problem() -> Problem:
    """The network inside a checkpoint of torch's."""
    return problem_of(by_name)


def rebuilt_problem() -> Problem:
    """The network inside a checkpoint of its own."""
    return problem_of(rebuilt)


def test_a_checkpointed_file_is_measured_by_the_command(tmp_path: Path) -> None:
    """``sharpscope eigen`` prints the eigenvalues of the dense Hessian."""
    path = saved(tmp_path, hidden_problem)
    found = printed("eigen", path, hidden_problem, "--dtype", "float64", "--tol", "1e-8")
    assert found["eigenvalues"] == pytest.approx(reference(path, plain_problem, each_class), rel=1e-6)


def plain_problem() -> Problem:
    """The network itself."""
    return problem_of(lambda net, x: net(x))


def test_a_gradient_of_zero_is_compared_with_the_loss(tmp_path: Path) -> None:
    """Where a foreign checkpoint hides all weights, every analysis names checkpointing."""
    measures: list[Callable[[Problem], Any]] = [
        sharpscope.top_eigenvalues,
        sharpscope.trace,
        sharpscope.spectral_density,
        sharpscope.measure_sharpness,
        partial(sharpscope.top_eigenvalues, operator="finite-difference"),
        sharpscope.SharpnessMonitor,
    ]
    for measure in measures:
        with pytest.raises(ProblemError, match=r"it says 0 where the loss changes.*gradient checkpointing"):
            measure(rebuilt_problem())
    path = saved(tmp_path, rebuilt_problem)
    assert "gradient checkpointing" in printed("density", path, rebuilt_problem, status=1)


def test_weights_hidden_in_part_are_refused() -> None:
    """A gradient that lacks the weights inside a foreign checkpoint is not the loss's derivative."""
    curved = partial(sharpscope.loss_slice, points=3, curvature=True)
    measures: list[Callable[[Problem], Any]] = [
        *(sharpscope.top_eigenvalues, sharpscope.measure_sharpness, sharpscope.SharpnessMonitor),
        *(gradient_directions, curved),
    ]
    for measure in measures:
        with pytest.raises(ProblemError, match="gradient checkpointing"):
            measure(problem_of(rebuilt_first_layers))


class Kept(Net):
    """It keeps a float32 tensor in an attribute, so that it has no copy in float64."""

    def __init__(self, run: Callable[[nn.Sequential, Tensor], Tensor]) -> None:
        super().__init__(run)
        self.mixing = torch.eye(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.net, x @ self.mixing)


def test_hidden_weights_are_noticed_without_a_copy_in_float64() -> None:
    """A model that runs in float32 alone is refused, too, and the plain one is measured; weights stay bit for bit."""
    for run in (rebuilt, rebuilt_first_layers):
        model = Kept(run)
        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(ProblemError, match="gradient checkpointing"):
            sharpscope.top_eigenvalues(replace(plain_problem(), model=model))
        assert all(map(torch.equal, before, model.parameters()))
    plain = replace(plain_problem(), model=Kept(lambda net, x: net(x)))
    assert sharpscope.top_eigenvalues(plain, k=1).eigenvalues == pytest.approx(top(exact(), 1).tolist(), rel=1e-3)


def flat(net: nn.Sequential, x: Tensor) -> Tensor:
    return net(x) * 0


def steps(net: nn.Sequential, x: Tensor) -> Tensor:
    return net(x).round() + 0 * net(x)


@pytest.mark.parametrize("run", [flat, steps])
def test_a_loss_without_slope_has_no_curvature(run: Callable[..., Tensor]) -> None:
    """A constant, and a loss that jumps and has no slope, have a gradient of zero that is right."""
    assert sharpscope.top_eigenvalues(problem_of(run), k=1).eigenvalues == pytest.approx([0.0])
