"""m-sharpness against m, or against rho, checkpoint beside checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sharpscope.errors import DataError
from sharpscope.plot.training import COLOURS
from sharpscope.results import Measure, SharpnessResult
from sharpscope.results.provenance import checkpoint_names

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
                yerr=_reach(line),
                color=COLOURS[i % len(COLOURS)],
                linestyle=STYLES[j % len(STYLES)],
                marker="o",
                capsize=3,
                label=f"{name}, {other} = {value:g}",
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


def _reach(line: list[Measure]) -> Any:
    """Below and above each value; nothing where there is no interval."""
    below = [m.value - m.lower if m.lower is not None else 0.0 for m in line]
    above = [m.upper - m.value if m.upper is not None else 0.0 for m in line]
    return [below, above]
