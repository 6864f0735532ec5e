"""A run that is killed and called again: the same bits, and no finished piece computed twice."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from sharpscope import ArgumentError, DataError, OutputError
from sharpscope.fingerprint import fingerprint
from sharpscope.linalg import top_eigenpairs
from sharpscope.resume import ALIGNMENT, Journal, discard

# Runs Lanczos through a journal in a child that is killed three times, then once to its end; all in one process, since
# importing torch takes longer than all of it.
DRIVER = """
import hashlib, json, os, signal, sys, time
import torch
from sharpscope.resume import Journal, discard
from sharpscope.linalg import top_eigenpairs

torch.set_num_threads(1)
folder, moments = sys.argv[1], json.loads(sys.argv[2])
diagonal = torch.linspace(0, 1, 400)[:, None] ** 3


def run(folder, log):
    journal = Journal(folder, "key")
    count = [0]

    def product(block):
        with open(log, "a") as file:
            file.write(f"{journal.replayed + count[0]}\\n")
        time.sleep(0.01)
        count[0] += 1
        return {"product": diagonal * block}

    generator = torch.Generator().manual_seed(3)
    pairs = top_eigenpairs(
        lambda block: journal.once("product", lambda: product(block), given=[block])["product"],
        400, 3, tol=1e-5, dtype=torch.float32, max_basis=20, generator=generator
    )
    everything = (pairs.eigenvalues, pairs.eigenvectors, pairs.lower, generator.get_state())
    bits = hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in everything)).hexdigest()
    return bits, pairs.num_products, journal


def stored():
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return len([name for name in names if name.endswith(".entry") and name[0] != "."])


plain, products, _ = run(None, folder + ".plain")
kept = []
for i, moment in enumerate(moments):
    child = os.fork()
    if child == 0:
        run(folder, f"{folder}.log{i}")
        os._exit(0)
    time.sleep(moment)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    kept.append(stored())
bits, _, journal = run(folder, f"{folder}.log{len(moments)}")
replayed = journal.replayed
again, _, journal = run(folder, folder + ".again")
discard(folder)
print(json.dumps({"plain": plain, "bits": bits, "again": again, "products": products, "kept": kept,
                  "replayed": [replayed, journal.replayed], "left": os.path.exists(folder)}))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_killed_three_times_a_run_gives_the_same_bits_and_repeats_no_product(tmp_path: Path) -> None:
    """After SIGKILL at three random moments the same call takes every stored product from disk, and ends the same."""
    moments = [random.uniform(0.03, 0.25) for _ in range(3)]
    folder = tmp_path / "run.journal"
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(folder), json.dumps(moments)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout)
    assert got["plain"] == got["bits"] == got["again"], moments
    kept = [0, *got["kept"]]
    assert kept == sorted(kept)
    assert got["replayed"] == [kept[-1], got["products"]]
    assert not got["left"]
    assert not Path(f"{folder}.again").exists()
    for i, start in enumerate(kept):
        log = Path(f"{folder}.log{i}")
        computed = [int(line) for line in log.read_text().split()] if log.exists() else []
        assert computed == list(range(start, start + len(computed))), "a product that was stored was computed again"


def piece(value: float, calls: list[float]) -> Callable[[], dict[str, Any]]:
    """A computation that leaves a trace of being done."""

    def compute() -> dict[str, Any]:
        calls.append(value)
        return {"tensor": torch.full((3, 2), value, dtype=torch.float64), "number": value, "text": "a"}

    return compute


def three(folder: Path | None, key: str = "key", first: float = 0.0) -> tuple[list[float], list[float], Journal]:
    """Three pieces through a journal: their values, and those that were computed."""
    journal = Journal(folder, key)
    calls: list[float] = []
    entries = [journal.once(f"piece {i}", piece(first + i, calls)) for i in range(3)]
    values = [entry["number"] for entry in entries]
    assert all(bool((entry["tensor"] == entry["number"]).all()) for entry in entries)
    return values, calls, journal


def test_what_is_stored_is_not_computed_again(tmp_path: Path) -> None:
    """A second run computes nothing; after discard() a third computes all, and the folder is gone in between."""
    folder = tmp_path / "j"
    assert three(folder)[:2] == ([0, 1, 2], [0, 1, 2])
    values, calls, journal = three(folder)
    assert (values, calls, journal.replayed) == ([0, 1, 2], [], 3)
    discard(folder)
    assert not folder.exists()
    assert three(folder)[1] == [0, 1, 2]


def test_another_key_reuses_nothing(tmp_path: Path) -> None:
    """State of another key is neither used nor mixed in, and goes when the new state comes."""
    three(tmp_path / "j")
    assert three(tmp_path / "j", "other", 10.0)[:2] == ([10, 11, 12], [10, 11, 12])
    assert three(tmp_path / "j", "other", 20.0)[:2] == ([10, 11, 12], [])
    assert three(tmp_path / "j")[1] == [0, 1, 2]


def test_leftovers_of_another_key_after_a_kill_are_not_picked_up(tmp_path: Path) -> None:
    """Where old entries of the right key follow new ones, the chain of checksums tells them apart."""
    folder, old = tmp_path / "j", tmp_path / "old"
    three(folder, first=5.0)
    shutil.copytree(folder, old)
    discard(folder)
    three(folder, first=7.0)
    shutil.copy(old / "000002.entry", folder / "000002.entry")
    assert three(folder)[:2] == ([7, 8, 2], [2])


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: b"",
        lambda data: b"something else",
        None,
    ],
    ids=["half", "last byte", "empty", "foreign", "gone"],
)
def test_a_damaged_entry_is_computed_again_with_all_after_it(
    tmp_path: Path, index: int, damage: Callable[[bytes], bytes] | None
) -> None:
    """Whatever happened to a file, the entries before it are used, and the values are right."""
    three(tmp_path)
    place = tmp_path / f"{index:06d}.entry"
    if damage is None:
        place.unlink()
    else:
        place.write_bytes(damage(place.read_bytes()))
    (tmp_path / ".000001.entry.abc.tmp").write_bytes(b"a write that was killed")
    (tmp_path / "mine.txt").write_text("not the journal's")
    values, calls, _ = three(tmp_path)
    assert values == [0, 1, 2]
    assert calls == [0, 1, 2][index:]
    discard(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_each_bit_of_an_entry_counts(tmp_path: Path) -> None:
    """With any one byte of a stored file flipped, the values that come back are still the right ones."""
    Journal(tmp_path, "key").once("piece", piece(1.0, []))
    place = tmp_path / "000000.entry"
    whole = place.read_bytes()
    source = random.Random(0)
    for position in source.sample(range(len(whole)), 150):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << source.randrange(8)
        place.write_bytes(bytes(flipped))
        entry = Journal(tmp_path, "key").once("piece", piece(1.0, []))
        assert entry["number"] == 1.0
        assert entry["text"] == "a"
        assert torch.equal(entry["tensor"], torch.ones(3, 2, dtype=torch.float64))


def test_a_well_formed_file_with_other_contents_is_not_believed(tmp_path: Path) -> None:
    """An archive in order whose tensor is not the one that was stored fails the entry's own checksum."""
    Journal(tmp_path, "key").once("piece", piece(1.0, []))
    place = tmp_path / "000000.entry"
    entry = torch.load(place, weights_only=True)
    entry["values"]["tensor"][0, 0] += 1
    torch.save(entry, place)
    journal = Journal(tmp_path, "key")
    assert torch.equal(journal.once("piece", piece(1.0, []))["tensor"], torch.ones(3, 2, dtype=torch.float64))
    assert journal.replayed == 0


def through(journal: Journal, matmat: Callable[[Tensor], Tensor], label: str = "product") -> Callable[[Tensor], Tensor]:
    """``matmat`` whose j-th call comes from the journal, if the block is that of the stored call."""
    return lambda block: journal.once(label, lambda: {"product": matmat(block)}, given=[block])["product"]


def test_a_product_is_replayed_only_for_the_very_block(tmp_path: Path) -> None:
    """A block that differs by one bit, by its shape or by its label is computed, and so is all that follows."""
    block = torch.randn(50, 2)
    changed = block.clone()
    changed[0, 0] = torch.nextafter(changed[0, 0], torch.tensor(2.0))
    calls: list[int] = []

    def double(given: Tensor) -> Tensor:
        calls.append(1)
        return 2 * given

    for blocks, expected in (
        ((block, block), 2),
        ((block, block), 0),
        ((block, changed), 1),
        ((changed, changed), 2),
        ((changed, changed[:, :1]), 1),
    ):
        calls.clear()
        product = through(Journal(tmp_path, "key"), double)
        assert all(torch.equal(product(given), 2 * given) for given in blocks)
        assert len(calls) == expected
    calls.clear()
    through(Journal(tmp_path, "key"), double, "another operator")(changed)
    assert calls == [1]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(5, 3).T,
        torch.randn(5, 3)[:, 1:],
        torch.tensor(1.5, dtype=torch.float64),
        torch.empty(0, 4),
        torch.randn(4).bfloat16(),
        torch.randn(4, dtype=torch.complex64),
        torch.tensor([True, False]),
        torch.tensor([float("nan"), float("-inf"), -0.0]),
        torch.randint(0, 9, (2, 3, 4)),
        torch.randn(9)[1:],
        torch.randn(4, 1).expand(4, 3),
    ],
    ids=[
        *(
            "columns",
            "strided",
            "scalar",
            "empty",
            "bfloat16",
            "complex",
            "bool",
            "nan",
            "int64",
            "unaligned",
            "expanded",
        ),
    ],
)
def test_tensors_come_back_bit_for_bit_and_laid_out_alike(tmp_path: Path, tensor: Tensor) -> None:
    """dtype, shape, bits, strides and alignment of what is replayed are those of what was computed."""
    computed = Journal(tmp_path, "key").once("t", lambda: {"t": tensor})["t"]
    journal = Journal(tmp_path, "key")
    replayed = journal.once("t", lambda: {"t": torch.zeros(1)})["t"]
    assert journal.replayed == 1
    assert (replayed.dtype, replayed.shape, replayed.stride()) == (tensor.dtype, tensor.shape, computed.stride())
    assert replayed.data_ptr() % ALIGNMENT == computed.data_ptr() % ALIGNMENT == 0
    assert fingerprint(replayed) == fingerprint(tensor) == fingerprint(computed)


def test_plain_values_come_back_exactly(tmp_path: Path) -> None:
    """Floats keep all their bits, infinities and NaN included, in the order they were given."""
    values = {"b": 0.1, "a": [1, 2.5e-308, None, "é"], "c": float("inf"), "d": True}
    for _ in range(2):
        assert list(Journal(tmp_path, "key").once("v", lambda: values).items()) == list(values.items())


def test_no_journal_stores_nothing_and_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With path None every piece is computed, nothing is written, and a solver gives the same bits."""
    monkeypatch.chdir(tmp_path)
    values, calls, journal = three(None)
    assert (values, calls, journal.replayed) == ([0, 1, 2], [0, 1, 2], 0)
    diagonal = torch.linspace(0, 1, 60, dtype=torch.float64)[:, None]
    plain = top_eigenpairs(lambda block: diagonal * block, 60, 2)
    journaled = top_eigenpairs(through(journal, lambda block: diagonal * block), 60, 2)
    assert torch.equal(plain.eigenvectors, journaled.eigenvectors)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_a_folder_is_refused(tmp_path: Path) -> None:
    """A file in the journal's place is not overwritten, and a value that cannot be stored is named."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="must be a folder"):
        Journal(tmp_path / "file", "key")
    with pytest.raises(ArgumentError, match="must have a key"):
        Journal(tmp_path / "j")
    with pytest.raises(ArgumentError, match="'thing'"):
        Journal(tmp_path / "j", "key").once("x", lambda: {"thing": object()})


def test_a_full_disk_is_named_and_what_was_stored_stays(tmp_path: Path) -> None:
    """An entry that cannot be written whole is an OutputError, leaves no file, and the entries before it are used."""
    resource = pytest.importorskip("resource")
    three(tmp_path)
    journal = Journal(tmp_path, "key")
    for i in range(3):
        journal.once(f"piece {i}", piece(i, []))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OutputError, match=r"000003\.entry"):
            journal.once("large", lambda: {"x": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{i:06d}.entry" for i in range(3)]
    assert three(tmp_path)[1] == []


DISTINCT: list[tuple[Any, ...]] = [
    (torch.zeros(2),),
    (torch.zeros(2, dtype=torch.float64),),
    (torch.zeros(1, 2),),
    (-torch.zeros(2),),
    (torch.zeros(2, dtype=torch.int32),),
    (np.zeros(2, np.float32),),
    (1,),
    (1.0,),
    (True,),
    ("1",),
    (b"1",),
    (None,),
    (),
    ("",),
    (Path("1"),),
    (torch.float32,),
    ("torch.float32",),
    (1, 2),
    ([1, 2],),
    ([1], 2),
    ({"a": 1, "b": 2},),
    ({"a": 2, "b": 1},),
    ([["a", 1], ["b", 2]],),
    ({1, 2},),
    ("ab", "c"),
    ("a", "bc"),
    ([torch.zeros(2)], [torch.zeros(1)]),
    ([torch.zeros(2), torch.zeros(1)],),
]


def test_different_values_have_different_fingerprints() -> None:
    """Type, dtype, shape, sign of zero, nesting and the place where one part ends all count."""
    assert len({fingerprint(*parts) for parts in DISTINCT}) == len(DISTINCT)


def test_equal_values_have_equal_fingerprints_wherever_they_are() -> None:
    """Layout, order of keys, gradients and the process do not count."""
    tensor = torch.randn(4, 3)
    assert fingerprint(tensor) == fingerprint(tensor.T.contiguous().T) == fingerprint(torch.nn.Parameter(tensor))
    assert fingerprint({"a": 1, "b": tensor}) == fingerprint({"b": tensor, "a": 1})
    assert fingerprint({"x", "y", "z"}) == fingerprint({"z", "y", "x"})
    assert fingerprint(5) == fingerprint(np.int64(5)) != fingerprint("int 5")
    assert fingerprint([3, "a", 0.5, None]) == "817d62630251dcf33a44391d26748d04"


class Squares(Dataset[tuple[Tensor, int]]):
    """A map-style data set whose examples are made when asked for."""

    def __init__(self, last: int = 9) -> None:
        self.last = last

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((2,), float(index if index < 9 else self.last)), index % 3


def test_data_count_by_their_batches_and_no_random_state_moves() -> None:
    """One changed example in the last batch changes the hash, as does another batch size; walking leaves no trace."""
    inputs, labels = torch.arange(20.0).reshape(10, 2), torch.arange(10)
    changed = inputs.clone()
    changed[9, 1] += 1
    before = torch.get_rng_state()
    loaders = [
        DataLoader(TensorDataset(inputs, labels), batch_size=4),
        DataLoader(TensorDataset(changed, labels), batch_size=4),
        DataLoader(TensorDataset(inputs, labels), batch_size=5),
        Squares(),
        Squares(8),
    ]
    hashes = [fingerprint(data) for data in loaders]
    assert len(set(hashes)) == len(loaders)
    assert hashes == [fingerprint(data) for data in loaders]
    assert torch.equal(before, torch.get_rng_state())


def test_what_has_no_fingerprint_is_refused() -> None:
    """A generator, a shuffled loader and an object without bytes are named."""
    with pytest.raises(DataError, match="walked once"):
        fingerprint(iter([torch.zeros(1)]))
    with pytest.raises(DataError, match="shuffle"):
        fingerprint(DataLoader(TensorDataset(torch.zeros(4)), shuffle=True))
    with pytest.raises(ArgumentError, match="needs tensors"):
        fingerprint(object())


def test_sparse_tensors_count_by_their_indices_and_values() -> None:
    """Equal ones have equal fingerprints; another value, place or shape, or the dense tensor, has another."""
    eye = torch.eye(2)
    others = (2 * eye, eye.flip(0), eye[:, :1])
    assert fingerprint(eye.to_sparse()) == fingerprint(torch.eye(2).to_sparse())
    forms = [eye, eye.to_sparse(), *(other.to_sparse() for other in others)]
    assert len({fingerprint(form) for form in forms}) == len(forms)
