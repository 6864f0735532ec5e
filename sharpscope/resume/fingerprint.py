"""A hash of exact values: tensors, numbers, text, and data by their batches."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from sharpscope.errors import ArgumentError
from sharpscope.objective.data import walkable
from sharpscope.preserve import preserved

# blake2b hashes about 1 GB a second on one core, several times what SHA-256 does without hardware support.
DIGEST_BYTES = 16

SCALARS = (type(None), bool, int, float, str, bytes, torch.dtype, torch.device, os.PathLike)


def fingerprint(*values: Any) -> str:
    """A hash (32 hexadecimal digits) of the exact ``values``, in order, equal in every process.

    Tensors and arrays are hashed by dtype, shape and bytes, whatever their device and strides; scalars, text, dtypes,
    devices and paths by type and value; mappings and sets in any order. Data (a Dataset, a DataLoader, an object to
    iterate over) are walked once and hashed by their batches; all random states are restored.

    Cost: one walk over the data without a model, and about a second a gigabyte.

    Raises: ArgumentError for a value that cannot be hashed, DataError for data that can be walked only once.
    """
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for value in values:
        _add(digest, value)
    return digest.hexdigest()


def _add(digest: hashlib.blake2b, value: Any) -> None:
    # Each value is preceded by its type and size, so that different values never give the same bytes.
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, SCALARS):
        text = repr(value).encode()
        _tag(digest, type(value).__name__, len(text))
        digest.update(text)
    elif has_bytes(value):
        _tag(digest, "tensor" if isinstance(value, Tensor) else "array", value.dtype, *value.shape)
        if isinstance(value, Tensor):
            dense = value.detach().resolve_conj().resolve_neg().cpu().contiguous()
            value = dense.reshape(-1).view(torch.uint8).numpy()
        digest.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
    elif isinstance(value, Mapping | set | frozenset):
        items = value.items() if isinstance(value, Mapping) else [(entry,) for entry in value]
        _tag(digest, "mapping" if isinstance(value, Mapping) else "set", len(value))
        digest.update("".join(sorted(fingerprint(*item) for item in items)).encode())
    elif isinstance(value, tuple | list):
        _tag(digest, "sequence", len(value))
        for entry in value:
            _add(digest, entry)
    elif not isinstance(value, Tensor) and (isinstance(value, Dataset) or hasattr(value, "__iter__")):
        with preserved(data=value):
            for batch in walkable(value):
                _add(digest, batch)
        _tag(digest, "end of data")
    else:
        raise ArgumentError(
            f"A fingerprint needs tensors, arrays, numbers, text or batches of them, got a {type(value).__name__}. "
            "Pass what it depends on instead."
        )


def _tag(digest: hashlib.blake2b, *words: object) -> None:
    digest.update(f"<{' '.join(map(str, words))}>".encode())


def has_bytes(value: Any) -> bool:
    """Whether ``value`` is a dense tensor, or an array of numbers or text."""
    if isinstance(value, Tensor):
        return value.layout == torch.strided and not value.is_quantized
    return isinstance(value, np.ndarray) and not value.dtype.hasobject
