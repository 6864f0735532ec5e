"""What the measurements took, and how to make them again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sharpscope.report.drawing import escape, table, tag
from sharpscope.results.base import Cost, total_cost
from sharpscope.results.comparison import ANALYSES, Comparison, Subject
from sharpscope.results.origin import describe_departures
from sharpscope.version import __version__

UNIT = (
    "A gradient is one forward and backward pass over the examples of a part, which differ between parts; a product is "
    "one of the Hessian with a vector."
)
_COLUMNS = ["Checkpoints", "Passes", "Products", "Gradients", "Seconds"]


def costs(comparison: Comparison) -> str:
    """Passes, products, gradients and seconds of every part, and of every checkpoint."""
    body = []
    everything: list[Cost] = []
    for name, analysis in ANALYSES.items():
        found = [s.results[name].cost for s in comparison.subjects if name in s.results]
        if found:
            everything += found
            body.append([analysis.title, *_cells(str(len(found)), total_cost(found))])
    ways = [r.cost for _, _, r in comparison.between]
    if ways:
        everything += ways
        body.append(["Lines between checkpoints", *_cells(str(len(ways)), total_cost(ways))])
    body.append([tag("strong", "All"), *_cells("", total_cost(everything))])
    parts = table(["Part", *_COLUMNS], body, "What each part took", "costs")
    each = [
        [f"{escape(s.name)}: {ANALYSES[name].title.lower()}", *_cells("", r.cost)[1:]]
        for s in comparison.subjects
        for name, r in s.results.items()
    ]
    inside = table(["Checkpoint and part", *_COLUMNS[1:]], each, "What each checkpoint took", "costs")
    return parts + tag("p", UNIT, class_="quiet") + tag("details", tag("summary", "Every checkpoint"), inside)


def _cells(count: str, cost: Cost) -> list[str]:
    return [count, f"{cost.passes:,}", f"{cost.hvps:,}", f"{cost.gradients:,.1f}", f"{cost.seconds:,.1f}"]


def merged_provenance(subject: Subject) -> dict[str, Any]:
    """The provenance of a checkpoint, with what its analyses know where it says nothing."""
    found: dict[str, Any] = {}
    for result in subject.results.values():
        found = {key: value for key, value in result.provenance.items() if value is not None} | found
    return found | {key: value for key, value in subject.provenance.items() if value is not None}


def facts(comparison: Comparison) -> dict[str, str]:
    """What all of it is about, by term: model, parameters, data, precision, level."""
    known = [merged_provenance(subject) for subject in comparison.subjects]
    found = {
        "Checkpoints": str(len(comparison.subjects)),
        "Model": _common_value(known, "model"),
        "Parameters": _common_value(known, "num_params", "{:,}"),
        "Data": _common_value(known, "data"),
        "Loss": _common_value(known, "loss_function"),
        "Measured": _departures(known),
        "Precision": _common_value(known, "dtype"),
        "Level": comparison.level,
    }
    return {term: description for term, description in found.items() if description}


def _departures(known: list[dict[str, Any]]) -> str:
    """What of the loss is not the default, and whether weight decay is in it."""
    found = dict.fromkeys(part for k in known for part in describe_departures(k))
    plain = [] if any(k.get("weight_decay") for k in known) else ["without weight decay"]
    return ", ".join([*found, *plain])


def _common_value(known: list[dict[str, Any]], name: str, shape: str = "{}") -> str:
    values = dict.fromkeys(shape.format(k[name]) for k in known if k.get(name) is not None)
    return ", ".join(values) if len(values) < 4 else f"{len(values)} different"


def reproduction(comparison: Comparison) -> str:
    """The command, the checkpoints with their hashes and seeds, and the versions."""
    known = {subject.name: merged_provenance(subject) for subject in comparison.subjects}
    command = tag("pre", tag("code", escape(comparison.command), id="command"), tabindex="0")
    copy = tag("button", "Copy", type="button", class_="copy", data_copy="command", hidden=True)
    how = tag("div", command, copy, class_="command") if comparison.command else ""
    body = [
        [
            escape(name),
            escape(k.get("checkpoint", "-")),
            escape(_training(k)),
            escape(_seeds(comparison, name)),
            _hash(k.get("sha256")),
        ]
        for name, k in known.items()
    ]
    head = ["Checkpoint", "File", "Trained by", "Seeds", "SHA-256"]
    versions = _versions(known.values())
    description = tag(
        "p", escape(f"Versions: {', '.join(f'{name} {v}' for name, v in versions.items())}."), class_="quiet"
    )
    return how + table(head, body, "Checkpoints", "origin") + description


def _training(known: Mapping[str, Any]) -> str:
    recipe = known.get("recipe") or {}
    description = [str(recipe["optimizer"])] if recipe.get("optimizer") else []
    description += [
        f"{key.replace('_', ' ')} {recipe[key]:g}"
        for key in ("rho", "lr", "momentum", "weight_decay")
        if recipe.get(key)
    ]
    description += [f"epoch {known['epoch']}"] if known.get("epoch") is not None else []
    return ", ".join(description) or "-"


def _seeds(comparison: Comparison, name: str) -> str:
    """Of training, and of each analysis's random vectors, subsets and directions."""
    subject = next(s for s in comparison.subjects if s.name == name)
    recipe = merged_provenance(subject).get("recipe") or {}
    found = {"training": recipe.get("seed")}
    for key, result in subject.results.items():
        seeds: list[Any] = [result.provenance.get("seed")]
        if key in ("line", "surface"):
            seeds = list(dict.fromkeys(d.get("seed") for line in result.directions for d in line))
        found[key] = ", ".join(str(seed) for seed in seeds if seed is not None) or None
        drawn = result.provenance.get("examples_seed")
        if drawn is not None and result.provenance.get("num_examples") != result.provenance.get("split_examples"):
            found[f"{key}'s examples"] = drawn
    return "; ".join(f"{what} {seed}" for what, seed in found.items() if seed is not None) or "-"


def _hash(value: Any) -> str:
    return tag("code", escape(value), class_="hash") if value else "-"


def _versions(known: Any) -> dict[str, str]:
    found: dict[str, list[str]] = {"sharpscope": [__version__]}
    for k in known:
        for name, version in (k.get("versions") or {}).items():
            if version not in found.setdefault(name, []):
                found[name].append(version)
    return {name: " and ".join(versions) for name, versions in found.items()}
