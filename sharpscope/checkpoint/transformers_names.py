"""Names that transformers gave the weights of a model in files, other than those in memory."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def renamed(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """``state_dict`` with the names and shapes of ``model``, as transformers itself translates them when it loads.

    None where ``model`` is none of transformers, or where something would be left out, made up or rounded.
    """
    library = sys.modules.get("transformers")  # a model of it cannot be there without it
    if library is None or not isinstance(model, library.PreTrainedModel):
        return None
    dtypes = {tensor.dtype for tensor in state_dict.values() if tensor.is_floating_point()}
    if len(dtypes) != 1:
        return None
    kind, hidden = type(model), ("_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_load_unexpected")
    # By its own name and module, by which transformers knows the translation; with nothing that goes unmentioned.
    told: Any = type(kind.__name__, (kind,), {"__module__": kind.__module__, **{name: [] for name in hidden}})
    with torch.random.fork_rng(devices=[]), _Quiet(library):
        try:
            found, info = told.from_pretrained(
                None, config=model.config, state_dict=dict(state_dict), dtype=dtypes.pop(), output_loading_info=True
            )
        # Whatever it is, the names as they are say more.
        except Exception:
            return None
    if any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")):
        return None
    translated: dict[str, Tensor] = found.state_dict()
    return translated


class _Quiet:
    """transformers without its progress bars and reports."""

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
