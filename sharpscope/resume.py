"""Store the finished steps of a long computation on disk, so that the same call resumes after a kill."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from sharpscope.atomic_io import atomic
from sharpscope.errors import ArgumentError, OutputError, SharpscopeError
from sharpscope.objective import Objective, Progress
from sharpscope.objective.accumulate import LossAndGradient
from sharpscope.objective.micro_batches import as_batches
from sharpscope.version import __version__
from sharpscope.weights.restore import preserved

# Examples that the probe evaluates.
EXAMPLES = 32


def key_of(objective: Objective, **settings: Any) -> str:
    """The hash of a measurement: model, loss, data, ``settings``, precision, device, versions.

    The code of model and loss counts by what it computes (``probe``): a change that does not affect the probe's
    examples is not detected, unless it is in a plain attribute of a module or of the loss. To be called before the
    micro-batch is settled. Cost: one walk over the data without the model, and the probe.
    """
    problem = objective.problem
    return fingerprint(
        _state(problem.model),
        [name for name, p in problem.model.named_parameters() if p.requires_grad],
        _state(problem.loss),
        problem.data,
        [problem.params, problem.mode, float(problem.weight_decay)],
        [objective.curvature.name, objective.dtype, objective.device, objective.micro_batch],
        settings,
        [__version__, torch.__version__, torch.get_num_threads()],
        probe(objective),
    )


def probe(objective: Objective) -> list[Tensor]:
    """Loss, weight, gradient and the product with a fixed vector of the first examples, which identify the code.

    Loss and gradient, or the loss alone, where the model has no further derivative; empty where even the loss fails,
    of which the first analysis reports the reason. Bit for bit the same for the same code. ``objective`` is left as it
    was. Cost: 1 gradient and 1 product of 32 examples (the loader's first batch where batches are kept), not counted.
    """
    # An objective of its own on the same model, so that counters, micro-batch and memory limit do not change.
    own = Objective(
        objective.terms.problem_with(objective.problem.data),
        dtype=objective.dtype,
        device=objective.device,
        micro_batch=objective.micro_batch,
        curvature=objective.curvature,
    )
    vector = torch.randn(1, own.num_params, generator=torch.Generator().manual_seed(0)).to(own.device, own.dtype)

    def derivatives(block: Tensor) -> list[Tensor]:
        sums = own.accumulate([own.first_examples(EXAMPLES)], block)
        return [sums.loss, sums.weight, sums.gradient, sums.products]

    def loss() -> list[Tensor]:
        return list(own.terms.without_graph(lambda: own.terms.sums(own.first_examples(EXAMPLES))))

    attempts: list[Callable[[], list[Tensor]]] = [
        lambda: derivatives(vector),
        lambda: derivatives(own.empty_block()),
        loss,
    ]
    with own.measuring(), _deterministic_kernels():
        for attempt in attempts:
            try:
                return attempt()
            except (SharpscopeError, RuntimeError):
                continue
    return []


@contextmanager
def _deterministic_kernels() -> Iterator[None]:
    """Deterministic kernels where torch has them: atomic additions on a GPU would change the probe's last bits."""
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_deterministic_debug_mode(before)


def _state(thing: Any) -> list[Any]:
    """Parameters, buffers and plain attributes of a model or loss: what it holds besides its code."""
    if isinstance(thing, functools.partial):
        return [_state(thing.func), _plain_state({**dict(enumerate(thing.args)), **thing.keywords})]
    if inspect.ismethod(thing):
        return [thing.__name__, _state(thing.__self__)]
    if not isinstance(thing, nn.Module):
        return [type(thing).__qualname__, _plain_state(getattr(thing, "__dict__", {}))]
    internal = vars(nn.Module())
    modules = {
        name: [type(module).__qualname__, {k: v for k, v in vars(module).items() if k not in internal and _is_plain(v)}]
        for name, module in thing.named_modules()
    }
    return [dict(thing.named_parameters()), dict(thing.named_buffers()), modules]


def _plain_state(values: Mapping[Any, Any]) -> dict[Any, Any]:
    """The plain entries of ``values``, and the state of modules among them."""
    modules = {name: _state(value) for name, value in values.items() if isinstance(value, nn.Module)}
    return {**{name: value for name, value in values.items() if _is_plain(value)}, **modules}


def _is_plain(value: Any) -> bool:
    """Whether ``value`` is a scalar, text, tensor or array, or a list, tuple or mapping of them."""
    if isinstance(value, Mapping):
        return all(_is_plain(entry) for item in value.items() for entry in item)
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return isinstance(value, SCALARS) or has_bytes(value)


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
            for batch in as_batches(value):
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


Entry = dict[str, Any]

# torch aligns the memory that it allocates to this, and the last bits of a product may depend on it.
ALIGNMENT = 64


class Journal:
    """The finished steps of one computation, in order, each in a file of its own in the folder ``path``.

    A computation that asks for the same steps in the same order gets the stored ones, bit for bit, and computes and
    stores the others: killed at any moment, it loses only the current step. The checksum of an entry covers its values,
    the ``key``, the request and the checksum of the entry before. An entry is used only if its checksum is right: files
    that are damaged, of another key or of another order are computed again and replaced.

    Args:
        path: the folder, made when the first entry is written; None stores nothing and computes every step.
        key: what the computation depends on, from ``key_of``.

    Attributes:
        replayed: the number of entries read from disk so far.

    Raises: ArgumentError without a key, OutputError when ``path`` is a file.
    """

    def __init__(self, path: str | os.PathLike[str] | None, key: str = "") -> None:
        if path is not None and not key:
            raise ArgumentError("A journal on disk must have a key, or it would be taken for another run's. Pass one.")
        self._folder = None if path is None else Path(path)
        if self._folder is not None and self._folder.exists() and not self._folder.is_dir():
            raise OutputError(f"The journal must be a folder, but {self._folder} is a file. Name another place.")
        self._count = 0
        self._previous = key
        self.replayed = 0

    def once(self, label: str, compute: Callable[[], Mapping[str, Any]], *, given: Sequence[Any] = ()) -> Entry:
        """What ``compute()`` returned, now or in the run that was killed.

        Args:
            label: the name of the step.
            compute: returns tensors and plain JSON values (numbers, strings, lists of them) by name.
            given: what the step depends on besides the key, the label and the entries before; hashed exactly.

        Raises: ArgumentError for a value that cannot be stored, OutputError when it cannot be written.
        """
        if self._folder is None:
            return _storable(compute())
        request = fingerprint(self._previous, label, list(given))
        path = self._folder / f"{self._count:06d}.entry"
        # Entries are replayed from the first on: after one that was computed, no file is worth reading.
        stored = _read(path, request) if self.replayed == self._count else None
        if stored is not None:
            values, self._previous = stored
            self.replayed += 1
        else:
            values = _storable(compute())
            self._previous = _write(path, request, values)
        self._count += 1
        return values


def discard(path: str | os.PathLike[str]) -> None:
    """Remove journal and points at ``path``, whatever their key. Other files stay, and the folder with them."""
    folder = Path(path)
    for pattern in ("[0-9]*.entry", ".[0-9]*.entry.*.tmp", "*.points", "[0-9]*.npz"):  # the last of 0.1.0
        for state in folder.glob(pattern):
            state.unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _write(path: Path, request: str, values: Entry) -> str:
    """Store an entry, whole or not at all, and return its checksum."""
    checksum = fingerprint(request, values)
    try:
        with atomic(path) as temporary:
            torch.save({"values": values, "checksum": checksum}, temporary)
    except RuntimeError as error:  # torch's writer, where the disk is full
        raise OutputError(f"Cannot write {path}: the disk takes no more. Choose another place.") from error
    return checksum


def _read(path: Path, request: str) -> tuple[Entry, str] | None:
    """The values and the checksum at ``path`` if they are whole and answer ``request``, else None."""
    try:
        entry = torch.load(path, weights_only=True)
        values, checksum = entry["values"], entry["checksum"]
        right = checksum == fingerprint(request, values)
    except Exception:  # a missing, damaged or foreign file makes the parser raise any kind of error
        return None
    return (_storable(values), checksum) if right else None


def _storable(values: Mapping[str, Any]) -> Entry:
    """``values`` as an entry holds them: tensors in memory of their own, everything else as JSON."""
    entry: Entry = {}
    for name, value in values.items():
        if isinstance(value, Tensor):
            entry[name] = _owned(value.detach())
        else:
            try:
                entry[name] = json.loads(json.dumps(value))
            except (TypeError, ValueError) as error:
                came = type(value).__name__
                raise ArgumentError(f"A journal keeps tensors and JSON values, got a {came} as {name!r}.") from error
    return entry


def _owned(tensor: Tensor) -> Tensor:
    """``tensor``, or a copy where it is not aligned or a view of a larger tensor; dense tensors keep their strides.

    So it is laid out as it comes back from disk, and later products with it have the same last bits.
    """
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole and tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


# The counters of the cost that are stored with a step.
COUNTERS = ("passes", "hvps", "example_gradients", "seconds")


def journaled_hvp(objective: Objective, journal: Journal, progress: Progress) -> Callable[[Tensor], Tensor]:
    """``objective.products`` that reads finished passes from ``journal``, with their loss, gradient and cost.

    The micro-batch is settled first, and stored: the last bits depend on it.
    """
    settled = journal.once("micro-batch", lambda: _settled(objective))
    objective.micro_batch = settled["size"]

    def products(rows: Tensor) -> Tensor:
        before = journal.replayed
        entry = once_with_cost(objective, journal, "pass", lambda: _pass(objective, rows, progress), given=[rows])
        if journal.replayed > before:
            _restore(objective, entry)
            progress(f"pass {objective.passes} is on disk", 0, objective.num_examples)
        images: Tensor = entry["products"]
        return images

    return products


def once_with_cost(
    objective: Objective,
    journal: Journal,
    label: str,
    compute: Callable[[], Mapping[str, Any]],
    *,
    given: Sequence[Any] = (),
) -> Entry:
    """``journal.once``, where a stored step leaves the cost as it was after it was computed."""

    def charged() -> Entry:
        values = compute()
        return {**values, "cost": {name: getattr(objective.cost_counter, name) for name in COUNTERS}}

    before = journal.replayed
    entry = journal.once(label, charged, given=given)
    if journal.replayed > before:
        objective.cost_counter.restore(**entry["cost"])
    return entry


def _settled(objective: Objective) -> Entry:
    objective.choose_micro_batch()
    return {"size": objective.micro_batch}


def _pass(objective: Objective, rows: Tensor, progress: Progress) -> Entry:
    """One pass over the data: the products, and what it leaves in ``objective``."""
    products = objective.products(rows, progress)
    return {"products": products, **vars(objective.last_pass), "micro_batch": objective.micro_batch}


def _restore(objective: Objective, entry: Entry) -> None:
    """Leave ``objective`` as the stored pass left it."""
    objective.last_pass = LossAndGradient(entry["loss"], entry["gradient"], entry["spread"], entry["examples"])
    objective.num_examples, objective.terms.checked = entry["examples"], True
    objective.micro_batch = entry["micro_batch"]


# The layout of a file; files of another are not read.
FORMAT = 1

_CHECK = struct.Struct("<I")

Place = tuple[float, ...]


class PointLog:
    """Values by the coordinates of the point, appended to a file in ``folder``; each is a whole record or none.

    What any file there holds under the same ``key`` (other weights, data, directions or configuration have another)
    counts as finished, whatever process wrote it: each writes to the file of its ``name``. A file of another key gives
    way when the first point of this one is added. A record that a kill cut short is dropped.

    Args:
        folder: made when the first point is added; None keeps points in memory alone.
        key: what the values depend on beside the coordinates, from ``fingerprint``.
        coordinates, values: how many numbers of each.
        name: of this process's file.

    Raises: OutputError when a file cannot be written.
    """

    def __init__(
        self, folder: str | os.PathLike[str] | None, key: str, coordinates: int, values: int, name: str = "points"
    ) -> None:
        self._folder = None if folder is None else Path(folder)
        self._name, self._coordinates = name, coordinates
        layout = {"format": FORMAT, "key": key, "coordinates": coordinates, "values": values}
        self._head = json.dumps(layout).encode() + b"\n"
        self._record = struct.Struct(f"<{coordinates + values}d")
        self._found: dict[Place, tuple[float, ...]] = {}
        self._whole = 0
        self._open: int | None = None
        self.read()
        self.replayed = len(self._found)

    def __contains__(self, point: Place) -> bool:
        return point in self._found

    def __getitem__(self, point: Place) -> tuple[float, ...]:
        return self._found[point]

    def read(self) -> None:
        """Take in what other processes have finished meanwhile."""
        if self._folder is None or not self._folder.is_dir():
            return
        for path in sorted(self._folder.glob("*.points")):
            whole = self._read(path)
            if path == self._path:
                self._whole = whole

    def add(self, point: Place, values: Sequence[float]) -> None:
        """Keep the values of a point: they survive a kill from now on."""
        self._found[point] = tuple(map(float, values))
        if self._folder is None:
            return
        record = self._record.pack(*point, *self._found[point])
        try:
            if self._open is None:
                self._open = self._append()
            os.write(self._open, record + _CHECK.pack(self._check(record)))
        except OSError as error:
            raise OutputError(f"Cannot write {self._path}: {error.strerror}. Choose another place.") from error

    def clear(self) -> None:
        """Forget every point; the first that is added replaces this process's file."""
        self._found, self._whole = {}, 0

    def close(self) -> None:
        """Close the file; what is in it stays."""
        if self._open is not None:
            os.close(self._open)
            self._open = None

    @property
    def _path(self) -> Path:
        assert self._folder is not None
        return self._folder / f"{self._name}.points"

    def _check(self, record: bytes) -> int:
        """A checksum under this head, which a record of another key fails, whoever wrote it into this file."""
        return zlib.crc32(record, zlib.crc32(self._head))

    def _append(self) -> int:
        """The file, open at the end of its last whole record."""
        assert self._folder is not None
        self._folder.mkdir(parents=True, exist_ok=True)
        opened = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        os.ftruncate(opened, self._whole)
        if not self._whole:
            os.write(opened, self._head)
        return opened

    def _read(self, path: Path) -> int:
        """Take in a file's records; returns where the last whole one ends, 0 for a file of another key."""
        try:
            data = path.read_bytes()
        except OSError:
            return 0
        position = len(self._head)
        if data[:position] != self._head:
            return 0
        size = self._record.size
        while len(data) >= position + size + _CHECK.size:
            record = data[position : position + size]
            if _CHECK.unpack_from(data, position + size)[0] != self._check(record):
                break
            numbers = self._record.unpack(record)
            self._found.setdefault(numbers[: self._coordinates], numbers[self._coordinates :])
            position += size + _CHECK.size
        return position
