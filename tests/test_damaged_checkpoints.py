"""Whatever happened to a file, it ends in one sentence: no traceback, no hang, no code run, no memory without bound."""

from __future__ import annotations

import argparse
import os
import random
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint as distributed

from sharpscope.checkpoint import read_checkpoint, write_checkpoint
from sharpscope.cli import main
from sharpscope.errors import CheckpointError
from sharpscope.zoo import make_model, model_arguments

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

# More by SHARPSCOPE_MUTATIONS: 2,000 take some minutes.
MUTATIONS = int(os.environ.get("SHARPSCOPE_MUTATIONS", "240"))
SECONDS = 5.0


def flipped(data: bytearray, source: random.Random) -> None:
    for _ in range(source.randint(1, 8)):
        data[source.randrange(len(data))] ^= 1 << source.randrange(8)


def cut(data: bytearray, source: random.Random) -> None:
    del data[source.randrange(len(data)) :]


def moved(data: bytearray, source: random.Random) -> None:
    start, size = source.randrange(len(data)), source.randint(1, 64)
    piece = data[start : start + size]
    del data[start : start + size]
    place = source.randrange(len(data) + 1)
    data[place:place] = piece


def overwritten(data: bytearray, source: random.Random) -> None:
    """A size, an offset or a length that is far too large, or noise."""
    start, size = source.randrange(len(data)), source.choice((1, 4, 8))
    data[start : start + size] = source.choice((b"\xff" * size, b"\x00" * size, source.randbytes(size)))


def grown(data: bytearray, source: random.Random) -> None:
    place = source.randrange(len(data))
    data[place:place] = source.randbytes(source.randint(1, 200))


def renamed(data: bytearray, source: random.Random) -> None:
    """Keys swapped for others of their length."""
    for old, new in source.sample([(b"weight", b"wright"), (b"state_dict", b"state_dicu"), (b"data", b"dada")], 2):
        data[:] = data.replace(old, new)


HOW: list[Callable[[bytearray, random.Random], None]] = [flipped, cut, moved, overwritten, grown, renamed]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One file of each kind that is read."""
    folder = tmp_path_factory.mktemp("originals")
    args = model_arguments("mlp", hidden=(5,))
    state = make_model("mlp", seed=1, **args).state_dict()
    write_checkpoint(folder / "own.pt", state_dict=state, model="mlp", model_args=args, data={"name": "digits"})
    torch.save({"model": state, "optimizer": {"state": {0: torch.ones(3)}}}, folder / "nested.pt")
    torch.save(state, folder / "old.pt", _use_new_zipfile_serialization=False)
    torch.save({"net": nn.Linear(3, 2), "args": argparse.Namespace(lr=0.1)}, folder / "objects.pt")
    distributed.save({"model": state, "step": 3}, checkpoint_id=folder / "pieces", no_dist=True)
    found = [folder / name for name in ("own.pt", "nested.pt", "old.pt", "objects.pt", "pieces")]
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(state, folder / "w.safetensors")
    return [*found, folder / "w.safetensors"]


def test_mutated_files_end_in_a_sentence(
    originals: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each of many mutants is read or refused with exit 1 in one line, within seconds."""
    refused = 0
    for i in range(MUTATIONS):
        source = random.Random(i)
        original = originals[i % len(originals)]
        path = file = tmp_path / f"mutant{original.suffix}"
        if original.is_dir():
            shutil.copytree(original, path, dirs_exist_ok=True)
            file = source.choice(sorted(path.iterdir()))
        else:
            file.write_bytes(original.read_bytes())
        data = bytearray(file.read_bytes())
        for how in source.sample(HOW, source.randint(1, 2)):
            if data:
                how(data, source)
        file.write_bytes(data)
        started = time.monotonic()
        status = main(["inspect", str(path)])
        said = capsys.readouterr()
        assert time.monotonic() - started < SECONDS, i
        assert status in (0, 1), i
        if status:
            refused += 1
            assert said.err.startswith("sharpscope: "), i
            assert said.err.count("\n") == 1, i
    assert refused > MUTATIONS // 2


def test_an_archive_that_unpacks_to_more_than_it_is_is_refused(originals: list[Path], tmp_path: Path) -> None:
    """A compressed bomb, and an entry that declares a size beyond the file's, are refused before they are unpacked."""
    bomb = tmp_path / "bomb.pt"
    with zipfile.ZipFile(originals[0]) as whole, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in whole.namelist():
            packed.writestr(name, whole.read(name) if not name.endswith("/0") else bytes(1 << 24))
    assert bomb.stat().st_size < 1 << 20
    with pytest.raises(CheckpointError, match="would unpack to more"):
        read_checkpoint(bomb)
    data = bytearray(originals[0].read_bytes())
    place = data.rindex(b"PK\x01\x02")
    data[place + 20 : place + 28] = b"\xf0\xff\xff\x7f" * 2  # both sizes of the last entry in the directory
    bomb.write_bytes(data)
    with pytest.raises(CheckpointError):
        read_checkpoint(bomb)
