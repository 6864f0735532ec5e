"""``sharpscope init``: a problem file to fill in, for a checkpoint of one's own."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sharpscope.cli import outputs, terminal

DESCRIPTION = """\
Write a problem file for a checkpoint that was not made by `sharpscope train`: a state dict, alone or in nested dicts, a
Lightning or safetensors file, a folder of Hugging Face's libraries or of torch.distributed.checkpoint. What the
checkpoint shows is filled in; your class (unless it is one of transformers) and your data are left to you, and until
they are there a command that is given the file says which line is next. No code of the checkpoint is run.
"""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """The command's options."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "init",
        help="write a problem file to fill in, for your own checkpoint",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoints", nargs=1, metavar="CKPT", help="checkpoint file or folder")
    parser.add_argument("--out", default="problem.py", metavar="FILE.py", help="where to (default problem.py)")
    parser.add_argument("--weights", metavar="KEY", help="of the state dict in a file of several, as ema or ema.module")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that exists already")
    return parser


def run(args: argparse.Namespace) -> int:
    """Write the problem file and say what is left to do."""
    from sharpscope import templates
    from sharpscope.atomic_io import atomic
    from sharpscope.errors import OutputError

    out = Path(args.out)
    if out.suffix != ".py":
        raise OutputError(f"A problem is a Python file, got {out}. Name it .py.")
    info = templates.inspect_checkpoint(args.checkpoints[0], args.weights)
    outputs.claim(args, out)
    text = templates.problem_text(info, out)
    with atomic(out) as temporary:
        temporary.write_text(text, encoding="utf-8")
    lines = [
        f"{out} is written. Fill in {' and '.join(templates.unfinished_lines(text))}, then run",
        f"  {templates.command(info, out)}",
    ]
    if info.zoo_model is not None:
        lines.append(f"It is not needed if the data are {' or '.join(info.zoo_model.data)}:")
        lines.append(f"  {templates.command_without_file(info)}")
    terminal.emit("\n".join(lines))
    return 0
