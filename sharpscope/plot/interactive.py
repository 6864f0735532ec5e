"""Surfaces to turn with the mouse, in one HTML page."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import numpy as np

from sharpscope.errors import ArgumentError, DataError
from sharpscope.plot.figure import caption, diverged, require_comparable, short_labels
from sharpscope.plot.levels import format_level, grid_values, logarithmic, shared_levels
from sharpscope.plot.surface import describe_marks, on_slice
from sharpscope.results import SliceResult
from sharpscope.results.serialization import Array

# Turning one surface turns all.
LINKED_CAMERAS = """
var page = document.getElementById('{plot_id}'), busy = false;
page.on('plotly_relayout', function(change) {
  if (busy) return;
  var camera = null;
  Object.keys(change).forEach(function(key) { if (/^scene[0-9]*[.]camera$/.test(key)) camera = change[key]; });
  if (!camera) return;
  var all = {};
  Object.keys(page.layout).forEach(function(key) { if (/^scene[0-9]*$/.test(key)) all[key + '.camera'] = camera; });
  busy = true;
  Plotly.relayout(page, all).then(function() { busy = false; });
});
"""


def interactive_surface(
    results: SliceResult | Sequence[SliceResult],
    *,
    split: str | None = None,
    quantity: str = "loss",
    log: bool = True,
    clip: float | None = None,
) -> str:
    """Planes of one or several checkpoints as surfaces side by side on one scale: an HTML page.

    The page holds all of plotly and fetches nothing. The pointer reads x, y and the loss; diverged points are holes
    with crosses above; other networks are at their own loss, open where they do not lie in the plane.

    Args:
        results: of planes, measured alike.
        split: by default the first.
        quantity: "loss" or "accuracy".
        log: a logarithmic scale of the loss.
        clip: loss at which surfaces are cut flat.

    Raises: ArgumentError where plotly is not installed; DataError as ``surfaces_side_by_side``.

    >>> import sharpscope
    >>> import torch
    >>> from sharpscope.plot import interactive_surface
    >>> data = torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.zeros(3, 1)
    >>> model = torch.nn.Linear(3, 1, bias=False)  # H = diag(6, 8/3, 2/3)
    >>> problem = sharpscope.Problem(model=model, loss=torch.nn.MSELoss(), data=data)
    >>> page = interactive_surface(sharpscope.loss_surface(problem, points=5))
    >>> page.startswith("<!DOCTYPE html>")
    True
    """
    try:
        import plotly.graph_objects as go
        from plotly.subplots import make_subplots
    except ImportError as error:
        raise ArgumentError("An interactive figure needs plotly. Run pip install 'sharpscope[interactive]'.") from error
    results = [results] if isinstance(results, SliceResult) else list(results)
    require_comparable(results, grid=True)
    if results[0].dimensions != 2:
        raise DataError("A surface is of planes, but the results are of lines. Use slice_curves.")
    shown = [r.finished() for r in results]
    at = shared_levels(shown, split=split, quantity=quantity, log=log, clip=clip)
    log = logarithmic(log, quantity)
    scaled = np.log10 if log else np.asarray
    ends = [float(scaled(at[0])), float(scaled(at[-1]))]
    ticks = {"tickvals": scaled(at).tolist(), "ticktext": [format_level(level, quantity) for level in at]}
    name = results[0].splits[results[0].split(split)]
    columns = len(results)
    specs = [[{"type": "surface"}] * columns]
    figure = make_subplots(1, columns, specs=specs, subplot_titles=short_labels(results), horizontal_spacing=0.02)
    for i, r in enumerate(shown, start=1):
        for trace in surface_traces(go, r, at, split=split, quantity=quantity, log=log):
            figure.add_trace(trace, row=1, col=i)
        labels = [str(d["label"]) for d in r.directions[0]]
        heading = {"xaxis_title": f"x: {labels[0]}", "yaxis_title": f"y: {labels[1]}", "zaxis_title": quantity}
        figure.update_scenes(**heading, zaxis={"range": ends, **ticks}, aspectmode="cube", row=1, col=i)
    bar = {"title": {"text": f"{name} {quantity}"}, **ticks}
    axis = {"colorscale": "Viridis", "cmin": ends[0], "cmax": ends[1], "colorbar": bar}
    figure.update_layout(coloraxis=axis, margin={"l": 0, "r": 0, "t": 40, "b": 0}, template="plotly_white")
    scale = f"{'logarithmic' if log else 'linear'} scale"
    text = caption(results, splits=[name], scale=scale, clip=clip, extra=describe_marks(results))
    config = {"displaylogo": False, "responsive": True}
    plot = figure.to_html(full_html=False, include_plotlyjs=True, post_script=LINKED_CAMERAS, config=config)
    title = html.escape(" | ".join(short_labels(results)))
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{title}</title></head>\n'
        '<body style="margin: 0; font-family: sans-serif">\n'
        f'<div style="height: 85vh">{plot}</div>\n<p style="margin: 1em">{html.escape(text)}</p>\n</body>\n</html>\n'
    )


def surface_traces(
    go: Any, r: SliceResult, at: Array, *, split: str | None = None, quantity: str = "loss", log: bool = True
) -> list[Any]:
    """The traces of one scene: the surface cut at the highest level, diverged points, other networks.

    ``go``: plotly.graph_objects; ``r``: a plane without pending points; ``at``: its levels.
    """
    log = logarithmic(log, quantity)
    scaled = np.log10 if log else np.asarray
    (x, y), z = r.axes, grid_values(r, split, quantity)
    surface = go.Surface(
        x=x,
        y=y,
        z=scaled(np.minimum(z, at[-1])),
        customdata=z,
        coloraxis="coloraxis",
        hovertemplate="x %{x:.4g}<br>y %{y:.4g}<br>" + f"{quantity} " + "%{customdata:.5g}<extra></extra>",
    )
    traces = [surface]
    rows, columns = np.nonzero(diverged(r, r.split(split)))
    if len(rows):
        style = {"mode": "markers", "marker": {"symbol": "x", "color": "#CC0000", "size": 3}, "name": "diverged"}
        tops = np.full(len(rows), scaled(at[-1]))
        traces.append(go.Scatter3d(x=x[columns], y=y[rows], z=tops, showlegend=False, hoverinfo="name+x+y", **style))
    return [*traces, *_marks(go, r, r.splits[r.split(split)], quantity, scaled, at)]


def _marks(go: Any, r: SliceResult, split: str, quantity: str, scaled: Any, at: Any) -> list[Any]:
    """The path of a training run as one line in order, and each other network."""
    path = [m for m in r.marks if m.on_path]
    groups = [[m] for m in r.marks if not m.on_path] + ([path] if path else [])
    traces = []
    for marks in groups:
        own = [(m.loss if quantity == "loss" else m.accuracy)[split] for m in marks]
        xs, ys = zip(*(m.coordinates for m in marks), strict=True)
        symbols = ["circle" if on_slice(m) else "circle-open" for m in marks]
        style: dict[str, Any] = {"mode": "lines+markers" if len(marks) > 1 else "markers", "line": {"color": "black"}}
        style["marker"] = {"symbol": symbols, "color": "black", "size": 4}
        hover_texts = [
            f"{m.name}: {quantity} {v:.4g}, {m.distance:.3g} off the plane" for m, v in zip(marks, own, strict=True)
        ]
        tops = scaled(np.clip(np.asarray(own, dtype=float), at[0], at[-1]))
        traces.append(
            go.Scatter3d(
                x=xs, y=ys, z=tops, text=hover_texts, hovertemplate="%{text}<extra></extra>", showlegend=False, **style
            )
        )
    return traces
