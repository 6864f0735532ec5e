"""Result files that 0.1.0 wrote, by name, with the classes that read them.

Written by small runs on digits and on 60 points in four dimensions: ``save`` of each result, and of a comparison
``json.dumps(to_dict())`` without white space.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sharpscope.results import (
    BlockResult,
    Comparison,
    DensityResult,
    EigenResult,
    InvarianceResult,
    MonitorResult,
    SharpnessResult,
    SliceResult,
    TraceResult,
)

SAVED = Path(__file__).parent / "saved_0_1_0"

FILES: dict[str, Any] = {
    "eigen-largest": EigenResult,  # with eigenvectors, sampling errors and a certificate
    "eigen-both": EigenResult,
    "eigen-not-converged": EigenResult,
    "density": DensityResult,
    "trace": TraceResult,
    "blocks": BlockResult,
    "sharpness": SharpnessResult,
    "invariance": InvarianceResult,
    "line": SliceResult,  # towards a checkpoint, of two splits, with a mark
    "plane": SliceResult,  # with points that are pending and points that diverged
    "monitor": MonitorResult,  # its last record holds a reason and no number
    "comparison-checkpoints": Comparison,
    "comparison-groups": Comparison,
}


def read(name: str) -> Any:
    """What the JSON file of that name holds."""
    return json.loads((SAVED / f"{name}.json").read_text(encoding="utf-8"))
