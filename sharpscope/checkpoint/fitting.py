"""Load the weights of a file into a model; names may differ by a prefix, tied weights or an adapter."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sharpscope.checkpoint.layouts import with_model_names
from sharpscope.errors import CheckpointError, first_few


def load_weights(
    model: nn.Module, state_dict: Mapping[str, Tensor], prefix: str | None = None, *, partial: bool = False
) -> str:
    """Copy ``state_dict`` into ``model``; all names and shapes must match, and tied parameters stay tied.

    The model takes the file's precision: a bfloat16 checkpoint makes a bfloat16 model. Names that transformers
    changed between its versions are converted.

    Args:
        model: changed in place.
        state_dict: weights of the file.
        prefix: load only the entries whose names start with ``prefix``, and strip it: "module." of data parallelism,
            "_orig_mod." of a compiled model, "model." of Lightning. None detects it.
        partial: parameters that the file lacks keep their values, such as the frozen weights under an adapter.

    Returns: the prefix.

    Raises: CheckpointError if keys are missing or unexpected, or shapes differ, with the number and the first of each;
        or if several prefixes fit.
    """
    own: dict[str, Tensor] = model.state_dict(keep_vars=True)
    if prefix is None:
        if not partial and not set(own) <= set(state_dict):
            state_dict = with_model_names(model, state_dict) or state_dict
        state_dict = _as_wrapped(state_dict, own)
    taken = _prefix(state_dict, own) if prefix is None else prefix
    chosen = {key.removeprefix(taken): value for key, value in state_dict.items() if key.startswith(taken)}
    _name_all(chosen, own)
    _require_fit(chosen, own, taken, partial)
    for key, tensor in own.items():
        if key in chosen and tensor.is_floating_point() and tensor.dtype != chosen[key].dtype:
            tensor.data = tensor.data.to(chosen[key].dtype)
    model.load_state_dict(chosen, strict=not partial)
    return taken


def _name_all(chosen: dict[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Add to ``chosen`` the other names of tied weights; rename peft's adapter weights to the model's names."""
    for names in _tied(own):
        there = [name for name in names if name in chosen]
        odd = next((name for name in there[1:] if not _same(chosen[there[0]], chosen[name])), None)
        if odd is not None:
            raise CheckpointError(
                f"The model ties {there[0]} and {odd}, but the checkpoint has two different weights for them. Untie "
                "them in the model, or check the file."
            )
        adapters = (name for name in map(_without_adapter, names) if name not in own)
        kept = next((name for name in (*there, *adapters) if name in chosen), None)
        if kept is not None:
            value = chosen[kept]
            if kept not in own:
                del chosen[kept]
            chosen |= {name: value for name in names if name not in chosen}


def _require_fit(chosen: Mapping[str, Tensor], own: Mapping[str, Tensor], prefix: str, partial: bool) -> None:
    """Raise CheckpointError if names, shapes or kinds differ; with ``partial``, names may be missing."""
    unexpected = [key for key in chosen if key not in own]
    missing = [key for key in own if key not in chosen] if not partial or not chosen else []
    differing = [
        f"{key}: {_kind(chosen[key])} in the file, {_kind(own[key])} in the model"
        for key in own
        if key in chosen and _kind(chosen[key]) != _kind(own[key])
    ]
    faults = []
    if unexpected:
        faults.append(f"has {len(unexpected)} keys that the model lacks ({first_few(unexpected)})")
    if missing:
        faults.append(f"misses {len(missing)} ({first_few(missing)})")
    if differing:
        faults.append(f"has {len(differing)} of another shape or kind ({first_few(differing, '; ')})")
    if faults:
        under = f" under {prefix!r}" if prefix else ""
        only = missing and not unexpected and not differing
        hint = " If the newly built model already has the others, pass --partial." if only else ""
        raise CheckpointError(
            f"The checkpoint{under} {', '.join(faults)}. Check --model and --model-args, or --problem.{hint}"
        )


def _prefix(state_dict: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """The prefix under which the file has every weight of the model.

    "" if the names match without one; the common prefix of all names if no prefix fits.

    Raises: CheckpointError if several prefixes fit.
    """
    tied = _tied(own)

    def fits(prefix: str) -> bool:
        return all(any(prefix + name in state_dict for name in names) for names in tied)

    if not own or fits(""):
        return ""
    suffixes = [f".{name}" for name in tied[0]]
    before = {key.removesuffix(end[1:]) for key in state_dict for end in suffixes if key.endswith(end)}
    fitting = sorted(prefix for prefix in before if fits(prefix))
    if len(fitting) > 1:
        raise CheckpointError(
            f"The checkpoint has the model's keys under several prefixes: {', '.join(map(repr, fitting))}. Choose one: "
            "prefix= (--prefix)."
        )
    # Otherwise the error would list every name as a difference.
    return fitting[0] if fitting else _common(state_dict, own)


def _as_wrapped(state_dict: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Add a prefix to every name if the model is a wrapper around the network of the file."""
    wrappers = {key[: i + 1] for key in list(own)[:1] for i in range(len(key)) if key[i] == "."}
    for prefix in sorted(wrappers, key=len):
        # All names of the model have the prefix, and none in the file.
        if all(key.startswith(prefix) and key[len(prefix) :] in state_dict and key not in state_dict for key in own):
            return {f"{prefix}{key}": tensor for key, tensor in state_dict.items()}
    return state_dict


def _without_adapter(name: str) -> str:
    """``name`` as peft saves it, without the name of the adapter ("default")."""
    return name.replace(".modules_to_save.default.", ".", 1).replace(".default.", ".", 1)


def _same(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors are equal, with NaN equal to NaN; meta tensors are compared by shape."""
    if one is two or one.shape != two.shape or one.is_meta or two.is_meta:
        return one is two or one.shape == two.shape
    return one.dtype == two.dtype and bool(((one == two) | ((one != one) & (two != two))).all())


def _tied(own: Mapping[str, Tensor]) -> list[list[str]]:
    """The names of each parameter or buffer; a tied one has several."""
    names: dict[int, list[str]] = {}
    for key, tensor in own.items():
        names.setdefault(id(tensor), []).append(key)
    return list(names.values())


def _common(state_dict: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """The longest prefix of whole names that all keys share, if some key of the model is under it."""
    parts = [key.split(".")[:-1] for key in state_dict]
    shared = parts[0] if parts else []
    for other in parts:
        shared = shared[: next((i for i, (a, b) in enumerate(zip(shared, other, strict=False)) if a != b), len(other))]
    for i in range(len(shared), 0, -1):
        prefix = ".".join(shared[:i]) + "."
        if any(prefix + key in state_dict for key in own):
            return prefix
    return ""


def _kind(tensor: Tensor) -> str:
    """The shape, and "float" or the exact dtype: floating-point precision may differ, integers may not replace it."""
    kind = "float" if tensor.is_floating_point() else str(tensor.dtype)[6:]
    form = "" if tensor.layout is torch.strided else f" {str(tensor.layout)[6:]}"
    return f"{tuple(tensor.shape)} {kind}{form}{' without numbers' if tensor.is_meta else ''}"
