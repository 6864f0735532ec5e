"""A hash of what a computation depends on: weights, data, configuration, versions."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from sharpscope.errors import ArgumentError
from sharpscope.objective.data import walkable
from sharpscope.preserve import preserved

# blake2b takes about 1 GB a second on one core, several times what SHA-256 does without instructions of its own.
DIGEST_BYTES = 16


def fingerprint(*parts: Any) -> str:
    """A hash (32 hexadecimal digits) of the exact values of ``parts``, in order, equal in every process.

    Tensors and arrays count by dtype, shape and bytes, wherever they are and however they are laid out; numbers,
    strings, None, dtypes, devices and paths by type and value; mappings by their items in any order, sequences in
    theirs. Anything else that holds batches (a Dataset, a DataLoader, an object to iterate over) is walked once, and
    counts by its batches; all random states are restored.

    Cost: one walk over the data without a model, and about a second a gigabyte.

    Raises: ArgumentError for what has no bytes of its own, DataError for data that can be walked only once.
    """
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        _add(digest, part)
    return digest.hexdigest()


def raw_bytes(tensor: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The bytes of a dense tensor in row-major order, one-dimensional, on the CPU; a view where that is possible."""
    dense = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return dense.reshape(-1).view(torch.uint8).numpy()


def _add(digest: hashlib.blake2b, value: Any) -> None:
    # Each value is preceded by its type and each container by its length, so that no two parts can be confused.
    if value is None or isinstance(value, bool | str | bytes | torch.dtype | torch.device | os.PathLike):
        plain = value if isinstance(value, bytes) else str(value).encode(errors="surrogatepass")
        kind = "path" if isinstance(value, os.PathLike) else type(value).__name__
        _tag(digest, kind, len(plain))
        digest.update(plain)
    elif isinstance(value, int | np.integer):
        _tag(digest, "int", int(value))
    elif isinstance(value, float | np.floating):
        _tag(digest, "float")
        digest.update(struct.pack("<d", float(value)))
    elif isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized:
        _tag(digest, "tensor", str(value.dtype), *value.shape)
        digest.update(raw_bytes(value).data)
    elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
        _tag(digest, "array", value.dtype.str, *value.shape)
        digest.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
    elif isinstance(value, Mapping):
        _tag(digest, "mapping", len(value))
        for item in sorted(fingerprint(key, entry) for key, entry in value.items()):
            digest.update(item.encode())
    elif isinstance(value, set | frozenset):
        _tag(digest, "set", len(value))
        for item in sorted(map(fingerprint, value)):
            digest.update(item.encode())
    elif isinstance(value, tuple | list):
        _tag(digest, "sequence", len(value))
        for entry in value:
            _add(digest, entry)
    else:
        _add_walk(digest, value)


def _add_walk(digest: hashlib.blake2b, data: Any) -> None:
    """The batches of ``data``, one after the other."""
    if isinstance(data, Tensor) or not (isinstance(data, Dataset) or hasattr(data, "__iter__")):
        raise ArgumentError(
            f"A fingerprint needs tensors, arrays, numbers, text or batches of them, got a {type(data).__name__}. "
            "Pass what it depends on instead."
        )
    count = 0
    with preserved(data=data):
        for batch in walkable(data):
            _add(digest, batch)
            count += 1
    _tag(digest, "batches", count)


def _tag(digest: hashlib.blake2b, *words: object) -> None:
    digest.update(f"<{' '.join(map(str, words))}>".encode())
