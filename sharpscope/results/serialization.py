"""Write results as JSON and .npz files, and read them back, checking each value against its annotation."""

from __future__ import annotations

import functools
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints, is_typeddict

import numpy as np
from numpy.typing import NDArray

from sharpscope.atomic_io import atomic
from sharpscope.errors import DataError, OutputError, first_line

# The layout of the saved JSON; a reader refuses a later one.
FORMAT = 1

# Raised by np.load for a damaged file, or one that another program wrote.
UNREADABLE = (
    *(KeyError, ValueError, TypeError, AttributeError, OSError, EOFError, RuntimeError, NotImplementedError),
    *(zipfile.BadZipFile, zlib.error),
)

# Notes on the annotations of fields. This one: null in the JSON means NaN; elsewhere null is an error.
NULL_IS_NAN = "null is NaN"
# The field is an array that is stored in the .npz file, not in the JSON.
IN_NPZ = "in the .npz"

Array = NDArray[np.float64]
MaybeNaN = Annotated[float, NULL_IS_NAN]
MaybeNaNs = Annotated[Array, NULL_IS_NAN]


@dataclass(frozen=True)
class Shape:
    """The dimensions of an array or tuple, named "n k": in one result, dimensions of one name are equally long."""

    names: str


@dataclass(frozen=True)
class Schema:
    """A mapping whose entries must have the types of this TypedDict; it stays a plain mapping."""

    kind: Any


class FieldError(Exception):
    """A value that does not match its annotation: "needs numbers in 'lower', got text"."""


def jsonable(value: Any) -> Any:
    """Convert to JSON types: non-finite numbers become null, objects of other types their ``str``."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(entry) for entry in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def as_json(value: Any) -> Any:
    """``jsonable`` for fields of results: arrays become lists, dataclasses objects, unless they have a ``record()``."""
    if isinstance(value, np.ndarray):
        return jsonable(value.tolist())
    if hasattr(value, "record"):
        return value.record()
    if is_dataclass(value):
        return {field.name: as_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): as_json(entry) for key, entry in value.items()}
    return [as_json(entry) for entry in value] if isinstance(value, list | tuple) else jsonable(value)


@functools.cache
def annotations_of(kind: Any) -> dict[str, Any]:
    """The annotations of a dataclass or TypedDict by field, those of its bases included."""
    return get_type_hints(kind, include_extras=True)


def metadata_of(hint: Any) -> tuple[Any, ...]:
    """Return the metadata of ``Annotated``, also inside ``... | None``."""
    if get_origin(hint) is Annotated:
        inner, *notes = get_args(hint)
        return (*notes, *metadata_of(inner))
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else ()
    return tuple(note for option in options for note in metadata_of(option))


def parse_fields(kind: type, names: Iterable[str], values: Mapping[str, Any]) -> dict[str, Any]:
    """Parse the fields ``names`` of the dataclass ``kind`` as annotated; absent ones keep their default.

    Raises: FieldError for a value of another type, KeyError for a missing key.
    """
    hints, found = annotations_of(kind), {}
    for name in names:
        if name in values:
            found[name] = parse_value(hints[name], values[name], name)
        elif _required(kind, name):
            raise KeyError(name)
    return found


def parse_value(hint: Any, value: Any, where: str, nan: bool = False) -> Any:
    """Convert a JSON value to the annotated type.

    Args:
        hint: the annotation.
        value: from a JSON file.
        where: its key, for the message.
        nan: whether null is NaN.

    Raises: FieldError.
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        like = next((note.kind for note in args[1:] if isinstance(note, Schema)), None)
        return parse_value(like or args[0], value, where, nan or NULL_IS_NAN in args[1:])
    if origin in (Union, UnionType):
        (inner,) = (arg for arg in args if arg is not NoneType)
        return None if value is None else parse_value(inner, value, where, nan)
    if hint is Any:
        return jsonable(value)
    if origin is np.ndarray:
        return _parse_array(get_args(args[1])[0], value, where, nan)
    if origin is tuple:
        return _parse_tuple(args, value, where)
    if isinstance(hint, type) and hasattr(hint, "from_dict"):
        try:
            return hint.from_dict(value)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
    if origin is Mapping or is_typeddict(hint) or is_dataclass(hint):
        return _parse_object(hint, args, value, where)
    return _parse_scalar(hint, value, where, nan)


_TYPE_NAMES = {float: "a number", int: "a whole number", bool: "a boolean", str: "text"}


def _parse_scalar(kind: type, value: Any, where: str, nan: bool) -> Any:
    if kind not in _TYPE_NAMES:
        raise TypeError(f"Fields of results cannot be annotated with {kind}, got {where!r}.")
    if kind is not float:
        if type(value) is not kind:
            raise _wrong_type(_TYPE_NAMES[kind], where, value)
        return value
    if nan and value is None:
        return float("nan")
    if type(value) not in (int, float):
        raise _wrong_type(_TYPE_NAMES[float], where, value)
    number = _convert(float, value, where)
    return number if nan else _require_finite(number, where)


def _convert(convert: Callable[[Any], Any], value: Any, where: str) -> Any:
    try:
        return convert(value)
    except OverflowError:
        raise FieldError(f"needs numbers in the range of their type in {where!r}, got larger ones") from None


def _require_finite(value: Any, where: str) -> Any:
    if not np.isfinite(value).all():
        raise FieldError(f"needs finite numbers in {where!r}, got infinity or NaN")
    return value


def _parse_array(dtype: type, value: Any, where: str, nan: bool) -> NDArray[Any]:
    """Nested lists as an array. Booleans are no numbers, and numbers no booleans."""
    kind = np.dtype(dtype).kind
    expected, kinds = {"f": ("numbers", (int, float)), "i": ("whole numbers", (int,)), "b": ("booleans", (bool,))}[kind]
    if isinstance(value, np.ndarray):  # from an .npz
        if value.dtype.kind != kind:
            raise FieldError(f"needs {expected} in {where!r}, got {value.dtype.name}")
        return value
    if not isinstance(value, list | tuple):
        raise _wrong_type(f"a list of {expected}", where, value)
    for entry in _flattened(value):
        if type(entry) not in kinds and not (nan and entry is None):
            raise _wrong_type(expected, where, entry)
    try:
        array: NDArray[Any] = _convert(lambda entries: np.array(entries, dtype), value, where)
    except ValueError:
        raise FieldError(f"needs rows of one length in {where!r}, got different lengths") from None
    return array if nan or kind != "f" else _require_finite(array, where)


def _flattened(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for entry in value:
            yield from _flattened(entry)
    else:
        yield value


def _parse_tuple(args: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise _wrong_type("a list", where, value)
    kinds = (args[0],) * len(value) if args[1:] == (...,) else args
    if len(kinds) != len(value):
        raise FieldError(f"needs {len(kinds)} entries in {where!r}, got {len(value)}")
    return tuple(
        parse_value(kind, entry, f"{where}[{i}]") for i, (kind, entry) in enumerate(zip(kinds, value, strict=True))
    )


def _parse_object(hint: Any, args: tuple[Any, ...], value: Any, where: str) -> Any:
    """A mapping, a TypedDict or a dataclass."""
    if not isinstance(value, Mapping):
        raise _wrong_type("an object", where, value)
    if args:
        return {str(key): parse_value(args[1], entry, f"{where}.{key}") for key, entry in value.items()}
    hints, is_typed_dict = annotations_of(hint), is_typeddict(hint)
    wanted_fields = hints if is_typed_dict else {field.name: hints[field.name] for field in fields(hint)}
    missing = sorted(name for name in wanted_fields if name not in value and (is_typed_dict or _required(hint, name)))
    if missing:
        raise FieldError(f"needs the key {missing[0]!r} in {where!r}, got none")
    derived = getattr(hint, "derived", ())
    unknown = [] if is_typed_dict else sorted(set(value) - set(wanted_fields) - set(derived))
    if unknown:
        raise FieldError(f"needs only known keys in {where!r}, got {unknown[0]!r}")
    parsed = {
        name: parse_value(kind, value[name], f"{where}.{name}") for name, kind in wanted_fields.items() if name in value
    }
    return {**jsonable(value), **parsed} if is_typed_dict else hint(**parsed)


def _required(kind: Any, name: str) -> bool:
    field = kind.__dataclass_fields__[name]
    return field.default is MISSING and field.default_factory is MISSING


def _wrong_type(expected: str, where: str, value: Any) -> FieldError:
    kinds = {NoneType: "null", bool: "a boolean", int: "a number", float: "a number", str: "text"}
    got = "an object" if isinstance(value, Mapping) else "a list" if isinstance(value, list | tuple) else None
    return FieldError(f"needs {expected} in {where!r}, got {got or kinds.get(type(value), type(value).__name__)}")


@contextmanager
def translate_errors(owner: str, keys: str) -> Iterator[None]:
    """Translate errors in a dictionary into a DataError that begins with ``owner``, such as "An eigen result"."""
    try:
        yield
    except FieldError as error:
        raise DataError(f"{owner} {error}. Measure it again.") from None
    except KeyError as error:
        raise DataError(f"{owner} must have the keys of {keys}, got none named {error}. Measure it again.") from None
    except RecursionError:
        raise DataError(f"{owner} needs few levels of nesting, got too many. Measure it again.") from None


def require_shapes(result: Any, owner: str) -> None:
    """Raise DataError unless arrays and tuples have the dimensions of their ``Shape``, equal where named alike."""
    kind: Any = type(result)
    sizes: dict[str, tuple[int, str]] = {}
    for name, hint in annotations_of(kind).items():
        shape = next((note.names.split() for note in metadata_of(hint) if isinstance(note, Shape)), None)
        value = None if shape is None else getattr(result, name)
        if shape is None or value is None:
            continue
        got = (len(value),) if isinstance(value, tuple) else np.shape(value)
        if len(got) != len(shape):
            what = "a flat list" if len(shape) == 1 else f"{len(shape)} dimensions"
            raise DataError(f"{owner} needs {what} in {name!r}, got the shape {got}. Measure it again.")
        for size, count in zip(shape, got, strict=True):
            expected, first_name = sizes.setdefault(size, (count, name))
            if count != expected:
                raise DataError(
                    f"{owner} needs as many entries in {name!r} as in {first_name!r}, got {count} and {expected}. "
                    "Measure it again."
                )


def reject_reserved_keys(provenance: Mapping[str, Any], keys: Iterable[str]) -> None:
    """Raise DataError when ``provenance`` uses one of a result's ``keys``: both are keys of one JSON object."""
    taken = sorted({"format", "analysis", *keys} & set(provenance))
    if taken:
        raise DataError(f"Provenance must not use the result's own keys, got {', '.join(taken)}. Rename them.")


def header(analysis: str, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return the first keys of every file: format, analysis, and the provenance as plain values."""
    return {"format": FORMAT, "analysis": analysis, **{str(key): jsonable(value) for key, value in provenance.items()}}


def noun_phrase(analysis: str) -> str:
    """Return the analysis as a noun phrase for messages: "An eigen result"."""
    return f"{'An' if analysis[0] in 'aeiou' else 'A'} {analysis} result"


def without_header(values: Any, analysis: str) -> dict[str, Any]:
    """Return a copy of the dictionary without its format and analysis.

    Raises: DataError when it is not an object, belongs to another analysis, or has a later format.
    """
    got = values.get("analysis") if isinstance(values, Mapping) else None
    if got != analysis:
        what = f"an object with analysis {analysis!r}"
        raise DataError(f"{noun_phrase(analysis)} must be {what}, got {_abbreviated(got)}. Choose another file.")
    if values.get("format", FORMAT) != FORMAT:
        raise DataError(
            f"The result has format {_abbreviated(values['format'])}, and this sharpscope reads {FORMAT}. Update it."
        )
    return {key: value for key, value in values.items() if key not in ("format", "analysis")}


def _abbreviated(value: Any) -> str:
    return repr(value)[:40] if isinstance(value, str | int | float | NoneType) else f"a {type(value).__name__}"


def arrays_path(path: str | os.PathLike[str]) -> Path:
    """Return the path of a JSON file's .npz: ``sgd.npz`` for ``sgd.json``, ``run.1.npz`` for ``run.1``."""
    place = Path(path)
    return place.with_name(f"{place.name.removesuffix('.json')}.npz")


def write_json(
    path: str | os.PathLike[str], values: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]] | None = None
) -> None:
    """Write ``arrays``, if any, to the .npz next to ``path``, and then ``values`` to ``path`` as JSON, each atomically.

    Raises: OutputError when it cannot be written, or ``path`` is named for the arrays.
    """
    if Path(path).suffix == ".npz":
        raise OutputError(
            f"The result is JSON, and its vectors are stored next to it as .npz, got {path}. Name it .json."
        )
    if arrays is not None:
        given: dict[str, Any] = dict(arrays)  # mypy would take the values for savez's own keywords
        with atomic(arrays_path(path)) as temporary, open(temporary, "wb") as file:
            np.savez(file, **given)
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Return the content of a JSON file.

    Raises: DataError when there is none.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except RecursionError:
        raise DataError(f"{path} must be a JSON file written by sharpscope; problem: too many levels.") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} must be a JSON file written by sharpscope; problem: {error}.") from error


def read_arrays(path: Path, names: Iterable[str]) -> dict[str, NDArray[Any]]:
    """Return the arrays of an .npz file.

    Raises: DataError when it cannot be read, or lacks one of ``names``.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except UNREADABLE as error:
        raise DataError(f"{path} must hold arrays written by sharpscope; problem: {first_line(error)}.") from error
    missing = [name for name in names if name not in arrays]
    if missing:
        raise DataError(f"{path} must hold arrays written by sharpscope, got none named {missing[0]!r}.")
    return arrays
