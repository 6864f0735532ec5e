"""The files that a folder's weights are in, as Hugging Face's libraries write them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from sharpscope.errors import CheckpointError, first_few

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
