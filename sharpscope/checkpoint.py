"""Self-describing checkpoint files, and plain state dicts of other people's making.

A sharpscope file is what ``torch.save`` makes of ``{"sharpscope": 1, "state_dict": ..., "model": {"name", "args"},
"data": {...}, "loss": ..., "recipe": {...}, "epoch": ..., "metrics": {...}}``, and ``"training"`` (the optimizer's
state) while a run is not finished. It holds tensors and plain values only, so that reading it runs no code.
"""

from __future__ import annotations

import hashlib
import os
import sys
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from sharpscope.errors import ArgumentError, CheckpointError
from sharpscope.files import atomic

FORMAT = 1
NESTS = ("state_dict", "model_state_dict", "model")
SHOWN = 3

HOW_TO_SAVE = "Give a file written by 'sharpscope train' or by torch.save(model.state_dict(), path)."


@dataclass(frozen=True, eq=False, kw_only=True)
class Checkpoint:
    """What a checkpoint file says.

    ``model`` is None for a plain state dict, whose other fields are empty too. ``training`` is the optimizer's state
    of an unfinished run, None for a finished one. ``sha256`` is the digest of the very bytes that were read.
    """

    path: Path
    sha256: str
    state_dict: Mapping[str, Tensor]
    model: str | None = None
    model_args: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    loss: str | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    epoch: int | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] | None = None


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint in ``path``, on the CPU, in the precision it was saved in; no code of the file is run.

    A sharpscope file is read in full. A dict of tensors, alone or under "state_dict", "model_state_dict" or "model",
    gives a Checkpoint whose ``model`` is None.

    Raises: CheckpointError when the file is missing, damaged, of another kind, or holds pickled code.
    """
    place = Path(path)
    if place.is_dir():
        raise CheckpointError(f"A checkpoint must be a file, but {place} is a folder. Name a file in it.")
    try:
        with open(place, "rb") as stream:
            # Digest and contents come from one open file, even if a training run replaces it meanwhile.
            digest = sha256_of(stream)
            if stream.tell() == 0:
                raise CheckpointError(f"The checkpoint {place} is empty. {HOW_TO_SAVE}")
            contents = _unpickle(place, stream)
    except FileNotFoundError:
        raise CheckpointError(f"There is no checkpoint {place}. Check the path.") from None
    except OSError as error:
        raise CheckpointError(f"The checkpoint {place} cannot be read: {error.strerror or error}.") from error
    if isinstance(contents, dict) and "sharpscope" in contents:
        return _bundled(place, digest, contents)
    return Checkpoint(path=place, sha256=digest, state_dict=_plain_state_dict(place, contents))


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
    """Write a self-describing file: a reader sees the old file or the new one, and equal contents give equal bytes.

    Args:
        state_dict: the model's; stored on the CPU in its own precision.
        model: the bundled name, or "package.module:function" for a factory that only a trusting reader imports.
        model_args: keyword arguments of the factory.
        data: ``name``, and optionally ``label_noise`` and ``noise_seed``.
        loss: a key of ``sharpscope.loading.LOSSES``.
        recipe, epoch, metrics: how the weights came about, and how good they are.
        training: what a resumed run needs besides the weights.

    Raises: ArgumentError for a value that is neither plain nor a tensor; OutputError when it cannot be written.
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
    # torch.save names the archive's folder after a path, but not after a stream: the temporary name would get in.
    with atomic(path) as temporary, open(temporary, "wb") as stream:
        torch.save(contents, stream)


def load_weights(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Copy ``state_dict`` into ``model``, every key and shape matching; the model takes on the file's precision.

    Tied parameters stay tied. A bfloat16 checkpoint makes a bfloat16 model.

    Raises: CheckpointError listing the first missing keys, unexpected keys and differing entries, and their numbers.
    """
    own: dict[str, Tensor] = model.state_dict(keep_vars=True)
    unexpected = [key for key in state_dict if key not in own]
    missing = [key for key in own if key not in state_dict]
    differing = [
        f"{key}: {_kind(state_dict[key])} in the file, {_kind(own[key])} in the model"
        for key in own
        if key in state_dict and _kind(state_dict[key]) != _kind(own[key])
    ]
    faults = []
    if unexpected:
        faults.append(f"has {len(unexpected)} keys that the model lacks ({_first(unexpected)})")
    if missing:
        faults.append(f"misses {len(missing)} ({_first(missing)})")
    if differing:
        faults.append(f"has {len(differing)} of another shape or kind ({_first(differing, '; ')})")
    if faults:
        first = next(iter(state_dict), "").partition(".")[0] + "."
        wrapped = all(key.startswith(first) for key in state_dict) and not any(key.startswith(first) for key in own)
        hint = f"All its keys start with {first!r}: save the wrapped model's own state_dict()" if wrapped else ""
        raise CheckpointError(f"The checkpoint {', '.join(faults)}. {hint or 'Check --model and --model-args'}.")
    for key, tensor in own.items():
        if tensor.is_floating_point() and tensor.dtype != state_dict[key].dtype:
            tensor.data = tensor.data.to(state_dict[key].dtype)
    model.load_state_dict(state_dict)


def _kind(tensor: Tensor) -> str:
    """The shape, and "float" or the exact type: precisions may differ, integers in place of weights may not."""
    return f"{tuple(tensor.shape)} {'float' if tensor.is_floating_point() else str(tensor.dtype)[6:]}"


def _first(items: list[str], separator: str = ", ") -> str:
    return separator.join(items[:SHOWN]) + (f"{separator}..." if len(items) > SHOWN else "")


def sha256_of(stream: BinaryIO) -> str:
    """The digest of what is left of ``stream``."""
    digest = hashlib.sha256()
    while chunk := stream.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def _unpickle(place: Path, stream: BinaryIO) -> Any:
    try:
        if zipfile.is_zipfile(stream):
            # torch.load does not compare the archive's checksums, so a flipped bit would pass as a weight.
            with zipfile.ZipFile(stream) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise CheckpointError(f"The checkpoint {place} is damaged: {damaged} fails its CRC. Copy it again.")
        stream.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(stream, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    # Bytes that are no checkpoint can raise nearly anything in an unpickler: KeyError for a PNG, for instance.
    except Exception as error:
        if "Unsupported global" in str(error) or "unsupported GLOBAL" in str(error):
            raise CheckpointError(
                f"The checkpoint {place} holds pickled Python objects, and reading them could run any code. "
                "Save the weights alone with torch.save(model.state_dict(), path), and pass --model and --data."
            ) from error
        raise CheckpointError(
            f"{place} must be a PyTorch checkpoint, but it is of another kind, truncated or damaged. {HOW_TO_SAVE}"
        ) from error


def _bundled(place: Path, digest: str, contents: dict[Any, Any]) -> Checkpoint:
    version = contents["sharpscope"]
    if version != FORMAT:
        raise CheckpointError(
            f"The checkpoint {place} has format {version!r}, and this sharpscope reads {FORMAT}. Install a newer one."
        )

    def entry(key: str, kinds: type | tuple[type, ...], parent: Mapping[str, Any] = contents) -> Any:
        value = parent.get(key)
        if not isinstance(value, kinds):
            raise CheckpointError(f"The checkpoint {place} has no usable entry {key!r}: got {type(value).__name__}.")
        return value

    state_dict = entry("state_dict", dict)
    if not _is_state_dict(state_dict):
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


def _plain_state_dict(place: Path, contents: Any) -> dict[str, Tensor]:
    nested = (contents.get(key) for key in NESTS) if isinstance(contents, dict) else ()
    for candidate in (contents, *nested):
        if _is_state_dict(candidate):
            # An OrderedDict with torch's version notes becomes an ordinary one.
            return dict(candidate)
    keys = f"a dict with the keys {_first([repr(key) for key in contents])}" if isinstance(contents, dict) else ""
    raise CheckpointError(
        f"The checkpoint {place} must hold a dict of tensors, alone or under {', '.join(NESTS)}, "
        f"got {keys or type(contents).__name__}. {HOW_TO_SAVE}"
    )


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and len(value) > 0
        and all(isinstance(key, str) and isinstance(entry, Tensor) for key, entry in value.items())
    )


def _storable(value: Any, where: str) -> Any:
    """A copy of ``value`` in which equal contents pickle to equal bytes, or ArgumentError for what is not plain."""
    if isinstance(value, Tensor):
        # A view would bring its whole storage along, and sharing would depend on the writer.
        return value.detach().to("cpu", copy=True).contiguous()
    if isinstance(value, str):
        # Pickle writes the same string object once and equal ones again and again.
        return sys.intern(str(value))
    if isinstance(value, Mapping):
        return {_storable(key, where): _storable(entry, f"{where}.{key}") for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        items: Iterable[Any] = (_storable(item, f"{where}[{i}]") for i, item in enumerate(value))
        return tuple(items) if isinstance(value, tuple) else list(items)
    if value is None or type(value) in (bool, int, float):
        return value
    raise ArgumentError(f"A checkpoint holds tensors and plain values, got {type(value).__name__} in {where[1:]!r}.")
