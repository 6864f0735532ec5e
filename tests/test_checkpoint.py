"""Checkpoint files, and the problems loaded from them."""

from __future__ import annotations

import os
import pickle
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sharpscope.checkpoint import load_weights, read_checkpoint, write_checkpoint
from sharpscope.errors import ArgumentError, CheckpointError
from sharpscope.loading import load
from sharpscope.zoo import load_data, make_model, model_arguments

ARGS = model_arguments("mlp", hidden=(5,))
DESCRIPTION: dict[str, Any] = {
    "model": "mlp",
    "model_args": ARGS,
    "data": {"name": "digits", "label_noise": 0.25, "noise_seed": 7, "noise_version": 2},
    "recipe": {"lr": 0.05, "rho": None, "p": float("inf")},
    "epoch": 3,
    "metrics": {"train_loss": 0.5},
}


def mlp() -> nn.Module:
    return make_model("mlp", seed=1, **ARGS)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    target = tmp_path / "run.pt"
    write_checkpoint(target, state_dict=mlp().state_dict(), **DESCRIPTION)
    return target


def test_reading_gives_back_what_was_written(path: Path) -> None:
    """Every tensor bit for bit and every entry of the description survive the file."""
    checkpoint = read_checkpoint(path)
    for key, tensor in mlp().state_dict().items():
        assert torch.equal(checkpoint.state_dict[key], tensor)
    for key, value in DESCRIPTION.items():
        assert getattr(checkpoint, key) == value
    assert checkpoint.loss == "cross_entropy"
    assert checkpoint.training is None


def test_equal_contents_are_equal_bytes(path: Path, tmp_path: Path) -> None:
    """What was read and is written again, under another name, has the same digest."""
    first = read_checkpoint(path)
    description = {key: getattr(first, key) for key in DESCRIPTION}
    write_checkpoint(tmp_path / "other.pt", state_dict=first.state_dict, **description)
    assert read_checkpoint(tmp_path / "other.pt").sha256 == first.sha256


def test_a_view_does_not_bring_its_storage_along(tmp_path: Path) -> None:
    """A row of a large matrix costs a row in the file."""
    row = torch.zeros(1000, 1000)[0]
    write_checkpoint(tmp_path / "row.pt", state_dict={"w": row}, **DESCRIPTION)
    assert (tmp_path / "row.pt").stat().st_size < 10_000


def test_a_failed_write_keeps_the_old_file(path: Path) -> None:
    """A value that a checkpoint cannot hold is named, and neither the old file changes nor a stray one stays."""
    before = path.read_bytes()
    with pytest.raises(ArgumentError, match=r"Path in 'metrics\.where'"):
        write_checkpoint(path, state_dict={}, **{**DESCRIPTION, "metrics": {"where": path.parent / "x"}})
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


class Mine:
    """Unpickling one makes a file, as a stranger's code would."""

    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_refused_and_never_run(tmp_path: Path, zipped: bool) -> None:
    """A file whose unpickling would make a folder raises CheckpointError and makes none."""
    bad = tmp_path / "bad.pt"
    torch.save({"w": Mine(str(tmp_path / "made"))}, bad, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="run any code"):
        read_checkpoint(bad)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04",
        b"\x89PNG\r\n\x1a\n" + bytes(100),
        b"epoch,loss\n1,0.5\n",
        pickle.dumps({"a": 1}),
        pickle.dumps(print),
        bytes(1000),
    ],
)
def test_foreign_files_are_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    """Empty, half a zip header, PNG, text, a bare pickle, zeros: CheckpointError that names the file."""
    bad = tmp_path / "bad.pt"
    bad.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"bad\.pt") as caught:
        read_checkpoint(bad)
    assert "\n" not in str(caught.value)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    """A path with nothing and a path with a folder get a sentence each."""
    with pytest.raises(CheckpointError, match="no checkpoint"):
        read_checkpoint(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match="The folder"):
        read_checkpoint(tmp_path)


def test_damage_never_passes_as_a_weight(path: Path, tmp_path: Path) -> None:
    """Of 200 truncated or bit-flipped copies, each is refused or reads to the very same weights."""
    raw, weights, rng = path.read_bytes(), mlp().state_dict(), random.Random(0)
    bad = tmp_path / "bad.pt"
    refused = 0
    for i in range(200):
        copy = bytearray(raw)
        if i % 2:
            copy[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        else:
            del copy[rng.randrange(len(raw)) :]
        bad.write_bytes(copy)
        try:
            read = read_checkpoint(bad).state_dict
        except CheckpointError:
            refused += 1
        else:
            assert all(torch.equal(read[key], weights[key]) for key in weights)
    assert refused > 100


@pytest.mark.parametrize("content", [[1, 2], {"optimizer": {}, "epoch": 1}, {}, {1: torch.ones(1)}, torch.ones(2)])
def test_files_without_weights_are_refused(tmp_path: Path, content: Any) -> None:
    """A list, a dict without tensors, an empty dict, numbered tensors and a lone tensor are no state dict."""
    torch.save(content, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match="must hold a dict of tensors"):
        read_checkpoint(tmp_path / "bad.pt")


@pytest.mark.parametrize(
    "change", [{"sharpscope": 2}, {"state_dict": {}}, {"model": "mlp"}, {"data": {}}, {"epoch": "3"}, {"recipe": None}]
)
def test_malformed_descriptions_are_refused(path: Path, change: dict[str, Any]) -> None:
    """A later format or an entry of the wrong kind raises CheckpointError, not KeyError or TypeError."""
    torch.save({**torch.load(path, weights_only=True), **change}, path)
    with pytest.raises(CheckpointError):
        read_checkpoint(path)


@pytest.mark.parametrize("nest", [None, "state_dict", "model_state_dict", "model"])
def test_plain_state_dicts_are_read(tmp_path: Path, nest: str | None) -> None:
    """A state dict, alone or nested beside other things, gives its tensors and no model name."""
    weights = mlp().state_dict()
    torch.save(weights if nest is None else {nest: weights, "epoch": 3}, tmp_path / "plain.pt")
    checkpoint = read_checkpoint(tmp_path / "plain.pt")
    assert checkpoint.model is None
    assert all(torch.equal(checkpoint.state_dict[key], weights[key]) for key in weights)


def test_mismatch_lists_the_first_three_of_each_kind() -> None:
    """Unexpected, missing and differing entries are counted, three of each named, and the model is unchanged."""
    model = mlp()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    state = {**{f"extra{i}": torch.ones(1) for i in range(5)}, "1.weight": torch.ones(2, 2), "1.bias": before["1.bias"]}
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, state)
    message = str(caught.value)
    assert "5 keys that the model lacks (extra0, extra1, extra2, ...)" in message
    assert "misses 2 (3.weight, 3.bias)" in message
    assert "1.weight: (2, 2) float in the file, (5, 64) float in the model" in message
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_model_takes_the_precision_of_the_file(dtype: torch.dtype) -> None:
    """Weights arrive bit for bit in the file's dtype, and integer buffers stay integers."""
    source, target = (make_model("wide_resnet", seed=seed, widen=1) for seed in (0, 1))
    state = source.to(dtype).state_dict()
    load_weights(target, state)
    for key, tensor in target.state_dict().items():
        assert tensor.dtype == state[key].dtype
        assert torch.equal(tensor, state[key])
    assert target.norm.num_batches_tracked.dtype == torch.int64  # type: ignore[union-attr]


def test_tied_weights_stay_tied() -> None:
    """After loading, in another precision too, one parameter still serves both layers and shares no file memory."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    state = {key: tensor.double() for key, tensor in model.state_dict().items()}
    load_weights(model, state)
    assert model[0].weight is model[1].weight
    assert model[0].weight.dtype == torch.float64
    assert model[0].weight.data_ptr() not in {tensor.data_ptr() for tensor in state.values()}


def test_load_rebuilds_model_loss_and_noisy_data(path: Path) -> None:
    """The problem's mean loss is that of the written model on the noisy training labels, and it says where from."""
    problem = load(path)
    data = load_data("digits", label_noise=0.25, noise_seed=7)
    inputs, targets = problem.data
    assert torch.equal(targets, data.targets)
    expected = nn.functional.cross_entropy(mlp()(data.inputs), data.targets)
    assert torch.equal(problem.loss(problem.model(inputs), targets), expected)
    said = problem.provenance
    assert (said["checkpoint"], said["data"], said["split"]) == (str(path), "digits", "train")
    assert said["split_examples"] == 1437
    assert (said["model"], said["model_args"], said["epoch"], said["label_noise"]) == ("mlp", ARGS, 3, 0.25)
    assert said["sha256"] == read_checkpoint(path).sha256


def test_load_takes_other_data(path: Path) -> None:
    """A name means the set with true labels, the test split is never noisy, and any other object passes through."""
    assert torch.equal(load(path, data="digits").data[1], load_data("digits").targets)
    assert torch.equal(load(path, split="test").data[1], load_data("digits", "test").targets)
    batches = [(torch.ones(2, 1, 8, 8), torch.tensor([0, 1]))]
    assert load(path, data=batches).data is batches


def test_examples_are_a_random_subset_without_replacement(path: Path) -> None:
    """n examples, all different, decided by the seed; n outside 1..N is refused."""
    inputs, targets = load_data("digits").inputs, load_data("digits").targets
    numbered = (torch.arange(len(inputs)), targets)
    first, again, other = (load(path, data=numbered, examples=100, seed=s).data for s in (1, 1, 2))
    assert len(first[0].unique()) == 100
    assert torch.equal(first[1], targets[first[0]])
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])
    assert load(path, examples=100).provenance["split_examples"] == 1437
    for n in (0, 1438):
        with pytest.raises(ArgumentError, match=f"1 to the 1437 of the data, got {n}"):
            load(path, examples=n)
    with pytest.raises(ArgumentError, match="got list_iterator"):
        load(path, data=iter([numbered]), examples=1)


def test_a_plain_state_dict_needs_model_and_data(tmp_path: Path) -> None:
    """Without them the error names both options; with them, shape and classes come from the data."""
    path = tmp_path / "plain.pt"
    torch.save(mlp().state_dict(), path)
    for given in ({}, {"data": "digits"}, {"model": "mlp"}):
        with pytest.raises(CheckpointError, match="--model and --data"):
            load(path, **given)
    problem = load(path, model="mlp", data="digits", model_args={"hidden": [5]})
    assert problem.provenance["model_args"] == ARGS
    with pytest.raises(CheckpointError, match="Check --model"):
        load(path, model="mlp", data="digits")
    with pytest.raises(ArgumentError, match="Did you mean 'mlp'"):
        load(path, model="mpl", data="digits")


def test_model_may_be_any_factory(path: Path) -> None:
    """A function and "module:function" both build the model; a module or function that is not there is named."""
    assert load(path, model=mlp).provenance["model"].endswith(":mlp")
    wanted = "sharpscope.zoo.networks:mlp"
    assert load(path, model=wanted, model_args={"hidden": (5,)}).provenance["model"] == wanted
    with pytest.raises(ArgumentError, match="no module sharpscope_none"):
        load(path, model="sharpscope_none.sub:f")
    with pytest.raises(ArgumentError, match="no function 'nothing'"):
        load(path, model="sharpscope.zoo:nothing")
    with pytest.raises(ArgumentError, match="Pass its class"):
        load(path, model=mlp())


def test_a_factory_named_by_the_file_needs_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its module is not imported without trust; with trust, or named by the caller, it is."""
    (tmp_path / "strangers_code.py").write_text(
        "from sharpscope.zoo import make_model\ndef build(**args):\n    return make_model('mlp', **args)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / "run.pt"
    write_checkpoint(path, state_dict=mlp().state_dict(), **{**DESCRIPTION, "model": "strangers_code:build"})
    with pytest.raises(CheckpointError, match="--trust"):
        load(path)
    assert "strangers_code" not in sys.modules
    assert load(path, trust=True).provenance["model"] == "strangers_code:build"
    assert load(path, model="strangers_code:build").provenance["model_args"] == ARGS
    monkeypatch.delitem(sys.modules, "strangers_code")


def test_loading_leaves_the_random_state(path: Path) -> None:
    """Building the model and drawing the subset move no global generator."""
    state = torch.get_rng_state()
    load(path, examples=10)
    assert torch.equal(state, torch.get_rng_state())


def test_a_plain_state_dict_on_other_data_needs_its_loss_named(tmp_path: Path) -> None:
    """A regression is never measured with cross-entropy because nobody said otherwise."""
    torch.save(torch.nn.Linear(3, 1).state_dict(), tmp_path / "w.pt")
    data = (torch.randn(5, 3), torch.randn(5, 1))
    with pytest.raises(ArgumentError, match="--loss"):
        load(tmp_path / "w.pt", model=lambda: torch.nn.Linear(3, 1), data=data)
    problem = load(tmp_path / "w.pt", model=lambda: torch.nn.Linear(3, 1), data=data, loss="mse")
    assert isinstance(problem.loss, torch.nn.MSELoss)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model.", "net.backbone."])
def test_a_wrappers_prefix_is_taken_off_and_named(tmp_path: Path, prefix: str) -> None:
    """Whatever wrapped the model, its weights are found under one prefix, and the result's provenance says which."""
    weights = make_model("mlp", seed=3).state_dict()
    beside = {} if prefix == "module." else {"criterion.weight": torch.ones(2)}
    torch.save({**{prefix + key: value for key, value in weights.items()}, **beside}, tmp_path / "ddp.pt")
    problem = load(tmp_path / "ddp.pt", model="mlp", data="digits")
    assert all(torch.equal(value, weights[key]) for key, value in problem.model.state_dict().items())
    assert problem.provenance["weights_prefix"] == prefix
    assert problem.provenance["weights_left_out"] == list(beside)
    again = load(tmp_path / "ddp.pt", model="mlp", data="digits", prefix=prefix)
    assert same_weights(again.model, problem.model)


def same_weights(one: nn.Module, two: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def test_a_model_under_two_prefixes_must_be_chosen(tmp_path: Path) -> None:
    """Student and teacher in one file: no guess, a sentence that names both; --prefix chooses."""
    models = {"student.": make_model("mlp", seed=1), "teacher.": make_model("mlp", seed=2)}
    torch.save({p + k: v for p, m in models.items() for k, v in m.state_dict().items()}, tmp_path / "two.pt")
    with pytest.raises(CheckpointError, match=r"'student\.', 'teacher\.'.*--prefix"):
        load(tmp_path / "two.pt", model="mlp", data="digits")
    chosen = load(tmp_path / "two.pt", model="mlp", data="digits", prefix="teacher.")
    assert same_weights(chosen.model, models["teacher."])
    assert all(name.startswith("student.") for name in chosen.provenance["weights_left_out"])


def test_a_wrapped_model_that_does_not_fit_is_told_under_its_prefix(tmp_path: Path) -> None:
    """The differences are those beneath the prefix, not that every name has one."""
    torch.save(nn.DataParallel(make_model("mlp", hidden=(7,))).state_dict(), tmp_path / "ddp.pt")
    with pytest.raises(CheckpointError, match=r"ddp\.pt.*under 'module\.'.*another shape"):
        load(tmp_path / "ddp.pt", model="mlp", model_args={"hidden": (9,)}, data="digits")


@pytest.mark.parametrize(
    ("names", "key", "taken"),
    [
        (("model", "ema"), None, "model"),
        (("ema", "state_dict"), None, "state_dict"),
        (("model", "ema"), "ema", "ema"),
        (("weights_of_mine",), None, "weights_of_mine"),
        (("callbacks.ema.module", "state_dict"), "callbacks.ema.module", "callbacks.ema.module"),
    ],
)
def test_one_of_several_state_dicts_is_taken_and_said(
    tmp_path: Path, names: tuple[str, ...], key: str | None, taken: str
) -> None:
    """The usual names come before averages, any can be chosen, and what is left is named."""
    models = {name: make_model("mlp", seed=i) for i, name in enumerate(names)}
    contents: dict[str, Any] = {"epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}
    for name, model in models.items():
        inner = contents
        *outer, last = name.split(".")
        for part in outer:
            inner = inner.setdefault(part, {})
        inner[last] = model.state_dict()
    torch.save(contents, tmp_path / "w.pt")
    problem = load(tmp_path / "w.pt", model="mlp", data="digits", weights=key)
    assert same_weights(problem.model, models[taken])
    assert problem.provenance["weights_key"] == taken
    assert set(problem.provenance["weights_left_out"]) == set(names) - {taken}


def test_weights_that_are_not_there_are_listed(tmp_path: Path) -> None:
    """A key that is not in the file, and several unusual ones with none chosen, end in the list of what there is."""
    torch.save({"one": mlp().state_dict(), "two": mlp().state_dict()}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"'one', 'two'.*--weights"):
        read_checkpoint(tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="no weights under 'three', but under 'one', 'two'"):
        read_checkpoint(tmp_path / "w.pt", "three")


def test_a_result_says_which_weights_it_is_of(tmp_path: Path) -> None:
    """The notes of a table name the key, the prefix and what was left out; of an ordinary checkpoint nothing."""
    from sharpscope import top_eigenvalues

    wrapped = {"ema": {"module." + k: v for k, v in mlp().state_dict().items()}, "model": mlp().state_dict()}
    torch.save(wrapped, tmp_path / "w.pt")
    problem = load(tmp_path / "w.pt", model="mlp", model_args=ARGS, data="digits", examples=50, weights="ema")
    said = top_eigenvalues(problem, k=1, tol=0.1).summary()
    assert "weights under 'ema'; the prefix 'module.' taken off their names; left out: model" in said
