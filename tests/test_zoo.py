"""Bundled models and data sets."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sharpscope.errors import ArgumentError, DataError
from sharpscope.zoo import MODELS, load_data, make_model, model_arguments


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_digits_are_the_published_ones() -> None:
    """Class counts, the pixel sum and the first row are those of load_digits in scikit-learn."""
    train, test = load_data("digits", "train"), load_data("digits", "test")
    counts = torch.bincount(torch.cat([train.targets, test.targets]))
    assert counts.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert float(train.inputs.double().sum() + test.inputs.double().sum()) * 16 == 561718
    assert (test.inputs[0, 0, 0] * 16).tolist() == [0, 0, 5, 13, 9, 1, 0, 0]


def test_every_fifth_digit_is_for_testing() -> None:
    """The splits share nothing and sum to 1,797, with types and shapes as promised."""
    train, test = load_data("digits", "train"), load_data("digits", "test")
    assert (len(train), len(test)) == (1437, 360)
    assert train.inputs.dtype == torch.float32
    assert train.targets.dtype == torch.int64
    assert train.shape == (1, 8, 8)
    # The set starts 0, 1, 2, 3, 4, 5, 6: numbers 0 and 5 are the first test digits.
    assert test.targets[:2].tolist() == [0, 5]
    assert train.targets[:5].tolist() == [1, 2, 3, 4, 6]


@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.4, 1.0])
def test_label_noise_changes_exactly_that_fraction(fraction: float) -> None:
    """round(f N) training labels differ from the true ones, all stay valid, and the test split is untouched."""
    clean, noisy = load_data("digits"), load_data("digits", label_noise=fraction, noise_seed=3)
    assert int((clean.targets != noisy.targets).sum()) == round(fraction * len(clean))
    assert int(noisy.targets.min()) >= 0
    assert int(noisy.targets.max()) <= 9
    test = load_data("digits", "test", label_noise=fraction, noise_seed=3)
    assert torch.equal(test.targets, load_data("digits", "test").targets)


def test_wrong_labels_are_uniform_over_the_other_classes() -> None:
    """With all labels replaced, each of the nine shifts appears N/9 times within five standard deviations."""
    clean, noisy = load_data("digits"), load_data("digits", label_noise=1.0)
    counts = torch.bincount((noisy.targets - clean.targets) % 10, minlength=10)
    expected = len(clean) / 9
    assert counts[0] == 0
    assert bool(((counts[1:] - expected).abs() < 5 * (expected * 8 / 9) ** 0.5).all())


def test_label_noise_depends_only_on_its_seed() -> None:
    """The same seed gives the same labels, another seed others, and the global random state stays."""
    state = torch.get_rng_state()
    first, again, other = (load_data("digits", label_noise=0.4, noise_seed=s).targets for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("side", [8, 28])
@pytest.mark.parametrize(
    ("name", "args"), [("mlp", {}), ("cnn", {}), ("wide_resnet", {}), ("wide_resnet", {"norm": "none"})]
)
def test_models_take_both_image_sizes(name: str, args: dict[str, str], side: int) -> None:
    """Every bundled model maps (N, 1, s, s) to finite logits of shape (N, 7), and every parameter is reached."""
    model = make_model(name, seed=0, shape=(1, side, side), classes=7, **args)
    logits = model(torch.ones(3, 1, side, side))
    assert logits.shape == (3, 7)
    logits.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_parameter_counts_match_the_literature() -> None:
    """WRN-28-10 has 36.5 million weights (Zagoruyko and Komodakis, table 5); mlp and cnn as counted by hand."""
    with torch.device("meta"):
        wrn = make_model("wide_resnet", shape=(3, 32, 32), classes=10, depth=28, widen=10)
    assert round(parameters(wrn) / 1e6, 1) == 36.5
    assert parameters(make_model("mlp")) == 64 * 64 + 64 + 64 * 10 + 10
    assert parameters(make_model("cnn")) == (9 + 1) * 8 + (8 * 9 + 1) * 16 + (16 * 4 + 1) * 64 + 65 * 10
    assert parameters(make_model("cnn", shape=(1, 28, 28))) == 52_138


def test_unnormalised_blocks_start_as_their_shortcut() -> None:
    """With norm none every residual branch starts at zero, so a block that keeps the shape is the identity."""
    model = make_model("wide_resnet", seed=0, depth=16, norm="none")
    blocks: list[Any] = [m for m in model.get_submodule("blocks").children() if m.shortcut is None]
    assert len(blocks) == 3
    for block in blocks:
        x = torch.randn(2, block.conv1.in_channels, 4, 4)
        assert torch.equal(block(x), x)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())


@pytest.mark.parametrize("name", sorted(MODELS))
def test_initial_weights_depend_only_on_the_seed(name: str) -> None:
    """Equal seeds give equal weights whatever the global random state, which stays bit for bit."""
    torch.manual_seed(1)
    first = make_model(name, seed=5)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second, other = make_model(name, seed=5), make_model(name, seed=6)
    assert torch.equal(state, torch.get_rng_state())
    flat = [nn.utils.parameters_to_vector(m.parameters()) for m in (first, second, other)]
    assert torch.equal(flat[0], flat[1])
    assert not torch.equal(flat[0], flat[2])


def test_model_arguments_are_complete() -> None:
    """Defaults are filled in and lists become tuples, so that a file needs no later version's defaults."""
    assert model_arguments("cnn", channels=[4, 8]) == {
        "shape": (1, 8, 8),
        "classes": 10,
        "channels": (4, 8),
        "hidden": 64,
    }


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("ccn", {}, "Did you mean 'cnn'"),
        ("cnn", {"chanels": (1,)}, "takes shape, classes, channels, hidden"),
        ("cnn", {"hidden": 0}, "at least 1"),
        ("cnn", {"hidden": "64"}, "at least 1"),
        ("cnn", {"shape": (8, 8)}, "three integers"),
        ("cnn", {"channels": (1, 1, 1, 1)}, "8x8 images, got 4"),
        ("wide_resnet", {"depth": 12}, "6n \\+ 4"),
        ("wide_resnet", {"norm": "layer"}, "'batch' or 'none'"),
    ],
)
def test_bad_model_requests_are_explained(name: str, args: dict[str, object], message: str) -> None:
    """An unknown model, argument or value raises ArgumentError that says what would be right."""
    with pytest.raises(ArgumentError, match=message):
        make_model(name, **args)


def test_bad_data_requests_are_explained() -> None:
    """An unknown set suggests the nearest; an unknown split and a fraction above 1 are refused."""
    with pytest.raises(ArgumentError, match="Did you mean 'fashion-mnist'"):
        load_data("fashion_mnist")
    with pytest.raises(ArgumentError, match="split must be"):
        load_data("digits", "validation")
    with pytest.raises(ArgumentError, match="fraction"):
        load_data("digits", label_noise=1.5)


@pytest.mark.usefixtures("_fashion_mnist")
def test_real_fashion_mnist_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """From Debian's package: 60,000 and 10,000 images, balanced, standardised, first labels as published."""
    monkeypatch.delenv("SHARPSCOPE_DATA", raising=False)
    train, test = load_data("fashion-mnist", "train"), load_data("fashion-mnist", "test")
    assert torch.bincount(train.targets).tolist() == [6000] * 10
    assert torch.bincount(test.targets).tolist() == [1000] * 10
    assert train.targets[:5].tolist() == [9, 0, 0, 3, 0]
    assert train.shape == (1, 28, 28)
    assert abs(float(train.inputs.mean())) < 1e-3
    assert abs(float(train.inputs.std()) - 1) < 1e-3


def write_idx(folder: Path, images: torch.Tensor, labels: torch.Tensor, compress: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for kind, tensor in (("images-idx3", images), ("labels-idx1", labels)):
        header = bytes((0, 0, 8, tensor.ndim)) + b"".join(n.to_bytes(4, "big") for n in tensor.shape)
        content = header + tensor.numpy().tobytes()
        name = f"train-{kind}-ubyte"
        (folder / (name + ".gz" * compress)).write_bytes(gzip.compress(content) if compress else content)


IMAGES = torch.arange(3 * 28 * 28).reshape(3, 28, 28).to(torch.uint8)
LABELS = torch.tensor([9, 0, 4], dtype=torch.uint8)


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("subfolder", ["", "fashion-mnist", "FashionMNIST/raw"])
def test_idx_files_are_found_and_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subfolder: str, compress: bool
) -> None:
    """Plain and .gz files in a folder or its usual subfolders, given or from the environment, give the same pixels."""
    write_idx(tmp_path / subfolder, IMAGES, LABELS, compress)
    expected = (IMAGES.float() / 255 - 0.2860) / 0.3530
    monkeypatch.setenv("SHARPSCOPE_DATA", str(tmp_path))
    for root in (tmp_path, None):
        data = load_data("fashion-mnist", root=root)
        torch.testing.assert_close(data.inputs[:, 0], expected, rtol=1e-6, atol=1e-6)
        assert data.targets.tolist() == LABELS.tolist()


def test_missing_fashion_mnist_says_how_to_get_it(tmp_path: Path) -> None:
    """An empty folder raises DataError with the package to install, the files and the option."""
    with pytest.raises(DataError, match=r"apt install dataset-fashion-mnist.*t10k-labels-idx1-ubyte.*--data-root"):
        load_data("fashion-mnist", root=tmp_path)


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"])
@pytest.mark.parametrize("damage", ["empty", "cut", "text", "flipped"])
def test_damaged_idx_files_are_refused(tmp_path: Path, name: str, damage: str) -> None:
    """An empty, truncated, foreign or corrupt file raises DataError naming the file."""
    write_idx(tmp_path, IMAGES, LABELS, compress=True)
    raw = (tmp_path / name).read_bytes()
    middle = len(raw) - 6  # in the checksum of the gzip format
    flipped = raw[:middle] + bytes([raw[middle] ^ 1]) + raw[middle + 1 :]
    (tmp_path / name).write_bytes({"empty": b"", "cut": raw[:-9], "text": b"hello", "flipped": flipped}[damage])
    with pytest.raises(DataError, match=name):
        load_data("fashion-mnist", root=tmp_path)


def test_idx_contents_must_fit_together(tmp_path: Path) -> None:
    """A short body, a label above 9, and unequal numbers of images and labels are refused."""
    write_idx(tmp_path, IMAGES, LABELS)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"must hold 2352 values.*got 2351"):
        load_data("fashion-mnist", root=tmp_path)
    write_idx(tmp_path, IMAGES, LABELS + 1)
    with pytest.raises(DataError, match="from 0 to 9, got 10"):
        load_data("fashion-mnist", root=tmp_path)
    write_idx(tmp_path, IMAGES, LABELS[:2])
    with pytest.raises(DataError, match="got 2 for 3"):
        load_data("fashion-mnist", root=tmp_path)
