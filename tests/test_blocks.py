"""lambda_max and trace of each diagonal block against the dense Hessian; the table, the record and the command."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dense import dense_hessian, top
from sharpscope import (
    ArgumentError,
    BlockResult,
    ConvergenceWarning,
    Cost,
    DataError,
    Estimate,
    Objective,
    Problem,
    block_spectra,
)
from sharpscope.cli import main
from sharpscope.operators import curvature
from sharpscope.operators.blockwise import blockwise, parameter_blocks
from sharpscope.results import side_by_side
from sharpscope.training import Recipe, train
from sharpscope.weights.parameters import select
from sharpscope.zoo import load_data, make_model

SMALL: dict[str, dict[str, Any]] = {
    "mlp": {"hidden": (6,)},
    "cnn": {"channels": (3, 4), "hidden": 6},
    "wide_resnet": {"depth": 10, "widen": 1, "base": 1, "norm": "batch"},
}


@cache
def digits() -> tuple[Tensor, Tensor]:
    data = load_data("digits")
    return data.inputs[:100].double(), data.targets[:100]


@cache
def small(name: str) -> nn.Module:
    """The small model after some SGD steps."""
    model = make_model(name, seed=1, **SMALL[name]).double().eval()
    inputs, labels = digits()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model


@cache
def truth(name: str) -> Tensor:
    inputs, labels = digits()
    return dense_hessian(small(name), lambda call: F.cross_entropy(call(inputs), labels))


def problem(model: nn.Module | str, **more: Any) -> Problem:
    inputs, labels = digits()
    given = small(model) if isinstance(model, str) else model
    return Problem(model=given, loss=nn.CrossEntropyLoss(), data=(inputs, labels), **more)


def diagonal(name: str, by: str) -> dict[str, Tensor]:
    """The dense diagonal blocks, by name, from the names of the parameters alone."""
    places: dict[str, list[int]] = {}
    start = 0
    for parameter, tensor in small(name).named_parameters():
        key = parameter if by == "parameter" else parameter[: parameter.rindex(".")]
        places.setdefault(key, []).extend(range(start, start + tensor.numel()))
        start += tensor.numel()
    return {key: truth(name)[index][:, index] for key, index in places.items()}


@pytest.mark.parametrize("by", ["module", "parameter"])
@pytest.mark.parametrize("name", SMALL)
def test_every_block_agrees_with_the_dense_hessian(name: str, by: str) -> None:
    """In float64 each lambda_max agrees to 1e-6, lies in its interval, and belongs to the right name and size."""
    result = block_spectra(problem(name), by, tol=1e-7)
    dense = diagonal(name, by)
    wanted = np.array([float(top(block, 1)) for block in dense.values()])
    assert result.names == tuple(dense)
    assert result.sizes.tolist() == [len(block) for block in dense.values()]
    assert np.abs(result.lambda_max - wanted).max() < 1e-6 * wanted.max()
    assert (np.abs(result.lambda_max - wanted) <= 1e-6 * np.abs(wanted)).all()
    assert ((result.lower <= wanted) & (wanted <= result.upper)).all()
    assert result.converged.all()


@pytest.mark.parametrize("name", SMALL)
def test_traces_lie_within_four_standard_errors(name: str) -> None:
    """For five seeds each block's trace, and the whole; blocks of at most 2 probes parameters to 1e-12."""
    dense = diagonal(name, "module")
    wanted = np.array([float(block.trace()) for block in dense.values()])
    for seed in range(5):
        result = block_spectra(problem(name), tol=0.1, generator=torch.Generator().manual_seed(seed))
        assert (np.abs(result.traces - wanted) <= 4 * result.trace_errors).all()
        assert abs(result.trace.value - wanted.sum()) <= 4 * result.trace.standard_error
        tiny = result.sizes <= 16
        assert (np.abs(result.traces - wanted)[tiny] <= 1e-12 * np.abs(wanted).max()).all()
        assert result.provenance["seed"] == seed


def test_float32_intervals_hold_the_true_values() -> None:
    """A float32 model's blocks: lambda_max to 1e-3, in intervals that hold the float64 ones."""
    model = make_model("cnn", **SMALL["cnn"])
    model.load_state_dict(small("cnn").state_dict())
    result = block_spectra(problem(model.float()))
    wanted = np.array([float(top(block, 1)) for block in diagonal("cnn", "module").values()])
    assert result.provenance["dtype"] == "float32"
    assert np.abs(result.lambda_max / wanted - 1).max() < 1e-3
    assert ((result.lower <= wanted) & (wanted <= result.upper)).all()


@pytest.mark.parametrize("name", ["hessian", "ggn"])
def test_a_blockwise_product_is_the_diagonal_of_whole_ones(name: str) -> None:
    """``diag(H_11, ..., H_LL) V`` for each block's own number of vectors, whatever the micro-batch; zero beyond."""
    parts, counts = parameter_blocks(select(small("cnn")), "module"), [2, 0, 3, 1]
    for size in (100, 32):
        objective = Objective(problem("cnn"), micro_batch=size, curvature=curvature(name))
        vectors = torch.randn(objective.num_params, 3, dtype=torch.float64)
        wanted = torch.zeros_like(vectors)
        for one, count in zip(parts, counts, strict=True):
            alone = torch.zeros_like(vectors)
            alone[one.entries, :count] = vectors[one.entries, :count]
            wanted[one.entries] = objective.hvp(alone)[one.entries]
        objective.curvature = blockwise(objective.curvature, parts, counts)
        assert (objective.hvp(vectors) - wanted).abs().max() < 1e-13


class Tied(nn.Module):
    """Two layers of one weight, a parameter of the model's own, and one that the loss never sees."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.first, self.second, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10)
        self.second.weight = self.first.weight
        self.unused = nn.Linear(2, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(inputs.flatten(1)))
        logits: Tensor = self.scale * self.head(torch.tanh(self.second(hidden)))
        return logits


def test_each_parameter_is_in_one_block_under_its_first_name() -> None:
    """A tied weight belongs to the first module, one held by the model to "(model)"; an unused one has no curvature."""
    model = Tied().double()
    result = block_spectra(problem(model), tol=0.1, probes=3)
    assert dict(zip(result.names, result.sizes.tolist(), strict=True)) == {
        "(model)": 1,
        "first": 64 * 64 + 64,
        "second": 64,
        "head": 650,
        "unused": 9,
    }
    assert (result.lambda_max[-1], result.traces[-1]) == (0.0, 0.0)
    assert result.converged.all()
    inner = block_spectra(problem(model, params="*.bias"), "parameter", tol=0.1, probes=3)
    assert inner.names == ("first.bias", "second.bias", "head.bias", "unused.bias")


class Attention(nn.Module):
    """One head of attention over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(64, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        rows = inputs.reshape(-1, 8, 8)
        weights = torch.softmax(3 * self.q(rows) @ self.k(rows).transpose(1, 2), -1)
        logits: Tensor = self.head((weights @ self.v(rows)).flatten(1))
        return logits


@pytest.mark.parametrize("probes", [2, 8])
def test_a_block_that_is_all_rounding_is_zero_to_rounding(probes: int) -> None:
    """A key's bias shifts all scores alike: in float32 its products are noise, and its interval holds the true zero."""
    inputs, labels = digits()
    data = (inputs.float(), labels)
    result = block_spectra(
        Problem(model=Attention(), loss=nn.CrossEntropyLoss(), data=data), "parameter", probes=probes
    )
    i = result.names.index("k.bias")
    assert result.lower[i] <= 0 <= result.upper[i] < 1e-5 * result.lambda_max.max()
    assert abs(result.traces[i]) <= 4 * result.trace_errors[i] < 1e-5 * result.lambda_max.max()
    assert result.converged.all()


def test_weight_decay_shifts_every_block() -> None:
    """``c/2 ||w||^2`` adds c to each lambda_max and ``c n_l`` to each trace."""
    plain, shifted = (block_spectra(problem("cnn", weight_decay=c), tol=1e-9, probes=60) for c in (0.0, 0.25))
    assert np.abs(shifted.lambda_max - plain.lambda_max - 0.25).max() < 1e-9
    assert np.abs(shifted.traces - plain.traces - 0.25 * plain.sizes).max() < 1e-9


def test_all_blocks_share_the_passes_and_one_audit() -> None:
    """As many passes as the slowest block needs alone, of gradients less than blocks measured one by one."""
    whole = block_spectra(problem("cnn"))
    alone = [block_spectra(problem("cnn", params=f"{name}.*")) for name in whole.names]
    assert whole.cost.passes <= max(one.cost.passes for one in alone) + 1
    assert whole.cost.gradients < sum(one.cost.gradients for one in alone)
    # Two passes with 8 + 2 vectors a block, then 2 for those not done, and 18 gradients of an audit.
    products = whole.cost.hvps
    assert 4 * (16 + 4) <= products <= 4 * (16 + 2 * whole.cost.passes)
    assert 0 < whole.cost.gradients - (whole.cost.passes + 2 * products) < 20


def test_too_few_passes_are_said() -> None:
    """max_passes=2 ends in a ConvergenceWarning that names the blocks, converged False, and a marked table."""
    with pytest.warns(ConvergenceWarning, match="lambda_max of 1 has not converged"):
        result = block_spectra(problem("mlp", params="1.*"), tol=1e-9, max_passes=2)
    assert not result.converged.any()
    assert "NOT CONVERGED" in str(result)
    assert " ?" in str(result).splitlines()[1]


def test_the_same_seed_gives_the_same_bits() -> None:
    """Threads or not: two runs with equal seeds and micro-batch agree in every bit."""
    one, two = (block_spectra(problem("cnn"), micro_batch=200).to_dict()["blocks"] for _ in range(2))
    assert one == two


def test_arguments_are_refused_before_anything_is_paid_for() -> None:
    """A wrong rule, tolerance or number of probes is named."""
    for wrong, words in (({"by": "layer"}, "by"), ({"tol": 0.0}, "tol"), ({"probes": 1}, "probes")):
        with pytest.raises(ArgumentError, match=words):
            block_spectra(problem("mlp"), **wrong)  # type: ignore[arg-type]


def by_hand(**changed: Any) -> BlockResult:
    given: dict[str, Any] = {
        "names": ("a", "b"),
        "sizes": np.array([1200, 30]),
        "lambda_max": np.array([2.0, 0.5]),
        "residuals": np.array([1e-4, 1e-4]),
        "lower": np.array([1.999, 0.499]),
        "upper": np.array([2.001, 0.501]),
        "converged": np.array([True, True]),
        "traces": np.array([30.0, 10.0]),
        "trace_errors": np.array([0.3, 0.4]),
        "loss": 0.1,
        "gradient_norm": 0.01,
        "cost": Cost(7, 40, 100.0, 1.0),
        "provenance": {"by": "module", "checkpoint": "x/net.pt", "operator": "hessian"},
    }
    return BlockResult(**{**given, **changed})


def test_shares_and_their_errors() -> None:
    """They add up to one, and their errors are those of 100,000 simulated pairs of traces within 2 %."""
    shares = by_hand().shares
    assert shares is not None
    assert abs(sum(share.value for share in shares) - 1) < 1e-15
    draws = np.random.default_rng(0).normal([30.0, 10.0], [0.3, 0.4], (100_000, 2))
    scatter = (draws / draws.sum(1, keepdims=True)).std(0)
    assert np.abs(np.array([share.standard_error for share in shares]) / scatter - 1).max() < 0.02
    assert by_hand().trace == Estimate(40.0, 0.5)


def test_shares_of_a_trace_that_may_be_zero_are_not_told() -> None:
    """Where the whole trace is not 4 errors above zero there is no share, and the table says why."""
    result = by_hand(traces=np.array([30.0, -29.0]))
    assert result.shares is None
    assert "No shares" in str(result)
    assert result.to_dict()["blocks"][0]["share"] is None


def test_the_table_has_a_row_a_block() -> None:
    """Name, parameters, lambda_max with its half-width, trace with its error, share; all of them last; then notes."""
    lines = by_hand().summary().splitlines()
    assert lines[1].split() == ["a", "1,200", "2.000", "±0.001", "30.0", "±0.3", "75.0", "%"]
    assert lines[3].split() == ["all", "1,230", "40.0", "±0.5"]
    assert "tied" in lines[7]
    assert ">b</td>" in by_hand()._repr_html_()
    several = str(side_by_side([by_hand(), by_hand(provenance={"by": "parameter", "checkpoint": "x/two.pt"})]))
    assert "net.pt: " in several
    assert "two.pt: " in several


def test_results_survive_the_journey_to_json(tmp_path: Path) -> None:
    """save and load give back every number and the provenance; another record, or a torn one, is refused."""
    result = block_spectra(problem("mlp"), tol=0.1)
    result.save(tmp_path / "r.json")
    again = BlockResult.load(tmp_path / "r.json")
    assert again.to_dict() == result.to_dict()
    assert again.names == result.names
    assert again.sizes.dtype == result.sizes.dtype
    for torn in ({"analysis": "eigen"}, {"analysis": "blocks"}, {**result.to_dict(), "blocks": []}):
        with pytest.raises(DataError):
            BlockResult.from_dict(torn)


def test_the_command_prints_and_writes_the_blocks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A table on stdout, JSON in the file and with --json, exit status 0, or 3 where a block has not converged."""
    checkpoint = tmp_path / "mlp.pt"
    train(Recipe(model="mlp", model_args={"hidden": (8,)}, epochs=1), checkpoint)

    def run(*argv: str | Path) -> int:
        return main(["eigen", *(str(arg) for arg in ("--device", "cpu", *argv, checkpoint))])

    capsys.readouterr()
    assert run("--per-layer", "--out", tmp_path / "r.json") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["block", "1", "3", "all"]
    assert BlockResult.load(tmp_path / "r.json").provenance["by"] == "module"
    assert run("--json", "--per-parameter") == 0
    record = json.loads(capsys.readouterr().out)
    assert [block["name"] for block in record["blocks"]] == ["1.weight", "1.bias", "3.weight", "3.bias"]
    assert run("--per-layer", "--max-passes", "2", "--tol", "1e-6") == 3
