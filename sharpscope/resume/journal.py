"""A long run's state on disk, so that the same call after a kill goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sharpscope.errors import ArgumentError, OutputError
from sharpscope.files import atomic
from sharpscope.resume.fingerprint import DIGEST_BYTES, fingerprint, raw_bytes

Entry = dict[str, Any]

# The layout of an entry; files of another are not read.
FORMAT = 1

# torch aligns what it allocates to this, and the last bits of a product may depend on it.
ALIGNMENT = 64


class Journal:
    """The finished pieces of one computation, in order, each in a file of its own in the folder ``path``.

    A computation that asks for the same pieces in the same order gets those that are on disk, bit for bit, and computes
    and stores the others: killed at any moment, it loses the piece at work. An entry is used only if it is whole
    (checksum), of this ``key``, and follows the same entries as when it was written; the first that is not, and all
    after it, count as absent and are removed when the next entry is written. So the state of another key (other
    weights, data, configuration) is never used and gives way to the new one's.

    Args:
        path: the folder, made when the first entry is written; None stores nothing, and every piece is computed.
        key: what the computation depends on, from ``fingerprint``.

    Attributes:
        replayed: entries that came from disk so far.

    An entry is written once, at about the disk's speed, and takes its tensors' size: with blocks of b vectors of
    length n, ``b n`` numbers a pass.

    Raises: ArgumentError without a key, OutputError when ``path`` is a file, or cannot be written; what was stored
    before stays.
    """

    def __init__(self, path: str | os.PathLike[str] | None, key: str = "") -> None:
        if path is not None and not key:
            raise ArgumentError("A journal on disk must have a key, or it would be taken for another run's. Pass one.")
        self._folder = None if path is None else Path(path)
        if self._folder is not None and self._folder.exists() and not self._folder.is_dir():
            raise OutputError(f"The journal must be a folder, but {self._folder} is a file. Name another place.")
        self._key = key
        self._index = 0
        self._previous = ""
        self._replaying = self._folder is not None
        self._clean = False
        self.replayed = 0

    def once(
        self,
        label: str,
        compute: Callable[[], Mapping[str, Any]],
        *,
        given: Sequence[Any] = (),
        generators: Iterable[torch.Generator] = (),
    ) -> Entry:
        """What ``compute()`` returned, now or in the run that was killed.

        Args:
            label: what this is.
            compute: returns tensors and plain JSON values (numbers, strings, lists of them) by name.
            given: what the piece depends on beyond the key, the label and the entries before, hashed exactly.
            generators: their states count as given, and are set to what they were after ``compute``.

        Raises: ArgumentError for a value that cannot be stored, OutputError when it cannot be written.
        """
        sources = list(generators)
        if self._folder is None:
            return _storable(compute())
        request = fingerprint(label, list(given), [source.get_state() for source in sources])
        head = {
            "format": FORMAT,
            "key": self._key,
            "index": self._index,
            "previous": self._previous,
            "request": request,
        }
        place = self._folder / f"{self._index:06d}.npz"
        if self._replaying:
            stored = _read(place, head, len(sources))
            if stored is not None:
                for source, state in zip(sources, stored.states, strict=True):
                    source.set_state(state)
                self._advance(stored.digest)
                self.replayed += 1
                return stored.values
            self._replaying = False
        values = _storable(compute())
        if not self._clean:
            self._discard(self._index)
            self._clean = True
        self._advance(_write(place, head, values, [source.get_state() for source in sources]))
        return values

    def matmat(
        self,
        matmat: Callable[[Tensor], Tensor],
        label: str = "product",
        *,
        note: Callable[[], Mapping[str, Any]] | None = None,
        recall: Callable[[Entry], None] | None = None,
    ) -> Callable[[Tensor], Tensor]:
        """``matmat`` whose j-th call comes from disk, if the block is bit for bit the one of that call.

        Args:
            matmat: a block to its product.
            label: what this product is.
            note: what a product leaves behind besides (loss, gradient, costs), stored with it under any name but
                "product".
            recall: called with that instead, when the product comes from disk.
        """

        def product(block: Tensor) -> Tensor:
            before = self.replayed

            def compute() -> Entry:
                image = matmat(block)
                return {**(note() if note is not None else {}), "product": image}

            # The bytes as they lie, so that a block of columns needs no copy.
            given = [block.T if _columns(block) else block, _columns(block)]
            entry = self.once(label, compute, given=given)
            image: Tensor = entry.pop("product")
            if self.replayed > before and recall is not None:
                recall(entry)
            return image

        return product

    def finish(self) -> None:
        """Remove the state: the result is safe elsewhere. A folder with other things in it stays, with them."""
        if self._folder is not None and self._folder.is_dir():
            self._discard(0)
            if not any(self._folder.iterdir()):
                self._folder.rmdir()

    def _advance(self, digest: str) -> None:
        self._index += 1
        self._previous = digest

    def _discard(self, start: int) -> None:
        """Remove entries from ``start`` on, and what writes that were killed left behind."""
        assert self._folder is not None
        for left in self._folder.glob(".[0-9]*.npz.*.tmp"):
            left.unlink(missing_ok=True)
        for entry in self._folder.glob("[0-9]*.npz"):
            if entry.stem.isdigit() and int(entry.stem) >= start:
                entry.unlink(missing_ok=True)


def discard(path: str | os.PathLike[str]) -> None:
    """Remove the state at ``path``, whatever its key: passes and points. Other files stay, and the folder with them."""
    place = Path(path)
    for points in place.glob("*.points"):
        points.unlink(missing_ok=True)
    Journal(place, "any").finish()


@dataclass(frozen=True)
class _Stored:
    values: Entry
    states: list[Tensor]
    digest: str


def _storable(values: Mapping[str, Any]) -> Entry:
    """``values`` as a replay gives them: tensors detached, aligned, row- or column-major; the rest through JSON.

    A view with other strides would be summed in another order than its copy from disk.
    """
    entry: Entry = {}
    for name, value in values.items():
        if isinstance(value, Tensor):
            plain = value.detach()
            if not (plain.is_contiguous() or _columns(plain)):
                plain = plain.contiguous()
            # An unaligned view is copied; the storage of a device is not looked at.
            unaligned = plain.device.type == "cpu" and plain.data_ptr() % ALIGNMENT
            entry[name] = plain.clone() if unaligned else plain
        else:
            try:
                entry[name] = json.loads(json.dumps(value))
            except (TypeError, ValueError) as error:
                came = type(value).__name__
                raise ArgumentError(f"A journal keeps tensors and JSON values, got a {came} as {name!r}.") from error
    return entry


def _columns(tensor: Tensor) -> bool:
    """Whether a matrix is stored by columns."""
    return tensor.dim() == 2 and not tensor.is_contiguous() and tensor.T.is_contiguous()


def _write(place: Path, head: Mapping[str, Any], values: Entry, states: list[Tensor]) -> str:
    """Store an entry, whole or not at all, and return its digest."""
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    layout = [
        (name, str(t.dtype).removeprefix("torch."), list(t.shape), _columns(t), str(t.device))
        for name, t in tensors.items()
    ]
    plain = {name: value for name, value in values.items() if name not in tensors}
    text = json.dumps({**head, "order": list(values), "tensors": layout, "plain": plain, "states": len(states)})
    header = np.frombuffer(text.encode(), np.uint8)
    arrays = [raw_bytes(t.T if _columns(t) else t) for t in tensors.values()]
    arrays += [raw_bytes(state) for state in states]
    digest = hashlib.blake2b(header.data, digest_size=DIGEST_BYTES)
    for array in arrays:
        digest.update(array.data)
    with atomic(place) as temporary, open(temporary, "wb") as file:
        np.savez(file, header, np.frombuffer(digest.digest(), np.uint8), *arrays)
    return digest.hexdigest()


def _read(place: Path, head: Mapping[str, Any], num_states: int) -> _Stored | None:
    """The entry at ``place`` if it is whole and has just this ``head``, else None, whatever is there."""
    try:
        with open(place, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            header = file["arr_0"]
            parsed = json.loads(header.tobytes())
            if any(parsed[name] != value for name, value in head.items()) or parsed["states"] != num_states:
                return None
            digest = hashlib.blake2b(header.data, digest_size=DIGEST_BYTES)
            found: Entry = dict(parsed["plain"])
            for i, (name, dtype, shape, columns, device) in enumerate(parsed["tensors"]):
                # Read into memory of torch's own, aligned as it was.
                tensor = torch.empty(shape[::-1] if columns else shape, dtype=getattr(torch, dtype))
                _fill(tensor, file[f"arr_{i + 2}"], digest)
                found[name] = (tensor.T if columns else tensor).to(device)
            states = []
            for i in range(num_states):
                array = file[f"arr_{len(parsed['tensors']) + i + 2}"]
                states.append(torch.empty(len(array), dtype=torch.uint8))
                _fill(states[-1], array, digest)
            if digest.digest() != file["arr_1"].tobytes():
                return None
            return _Stored({name: found[name] for name in parsed["order"]}, states, digest.hexdigest())
    # Whatever a truncated or foreign file makes a parser raise, it is no entry.
    except Exception:
        return None


def _fill(tensor: Tensor, array: np.ndarray[Any, np.dtype[np.uint8]], digest: hashlib.blake2b) -> None:
    digest.update(array.data)
    tensor.view(-1).view(torch.uint8).copy_(torch.from_numpy(array))
