"""Reading a file of weights, without running any code that it may hold."""

from __future__ import annotations

import hashlib
import os
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from sharpscope.checkpoint.bundled import bundled
from sharpscope.checkpoint.contents import Checkpoint
from sharpscope.checkpoint.distributed import INDEX, Pieces
from sharpscope.checkpoint.folders import require_all, shards_of
from sharpscope.checkpoint.foreign import inert
from sharpscope.checkpoint.layouts import HOW_TO_SAVE, chosen_weights, hyper_parameters, module_at
from sharpscope.errors import CheckpointError, first_line


def read_checkpoint(
    path: str | os.PathLike[str], weights: str | None = None, *, trust_pickle: bool = False
) -> Checkpoint:
    """The checkpoint in ``path``, on the CPU, in the precision it was saved in; no code of the file is run.

    A sharpscope file is read in full. Of a folder, as Hugging Face's libraries or torch.distributed.checkpoint write
    it, the weights are read from all files that its index names; ``.safetensors`` needs the extra of that name. A dict
    of tensors, alone or in nested dicts, gives a Checkpoint whose ``model`` is None; of several it is the one under
    ``weights``, or the first of the usual names (``layouts.NESTS``). Of a pickled module the weights are read.

    ``trust_pickle`` unpickles whatever the file holds, which **runs its code**, so that a pickled module is the model.

    Raises: CheckpointError when the file is missing, damaged, of another kind, or cannot be read without its code.
    """
    place = Path(path)
    if place.is_dir() and (place / INDEX).is_file():
        return _distributed(place, weights)
    digest, contents, foreign = _folder(place, trust_pickle) if place.is_dir() else _file(place, trust_pickle)
    if isinstance(contents, dict) and isinstance(contents.get("sharpscope"), int):
        if weights is not None:
            raise CheckpointError(
                f"The checkpoint {place} is of `sharpscope train`, with one state dict. Leave weights= (--weights) out."
            )
        return bundled(place, digest, contents)
    state_dict, key, others = chosen_weights(place, contents, weights, foreign)
    return Checkpoint(
        path=place,
        sha256=digest,
        state_dict=state_dict,
        weights=key,
        others=others,
        foreign=foreign,
        module=module_at(contents, key),
        hyper_parameters=hyper_parameters(contents),
    )


def _file(place: Path, trust_pickle: bool = False) -> tuple[str, Any, list[str]]:
    """The digest of a file, what it holds, and the names of what in it was not run."""
    if place.exists() and not place.is_file():
        raise CheckpointError(f"The checkpoint {place} must be a file or a folder, but is a device or a pipe.")
    try:
        with open(place, "rb") as stream:
            # Digest and contents come from one open file, even if a training run replaces it meanwhile.
            digest = _sha256(stream)
            if stream.tell() == 0:
                raise CheckpointError(f"The checkpoint {place} is empty. {HOW_TO_SAVE}")
            if place.suffix == ".safetensors":
                stream.seek(0)
                return digest, _safetensors(place, stream), []
            return digest, *_unpickle(place, stream, trust_pickle)
    except FileNotFoundError:
        raise CheckpointError(f"There is no checkpoint {place}. Check the path.") from None
    except OSError as error:
        raise CheckpointError(f"The checkpoint {place} cannot be read: {error.strerror or error}.") from error


def _folder(place: Path, trust_pickle: bool) -> tuple[str, dict[str, Any], list[str]]:
    """The weights of all files in a folder, a digest of theirs, and what in them was not run."""
    digests: list[str] = []
    merged: dict[str, Any] = {}
    left: list[str] = []
    for shard, names in shards_of(place).items():
        digest, contents, foreign = _file(shard, trust_pickle)
        state_dict, *_ = chosen_weights(shard, contents)
        require_all(shard, names, state_dict)
        digests.append(digest)
        left += foreign
        # A stale copy of what the index has elsewhere does not count.
        merged |= state_dict if names is None else {name: state_dict[name] for name in names}
    return _digest(digests), merged, left


def _distributed(place: Path, weights: str | None) -> Checkpoint:
    pieces = Pieces(place)
    chosen, key, others = chosen_weights(place, pieces.tree, weights)
    state_dict = pieces.read(chosen, lambda path, stream: _unpickle(path, stream)[0])
    digest = _digest_of_all(pieces.read_from)
    return Checkpoint(path=place, sha256=digest, state_dict=state_dict, weights=key, others=others)


def digest_of(path: str | os.PathLike[str]) -> str:
    """The sha256 of a file, or of those of all files of a folder's weights, as in ``Checkpoint.sha256``.

    Raises: CheckpointError for a folder without weights; OSError for a file that cannot be read.
    """
    place = Path(path)
    if not place.is_dir():
        files = [place]
    elif (place / INDEX).is_file():
        files = Pieces(place).read_from
    else:
        files = list(shards_of(place))
    return _digest_of_all(files)


def _digest_of_all(files: list[Path]) -> str:
    digests = []
    for file in files:
        with open(file, "rb") as stream:
            digests.append(_sha256(stream))
    return _digest(digests)


def _digest(digests: list[str]) -> str:
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


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


def _sha256(stream: BinaryIO) -> str:
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


def _unpickle(place: Path, stream: BinaryIO, trust_pickle: bool = False) -> tuple[Any, list[str]]:
    """What a file of ``torch.save`` holds, and the names of what in it was not run."""
    try:
        if zipfile.is_zipfile(stream):
            with zipfile.ZipFile(stream) as archive:
                if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                    raise CheckpointError(
                        f"{place} is a TorchScript archive, which holds a program. Save the weights of the model that "
                        "it was made of: torch.save(model.state_dict(), path)."
                    )
                _require_plain(place, archive, stream.seek(0, os.SEEK_END))
                # torch.load does not compare the archive's checksums, so a flipped bit would pass as a weight.
                damaged = archive.testzip()
            if damaged is not None:
                raise CheckpointError(f"The checkpoint {place} is damaged: {damaged} fails its CRC. Copy it again.")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stream.seek(0)
            if trust_pickle:
                return _trusted(place, stream), []
            try:
                return torch.load(stream, map_location="cpu", weights_only=True), []
            except pickle.UnpicklingError as error:
                if not _of_foreign(error):
                    raise
                return inert(stream)
    except CheckpointError:
        raise
    # Bytes that are no checkpoint can raise nearly anything in an unpickler: KeyError for a PNG, for instance.
    except Exception as error:
        if _of_foreign(error):
            raise CheckpointError(
                f"The checkpoint {place} holds pickled Python objects, and reading them could run any code. "
                "Save the weights alone with torch.save(model.state_dict(), path), or pass --trust-pickle if you trust "
                "the file."
            ) from error
        raise CheckpointError(
            f"{place} must be a PyTorch checkpoint, but it is of another kind, truncated or damaged. {HOW_TO_SAVE}"
        ) from error


def _of_foreign(error: BaseException | None) -> bool:
    """Whether torch's unpickler for weights met another class, before this error or in it."""
    return error is not None and ("unsupported global" in str(error).lower() or _of_foreign(error.__context__))


def _trusted(place: Path, stream: BinaryIO) -> Any:
    try:
        return torch.load(stream, map_location="cpu", weights_only=False)
    except (ImportError, AttributeError) as error:
        raise CheckpointError(
            f"The checkpoint {place} needs the classes of its pickled objects: {first_line(error)}. Run where they can "
            "be imported from, or leave --trust-pickle out and name the model by --model or --problem."
        ) from error
