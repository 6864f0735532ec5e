"""``sharpscope inspect``: what a checkpoint file holds."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

from sharpscope.cli import terminal

# Shown in another form, or not at all.
LEFT_OUT = ("state_dict", "training", "module", "hyper_parameters")


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """The command's options."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "inspect",
        help="layout, parameters and recipe of a checkpoint file",
        description="What a checkpoint file holds: its layout, tensors, model, data and recipe. No code of it is run.",
    )
    parser.add_argument("file", metavar="FILE", help="checkpoint file")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def run(args: argparse.Namespace) -> int:
    """Print what the file says."""
    from sharpscope.checkpoint import read_checkpoint

    checkpoint = read_checkpoint(args.file)
    tensors = [(name, list(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in checkpoint.state_dict.items()]
    count = sum(t.numel() for t in checkpoint.state_dict.values())
    layout = "plain state dict" if checkpoint.model is None else "sharpscope checkpoint"
    layout += f" under {checkpoint.weights!r}" if checkpoint.weights else ""
    layout += f" (others under {', '.join(map(repr, checkpoint.others))})" if checkpoint.others else ""
    if args.json:
        said = {f.name: getattr(checkpoint, f.name) for f in dataclasses.fields(checkpoint) if f.name not in LEFT_OUT}
        said |= {"layout": layout, "num_elements": count, "resumable": checkpoint.training is not None}
        said["tensors"] = [{"name": name, "shape": shape, "dtype": dtype} for name, shape, dtype in tensors]
        terminal.emit(json.dumps(said, indent=2, default=str))
        return 0
    lines = [f"{args.file}: {layout}, sha256 {checkpoint.sha256}"]
    if checkpoint.model is not None:
        lines += [
            f"model    {checkpoint.model} {_flat(checkpoint.model_args)}",
            f"data     {_flat(checkpoint.data)}",
            f"loss     {checkpoint.loss}",
            f"recipe   {_flat(_named(checkpoint.recipe))}",
            f"epoch    {checkpoint.epoch}{' (unfinished, can be resumed)' if checkpoint.training else ''}",
            f"metrics  {_flat(checkpoint.metrics)}",
        ]
    if checkpoint.foreign:
        lines.append(f"objects  {', '.join(checkpoint.foreign)} (not run)")
    lines.append(f"{len(tensors)} tensors, {count} elements:")
    tensors = [(name if name.isprintable() else ascii(name)[1:-1], shape, dtype) for name, shape, dtype in tensors]
    width = max(len(name) for name, _, _ in tensors)
    lines += [
        f"  {name.ljust(width)}  {'x'.join(map(str, shape)) or 'scalar'}  {dtype}" for name, shape, dtype in tensors
    ]
    terminal.emit("\n".join(lines))
    return 0


def _named(recipe: Any) -> dict[str, Any]:
    """The recipe with SAM called so, and without SAM's options where there is none."""
    if recipe.get("rho") is None:
        return {key: value for key, value in recipe.items() if key not in ("rho", "p")}
    return {**recipe, "optimizer": f"SAM({recipe.get('optimizer')})"}


def _flat(values: Any) -> str:
    return " ".join(f"{key}={f'{value:.6g}' if isinstance(value, float) else value}" for key, value in values.items())
