"""Store finished steps of a long computation on disk, so that the same call resumes after a kill."""

from __future__ import annotations

import argparse
import dataclasses
import enum
import functools
import hashlib
import inspect
import json
import os
import struct
import types
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
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
from sharpscope.objective.micro_batches import as_batches, walk
from sharpscope.random_streams import stream
from sharpscope.version import __version__
from sharpscope.weights.restore import preserved

# Examples that the probe evaluates.
EXAMPLES = 32


def key_of(objective: Objective, **settings: Any) -> str:
    """Hash of a measurement: model, loss, data, ``settings``, precision, device and versions.

    Model and loss are identified by their plain attributes, their code with the constants that it reads (``code_of``;
    not that of installed packages), and what they compute on a few examples (``probe``). Call this before the
    micro-batch is chosen.

    Cost: one walk over the data without the model, and the probe.
    """
    problem = objective.problem
    return fingerprint(
        state_of(problem.model),
        [name for name, p in problem.model.named_parameters() if p.requires_grad],
        state_of(problem.loss),
        problem.data,
        [problem.params, problem.mode, float(problem.weight_decay)],
        [objective.curvature.name, objective.dtype, objective.device, objective.micro_batch],
        settings,
        [__version__, torch.__version__, torch.get_num_threads()],
        probe(objective),
    )


def probe(objective: Objective) -> list[Tensor]:
    """Loss, weight, gradient and Hessian product with a fixed vector on the first examples, to identify the code.

    Only loss and gradient, or only the loss, if the model cannot be differentiated further; empty if the loss fails
    (the first analysis reports why). Bit-identical for the same code. ``objective`` is not changed.

    Cost: 1 gradient and 1 product of 32 examples (or of the loader's first batch, if batches are kept), not counted.
    """
    # A separate objective on the same model, so that counters, micro-batch and memory limit do not change.
    own = Objective(
        objective.terms.problem_with(objective.problem.data),
        dtype=objective.dtype,
        device=objective.device,
        micro_batch=objective.micro_batch,
        curvature=objective.curvature,
    )
    vector = torch.randn(1, own.num_params, generator=stream(0, "probe")).to(own.device, own.dtype)

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
    """Use deterministic kernels if torch has them: atomic additions on a GPU would change the probe's last bits."""
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_deterministic_debug_mode(before)


def state_of(thing: Any) -> list[Any]:
    """Parameters, buffers and plain attributes of a model or loss."""
    if isinstance(thing, functools.partial):
        return [state_of(thing.func), _plain_state({**dict(enumerate(thing.args)), **thing.keywords})]
    if inspect.ismethod(thing):
        return [thing.__name__, state_of(thing.__self__)]
    if not isinstance(thing, nn.Module):
        attributes = _plain_state(getattr(thing, "__dict__", {}))
        code = code_of(thing if isinstance(thing, types.FunctionType) else type(thing))
        return [type(thing).__qualname__, attributes, code]
    internal = vars(nn.Module())
    modules = {
        name: [type(module).__qualname__, {k: v for k, v in vars(module).items() if k not in internal and _is_plain(v)}]
        for name, module in thing.named_modules()
    }
    kinds = {type(module).__qualname__: code_of(type(module)) for module in thing.modules()}
    return [dict(thing.named_parameters()), dict(thing.named_buffers()), modules, kinds]


def code_of(thing: Any) -> dict[str, Any]:
    """The code of a function or class, by name, of all it calls by name, and the constants that it reads.

    Bytecode, constants, and the plain globals, attributes of modules and variables of an enclosing function. Code of
    installed packages is left out.
    """
    found: dict[str, Any] = {}
    _collect_code(thing, found)
    return found


def _collect_code(thing: Any, found: dict[str, Any]) -> None:
    if isinstance(thing, type):
        for kind in thing.__mro__:
            for function in vars(kind).values():
                _collect_code(getattr(function, "__func__", getattr(function, "fget", function)), found)
        return
    thing = inspect.unwrap(thing) if callable(thing) else thing
    if not isinstance(thing, types.FunctionType) or "site-packages" in thing.__code__.co_filename:
        return
    name = f"{thing.__module__}.{thing.__qualname__}"
    if name in found or thing.__code__.co_filename.startswith(_STANDARD_LIBRARY):
        return
    read = _names_read(thing.__code__)
    used = {n: thing.__globals__[n] for n in read & thing.__globals__.keys()}
    for module in [value for value in used.values() if isinstance(value, types.ModuleType)]:
        if "site-packages" not in (getattr(module, "__file__", None) or "site-packages"):
            used.update({f"{module.__name__}.{n}": vars(module)[n] for n in read & vars(module).keys()})
    for variable, cell in zip(thing.__code__.co_freevars, thing.__closure__ or (), strict=True):
        with suppress(ValueError):  # not assigned yet
            used[f"<{variable}>"] = cell.cell_contents
    functions = {n: value for n, value in used.items() if isinstance(value, types.FunctionType | type)}
    plain = {n: value for n, value in used.items() if n not in functions and _is_plain(value)}
    defaults = [value for value in (*(thing.__defaults__ or ()), thing.__kwdefaults__) if _is_plain(value)]
    found[name] = [_bytes_of(thing.__code__), plain, defaults]
    for value in functions.values():
        _collect_code(value, found)


_STANDARD_LIBRARY = os.path.dirname(os.__file__)


def _names_read(code: types.CodeType) -> set[str]:
    return set(code.co_names).union(*(_names_read(c) for c in code.co_consts if isinstance(c, types.CodeType)))


def _bytes_of(code: types.CodeType) -> list[Any]:
    """Bytecode and constants, the same in every process."""
    constants = [
        _bytes_of(c) if isinstance(c, types.CodeType) else sorted(map(repr, c)) if isinstance(c, frozenset) else repr(c)
        for c in code.co_consts
    ]
    return [code.co_code, list(code.co_names), constants]


def _plain_state(values: Mapping[Any, Any]) -> dict[Any, Any]:
    """The plain entries of ``values``, and the state of the modules in it."""
    modules = {name: state_of(value) for name, value in values.items() if isinstance(value, nn.Module)}
    return {**{name: value for name, value in values.items() if _is_plain(value)}, **modules}


def _is_plain(value: Any) -> bool:
    """Whether ``value`` is a scalar, text, tensor, array or function, or a collection or record of them."""
    if isinstance(value, Mapping):
        return all(_is_plain(entry) for item in value.items() for entry in item)
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_is_plain, value))
    if _is_record(value):
        return _is_plain(vars(value))
    return isinstance(value, SCALARS + FUNCTIONS + (np.generic, enum.Enum)) or has_bytes(value)


def _is_record(value: Any) -> bool:
    """Whether ``value`` holds named values and nothing else, as the configuration of a model does."""
    if isinstance(value, type) or hasattr(value, "__getitem__") or not hasattr(value, "__dict__"):
        return False
    return dataclasses.is_dataclass(value) or isinstance(value, types.SimpleNamespace | argparse.Namespace)


# blake2b hashes about 1 GB a second on one core, several times what SHA-256 does without hardware support.
DIGEST_BYTES = 16

SCALARS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, os.PathLike)
FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, type)


def fingerprint(*values: Any) -> str:
    """Hash (32 hexadecimal digits) of the exact ``values``, the same in every process.

    Tensors and arrays are hashed by dtype, shape and bytes, independent of device and strides; scalars, text, dtypes,
    devices and paths by type and value; functions by name; mappings and sets independent of their order. Data (a
    Dataset, a DataLoader, an iterable) are hashed batch by batch; all random states are restored.

    Cost: one walk over the data, and about 1 s per gigabyte.

    Raises: ArgumentError for a value that cannot be hashed; DataError for data that can be iterated over only once.
    """
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for value in values:
        _add(digest, value)
    return digest.hexdigest()


def _add(digest: hashlib.blake2b, value: Any) -> None:
    # Each value is preceded by its type and size, so that different values never give the same bytes.
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, FUNCTIONS):  # by name: what they compute is seen by the probe
        value = f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, enum.Enum):
        value = str(value)
    if _is_record(value):
        value = {"type": type(value), **vars(value)}
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
            for batch in walk(as_batches(value)):
                _add(digest, batch)
        _tag(digest, "end of data")
    else:
        raise ArgumentError(
            f"A fingerprint needs tensors, arrays, numbers, text or batches of them, got a {type(value).__name__}. "
            "Pass the values that define it instead."
        )


def _tag(digest: hashlib.blake2b, *words: object) -> None:
    digest.update(f"<{' '.join(map(str, words))}>".encode())


def has_bytes(value: Any) -> bool:
    """Whether ``value`` is a dense tensor, or an array of numbers or text."""
    if isinstance(value, Tensor):
        return value.layout == torch.strided and not value.is_quantized
    return isinstance(value, np.ndarray) and not value.dtype.hasobject


Entry = dict[str, Any]

# Bytes to which torch aligns its memory; the last bits of a product may depend on it.
ALIGNMENT = 64


class Journal:
    """Results of the finished steps of one computation, in order, each in a file in the folder ``path``.

    When the computation runs again, finished steps are read back, bit for bit; a kill loses only the current step. The
    checksum of an entry covers its values, the ``key``, the request and the checksum of the entry before. Files with
    another checksum (damaged, of another key or in another order) are computed again and replaced.

    Args:
        path: folder, created with the first entry; None stores nothing and computes every step.
        key: identifies the computation, from ``key_of``.

    Attributes:
        replayed: number of entries read from disk so far.

    Raises: ArgumentError if ``path`` has no key; OutputError if ``path`` is a file.
    """

    def __init__(self, path: str | os.PathLike[str] | None, key: str = "") -> None:
        if path is not None and not key:
            raise ArgumentError("A journal on disk must have a key, which identifies its computation. Pass one.")
        self._folder = None if path is None else Path(path)
        if self._folder is not None and self._folder.exists() and not self._folder.is_dir():
            raise OutputError(f"The journal must be a folder, but {self._folder} is a file. Choose another path.")
        self._count = 0
        self._previous = key
        self.replayed = 0

    def once(self, label: str, compute: Callable[[], Mapping[str, Any]], *, given: Sequence[Any] = ()) -> Entry:
        """Return the stored result of this step, or that of ``compute()``, which is then stored.

        Args:
            label: name of the step.
            compute: returns tensors and JSON values by name.
            given: further inputs of the step besides the key, the label and the earlier entries; hashed exactly.

        Raises: ArgumentError for a value that cannot be stored; OutputError if the entry cannot be written.
        """
        if self._folder is None:
            return _storable(compute())
        request = fingerprint(self._previous, label, list(given))
        path = self._folder / f"{self._count:06d}.entry"
        # The first entry that had to be computed invalidates all later ones.
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
    """Delete journals and point logs in the folder ``path``, and the folder if it is then empty."""
    folder = Path(path)
    for pattern in ("[0-9]*.entry", ".[0-9]*.entry.*.tmp", "*.points", "[0-9]*.npz"):  # .npz: version 0.1.0
        for state in folder.glob(pattern):
            state.unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _write(path: Path, request: str, values: Entry) -> str:
    """Store an entry atomically and return its checksum."""
    checksum = fingerprint(request, values)
    try:
        with atomic(path) as temporary:
            torch.save({"values": values, "checksum": checksum}, temporary)
    except RuntimeError as error:  # of torch.save if the disk is full
        raise OutputError(f"Cannot write {path}: the disk is full. Choose another path.") from error
    return checksum


def _read(path: Path, request: str) -> tuple[Entry, str] | None:
    """Values and checksum of the entry at ``path`` if it is intact and matches ``request``, else None."""
    try:
        entry = torch.load(path, weights_only=True)
        values, checksum = entry["values"], entry["checksum"]
        right = checksum == fingerprint(request, values)
    except Exception:  # the parser can raise any error for a missing, damaged or foreign file
        return None
    return (_storable(values), checksum) if right else None


def _storable(values: Mapping[str, Any]) -> Entry:
    """``values`` as they are read back from an entry: tensors that own their memory, everything else through JSON."""
    entry: Entry = {}
    for name, value in values.items():
        if isinstance(value, Tensor):
            entry[name] = _owned(value.detach())
        else:
            try:
                entry[name] = json.loads(json.dumps(value))
            except (TypeError, ValueError) as error:
                kind = type(value).__name__
                raise ArgumentError(f"A journal stores tensors and JSON values, got a {kind} as {name!r}.") from error
    return entry


def _owned(tensor: Tensor) -> Tensor:
    """``tensor``, or a copy if it is unaligned or a view of a larger tensor; dense tensors keep their strides.

    The layout is then the same as after reading it from disk, so later products have the same last bits.
    """
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole and tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


# Counters of the cost that are stored with a step.
COUNTERS = ("passes", "hvps", "example_gradients", "seconds")


def journaled_hvp(objective: Objective, journal: Journal, progress: Progress) -> Callable[[Tensor], Tensor]:
    """Return ``objective.products`` with finished passes read from ``journal``, with their loss, gradient and cost.

    The micro-batch is chosen first and stored (``journaled_micro_batch``).
    """
    journaled_micro_batch(objective, journal)

    def products(rows: Tensor) -> Tensor:
        before = journal.replayed
        entry = once_with_cost(objective, journal, "pass", lambda: _pass(objective, rows, progress), given=[rows])
        if journal.replayed > before:
            _restore(objective, entry)
            progress(f"pass {objective.passes} is on disk", 0, objective.num_examples)
        result: Tensor = entry["products"]
        return result

    return products


def journaled_micro_batch(objective: Objective, journal: Journal) -> None:
    """Choose the micro-batch, or take the stored choice: it is timed, and the last bits of all sums depend on it."""
    chosen = once_with_cost(objective, journal, "micro-batch", lambda: _choose_micro_batch(objective))
    objective.micro_batch = chosen["size"]


def once_with_cost(
    objective: Objective,
    journal: Journal,
    label: str,
    compute: Callable[[], Mapping[str, Any]],
    *,
    given: Sequence[Any] = (),
) -> Entry:
    """``journal.once`` that also stores the cost; a stored step restores the counters to their value after it."""

    def compute_with_cost() -> Entry:
        values = compute()
        return {**values, "cost": {name: getattr(objective.cost_counter, name) for name in COUNTERS}}

    before = journal.replayed
    entry = journal.once(label, compute_with_cost, given=given)
    if journal.replayed > before:
        objective.cost_counter.restore(**entry["cost"])
    return entry


def _choose_micro_batch(objective: Objective) -> Entry:
    objective.choose_micro_batch()
    return {"size": objective.micro_batch}


def _pass(objective: Objective, rows: Tensor, progress: Progress) -> Entry:
    """One pass over the data: the products, and the state that it leaves in ``objective``."""
    products = objective.products(rows, progress)
    return {"products": products, **vars(objective.last_pass), "micro_batch": objective.micro_batch}


def _restore(objective: Objective, entry: Entry) -> None:
    """Set the state of ``objective`` to that after the stored pass."""
    objective.last_pass = LossAndGradient(entry["loss"], entry["gradient"], entry["spread"], entry["examples"])
    objective.num_examples, objective.terms.checked = entry["examples"], True
    objective.micro_batch = entry["micro_batch"]


# Version of the file layout; files of other versions are ignored.
FORMAT = 1

_CHECK = struct.Struct("<I")

Place = tuple[float, ...]


class PointLog:
    """Append-only log of values by the coordinates of a point, in files in ``folder``.

    Each process appends to its own file, ``name``, and reads all files with the same ``key``. A file with another key
    is ignored, and overwritten if it has the same name. An incomplete record, left by a kill, is dropped.

    Args:
        folder: created with the first point; None keeps the points in memory only.
        key: identifies everything but the coordinates that the values depend on, from ``key_of``.
        coordinates: numbers per point.
        values: values per point.
        name: name of this process's file, without suffix.

    Raises: OutputError if the file cannot be written.
    """

    def __init__(
        self, folder: str | os.PathLike[str] | None, key: str, coordinates: int, values: int, name: str = "points"
    ) -> None:
        self._folder = None if folder is None else Path(folder)
        self._name, self._coordinates = name, coordinates
        layout = {"format": FORMAT, "key": key, "coordinates": coordinates, "values": values}
        self._header = json.dumps(layout).encode() + b"\n"
        self._record = struct.Struct(f"<{coordinates + values}d")
        self._points: dict[Place, tuple[float, ...]] = {}
        self._valid_bytes = 0
        self._descriptor: int | None = None
        self.read()
        self.replayed = len(self._points)

    def __contains__(self, point: Place) -> bool:
        return point in self._points

    def __getitem__(self, point: Place) -> tuple[float, ...]:
        return self._points[point]

    def read(self) -> None:
        """Read the points that other processes have added."""
        if self._folder is None or not self._folder.is_dir():
            return
        for path in sorted(self._folder.glob("*.points")):
            valid_bytes = self._read(path)
            if path == self._path:
                self._valid_bytes = valid_bytes

    def add(self, point: Place, values: Sequence[float]) -> None:
        """Store the values of a point; they survive a kill once this returns."""
        self._points[point] = tuple(map(float, values))
        if self._folder is None:
            return
        record = self._record.pack(*point, *self._points[point])
        try:
            if self._descriptor is None:
                self._descriptor = self._append()
            os.write(self._descriptor, record + _CHECK.pack(self._check(record)))
        except OSError as error:
            raise OutputError(f"Cannot write {self._path}: {error.strerror}. Choose another path.") from error

    def clear(self) -> None:
        """Discard all points; the next one added overwrites this process's file."""
        self._points, self._valid_bytes = {}, 0

    def close(self) -> None:
        """Close the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    @property
    def _path(self) -> Path:
        assert self._folder is not None
        return self._folder / f"{self._name}.points"

    def _check(self, record: bytes) -> int:
        """CRC-32 of the header and the record, so that a record written with another key does not match."""
        return zlib.crc32(record, zlib.crc32(self._header))

    def _append(self) -> int:
        """Open this process's file, truncated after its last complete record."""
        assert self._folder is not None
        self._folder.mkdir(parents=True, exist_ok=True)
        opened = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        os.ftruncate(opened, self._valid_bytes)
        if not self._valid_bytes:
            os.write(opened, self._header)
        return opened

    def _read(self, path: Path) -> int:
        """Read the records of a file; return the end of the last complete one, or 0 for a file with another key."""
        try:
            data = path.read_bytes()
        except OSError:
            return 0
        position = len(self._header)
        if data[:position] != self._header:
            return 0
        size = self._record.size
        while len(data) >= position + size + _CHECK.size:
            record = data[position : position + size]
            if _CHECK.unpack_from(data, position + size)[0] != self._check(record):
                break
            numbers = self._record.unpack(record)
            self._points.setdefault(numbers[: self._coordinates], numbers[self._coordinates :])
            position += size + _CHECK.size
        return position
