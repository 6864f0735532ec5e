"""Networks that run otherwise than they are written: compiled, scripted, traced, in other layouts or precisions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sharpscope
from command import each_class, printed, reference, saved
from conftest import tiny_mlp
from dense import dense_hessian, top
from sharpscope import DataError, Problem, ProblemError

COUNT = 24
# Compiling warns of what torch itself no longer recommends, and scripting is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore")


def data(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(COUNT, 4, generator=draw).to(dtype), torch.randint(3, (COUNT,), generator=draw)


class Net(nn.Module):
    """4-8-8-3 with tanh and BatchNorm, and dropout if wanted."""

    def __init__(self, dropping: bool = False) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.BatchNorm1d(8), tiny_mlp(8, 8, 3)
        self.drop = nn.Dropout(0.3) if dropping else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(torch.tanh(self.norm(self.first(x)))))


def network() -> nn.Module:
    torch.manual_seed(3)
    return Net()


def exact(k: int = 3) -> list[float]:
    x, y = data(torch.float64)
    found: list[float] = top(dense_hessian(network(), lambda call: F.cross_entropy(call(x), y)), k).tolist()
    return found


def compiled() -> Any:
    """By the compiler that differentiates ahead of time, without its slow back end."""
    return torch.compile(network(), backend="aot_eager")


def compiled_and_trained() -> Any:
    """It has taken a gradient, in eval mode, so that no statistics have changed."""
    model = compiled().eval()
    x, y = data()
    F.cross_entropy(model(x), y).backward()
    return model


def compiled_in_part() -> nn.Module:
    model = network()
    model.last = torch.compile(model.last, backend="aot_eager")
    return model


def compiled_in_place() -> nn.Module:
    model = network()
    model.compile(backend="aot_eager")
    return model


def scripted() -> Any:
    return torch.jit.script(network())


def scripted_in_part() -> nn.Module:
    model = network()
    model.last = torch.jit.script(model.last)
    return model


def traced() -> Any:
    return torch.jit.trace(network().eval(), data()[0])


WRAPPED = [
    *(compiled, compiled_and_trained, compiled_in_part, compiled_in_place),
    *(scripted, scripted_in_part, traced),
]


def problem_of(model: Any, **given: Any) -> Problem:
    return Problem(**{"model": model, "loss": nn.CrossEntropyLoss(), "data": data(), **given})


@pytest.mark.parametrize("make", WRAPPED)
@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_a_wrapped_network_has_the_networks_eigenvalues(make: Callable[[], Any], dtype: torch.dtype | None) -> None:
    """Compiled, scripted or traced, whole or in part, itself or a copy: the dense Hessian's; nothing changes."""
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    found = sharpscope.top_eigenvalues(problem_of(model), k=3, tol=1e-6, dtype=dtype)
    assert found.eigenvalues == pytest.approx(exact(), rel=1e-6 if dtype else 1e-4)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None or make is compiled_and_trained for p in model.parameters())


@pytest.mark.parametrize("make", [compiled_and_trained, scripted])
def test_every_analysis_takes_a_wrapped_network(make: Callable[[], Any]) -> None:
    """Trace, sharpness, the loss along the gradient, the approximate Hessian and the monitor are the network's own."""

    def numbers(model: Any) -> list[float]:
        problem, double = problem_of(model), {"dtype": torch.float64}
        along = sharpscope.slices.gradient_directions(problem, **double)
        record = sharpscope.SharpnessMonitor(problem, every=1, tol=1e-3, **double).step()
        assert record is not None
        return [
            sharpscope.trace(problem, **double).trace.value,
            *(m.value for m in sharpscope.measure_sharpness(problem, rho=[0.05], **double).measures),
            *sharpscope.loss_slice(problem, along, points=3, curvature=True, **double).curvatures.ravel().tolist(),
            float(sharpscope.top_eigenvalues(problem, k=1, operator="finite-difference").eigenvalues[0]),
            record.lambda_max,
        ]

    assert numbers(make()) == pytest.approx(numbers(network()), rel=1e-6)


def test_a_compiled_loss_is_the_loss() -> None:
    """A loss function that is compiled is differentiated as it was written."""

    @torch.compile(backend="aot_eager")
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target)

    found = sharpscope.top_eigenvalues(problem_of(network(), loss=loss), k=3, tol=1e-6)
    assert found.eigenvalues == pytest.approx(exact(), rel=1e-4)


def test_statistics_of_a_scripted_network_are_restored() -> None:
    """Measured in train mode, BatchNorm's buffers of a scripted module are afterwards what they were."""
    model = scripted_in_part()
    model.norm = torch.jit.script(model.norm)
    before = [buffer.clone() for buffer in model.buffers()]
    sharpscope.top_eigenvalues(problem_of(model, mode="train"), k=1, micro_batch="loader")
    assert all(map(torch.equal, before, model.buffers()))


def test_a_scripted_network_with_a_wrong_second_derivative_is_refused() -> None:
    """TorchScript's second derivative of BatchNorm with dropout is wrong (torch 2.13): refused by name."""
    torch.manual_seed(3)
    with pytest.raises(ProblemError, match="scripted"):
        sharpscope.top_eigenvalues(problem_of(torch.jit.script(Net(dropping=True))))


def plain_problem() -> Problem:
    """The network itself."""
    return problem_of(network())


def compiled_problem() -> Problem:
    """The network, compiled."""
    return problem_of(compiled())


def scripted_problem() -> Problem:
    """The network, scripted."""
    return problem_of(scripted())


@pytest.mark.parametrize("problem", [compiled_problem, scripted_problem])
def test_a_file_is_measured_in_a_wrapped_network(problem: Callable[[], Problem], tmp_path: Path) -> None:
    """``sharpscope eigen`` fits the weights into it and prints the eigenvalues of the dense Hessian."""
    path = saved(tmp_path, plain_problem)
    found = printed("eigen", path, problem, "--dtype", "float64", "--tol", "1e-8")
    assert found["eigenvalues"] == pytest.approx(reference(path, plain_problem, each_class), rel=1e-6)


class Mixed(Net):
    """In bfloat16 where autocast allows it, by a block and by a decorator."""

    @torch.autocast("cpu", dtype=torch.bfloat16)
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(x).float()


def mixed_problem() -> Problem:
    """The network with autocast inside."""
    torch.manual_seed(3)
    return problem_of(Mixed())


def test_autocast_inside_the_network_is_off_while_measuring(tmp_path: Path) -> None:
    """Eigenvalues, slices, the monitor and the command give the network's own numbers; afterwards it works."""
    problem = mixed_problem()
    found = sharpscope.top_eigenvalues(problem, k=3, tol=1e-6)
    assert found.eigenvalues == pytest.approx(exact(), rel=1e-4)
    x, y = data(torch.float64)
    loss = float(F.cross_entropy(network().double().eval()(x), y))
    assert sharpscope.loss_slice(problem, points=3).loss.ravel()[1] == pytest.approx(loss, rel=1e-6)
    record = sharpscope.SharpnessMonitor(problem, every=1, tol=1e-4, max_products=30).step()
    assert record is not None
    assert record.lambda_max == pytest.approx(exact(1)[0], rel=1e-3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert problem.model.first(x.float()).dtype == torch.bfloat16
    path = saved(tmp_path, plain_problem)
    printed_values = printed("eigen", path, mixed_problem, "--tol", "1e-4")["eigenvalues"]
    assert printed_values == pytest.approx(reference(path, plain_problem, each_class), rel=1e-3)


class Halved(Net):
    """It computes in 16 bits whatever autocast says."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).bfloat16().float()


def test_a_network_that_rounds_by_hand_is_refused_by_name() -> None:
    """The sentence names 16 bits, which the user can change, next to the loss."""
    torch.manual_seed(3)
    with pytest.raises(ProblemError, match="16 bits"):
        sharpscope.top_eigenvalues(problem_of(Halved()))


def exported(**given: Any) -> Any:
    return torch.export.export(network().eval(), (data()[0],), **given).module()


def test_an_exported_program_is_measured_in_batches_that_it_takes() -> None:
    """Of any size, cut as others are; of one size, if the loader's batches are kept, else a sentence says so."""
    free = exported(dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    for model, kept in ((free, None), (exported(), "loader")):
        found = sharpscope.top_eigenvalues(problem_of(model), k=3, tol=1e-6, micro_batch=kept)
        assert found.eigenvalues == pytest.approx(exact(), rel=1e-4)
    for measure in (sharpscope.top_eigenvalues, sharpscope.trace, sharpscope.measure_sharpness):
        with pytest.raises(ProblemError, match="dynamic_shapes"):
            measure(problem_of(exported()))


class Paired(Net):
    """Its output, and as a target its own detached output for other inputs, as self-distillation has it."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), super().forward(x + 1).detach()


def paired_loss(outputs: Any, target: Tensor) -> Tensor:
    return F.mse_loss(*outputs)


def paired_problem() -> Problem:
    """A loss in which the weights are also in the target."""
    torch.manual_seed(3)
    return problem_of(Paired(), loss=paired_loss)


def test_a_detached_target_of_the_same_network_is_refused_by_name(tmp_path: Path) -> None:
    """The loss moves with the weights in the target, and its gradient does not say so: every analysis names detach."""
    for measure in (sharpscope.top_eigenvalues, sharpscope.measure_sharpness, sharpscope.SharpnessMonitor):
        with pytest.raises(ProblemError, match=r"detach.*copy"):
            measure(paired_problem())
    path = saved(tmp_path, paired_problem)
    assert "detach" in printed("density", path, paired_problem, status=1)


def mixing() -> Tensor:
    return torch.eye(4) + torch.diag(torch.ones(3), 1)


class Mixing(Net):
    """The inputs are first multiplied with a constant matrix, a buffer in the given layout."""

    def __init__(self, layout: torch.layout) -> None:
        super().__init__()
        self.register_buffer("mixing", mixing().to_sparse(layout=layout))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.sparse.mm(self.mixing, x.T).T)


class Sparse(Net):
    """The first layer takes sparse rows."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.sparse.mm(x, self.first.weight.T) + self.first.bias
        return self.last(self.drop(torch.tanh(self.norm(h))))


def positive(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    x, y = data(dtype)
    return x.clamp(min=0), y


LAYOUTS = [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc]


def with_buffer(layout: torch.layout) -> Problem:
    torch.manual_seed(3)
    return problem_of(Mixing(layout))


def with_inputs(layout: torch.layout) -> Problem:
    torch.manual_seed(3)
    x, y = positive()
    parts = [(x[i : i + 10].to_sparse(layout=layout), y[i : i + 10]) for i in range(0, COUNT, 10)]
    return problem_of(Sparse(), data=parts)


def sparse_hessian(kind: Callable[..., Problem]) -> Tensor:
    x, y = data(torch.float64) if kind is with_buffer else positive(torch.float64)
    x = x @ mixing().T.double() if kind is with_buffer else x
    return dense_hessian(network(), lambda call: F.cross_entropy(call(x), y))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", [with_buffer, with_inputs])
def test_sparse_buffers_and_inputs_are_measured(kind: Callable[..., Problem], layout: torch.layout) -> None:
    """In each layout, cut too, eigenvalues, traces, monitor, sharpness and slices are the dense matrix's."""
    problem, exact_hessian = kind(layout), sparse_hessian(kind)
    for given in ({"dtype": torch.float64, "micro_batch": 7}, {}):
        found = sharpscope.top_eigenvalues(problem, k=3, tol=1e-5, **given)
        assert found.eigenvalues == pytest.approx(top(exact_hessian, 3).tolist(), rel=1e-4)
    blocks = sharpscope.block_spectra(problem, probes=200, dtype=torch.float64)
    assert blocks.traces.sum() == pytest.approx(float(exact_hessian.trace()), rel=1e-6)
    record = sharpscope.SharpnessMonitor(problem, every=1, examples=None, tol=1e-4, max_products=30).step()
    assert record is not None
    assert record.lambda_max == pytest.approx(float(top(exact_hessian, 1)), rel=1e-3)
    x, y = positive() if kind is with_inputs else (data()[0] @ mixing().T, data()[1])
    parts = [(x[i : i + 10], y[i : i + 10]) for i in range(0, COUNT, 10)]
    plain = problem_of(network(), data=parts if kind is with_inputs else (x, y))
    double = {"dtype": torch.float64}
    one, two = (
        [m.value for m in sharpscope.measure_sharpness(p, rho=[0.05], **double).measures] for p in (problem, plain)
    )
    assert one == pytest.approx(two, rel=1e-6)
    one, two = (sharpscope.loss_slice(p, points=3, **double).loss.ravel().tolist() for p in (problem, plain))
    assert one == pytest.approx(two, rel=1e-6)


class Unpacking(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to_dense())


def test_blocks_of_sparse_inputs_are_refused_where_they_are_cut() -> None:
    """Rows of a block layout are not selected; the sentence says in which layouts they are."""
    x, y = positive()
    model = Unpacking()
    with pytest.raises(DataError, match="to_sparse_csr"):
        sharpscope.trace(problem_of(model, data=(x.to_sparse_bsr((2, 2)), y)))


def sparse_problem() -> Problem:
    """Sparse inputs."""
    return with_inputs(torch.sparse_csr)


def test_sparse_inputs_are_measured_by_the_command(tmp_path: Path) -> None:
    """``sharpscope eigen`` prints the dense matrix's eigenvalues, of all examples and of some of them."""
    path = saved(tmp_path, sparse_problem, seed=3)
    found = printed("eigen", path, sparse_problem, "--dtype", "float64", "--tol", "1e-8")
    assert found["eigenvalues"] == pytest.approx(top(sparse_hessian(with_inputs)).tolist(), rel=1e-6)
    assert printed("eigen", path, sparse_problem, "--examples", "12")["num_examples"] == 12


@pytest.mark.parametrize("hook", ["tensor", "module", "retained"])
def test_hooks_that_read_gradients_change_nothing(hook: str) -> None:
    """A hook on an activation or a module, and ``retain_grad``, that only read: the network's own eigenvalues."""

    class Watched(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(self.first(x))
            if h.requires_grad and hook == "tensor":
                h.register_hook(lambda grad: None)
            if h.requires_grad and hook == "retained":
                h.retain_grad()
            return self.last(torch.tanh(h))

    torch.manual_seed(3)
    model = Watched()
    if hook == "module":
        model.last.register_full_backward_hook(lambda module, before, after: None)
    for given in ({}, {"dtype": torch.float64}):
        found = sharpscope.top_eigenvalues(problem_of(model), k=3, tol=1e-6, **given)
        assert found.eigenvalues == pytest.approx(exact(), rel=1e-4)
