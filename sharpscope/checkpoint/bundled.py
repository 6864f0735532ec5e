"""Self-describing checkpoint files: contents, writing and parsing."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sharpscope.atomic_io import atomic
from sharpscope.checkpoint.layouts import is_state_dict
from sharpscope.errors import ArgumentError, CheckpointError

FORMAT = 1


def write_checkpoint(
    path: str | os.PathLike[str],
    *,
    state_dict: Mapping[str, Tensor],
    model: str,
    model_args: Mapping[str, Any],
    data: Mapping[str, Any],
    loss: str = "cross_entropy",
    recipe: Mapping[str, Any] | None = None,
    epoch: int | None = None,
    metrics: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
) -> None:
    """Write a self-describing checkpoint atomically; equal contents give equal bytes.

    Args:
        path: file to write or replace.
        state_dict: weights of the model; stored on the CPU in their precision.
        model: name of a bundled model, or "package.module:function" of a factory, which ``load`` imports only with
            ``trust``.
        model_args: keyword arguments of the factory.
        data: the entries ``name`` and optionally ``label_noise``, ``noise_seed`` and ``noise_version``.
        loss: a key of ``sharpscope.loading.LOSSES``.
        recipe: settings of the training.
        epoch: finished epochs.
        metrics: losses and accuracies of the weights.
        training: state that a resumed run needs besides the weights.

    Raises: ArgumentError for a value that is neither plain nor a tensor; OutputError if the file cannot be written.
    """
    contents = {
        "sharpscope": FORMAT,
        "state_dict": dict(state_dict),
        "model": {"name": model, "args": dict(model_args)},
        "data": dict(data),
        "loss": loss,
        "recipe": dict(recipe or {}),
        "epoch": epoch,
        "metrics": dict(metrics or {}),
    }
    if training is not None:
        contents["training"] = dict(training)
    contents = _storable(contents, "")
    # A stream, not a path: torch.save would write the temporary name into the archive.
    with atomic(path) as temporary, open(temporary, "wb") as stream:
        torch.save(contents, stream)


def bundled(place: Path, digest: str, contents: dict[Any, Any]) -> Checkpoint:
    """The Checkpoint of the ``contents`` of a file of ``write_checkpoint``.

    Raises: CheckpointError for another format, or a missing entry.
    """
    version = contents["sharpscope"]
    if version != FORMAT:
        raise CheckpointError(
            f"The checkpoint {place} has format {version!r}, but this version of sharpscope reads {FORMAT}. Upgrade it."
        )

    def entry(key: str, kinds: type | tuple[type, ...], parent: Mapping[str, Any] = contents) -> Any:
        value = parent.get(key)
        if not isinstance(value, kinds):
            raise CheckpointError(f"The checkpoint {place} has no usable entry {key!r}: got {type(value).__name__}.")
        return value

    state_dict = entry("state_dict", dict)
    if not is_state_dict(state_dict):
        raise CheckpointError(f"The entry 'state_dict' of the checkpoint {place} must map names to tensors.")
    model = entry("model", dict)
    data = entry("data", dict)
    entry("name", str, data)
    nothing = type(None)
    return Checkpoint(
        path=place,
        sha256=digest,
        state_dict=state_dict,
        model=entry("name", str, model),
        model_args=entry("args", dict, model),
        data=data,
        loss=entry("loss", str),
        recipe=entry("recipe", dict),
        epoch=entry("epoch", (int, nothing)),
        metrics=entry("metrics", dict),
        training=entry("training", (dict, nothing)),
    )


def _storable(value: Any, where: str) -> Any:
    """A copy of ``value`` that pickles equal contents to equal bytes. Raises ArgumentError for other types."""
    if isinstance(value, Tensor):
        # A view would save its whole storage, and shared storage would make the bytes depend on the writer.
        return value.detach().to("cpu", copy=True).contiguous()
    if isinstance(value, str):
        # Interned, since pickle writes the same object only once, but equal objects each time.
        return sys.intern(str(value))
    if isinstance(value, Mapping):
        return {_storable(key, where): _storable(entry, f"{where}.{key}") for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        items: Iterable[Any] = (_storable(item, f"{where}[{i}]") for i, item in enumerate(value))
        return tuple(items) if isinstance(value, tuple) else list(items)
    if value is None or type(value) in (bool, int, float):
        return value
    raise ArgumentError(f"A checkpoint holds tensors and plain values, got {type(value).__name__} in {where[1:]!r}.")


@dataclass(frozen=True, eq=False, kw_only=True)
class Checkpoint:
    """The contents of a checkpoint file.

    Attributes:
        path: file or folder.
        sha256: digest of the bytes that were read.
        state_dict: weights, on the CPU.
        weights: key of the state dict in the file, "" if it is the whole file.
        others: keys of further state dicts in the file.
        foreign: classes of pickled objects, whose code was not run.
        module: pickled model of a trusted file.
        hyper_parameters: of a Lightning file; None for other files.
        model, model_args, data, loss, recipe, epoch, metrics: as in ``write_checkpoint``; None or empty for a plain
            state dict.
        training: optimizer state of an unfinished run, None for a finished one.
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
