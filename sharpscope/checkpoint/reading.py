"""Read checkpoint files and folders without running any code in them."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from sharpscope.checkpoint.bundled import Checkpoint, bundled
from sharpscope.checkpoint.layouts import HOW_TO_SAVE, chosen_weights, hyper_parameters, module_at
from sharpscope.checkpoint.unpickling import INDEX, DistributedCheckpoint, unpickle_inert
from sharpscope.errors import CheckpointError, first_few, first_line


def read_checkpoint(
    path: str | os.PathLike[str], weights: str | None = None, *, trust_pickle: bool = False
) -> Checkpoint:
    """Read a checkpoint onto the CPU, in its saved precision, without running any code in it.

    Args:
        path: a file of ``sharpscope train``, of ``torch.save`` (a state dict, alone or in nested dicts, or a pickled
            module) or of safetensors (needs the extra of that name); or a folder of Hugging Face's libraries or of
            ``torch.distributed.checkpoint``, where all files in the index are read.
        weights: key of the state dict if there are several; by default the first of ``layouts.NESTS``.
        trust_pickle: unpickle the whole file, which **runs its code**; a pickled module then becomes the model.

    Raises: CheckpointError if the file is missing, damaged, of another kind, or cannot be read without running code.
    """
    place = Path(path)
    if place.is_dir() and (place / INDEX).is_file():
        return _distributed(place, weights)
    digest, contents, skipped = _folder(place, trust_pickle) if place.is_dir() else _file(place, trust_pickle)
    if isinstance(contents, dict) and isinstance(contents.get("sharpscope"), int):
        if weights is not None:
            raise CheckpointError(
                f"The checkpoint {place} is of `sharpscope train`, with one state dict. Leave out weights= (--weights)."
            )
        return bundled(place, digest, contents)
    state_dict, key, others = chosen_weights(place, contents, weights, skipped)
    return Checkpoint(
        path=place,
        sha256=digest,
        state_dict=state_dict,
        weights=key,
        others=others,
        foreign=skipped,
        module=module_at(contents, key),
        hyper_parameters=hyper_parameters(contents),
    )


def _file(place: Path, trust_pickle: bool = False) -> tuple[str, Any, list[str]]:
    """Digest and contents of a file, and the classes in it that were not run."""
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
    """Digest and weights of all files in a folder, and the classes in them that were not run."""
    digests: list[str] = []
    merged: dict[str, Any] = {}
    all_skipped: list[str] = []
    for shard, names in shard_files(place).items():
        digest, contents, skipped = _file(shard, trust_pickle)
        state_dict, *_ = chosen_weights(shard, contents)
        require_complete_shard(shard, names, state_dict)
        digests.append(digest)
        all_skipped += skipped
        # Ignore stale copies of weights that the index assigns to another file.
        merged |= state_dict if names is None else {name: state_dict[name] for name in names}
    return _digest(digests), merged, all_skipped


def _distributed(place: Path, weights: str | None) -> Checkpoint:
    distributed = DistributedCheckpoint(place)
    chosen, key, others = chosen_weights(place, distributed.tree, weights)
    state_dict = distributed.read(chosen, lambda path, stream: _unpickle(path, stream)[0])
    digest = _digest_of_all(distributed.read_from)
    return Checkpoint(path=place, sha256=digest, state_dict=state_dict, weights=key, others=others)


def digest_of(path: str | os.PathLike[str]) -> str:
    """The sha256 of a file, or of the digests of all files of weights in a folder, as in ``Checkpoint.sha256``.

    Raises: CheckpointError for a folder without weights; OSError for a file that cannot be read.
    """
    place = Path(path)
    if not place.is_dir():
        files = [place]
    elif (place / INDEX).is_file():
        files = DistributedCheckpoint(place).read_from
    else:
        files = list(shard_files(place))
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
    """The digest of the rest of ``stream``."""
    digest = hashlib.sha256()
    while chunk := stream.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def _require_plain(place: Path, archive: zipfile.ZipFile, size: int) -> None:
    """Raise CheckpointError for a compressed archive, which torch.save never writes."""
    entries = archive.infolist()
    if any(e.compress_type != zipfile.ZIP_STORED for e in entries) or sum(e.file_size for e in entries) > size:
        raise CheckpointError(
            f"The archive {place} would unpack to more than its {size:,} bytes, which torch.save never does. Do not "
            "trust it."
        )


def _unpickle(place: Path, stream: BinaryIO, trust_pickle: bool = False) -> tuple[Any, list[str]]:
    """Contents of a file of ``torch.save``, and the classes in it that were not run."""
    try:
        if zipfile.is_zipfile(stream):
            with zipfile.ZipFile(stream) as archive:
                if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                    raise CheckpointError(
                        f"{place} is a TorchScript archive, which holds a program. Save the weights of the original "
                        "model: torch.save(model.state_dict(), path)."
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
                if not _met_unknown_class(error):
                    raise
                return unpickle_inert(stream)
    except CheckpointError:
        raise
    # An unpickler can raise nearly any error for other bytes, such as KeyError for a PNG.
    except Exception as error:
        if _met_unknown_class(error):
            raise CheckpointError(
                f"The checkpoint {place} holds pickled Python objects, and reading them could run any code. "
                "Save only the weights with torch.save(model.state_dict(), path), or pass --trust-pickle if you trust "
                "the file."
            ) from error
        raise CheckpointError(
            f"{place} must be a PyTorch checkpoint, but it is of another kind, truncated or damaged. {HOW_TO_SAVE}"
        ) from error


def _met_unknown_class(error: BaseException | None) -> bool:
    """Whether ``error``, or an error in its context, is of torch's weights-only unpickler for an unknown class."""
    return error is not None and ("unsupported global" in str(error).lower() or _met_unknown_class(error.__context__))


def _trusted(place: Path, stream: BinaryIO) -> Any:
    try:
        return torch.load(stream, map_location="cpu", weights_only=False)
    except (ImportError, AttributeError) as error:
        raise CheckpointError(
            f"The checkpoint {place} needs the classes of its pickled objects: {first_line(error)}. Run where they can "
            "be imported, or leave out --trust-pickle and pass --model or --problem."
        ) from error


# In order of preference: if a folder has both, safetensors is the newer file.
WHOLE = ("model.safetensors", "pytorch_model.bin", "adapter_model.safetensors", "diffusion_pytorch_model.safetensors")
INDEXED = tuple(f"{name}.index.json" for name in WHOLE)


def shard_files(folder: Path) -> dict[Path, list[str] | None]:
    """The files of weights in a folder, each with the names that the index lists for it (None without an index).

    Raises: CheckpointError if there is none, or if the index is damaged or names files outside the folder.
    """
    for whole, index in zip(WHOLE, INDEXED, strict=True):
        if (folder / whole).is_file():
            return {folder / whole: None}
        if (folder / index).is_file():
            return _indexed(folder / index)
    raise CheckpointError(
        f"The folder {folder} must hold one of {', '.join(WHOLE[:2])} or their .index.json, but does not. Pass a file "
        "in it."
    )


def require_complete_shard(shard: Path, names: list[str] | None, found: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError if a shard lacks weights that the index lists for it."""
    missing = [name for name in names or () if name not in found]
    if missing:
        raise CheckpointError(
            f"{shard} must hold {len(missing)} weights that the index names ({first_few(missing)}). Copy it again."
        )


def _indexed(index: Path) -> dict[Path, list[str] | None]:
    try:
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        pairs = [(str(name), str(file)) for name, file in named.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} must be an index with a weight_map, but is damaged. Copy it again.") from error
    shards: dict[Path, list[str] | None] = {}
    for name, file in pairs:
        if Path(file).name != file:
            raise CheckpointError(f"{index} must name files in its folder, got {file!r}. Do not trust it.")
        names = shards.setdefault(index.parent / file, [])
        assert names is not None
        names.append(name)
    if not shards:
        raise CheckpointError(f"{index} must name at least one weight, got none. Copy it again.")
    return shards
