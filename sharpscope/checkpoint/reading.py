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
from sharpscope.checkpoint.unpickling import INDEX, Pieces, inert
from sharpscope.errors import CheckpointError, first_few, first_line


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


# The likeliest first: where there are both, safetensors are the newer.
WHOLE = ("model.safetensors", "pytorch_model.bin", "adapter_model.safetensors", "diffusion_pytorch_model.safetensors")
INDEXED = tuple(f"{name}.index.json" for name in WHOLE)


def shards_of(folder: Path) -> dict[Path, list[str] | None]:
    """Each file of a folder's weights, with the names that it must hold as far as an index says them.

    Raises: CheckpointError where there is none, or the index is no index or names files elsewhere.
    """
    for whole, index in zip(WHOLE, INDEXED, strict=True):
        if (folder / whole).is_file():
            return {folder / whole: None}
        if (folder / index).is_file():
            return _indexed(folder / index)
    raise CheckpointError(
        f"The folder {folder} must hold one of {', '.join(WHOLE[:2])} or their .index.json, but does not. Name a file "
        "in it."
    )


def require_all(shard: Path, names: list[str] | None, found: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError where a shard lacks what the index says it holds."""
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
            raise CheckpointError(f"{index} must name files beside it, got {file!r}. Do not trust it.")
        names = shards.setdefault(index.parent / file, [])
        assert names is not None
        names.append(name)
    if not shards:
        raise CheckpointError(f"{index} must name at least one weight, got none. Copy it again.")
    return shards
