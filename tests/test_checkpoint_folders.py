"""Weights in safetensors and in folders of several files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sharpscope import load
from sharpscope.checkpoint import load_weights, read_checkpoint
from sharpscope.cli import main
from sharpscope.errors import CheckpointError
from sharpscope.zoo import make_model

safetensors = pytest.importorskip("safetensors.torch")


def weights(seed: int = 4) -> dict[str, Tensor]:
    return make_model("mlp", seed=seed).state_dict()


def sharded(folder: Path, kind: str = "safetensors", **changes: Any) -> None:
    """The weights in two files and an index, as Hugging Face's libraries write them."""
    state, files = weights(), (f"model-00001-of-00002.{kind}", f"model-00002-of-00002.{kind}")
    named = {key: files[i % 2] for i, key in enumerate(state)}
    for file in files:
        part = {key: value for key, value in state.items() if named[key] == file}
        safetensors.save_file(part, folder / file) if kind == "safetensors" else torch.save(part, folder / file)
    index = "model.safetensors.index.json" if kind == "safetensors" else "pytorch_model.bin.index.json"
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": {**named, **changes}}))


def check(path: Path) -> None:
    found = load(path, model="mlp", data="digits", examples=20).model.state_dict()
    assert all(torch.equal(found[key], value) for key, value in weights().items())


def test_a_safetensors_file_gives_its_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Alone, or as model.safetensors in a folder; the digest is that of its bytes; the command line takes both."""
    safetensors.save_file(weights(), tmp_path / "model.safetensors")
    check(tmp_path / "model.safetensors")
    check(tmp_path)
    assert read_checkpoint(tmp_path).sha256 == read_checkpoint(tmp_path / "model.safetensors").sha256
    given = ["--model", "mlp", "--data", "digits", "--examples", "50", "--k", "1", "--tol", "0.1"]
    assert main(["eigen", str(tmp_path), *given]) == 0
    assert "lambda_max" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_weights_in_several_files_are_put_together(tmp_path: Path, kind: str) -> None:
    """A sharded folder is read by its index, and its digest changes with any of its files."""
    sharded(tmp_path, kind)
    check(tmp_path)
    before = read_checkpoint(tmp_path).sha256
    other = next(tmp_path.glob(f"*2.{kind}"))
    part = {key: value + 1 for key, value in read_checkpoint(other).state_dict.items()}
    safetensors.save_file(part, other) if kind == "safetensors" else torch.save(part, other)
    assert read_checkpoint(tmp_path).sha256 != before


def test_a_tied_weight_that_the_file_names_once_is_whole(tmp_path: Path) -> None:
    """safetensors keep one name of tied weights; the model's other name is not missing, prefix or not."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight

    for prefix in ("", "module."):
        torch.manual_seed(1)
        kept = torch.randn(7, 4)
        safetensors.save_file({f"{prefix}head.weight": kept}, tmp_path / "w.safetensors")
        found = load(tmp_path / "w.safetensors", model=Tied, data=[(torch.ones(1), torch.ones(1))], loss="mse").model
        assert torch.equal(found.embed.weight, kept)  # type: ignore[arg-type,union-attr]
        assert found.head.weight is found.embed.weight  # type: ignore[union-attr]


def test_a_folder_that_is_not_whole_is_told(tmp_path: Path) -> None:
    """No weights, an index that is none, names a weight that is not there, a file that is not, or one elsewhere."""
    with pytest.raises(CheckpointError, match=r"must hold one of model\.safetensors"):
        read_checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="weight_map"):
        read_checkpoint(tmp_path)
    for changes, message in (
        ({"more": "model-00001-of-00002.safetensors"}, "1 weights that the index names"),
        ({"more": "model-00003-of-00002.safetensors"}, "There is no checkpoint"),
        ({"more": "../secret.safetensors"}, "in its folder"),
    ):
        sharded(tmp_path, **changes)
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint(tmp_path)


def test_damaged_safetensors_are_refused_in_one_sentence(tmp_path: Path) -> None:
    """Cut anywhere, or with a header of absurd size, it is damage, quickly."""
    path = tmp_path / "w.safetensors"
    safetensors.save_file(weights(), path)
    whole = path.read_bytes()
    for damaged in (whole[:5], whole[:100], whole[:-7], b"\xff" * 8 + whole[8:], b"garbage" * 9):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="truncated or damaged"):
            read_checkpoint(path)


def test_without_safetensors_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing is said, with the command that installs it."""
    safetensors.save_file(weights(), tmp_path / "w.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(CheckpointError, match=r"pip install 'sharpscope\[safetensors\]'"):
        read_checkpoint(tmp_path / "w.safetensors")


def test_a_wrapper_around_the_network_of_the_file_is_seen_through() -> None:
    """A model that holds the file's network as an attribute takes its weights, as a residual of an equation does."""
    inner = nn.Linear(3, 2)

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.u = nn.Linear(3, 2)

    wrapper = Wrapper()
    load_weights(wrapper, inner.state_dict())
    assert torch.equal(wrapper.u.weight, inner.weight)
    with pytest.raises(CheckpointError, match="misses 2"):
        load_weights(nn.Sequential(nn.Linear(3, 2)), {"1.weight": inner.weight, "1.bias": inner.bias})


def test_a_stale_copy_in_another_shard_does_not_count(tmp_path: Path) -> None:
    """A weight comes from the file that the index names, whatever else holds one of its name."""
    sharded(tmp_path)
    second = tmp_path / "model-00002-of-00002.safetensors"
    first_key = next(iter(weights()))
    kept = safetensors.load_file(second)
    safetensors.save_file({**kept, first_key: torch.zeros_like(weights()[first_key])}, second)
    check(tmp_path)
