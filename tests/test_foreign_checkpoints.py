"""Files of other people's making: objects in them are not run, pieces are put together, adapters lie on their base."""

from __future__ import annotations

import argparse
import collections
import json
import os
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed import checkpoint as distributed

import sharpscope
from conftest import tiny_mlp
from dense import dense_hessian, top
from sharpscope.checkpoint import load_weights, read_checkpoint
from sharpscope.cli import main
from sharpscope.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

PROBLEM = """
import sharpscope, torch
from torch import nn

def problem():
    source = torch.Generator().manual_seed(3)
    inputs = torch.randn(30, 4, generator=source)
    labels = torch.randint(0, 3, (30,), generator=source)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    return sharpscope.Problem(model=model, loss=nn.CrossEntropyLoss(), data=(inputs, labels))
"""


class Config(dict[str, int]):
    """A dict of somebody's own class."""


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


def network(seed: int = 0) -> nn.Sequential:
    return tiny_mlp(4, 5, 3, seed=seed)


def eigenvalues(path: Path, folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> np.ndarray[Any, Any]:
    """What the command line says of a file, in float64."""
    (folder / "problem.py").write_text(PROBLEM)
    flags = ["--problem", str(folder / "problem.py"), "--dtype", "float64", "--tol", "1e-9", "--json", *options]
    status = main(["eigen", str(path), *flags])
    said = capsys.readouterr()
    assert status == 0, said.err
    return np.array(json.loads(said.out)["eigenvalues"])


def exact(model: nn.Module) -> np.ndarray[Any, Any]:
    source = torch.Generator().manual_seed(3)
    inputs, labels = torch.randn(30, 4, generator=source), torch.randint(0, 3, (30,), generator=source)

    def loss(call: Any) -> Tensor:
        return nn.functional.cross_entropy(call(inputs.double()), labels)

    return top(dense_hessian(model, loss)).numpy()


def test_objects_beside_the_weights_are_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A training script's file is measured whatever objects it holds, none of which is run."""
    rest = {
        "args": argparse.Namespace(lr=0.1, out=tmp_path),
        "best": np.float64(0.9),
        "curve": np.arange(3),
        "config": Config(depth=3),
        "seen": collections.defaultdict(list, {"a": [1]}),
        "touch": Touch(tmp_path / "touched"),
    }
    torch.save({**rest, "state_dict": network(1).state_dict()}, tmp_path / "run.pt")
    found = eigenvalues(tmp_path / "run.pt", tmp_path, capsys)
    assert found == pytest.approx(exact(network(1)), rel=1e-6)
    assert not (tmp_path / "touched").exists()
    assert main(["inspect", str(tmp_path / "run.pt")]) == 0
    assert "argparse.Namespace" in capsys.readouterr().out


def test_weights_of_a_pickled_module_are_read_without_its_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A whole pickled module gives its weights, buffers included, to the model that the user names."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model.register_buffer("passing", torch.ones(2), persistent=False)
    torch.save({"ema": model}, tmp_path / "ema.pt")
    checkpoint = read_checkpoint(tmp_path / "ema.pt")
    assert {k: v.tolist() for k, v in checkpoint.state_dict.items()} == {
        k: v.tolist() for k, v in model.state_dict().items()
    }
    assert checkpoint.module is None
    torch.save(network(2), tmp_path / "whole.pt")
    assert eigenvalues(tmp_path / "whole.pt", tmp_path, capsys) == pytest.approx(exact(network(2)), rel=1e-6)


def test_a_trusted_pickle_is_the_model_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --trust-pickle no model need be named, even one of a module in the working directory."""
    (tmp_path / "their_net.py").write_text("from torch import nn\nclass Net(nn.Linear):\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    import their_net  # type: ignore[import-not-found]

    torch.save({"model": their_net.Net(64, 10), "epoch": 3}, "net.pt")
    problem = sharpscope.load("net.pt", data="digits", trust_pickle=True, model=None)
    assert type(problem.model) is their_net.Net
    assert problem.provenance["model"] == "their_net:Net"


def test_a_trusted_pickle_without_its_class_ends_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where a class cannot be imported, the sentence says so and names the way without it."""
    (tmp_path / "gone_net.py").write_text("from torch import nn\nclass Net(nn.Linear):\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import gone_net  # type: ignore[import-not-found]

    torch.save(gone_net.Net(64, 10), tmp_path / "net.pt")
    (tmp_path / "gone_net.py").unlink()
    monkeypatch.delitem(sys.modules, "gone_net")
    assert main(["eigen", str(tmp_path / "net.pt"), "--data", "digits", "--trust-pickle"]) == 1
    said = capsys.readouterr().err
    assert "No module named 'gone_net'" in said
    assert said.count("\n") == 1


def test_code_is_not_run_even_where_nothing_else_is_there(tmp_path: Path) -> None:
    """A file of nothing but an object says what it holds and runs nothing."""
    torch.save({"touch": Touch(tmp_path / "touched")}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match=r"io.open, which were not run|builtins.open, which were not run"):
        read_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "touched").exists()


def test_a_distributed_checkpoint_is_put_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder of torch.distributed.checkpoint, optimizer and all, is measured like the model it was saved from."""
    model = network(4)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    state = {"app": {"model": model.state_dict(), "optim": optimizer.state_dict()}, "step": 7}
    distributed.save(state, checkpoint_id=tmp_path / "step7", no_dist=True)
    found = eigenvalues(tmp_path / "step7", tmp_path, capsys)
    assert found == pytest.approx(exact(model), rel=1e-6)
    assert read_checkpoint(tmp_path / "step7").weights == "app.model"


def in_two_pieces(folder: Path, tensor: Tensor) -> None:
    """Save ``tensor`` as two processes do, each its half of the rows."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    folder.mkdir()
    storage, chunks, half = {}, [], len(tensor) // 2
    for rank, part in enumerate((tensor[:half], tensor[half:])):
        offset = torch.Size([rank * half, 0])
        torch.save(part.clone(), folder / f"__{rank}_0.distcp")
        size = (folder / f"__{rank}_0.distcp").stat().st_size
        storage[MetadataIndex("w", offset)] = _StorageInfo(f"__{rank}_0.distcp", 0, size)
        chunks.append(ChunkStorageMetadata(offset, part.shape))
    entry = TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), tensor.shape, chunks)
    with open(folder / ".metadata", "wb") as stream:
        pickle.dump(Metadata({"w": entry}, planner_data={"w": ("w",)}, storage_data=storage), stream)


def test_pieces_of_a_tensor_join_in_their_places(tmp_path: Path) -> None:
    """A tensor of which each process saved a part is whole again; a missing part is named."""
    tensor = torch.arange(20.0).reshape(5, 4)
    in_two_pieces(tmp_path / "w", tensor)
    assert torch.equal(read_checkpoint(tmp_path / "w").state_dict["w"], tensor)
    (tmp_path / "w" / "__1_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"shard of w .*__1_0.distcp is missing or damaged"):
        read_checkpoint(tmp_path / "w")


def test_a_distributed_checkpoint_runs_no_code(tmp_path: Path) -> None:
    """An index that calls something, or points out of its folder, is refused."""
    folder = tmp_path / "evil"
    folder.mkdir()
    (folder / ".metadata").write_bytes(pickle.dumps(Touch(tmp_path / "touched")))
    with pytest.raises(CheckpointError, match="must be an index"):
        read_checkpoint(folder)
    assert not (tmp_path / "touched").exists()
    in_two_pieces(tmp_path / "out", torch.ones(4, 2))
    moved = (tmp_path / "out" / ".metadata").read_bytes().replace(b"\x0c__0_0.distcp", b"\x0c../_0.distcp")
    (tmp_path / "out" / ".metadata").write_bytes(moved)
    with pytest.raises(CheckpointError, match="must name files of its own"):
        read_checkpoint(tmp_path / "out")


def test_adapters_lie_on_the_weights_that_the_model_has() -> None:
    """With partial the frozen base stays as it was built, and an adapter is found without its own name."""
    model = nn.Module()
    model.base = nn.Linear(3, 3)
    model.lora_A = nn.ModuleDict({"default": nn.Linear(3, 1, bias=False)})
    before = model.base.weight.detach().clone()
    file = {"base_model.model.lora_A.weight": torch.full((1, 3), 7.0)}
    with pytest.raises(CheckpointError, match="pass --partial"):
        load_weights(model, file, "base_model.model.")
    load_weights(model, file, "base_model.model.", partial=True)
    assert torch.equal(model.base.weight, before)
    assert torch.equal(model.lora_A["default"].weight, file["base_model.model.lora_A.weight"])


def test_partial_still_names_what_the_model_lacks() -> None:
    """A key of the file that the model lacks is an error with partial too, and so is a file without any of its keys."""
    with pytest.raises(CheckpointError, match="has 1 keys that the model lacks"):
        load_weights(network(), {"other": torch.ones(3)}, partial=True)


@pytest.mark.skipif(os.name == "nt", reason="POSIX paths")
def test_a_path_in_a_file_does_not_matter(tmp_path: Path) -> None:
    """Paths, which many scripts save, keep nobody from the weights."""
    torch.save({"model": network().state_dict(), "out": tmp_path}, tmp_path / "path.pt")
    assert read_checkpoint(tmp_path / "path.pt").foreign == ["pathlib.PosixPath"]


def test_pieces_that_overlap_or_are_of_another_type_are_refused(tmp_path: Path) -> None:
    """Numbers are counted by their places, not by how many there are; nothing is rounded on the way."""
    in_two_pieces(tmp_path / "twice", torch.ones(4, 2))
    pickled = tmp_path / "twice" / ".metadata"
    index = pickle.loads(pickled.read_bytes())
    second = next(key for key in index.storage_data if key.offset[0] == 2)
    index.storage_data[type(second)("w", torch.Size([1, 0]))] = index.storage_data.pop(second)
    pickled.write_bytes(pickle.dumps(index))
    with pytest.raises(CheckpointError, match="missing or damaged"):
        read_checkpoint(tmp_path / "twice")
    in_two_pieces(tmp_path / "other", torch.ones(4, 2))
    torch.save(torch.ones(2, 2, dtype=torch.float16), tmp_path / "other" / "__0_0.distcp")
    with pytest.raises(CheckpointError, match="missing or damaged"):
        read_checkpoint(tmp_path / "other")


def test_a_module_that_names_itself_over_and_over_ends(tmp_path: Path) -> None:
    """Modules that share their children 2^60 times over are no module, within moments."""
    module = nn.Module()
    for _ in range(60):
        outer = nn.Module()
        outer.a = outer.b = module
        module = outer
    torch.save({"net": module}, tmp_path / "deep.pt")
    with pytest.raises(CheckpointError, match="must hold a dict of tensors"):
        read_checkpoint(tmp_path / "deep.pt")


def test_a_script_archive_is_called_so(tmp_path: Path) -> None:
    """TorchScript holds a program; the sentence says what to save in its place."""
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("script/constants.pkl", b"")
        archive.writestr("script/data.pkl", b"")
    with pytest.raises(CheckpointError, match="TorchScript"):
        read_checkpoint(tmp_path / "script.pt")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_a_pipe_is_no_checkpoint(tmp_path: Path) -> None:
    """What could be read for ever is not begun."""
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(CheckpointError, match="device or a pipe"):
        read_checkpoint(tmp_path / "pipe.pt")


def test_plain_values_among_the_weights_are_left_out(tmp_path: Path) -> None:
    """A state dict into which somebody put the epoch is one."""
    torch.save({**network().state_dict(), "epoch": 3, "note": "best"}, tmp_path / "w.pt")
    assert set(read_checkpoint(tmp_path / "w.pt").state_dict) == set(network().state_dict())


def test_tied_weights_that_differ_are_refused() -> None:
    """Of two names that the model ties neither value is thrown away in silence."""
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    state = {key: value.clone() for key, value in tied.state_dict().items()}
    load_weights(tied, state)
    state["1.weight"] += 1
    with pytest.raises(CheckpointError, match=r"ties 0\.weight and 1\.weight"):
        load_weights(tied, state)


def test_an_adapters_alias_does_not_fill_two_weights() -> None:
    """A name without the adapter's part stands for it only where the model has no such weight itself."""
    model = nn.ModuleDict({"h": nn.ModuleDict({"default": nn.Linear(2, 2, bias=False)})})
    model["h"].weight = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(CheckpointError, match=r"misses 1 \(h.default.weight\)"):
        load_weights(model, {"h.weight": torch.ones(2, 2)})


def test_weights_without_numbers_are_told(tmp_path: Path) -> None:
    """Sparse tensors, and those of the meta device, do not fit a model of dense ones."""
    for value in (torch.ones(5, 4).to_sparse(), torch.ones(5, 4, device="meta")):
        with pytest.raises(CheckpointError, match="another shape or kind"):
            load_weights(network(), {**network().state_dict(), "0.weight": value})
