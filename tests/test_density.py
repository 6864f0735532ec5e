"""spectral_density and trace against the dense Hessian; the density, its figure and its command."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dense import dense_hessian
from sharpscope import (
    ArgumentError,
    AuditError,
    Cost,
    DataError,
    DensityResult,
    EigenResult,
    Estimate,
    Problem,
    TraceResult,
    load,
    spectral_density,
    top_eigenvalues,
    trace,
)
from sharpscope.cli import main
from sharpscope.linalg import lanczos_quadrature
from sharpscope.plot import density_curve
from sharpscope.training import Recipe, train
from sharpscope.zoo import load_data, make_model


@cache
def digits() -> tuple[Tensor, Tensor]:
    data = load_data("digits")
    return data.inputs[:200].double(), data.targets[:200]


@cache
def network() -> nn.Module:
    """An mlp of 460 parameters after some SGD steps."""
    model = make_model("mlp", seed=1, hidden=(6,)).double()
    inputs, labels = digits()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model


@cache
def truth() -> np.ndarray:
    """All eigenvalues of the network's dense Hessian, ascending."""
    inputs, labels = digits()
    hessian = dense_hessian(network(), lambda call: F.cross_entropy(call(inputs), labels))
    return torch.linalg.eigvalsh(hessian).numpy()


def problem(**changed: Any) -> Problem:
    given = {"model": network(), "loss": nn.CrossEntropyLoss(), "data": digits(), **changed}
    return Problem(**given)


@cache
def measured(seed: int = 0, probes: int = 6, known: bool = False) -> DensityResult:
    pairs = outliers() if known else None
    return spectral_density(problem(), probes, generator=torch.Generator().manual_seed(seed), known=pairs)


@cache
def outliers() -> EigenResult:
    return top_eigenvalues(problem(), k=8, tol=1e-4, vectors=True)


def by_hand(spectrum: Tensor, probes: int = 8, steps: int = 40, seed: int = 0) -> DensityResult:
    """The density of a diagonal matrix."""
    n = len(spectrum)
    source = torch.Generator().manual_seed(seed)
    rule = lanczos_quadrature(lambda block: spectrum[:, None] * block, n, probes, steps, generator=source)
    moments = Estimate(float(spectrum.sum()), 0.0), Estimate(float(spectrum.norm()), 0.0)
    nodes, weights = rule.nodes.numpy(), rule.weights.numpy()
    return DensityResult(nodes, weights, 0, *moments, 0.1, 0.1, Cost(1, 1, 1.0, 1.0), {"num_params": n})


def mixture(at: np.ndarray, points: np.ndarray, width: float) -> np.ndarray:
    """The density of ``points``, each smoothed by a Gaussian."""
    kernel = np.exp(-0.5 * ((at[:, None] - points) / width) ** 2)
    return kernel.mean(1) / (width * np.sqrt(2 * np.pi))


@pytest.mark.parametrize("known", [False, True])
def test_the_density_integrates_to_one(known: bool) -> None:
    """So does the curve at any width, whether outliers were taken out or not; so does one of a single point."""
    result = measured(known=known)
    for width in (None, 0.01, 1.0):
        curve = result.curve(width=width)
        assert abs(np.trapezoid(curve.density, curve.grid) - 1) < 1e-7
        assert (curve.lower >= 0).all()
        assert (curve.lower <= curve.density).all()
        assert (curve.density <= curve.upper).all()
    for value in (0.0, 3.0):
        curve = by_hand(torch.full((20,), value, dtype=torch.float64)).curve()
        assert abs(np.trapezoid(curve.density, curve.grid) - 1) < 1e-7


@pytest.mark.parametrize("known", [False, True])
def test_moments_match_the_dense_hessian(known: bool) -> None:
    """Trace, Frobenius norm and the quadratures' own first two moments lie within 4 stated errors, for five seeds."""
    values = truth()
    for seed in range(5):
        result = measured(seed, known=known)
        pairs = [
            (result.trace, values.sum()),
            (result.frobenius, np.linalg.norm(values)),
            (result.mean, values.mean()),
            (result.second_moment, (values**2).mean()),
            (result.moment(1), values.mean()),
            (result.moment(2), (values**2).mean()),
        ]
        for estimate, exact in pairs:
            assert abs(estimate.value - exact) < 4 * estimate.standard_error


@pytest.mark.parametrize("known", [False, True])
def test_the_curve_matches_the_exact_spectrum_smoothed_likewise(known: bool) -> None:
    """At every point of the spectrum of 460 eigenvalues within the band that 1 of 10,000 means leaves, and 1e-3.

    The 1e-3, of the density, is what 32 steps leave at the default width (6e-4 at most, on four spectra).
    """
    for seed in range(3):
        result = measured(seed, probes=12, known=known)
        curve = result.curve(confidence=0.9999)
        exact = mixture(curve.grid, truth(), curve.width)
        inside = (curve.grid > truth()[0]) & (curve.grid < truth()[-1])
        # 1e-3 of the peak's height too where eigenvectors that were known to 1e-4 move a far tail.
        slack = 1e-3 * exact + 1e-5 * exact.max()
        off = np.maximum(curve.lower - exact, exact - curve.upper) - slack
        assert off[inside].max() < 0
        # The band says something: on the bulk it is a tenth of the density.
        peak = curve.density.argmax()
        assert curve.upper[peak] - curve.lower[peak] < 0.2 * curve.density[peak]


def test_known_outliers_sharpen_the_rest() -> None:
    """With eight eigenvalues taken out the width is a third or less, and these stand in the density exactly."""
    plain, sharp = measured(), measured(known=True)
    assert sharp.width < plain.width / 3
    assert sharp.num_known == 8
    assert np.abs(sharp.nodes[:, :8] / truth()[::-1][:8] - 1).max() < 1e-4
    assert (sharp.weights[:, :8] == 1 / 460).all()
    assert sharp.cost.passes == plain.cost.passes + 1


def test_the_negative_mass_of_a_chosen_spectrum_is_right() -> None:
    """Of 300 eigenvalues 90 lie in [-2, -1], 210 in [1, 3]: the share is 0.3 within 4 errors, and nothing near zero."""
    spectrum = torch.cat([torch.linspace(-2, -1, 90), torch.linspace(1, 3, 210)]).double()
    for seed in range(5):
        result = by_hand(spectrum, seed=seed)
        assert abs(result.negative_mass.value - 0.3) < 4 * result.negative_mass.standard_error < 0.2
        assert result.near_zero_mass.value < 1e-6


def test_zero_eigenvalues_are_not_counted_as_negative() -> None:
    """With 200 zeros and 100 eigenvalues up to 1 the negative mass is below 1e-4, and the mass near zero 0.7."""
    spectrum = torch.cat([torch.zeros(200), torch.linspace(0, 1, 100)]).double()
    result = by_hand(spectrum, steps=20)
    assert result.negative_mass.value < 1e-4
    assert abs(result.near_zero_mass.value - (200 + 100 * 2 * result.width) / 300) < 0.05


def test_the_cost_is_what_was_paid() -> None:
    """6 probes, 32 steps: 33 passes, 198 products, 33 * 13 gradients plus the audit; a trace takes 2 passes."""
    cost = measured().cost
    assert (cost.passes, cost.hvps) == (33, 198)
    assert 33 * 13 < cost.gradients < 33 * 13 + 20
    result = trace(problem(), probes=8)
    assert (result.cost.passes, result.cost.hvps) == (2, 16)
    assert 34 < result.cost.gradients < 54


def test_the_trace_matches_the_dense_hessian() -> None:
    """Within 4 stated errors, for five seeds, also in float32."""
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        dtype = torch.float32 if seed == 4 else None
        result = trace(problem(), generator=generator, dtype=dtype)
        assert abs(result.trace.value - truth().sum()) < 4 * result.trace.standard_error
        assert abs(result.frobenius.value - np.linalg.norm(truth())) < 4 * result.frobenius.standard_error
        assert result.provenance["seed"] == seed
    assert "±" in str(result)
    assert "trace" in result._repr_html_()


def test_as_many_probes_as_weights_leave_nothing_to_chance() -> None:
    """With K = n the trace is exact, and its error is rounding's."""
    model = nn.Linear(5, 1, bias=False).double()
    inputs = torch.randn(40, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = trace(Problem(model=model, loss=nn.MSELoss(), data=(inputs, torch.zeros(40, 1).double())), probes=5)
    expected = 2 * float(inputs.square().sum(1).mean())
    assert result.trace.value == pytest.approx(expected, rel=1e-12)
    assert result.trace.standard_error < 1e-12 * expected


def test_another_operator_has_its_own_trace_and_density() -> None:
    """tr of the empirical Fisher matrix is the mean squared gradient norm of an example; the table names the matrix."""
    inputs, labels = digits()
    per_example = []
    for one, label in zip(inputs, labels, strict=True):
        model = network()
        grads = torch.autograd.grad(F.cross_entropy(model(one[None]), label[None]), list(model.parameters()))
        per_example.append(float(sum(g.square().sum() for g in grads)))
    true = float(np.mean(per_example))
    found = trace(problem(), 16, operator="empirical-fisher")
    assert abs(found.trace.value - true) <= 5 * found.trace.standard_error
    assert found.trace.standard_error < 0.2 * true
    density = spectral_density(problem(), 6, 16, operator="empirical-fisher")
    assert abs(density.trace.value - true) <= 5 * density.trace.standard_error
    assert density.negative_mass.value < 1e-3
    for result in (found, density):
        assert "but of: empirical-fisher" in result.summary()


def test_the_audit_comes_first() -> None:
    """A model with dropout on is refused before any pass, by both."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Dropout(0.5), nn.Linear(8, 10)).double()
    for measure in (spectral_density, trace):
        with pytest.raises(AuditError):
            measure(problem(model=model, mode="train"))


def test_what_is_not_of_this_problem_is_refused() -> None:
    """Eigenvectors of other weights, of other parameters, or none at all, are no known eigenpairs; nor is one probe."""
    other = top_eigenvalues(problem(data=tuple(t[100:] for t in digits())), k=2, tol=0.1, vectors=True)
    part = top_eigenvalues(problem(params="*.bias"), k=2, tol=0.1, vectors=True)
    none = top_eigenvalues(problem(), k=1, tol=0.1)
    for known, message in ((other, "of this problem"), (part, "as long as"), (none, "vectors=True")):
        with pytest.raises(ArgumentError, match=message):
            spectral_density(problem(), known=known)
    with pytest.raises(ArgumentError, match="probes must be at least 2"):
        spectral_density(problem(), probes=1)
    with pytest.raises(ArgumentError, match="steps must be at least 1"):
        spectral_density(problem(), steps=0)


def test_densities_survive_the_journey_to_json(tmp_path: Path) -> None:
    """save and load give back every number; another analysis is refused, and so is a file without all keys."""
    for result in (measured(known=True), trace(problem(), probes=2)):
        result.save(tmp_path / "r.json")
        again = type(result).load(tmp_path / "r.json")
        assert again.to_dict() == result.to_dict()
        said = json.loads((tmp_path / "r.json").read_text())
        assert said["analysis"] in ("density", "trace")
        assert {"trace", "frobenius", "loss", "gradient_norm", "cost", "probes", "versions", "seed"} <= set(said)
        for other in {DensityResult, TraceResult, EigenResult} - {type(result)}:
            with pytest.raises(DataError, match="analysis"):
                other.load(tmp_path / "r.json")
        with pytest.raises(DataError, match="must have the keys"):
            type(result).from_dict({"analysis": said["analysis"]})


def test_provenance_holds_what_the_density_needs() -> None:
    """A key of the result's own is refused, and so is a provenance without the number of parameters."""
    given = (np.zeros((2, 1)), np.ones((2, 1)), 0, Estimate(0, 0), Estimate(0, 0), 0.0, 0.0, Cost(1, 1, 1.0, 1.0))
    for provenance, message in (({"num_params": 3, "curve": 1}, "curve"), ({}, "num_params")):
        with pytest.raises(DataError, match=message):
            DensityResult(*given, provenance)
    with pytest.raises(DataError, match="width must be positive"):
        DensityResult(*given, {"num_params": 3}).curve(width=0)


def test_students_t_is_scipys() -> None:
    """The band's half-width over its standard error is SciPy's quantile, for 1 to 30 degrees of freedom."""
    none, at = Estimate(0.0, 0.0), np.zeros(1)
    for freedom in range(1, 31):
        nodes = np.random.default_rng(freedom).normal(size=(freedom + 1, 1))
        known = (nodes, np.ones_like(nodes), 0, none, none, 0.0, 0.0, Cost(1, 1, 1.0, 1.0), {"num_params": 3})
        error = np.std([mixture(at, node, 1.0) for node in nodes], ddof=1) / np.sqrt(len(nodes))
        for confidence in (0.5, 0.95, 0.9999):
            curve = DensityResult(*known).curve(at, 1.0, confidence)
            quantile = (curve.upper - curve.density) / error
            assert quantile == pytest.approx(scipy.stats.t.ppf((1 + confidence) / 2, freedom), rel=1e-9)


def test_the_table_says_what_is_shown() -> None:
    """Trace, norm, mean and negative mass with their errors, steps, width, and what a ± is, in text and HTML."""
    result = measured(known=True)
    for text in (str(result), result._repr_html_()):
        assert "460 parameters" in text
        assert "6 random vectors, 32 Lanczos steps each, 8 eigenvalues taken out before" in text
        assert "± is one standard error" in text
        assert str(result.negative_mass) in text


def test_the_figure_shows_the_curve_and_marks_the_outliers() -> None:
    """The line runs through the curve, triangles stand at the eigenvalues, and a second density shares the Axes."""
    axes = density_curve(measured(), outliers(), label="a")
    curve = measured().curve()
    assert axes.get_yscale() == "log"
    drawn = axes.lines[0].get_xydata()
    drawn = drawn[~np.isnan(drawn[:, 0])]
    assert np.array_equal(drawn, np.stack([curve.grid, curve.density], 1))
    marked = [line.get_xdata() for line in axes.lines if line.get_marker() == "v"]
    assert np.array_equal(marked[0], outliers().eigenvalues)
    again = density_curve(measured(known=True), axes=axes, label="b", colour="black")
    assert again is axes
    marked = [line.get_xdata() for line in axes.lines if line.get_marker() == "v"]
    assert np.array_equal(marked[1], measured(known=True).nodes[0, :8])
    low, high = axes.get_ylim()
    assert low < 1 / (460 * curve.width * np.sqrt(2 * np.pi)) < curve.density.max() < high
    foreign = EigenResult.from_dict({**outliers().to_dict(), "sha256": "1"})
    ours = DensityResult.from_dict({**measured().to_dict(), "sha256": "2"})
    with pytest.raises(DataError, match="checkpoint differs"):
        density_curve(ours, foreign)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small mlp on digits after two epochs."""
    out = tmp_path_factory.mktemp("trained") / "mlp.pt"
    train(Recipe(model="mlp", model_args={"hidden": (8,)}, epochs=2), out)
    return out


def run(*argv: str | Path) -> int:
    return main([str(arg) for arg in argv])


SHORT = ("--probes", "3", "--steps", "4", "--examples", "100", "--micro-batch", "256", "--device", "cpu")


def test_the_command_prints_writes_and_draws(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A table on stdout, JSON that agrees with the library, and a figure; none is written over unless told."""
    argv = ["density", trained, *SHORT, "--seed", "3", "--out", tmp_path / "r.json", "--figure", tmp_path / "d.png"]
    assert run(*argv) == 0
    out, err = capsys.readouterr()
    assert err == ""
    shown = out.partition("\n\n")[0]
    assert all(word in shown for word in ("mlp.pt", "trace", "||H||_F", "mean eigenvalue", "negative mass", "passes"))
    assert shown.count("±") == 4
    assert (tmp_path / "d.png").read_bytes().startswith(b"\x89PNG")
    result = DensityResult.load(tmp_path / "r.json")
    generator = torch.Generator().manual_seed(3)
    again = spectral_density(load(trained, examples=100, seed=3), 3, 4, generator, micro_batch=256)
    assert np.array_equal(result.nodes, again.nodes)
    assert np.array_equal(result.weights, again.weights)
    assert result.trace == again.trace
    assert run(*argv) == 1
    assert "exists already" in capsys.readouterr().err
    assert run(*argv, "--overwrite") == 0


def test_the_command_takes_eigenvalues_for_outliers(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--eigen with vectors takes these out; without them they are only marked; for another checkpoint it is refused."""
    eigen = ["eigen", trained, "--k", "2", "--examples", "100", "--device", "cpu", "--out", tmp_path / "e.json"]
    assert run(*eigen, "--vectors") == 0
    capsys.readouterr()
    density = ["density", trained, *SHORT, "--json", "--eigen", tmp_path / "e.json", "--figure", tmp_path / "d.svg"]
    assert run(*density) == 0
    assert json.loads(capsys.readouterr().out)["num_known"] == 2
    (tmp_path / "e.npz").unlink()
    assert run(*density, "--overwrite") == 0
    assert json.loads(capsys.readouterr().out)["num_known"] == 0
    assert run(*density, "--split", "test", "--overwrite") == 1
    assert "the split differs (train against test)" in capsys.readouterr().err
    said = json.loads((tmp_path / "e.json").read_text())
    (tmp_path / "e.json").write_text(json.dumps({**said, "sha256": "0"}))
    assert run(*density, "--overwrite") == 1
    assert "--eigen must be a result for one of these checkpoints" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--probes", "1"], "probes must be at least 2"),
        (["--steps", "0"], "steps must be at least 1"),
        (["--figure", "d.jpeg"], "must be one of .png, .pdf, .svg"),
        (["--figure", "/proc/nowhere/d.png"], "Cannot write"),
        (["--out", "r.npz"], "Name it .json"),
        (["--eigen", "nothing.json"], "must be a JSON file"),
    ],
)
def test_bad_options_end_in_one_sentence(
    argv: list[str], message: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 1 and one line on stderr that says what must hold."""
    assert run("density", trained, *argv) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert len(err.strip().splitlines()) == 1
