"""Reading a file of weights, without running any code that it may hold."""

from __future__ import annotations

import hashlib
import os
import warnings
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from sharpscope.checkpoint.bundled import bundled
from sharpscope.checkpoint.contents import Checkpoint
from sharpscope.checkpoint.folders import require_all, shards_of
from sharpscope.checkpoint.layouts import HOW_TO_SAVE, chosen_weights
from sharpscope.errors import CheckpointError


def read_checkpoint(path: str | os.PathLike[str], weights: str | None = None) -> Checkpoint:
    """The checkpoint in ``path``, on the CPU, in the precision it was saved in; no code of the file is run.

    A sharpscope file is read in full. Of a folder, as Hugging Face's libraries write it, the weights of its file, or of
    all files that its index names, are read; ``.safetensors`` needs the extra of that name. A dict of tensors, alone
    or in nested dicts, gives a Checkpoint whose ``model`` is None; of several it is the one under ``weights``, or the
    first of the usual names (``layouts.NESTS``).

    Raises: CheckpointError when the file is missing, damaged, of another kind, or holds pickled code.
    """
    place = Path(path)
    if place.is_dir():
        digest, contents = _folder(place)
    else:
        digest, contents = _file(place)
    if isinstance(contents, dict) and "sharpscope" in contents:
        return bundled(place, digest, contents)
    state_dict, key, others = chosen_weights(place, contents, weights)
    return Checkpoint(path=place, sha256=digest, state_dict=state_dict, weights=key, others=others)


def _file(place: Path) -> tuple[str, Any]:
    """The digest of a file and what it holds."""
    try:
        with open(place, "rb") as stream:
            # Digest and contents come from one open file, even if a training run replaces it meanwhile.
            digest = sha256_of(stream)
            if stream.tell() == 0:
                raise CheckpointError(f"The checkpoint {place} is empty. {HOW_TO_SAVE}")
            if place.suffix == ".safetensors":
                stream.seek(0)
                return digest, _safetensors(place, stream)
            return digest, _unpickle(place, stream)
    except FileNotFoundError:
        raise CheckpointError(f"There is no checkpoint {place}. Check the path.") from None
    except OSError as error:
        raise CheckpointError(f"The checkpoint {place} cannot be read: {error.strerror or error}.") from error


def _folder(place: Path) -> tuple[str, dict[str, Any]]:
    """The weights of all files in a folder, and a digest of theirs."""
    digests: list[str] = []
    merged: dict[str, Any] = {}
    for shard, names in shards_of(place).items():
        digest, contents = _file(shard)
        state_dict, *_ = chosen_weights(shard, contents)
        require_all(shard, names, state_dict)
        digests.append(digest)
        merged |= state_dict
    return (digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()), merged


def _safetensors(place: Path, stream: BinaryIO) -> dict[str, Any]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load
    except ImportError as error:
        raise CheckpointError(
            f"{place} is of safetensors, which is not installed. Run pip install 'sharpscope[safetensors]'."
        ) from error
    try:
        return dict(load(stream.read()))
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{place} must be a safetensors file, but is truncated or damaged. Copy it again."
        ) from error


def sha256_of(stream: BinaryIO) -> str:
    """The digest of what is left of ``stream``."""
    digest = hashlib.sha256()
    while chunk := stream.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def _require_plain(place: Path, archive: zipfile.ZipFile, size: int) -> None:
    """Raise CheckpointError where an archive would unpack to more than it is: torch.save never compresses."""
    entries = archive.infolist()
    if any(e.compress_type != zipfile.ZIP_STORED for e in entries) or sum(e.file_size for e in entries) > size:
        raise CheckpointError(
            f"The archive {place} would unpack to more than its {size:,} bytes, which no torch.save writes. Do not "
            "trust it."
        )


def _unpickle(place: Path, stream: BinaryIO) -> Any:
    try:
        if zipfile.is_zipfile(stream):
            with zipfile.ZipFile(stream) as archive:
                _require_plain(place, archive, stream.seek(0, os.SEEK_END))
                # torch.load does not compare the archive's checksums, so a flipped bit would pass as a weight.
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
