"""m-sharpness against m or rho, and lambda_max against training time, one curve per checkpoint or run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sharpscope.errors import DataError
from sharpscope.plot.figure import COLOURS
from sharpscope.results import EigenResult, Measure, MonitorResult, SharpnessResult
from sharpscope.results.measured_alike import LOSS, describe, differing
from sharpscope.results.origin import checkpoint_names
from sharpscope.results.sharpness import exact_setting

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STYLES = ("-", "--", ":", "-.")


def m_sharpness_curves(
    results: Sequence[SharpnessResult], axes: Axes | None = None, *, against: str | None = None
) -> Axes:
    """m-sharpness with its 95 % intervals, a colour a result; returns the Axes.

    Args:
        results: that hold "m-sharpness".
        axes: where to draw; by default a new figure.
        against: "m" (a line for each rho) or "rho" (a line for each m); by default m where there are several.

    Raises: DataError when a result has no m-sharpness, or of another ball or ascent than the others.

    >>> import sharpscope
    >>> import torch
    >>> from sharpscope.plot import m_sharpness_curves
    >>> data = torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.zeros(3, 1)
    >>> model = torch.nn.Linear(3, 1, bias=False)  # H = diag(6, 8/3, 2/3)
    >>> problem = sharpscope.Problem(model=model, loss=torch.nn.MSELoss(), data=data)
    >>> axes = m_sharpness_curves([sharpscope.measure_sharpness(problem, "m-sharpness", m=[1, 3], rho=0.05)])
    >>> axes.get_xlabel(), axes.get_ylabel()
    ('examples m that share a perturbation', 'm-sharpness')
    """
    import matplotlib.pyplot as plt

    found = [[m for m in r.measures if m.name == "m-sharpness"] for r in results]
    if not results or not all(found):
        raise DataError("A figure of m-sharpness needs results that hold it. Measure m-sharpness.")
    shapes = {tuple(m.settings.get(key) for key in ("p", "adaptive", "eta", "ascent")) for ms in found for m in ms}
    if len(shapes) > 1:
        raise DataError("Curves of m-sharpness must share p, ascent and scaling to be compared. Measure them alike.")
    differ = differing([r.provenance for r in results], LOSS)
    if differ:
        raise DataError(f"Curves of m-sharpness must be alike, but {describe(differ)}. Draw them apart.")
    if axes is None:
        _, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    if against is None:
        against = "m" if len({m.settings["m"] for ms in found for m in ms}) > 1 else "rho"
    other = "rho" if against == "m" else "m"
    for i, (name, ms) in enumerate(zip(checkpoint_names([r.provenance for r in results]), found, strict=True)):
        for j, value in enumerate(dict.fromkeys(m.settings[other] for m in ms)):
            line = sorted((m for m in ms if m.settings[other] == value), key=lambda m: float(m.settings[against]))
            axes.errorbar(
                [m.settings[against] for m in line],
                [m.value for m in line],
                yerr=_error_bars(line),
                color=COLOURS[i % len(COLOURS)],
                linestyle=STYLES[j % len(STYLES)],
                marker="o",
                capsize=3,
                label=f"{name}, {other} = {exact_setting(value)}",
            )
    if all(m.settings[against] > 0 for ms in found for m in ms):
        axes.set_xscale("log", base=2 if against == "m" else 10)
    axes.set(xlabel="examples m that share a perturbation" if against == "m" else "radius rho", ylabel="m-sharpness")
    if all(m.value > 0 for ms in found for m in ms):
        axes.set_yscale("log")
    first = found[0][0]
    adaptive = f", adaptive ({first.settings['adaptive']})" if first.settings.get("adaptive") else ""
    axes.set_title(f"p = {first.settings['p']}{adaptive}, {first.settings['ascent']}, 95 % intervals", fontsize="small")
    axes.legend(fontsize="small")
    return axes


def _error_bars(line: list[Measure]) -> Any:
    """Below and above each value; nothing where there is no interval."""
    below = [m.value - m.lower if m.lower is not None else 0.0 for m in line]
    above = [m.upper - m.value if m.upper is not None else 0.0 for m in line]
    return [below, above]


def sharpness_over_training(
    runs: Mapping[str, Sequence[EigenResult]], axes: Sequence[Axes] | None = None
) -> tuple[Axes, Axes]:
    """lambda_max and lambda_max/lambda_k against the epoch, a line a run, with intervals; returns the two Axes.

    A triangle in the run's colour shows ``2/eta``, the edge of stability of plain gradient descent at the learning rate
    in force (Cohen et al. 2021), unless a small rate takes it far above the picture.

    Args:
        runs: by label, the results of one training run; their provenance must hold ``epoch`` and ``metrics``.
        axes: two Axes to draw on; by default a new figure.

    Raises: DataError when a result does not say its epoch.

    >>> import sharpscope
    >>> import torch
    >>> from sharpscope.plot import sharpness_over_training
    >>> data = torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.zeros(3, 1)
    >>> def at(epoch):
    ...     model, said = torch.nn.Linear(3, 1, bias=False), {"epoch": epoch, "metrics": {"lr": 0.1}}
    ...     return sharpscope.Problem(model=model, loss=torch.nn.MSELoss(), data=data, provenance=said)
    >>> run = [sharpscope.top_eigenvalues(at(epoch), k=2) for epoch in (0, 10)]
    >>> left, right = sharpness_over_training({"SGD": run})
    >>> left.get_xlabel(), right.get_legend_handles_labels()[1]
    ('epoch', ['SGD'])
    """
    import matplotlib.pyplot as plt

    if axes is None:
        _, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left, right = axes
    ks: set[int] = set()
    for colour, (label, results) in zip(_colours(len(runs)), runs.items(), strict=True):
        if any(r.provenance.get("epoch") is None for r in results):
            raise DataError(f"Every result of {label!r} must say its epoch, as those of sharpscope checkpoints do.")
        ordered = sorted(results, key=lambda r: r.provenance["epoch"])
        epochs = [r.provenance["epoch"] for r in ordered]
        values = [r.lambda_max for r in ordered]
        error = [
            [r.lambda_max - float(r.lower[0]) for r in ordered],
            [float(r.upper[0]) - r.lambda_max for r in ordered],
        ]
        left.errorbar(epochs, values, yerr=error, color=colour, marker="o", capsize=3, label=label)
        rates = [(r.provenance["epoch"], (r.provenance.get("metrics") or {}).get("lr")) for r in ordered]
        edges = [(epoch, 2 / rate) for epoch, rate in rates if rate]
        if edges:
            # Points, for a legend is kept off the line between two points, drawn or not, as off the points.
            left.scatter(*zip(*edges, strict=True), edgecolors=colour, marker="v", facecolors="none")
        ratios = [(r.provenance["epoch"], r.ratio) for r in ordered if r.ratio.value is not None]
        ks |= {ratio.k for _, ratio in ratios}
        right.errorbar(
            [epoch for epoch, _ in ratios],
            [float(ratio.value or 0) for _, ratio in ratios],
            yerr=[
                [_distance(ratio.value, ratio.lower) for _, ratio in ratios],
                [_distance(ratio.upper, ratio.value) for _, ratio in ratios],
            ],
            color=colour,
            marker="o",
            capsize=3,
            label=label,
        )
    everything = [r.lambda_max for results in runs.values() for r in results if r.lambda_max > 0]
    left.plot([], [], color="grey", marker="v", fillstyle="none", linestyle="", label="2/eta, where in the picture")
    left.set(xlabel="epoch", ylabel=r"$\lambda_{\max}$", yscale="log")
    if everything:
        left.set_ylim(min(everything) / 2, max(*everything, 1e-300) * 100)
    last = ks.pop() if len(ks) == 1 else "k"
    right.set(xlabel="epoch", ylabel=rf"$\lambda_{{\max}}/\lambda_{{{last}}}$", ylim=(0, None))
    left.legend(fontsize="small")
    right.legend(fontsize="small")
    return left, right


# The edges of a monitored run: their column, what they are called and how they are drawn.
EDGES = (("two_over_eta", "2/eta", "--"), ("momentum_edge", "momentum edge", ":"), ("sam_edge", "SAM edge", "-."))


def sharpness_over_steps(runs: MonitorResult | Mapping[str, MonitorResult], axes: Axes | None = None) -> Axes:
    """lambda_max with its interval against optimizer steps, and the edges of stability as lines; returns the Axes.

    Each run's edges have its colour; the picture is as high as lambda_max asks for, and shows edges up to ten times
    beyond. A step without a number leaves a gap.

    Args:
        runs: one result, or several by label.
        axes: to draw on; by default a new figure.

    Raises: DataError when there is no finite number to draw.

    >>> import sharpscope
    >>> import torch
    >>> from sharpscope.plot import sharpness_over_steps
    >>> data = torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.zeros(3, 1)
    >>> model = torch.nn.Linear(3, 1, bias=False)  # H = diag(6, 8/3, 2/3)
    >>> problem = sharpscope.Problem(model=model, loss=torch.nn.MSELoss(), data=data)
    >>> monitor = sharpscope.SharpnessMonitor(problem, torch.optim.SGD(model.parameters(), lr=0.1))
    >>> records = [monitor.measure(step) for step in (0, 100)]
    >>> axes = sharpness_over_steps(monitor.result())
    >>> axes.get_xlabel(), axes.get_legend_handles_labels()[1][0]
    ('step', '2/eta')
    """
    import matplotlib.pyplot as plt

    named = {r"$\lambda_{\max}$": runs} if isinstance(runs, MonitorResult) else runs
    everything = [x for r in named.values() for x in r.lambda_max.tolist() if x > 0]
    if not everything:
        raise DataError("There must be at least one positive lambda_max to draw, got none.")
    if axes is None:
        _, axes = plt.subplots(layout="constrained")
    shown: set[str] = set()
    for colour, (label, result) in zip(_colours(len(named)), named.items(), strict=True):
        value = result.lambda_max
        error = [value - result.column("lower"), result.column("upper") - value]
        axes.errorbar(result.steps, value, yerr=error, color=colour, marker=".", capsize=2, label=label)
        for name, title, style in EDGES:
            edge = result.column(name)
            if (edge == edge).any():
                axes.plot(result.steps, edge, style, color=colour, lw=1, label="" if title in shown else title)
                shown.add(title)
    axes.set(xlabel="step", ylabel=r"$\lambda_{\max}$", yscale="log")
    known = [x for r in named.values() for name, *_ in EDGES for x in r.column(name).tolist() if x > 0]
    reach = [x for x in known if x <= 10 * max(everything)]
    axes.set_ylim(min(everything) / 2, max([*everything, *reach]) * 2)
    axes.legend(fontsize="small")
    return axes


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _distance(high: Any, low: Any) -> float:
    return max(float(high) - float(low), 0.0)
