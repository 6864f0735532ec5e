"""What a checkpoint file says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True, eq=False, kw_only=True)
class Checkpoint:
    """What a checkpoint file says.

    ``model`` is None for a plain state dict, whose other fields are empty too. ``training`` is the optimizer's state
    of an unfinished run, None for a finished one. ``sha256`` is the digest of the very bytes that were read.
    ``weights`` is the key that the state dict was under, ``others`` are those of further ones in the file. ``foreign``
    names the classes of pickled objects that were not run; ``module`` is the pickled model of a file that is trusted.
    ``hyper_parameters`` are those of a file that Lightning wrote, None for another file.
    """

    path: Path
    sha256: str
    state_dict: Mapping[str, Tensor]
    weights: str = ""
    others: Sequence[str] = ()
    foreign: Sequence[str] = ()
    module: nn.Module | None = None
    hyper_parameters: Mapping[str, Any] | None = None
    model: str | None = None
    model_args: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    loss: str | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    epoch: int | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] | None = None
