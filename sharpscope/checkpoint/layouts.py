"""Find the weights, and their names, in the layouts that other programs write."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sharpscope.checkpoint.unpickling import module_weights
from sharpscope.errors import CheckpointError, first_few

# Keys under which training scripts store the weights, most common first. Averaged weights come last.
NESTS = ("state_dict", "model_state_dict", "model", "net", "params", "state_dict_ema", "model_ema", "ema")
OPTIMIZERS = ("optim", "optimizer", "optimizers", "optimizer_state_dict", "optimizer_states")
DEPTH = 3  # of nested dicts

HOW_TO_SAVE = "Give a file written by 'sharpscope train' or by torch.save(model.state_dict(), path)."


def chosen_weights(
    place: Path, contents: Any, key: str | None = None, skipped_classes: Sequence[str] = ()
) -> tuple[dict[str, Tensor], str, list[str]]:
    """Choose a state dict in ``contents``: under ``key``, else the first of NESTS, else the only one.

    Returns: the state dict, its key ("" if it is the whole of ``contents``), and the keys of the other state dicts.

    Raises: CheckpointError if there is none, none under ``key``, or several and none of NESTS.
    """
    found = state_dicts(contents)
    if not found:
        keys = f"a dict with the keys {first_few([repr(k) for k in contents])}" if isinstance(contents, dict) else ""
        classes = first_few(skipped_classes)
        objects = f", and objects of {classes}, which were not run (--trust-pickle)" if skipped_classes else ""
        raise CheckpointError(
            f"The checkpoint {place} must hold a dict of tensors, alone or under {', '.join(NESTS[:3])}, ..., "
            f"got {keys or type(contents).__name__}{objects}. {HOW_TO_SAVE}"
        )
    if key is not None and key not in found:
        raise CheckpointError(
            f"The checkpoint {place} has no weights under {key!r}, but under {_listed(found)}. Pass one of them."
        )
    known = [name for nest in ("", *NESTS) for name in found if name == nest or (nest and name.endswith(f".{nest}"))]
    if key is None and not known and len(found) > 1:
        raise CheckpointError(
            f"The checkpoint {place} holds several dicts of weights, under {_listed(found)}. Choose one: weights= "
            "(--weights)."
        )
    taken = key if key is not None else [*known, *found][0]
    return found[taken], taken, [name for name in found if name != taken]


def state_dicts(contents: Any, depth: int = DEPTH) -> dict[str, dict[str, Tensor]]:
    """All state dicts in nested dicts, by their keys joined with dots; "" is ``contents`` itself.

    A module counts as its state dict. The state of optimizers is ignored.
    """
    named = _named_tensors(contents)
    if named:
        return {"": named}  # an OrderedDict with torch's version notes becomes an ordinary one
    held = contents.state_dict() if isinstance(contents, nn.Module) else module_weights(contents)
    if held:
        return {"": dict(held)}
    found: dict[str, dict[str, Tensor]] = {}
    if isinstance(contents, Mapping) and depth:
        for key, value in contents.items():
            # The keys of an optimizer's state are numbers.
            if isinstance(key, str) and key not in OPTIMIZERS:
                inner = state_dicts(value, depth - 1)
                found |= {f"{key}.{name}" if name else key: entry for name, entry in inner.items()}
    return found


def module_at(contents: Any, key: str) -> nn.Module | None:
    """The module whose state dict ``state_dicts`` finds under ``key``; None if it is not a module."""
    if isinstance(contents, nn.Module):
        return contents if not key else None
    for name, value in contents.items() if isinstance(contents, Mapping) else ():
        if isinstance(name, str) and (key == name or key.startswith(f"{name}.")):
            found = module_at(value, key[len(name) + 1 :])
            if found is not None:
                return found
    return None


def hyper_parameters(contents: Any) -> dict[str, Any] | None:
    """Hyperparameters that ``save_hyperparameters()`` stored in a Lightning file; None for other files."""
    if not isinstance(contents, Mapping) or "pytorch-lightning_version" not in contents:
        return None
    stored = contents.get("hyper_parameters")
    return {key: value for key, value in stored.items() if isinstance(key, str)} if isinstance(stored, Mapping) else {}


def is_state_dict(value: Any) -> bool:
    """Whether ``value`` is a dict of named tensors."""
    return (
        isinstance(value, dict)
        and len(value) > 0
        and all(isinstance(key, str) and isinstance(entry, Tensor) for key, entry in value.items())
    )


def _named_tensors(value: Any) -> dict[str, Tensor]:
    """The tensors of a dict that holds mostly tensors and otherwise plain values; else an empty dict."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        return {}
    tensors = {key: entry for key, entry in value.items() if isinstance(entry, Tensor)}
    rest = [entry for entry in value.values() if not isinstance(entry, Tensor)]
    plain = all(entry is None or isinstance(entry, bool | int | float | str | bytes) for entry in rest)
    return tensors if plain and len(tensors) > len(rest) else {}


def _listed(found: Mapping[str, Any]) -> str:
    return first_few([repr(name) for name in found])


def with_model_names(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """``state_dict`` with the names and shapes of ``model``, converted by transformers' own loader.

    None if ``model`` is not of transformers, or if an entry would be dropped, initialised or rounded.
    """
    library = sys.modules.get("transformers")  # imported already if the model is one of its classes
    if library is None or not isinstance(model, library.PreTrainedModel):
        return None
    dtypes = {tensor.dtype for tensor in state_dict.values() if tensor.is_floating_point()}
    if len(dtypes) != 1:
        return None
    kind, hidden = type(model), ("_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_load_unexpected")
    # A subclass that reports every key that does not match. transformers finds the conversion by name and module.
    reporting: Any = type(kind.__name__, (kind,), {"__module__": kind.__module__, **{name: [] for name in hidden}})
    with torch.random.fork_rng(devices=[]), _Quiet(library):
        try:
            found, info = reporting.from_pretrained(
                None, config=model.config, state_dict=dict(state_dict), dtype=dtypes.pop(), output_loading_info=True
            )
        # The error about the unconverted names is the more helpful one.
        except Exception:
            return None
    if any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")):
        return None
    translated: dict[str, Tensor] = found.state_dict()
    return translated


class _Quiet:
    """Silence the progress bars and reports of transformers."""

    def __init__(self, library: Any) -> None:
        self._logging = library.utils.logging

    def __enter__(self) -> None:
        self._level, self._bars = self._logging.get_verbosity(), self._logging.is_progress_bar_enabled()
        self._logging.set_verbosity_error()
        self._logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        self._logging.set_verbosity(self._level)
        if self._bars:
            self._logging.enable_progress_bar()
