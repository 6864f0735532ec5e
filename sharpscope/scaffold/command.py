"""The commands that a checkpoint can be measured with."""

from __future__ import annotations

import shlex
from pathlib import Path

from sharpscope.scaffold.seen import Seen


def command(seen: Seen, out: Path) -> str:
    """The one that takes the problem file ``out``."""
    # A PEFT file holds the adapter alone.
    partial = ["--partial"] if seen.layout == "PEFT" else []
    return _eigen(seen, "--problem", str(out), *partial)


def command_without_file(seen: Seen) -> str:
    """The one that names the bundled model which the checkpoint is of, and the first of the data it may be for."""
    assert seen.zoo_model is not None
    return _eigen(seen, *seen.zoo_model.options)


def _eigen(seen: Seen, *options: str) -> str:
    checkpoint = seen.checkpoint
    weights = ["--weights", checkpoint.weights] if checkpoint.others else []
    return shlex.join(["sharpscope", "eigen", str(checkpoint.path), *options, *weights])
