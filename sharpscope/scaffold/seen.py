"""What a checkpoint shows of the model that it is of."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sharpscope.checkpoint import Checkpoint, read_checkpoint
from sharpscope.checkpoint.distributed import INDEX
from sharpscope.errors import CheckpointError
from sharpscope.scaffold.zoo_model import ZooModel, recognised

# Of data parallelism, torch.compile, and a module that holds the network as .model.
WRAPPERS = ("module.", "_orig_mod.", "model.")


@dataclass(frozen=True, eq=False, kw_only=True)
class Seen:
    """What a checkpoint shows of its model.

    Attributes:
        checkpoint: its weights.
        layout: "state dict", "Lightning", "Hugging Face", "PEFT" or "distributed".
        prefix: what a wrapper seems to have put before every name.
        folder: where Hugging Face's configuration is, with its contents in ``config``.
        zoo_model: the bundled model that it is of.
    """

    checkpoint: Checkpoint
    layout: str
    prefix: str = ""
    folder: Path | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    zoo_model: ZooModel | None = None


def look(path: str | os.PathLike[str], weights: str | None = None) -> Seen:
    """What the checkpoint in ``path`` shows; no code of it is run. ``weights`` is as in ``read_checkpoint``.

    Raises: CheckpointError for a file that cannot be read, or one of ``sharpscope train``, which says all itself.
    """
    checkpoint = read_checkpoint(path, weights)
    place = checkpoint.path
    if checkpoint.model is not None:
        raise CheckpointError(
            f"The checkpoint {place} says itself that it is of {checkpoint.model} on {checkpoint.data['name']}, and "
            f"needs no problem file. Run sharpscope eigen {place}."
        )
    names = list(checkpoint.state_dict)
    folder = place if place.is_dir() else place.parent
    if _of_hugging_face(place):
        if all(name.startswith("base_model.") for name in names) and (folder / "adapter_config.json").is_file():
            config = _json(folder / "adapter_config.json")
            return Seen(checkpoint=checkpoint, layout="PEFT", folder=folder, config=config)
        config = _json(folder / "config.json") if (folder / "config.json").is_file() else {}
        if {"architectures", "model_type"} & set(config):  # a config.json may be of anybody's training script
            return Seen(checkpoint=checkpoint, layout="Hugging Face", folder=folder, config=config)
    if checkpoint.hyper_parameters is not None:
        first = {name.partition(".")[0] for name in names}
        prefix = f"{first.pop()}." if len(first) == 1 and all("." in name for name in names) else ""
        return Seen(checkpoint=checkpoint, layout="Lightning", prefix=prefix)
    prefix = _wrapping(names)
    shapes = {name.removeprefix(prefix): tuple(value.shape) for name, value in checkpoint.state_dict.items()}
    return Seen(
        checkpoint=checkpoint,
        layout="distributed" if (place / INDEX).is_file() else "state dict",
        prefix=prefix,
        zoo_model=recognised(shapes),
    )


def _wrapping(names: list[str]) -> str:
    """The wrappers' names that all ``names`` start with, "module._orig_mod." for instance."""
    prefix = ""
    while True:
        more = next((w for w in WRAPPERS if all(name.startswith(prefix + w) for name in names)), None)
        if more is None:
            return prefix
        prefix += more


def _of_hugging_face(place: Path) -> bool:
    """A folder, or a file whose name is one that Hugging Face's libraries give."""
    return place.is_dir() or place.name.startswith(("model.safetensors", "pytorch_model", "adapter_model"))


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} must be the model's configuration as JSON, but is damaged. Copy it again."
        ) from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(found).__name__}. Copy it again.")
    return found
