"""Bundled data sets, in memory, with optional label noise."""

from __future__ import annotations

import dataclasses
import gzip
import math
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sharpscope.errors import ArgumentError, DataError
from sharpscope.random_streams import stream


# eq=False, since == on tensors is elementwise.
@dataclass(frozen=True, eq=False)
class DataSet:
    """One split of a data set: ``inputs`` float32 (N, C, H, W), ``targets`` int64 (N,) in ``[0, classes)``."""

    inputs: Tensor
    targets: Tensor
    classes: int
    name: str
    split: str

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape (C, H, W) of one input."""
        return tuple(self.inputs.shape[1:])


# How wrong labels are drawn. Version 1 is that of sharpscope 0.1.0: the examples that torch.randperm of the seed gives
# first.
NOISE_VERSION = 2


def with_label_noise(data: DataSet, fraction: float, seed: int, version: int = NOISE_VERSION) -> DataSet:
    """Replace exactly ``round(fraction * N)`` labels, each by another class drawn uniformly.

    Deterministic in ``seed``, ``fraction`` and ``version``. Symmetric noise as in Foret et al. 2021, section 3.3,
    except that the number is exact and a replaced label always differs from the true one.

    Raises: ArgumentError unless ``0 <= fraction <= 1``, and for an unknown version.
    """
    if not 0 <= fraction <= 1:
        raise ArgumentError(f"label_noise must be a fraction from 0 to 1, got {fraction!r}.")
    if version not in (1, NOISE_VERSION):
        raise ArgumentError(f"noise_version must be 1 or {NOISE_VERSION}, got {version!r}. Update sharpscope.")
    generator = torch.Generator().manual_seed(seed) if version == 1 else stream(seed, "label noise")
    chosen = torch.randperm(len(data), generator=generator)[: round(fraction * len(data))]
    shift = torch.randint(1, data.classes, (len(chosen),), generator=generator)
    targets = data.targets.clone()
    targets[chosen] = (targets[chosen] + shift) % data.classes
    return dataclasses.replace(data, targets=targets)


def digits(split: str, root: str | os.PathLike[str] | None = None) -> DataSet:
    """One split of the digits, inputs (N, 1, 8, 8) in [0, 1]; every fifth is "test" (360), the others "train" (1,437).

    ``root`` is ignored: the data are included in the package.
    """
    with np.load(Path(__file__).with_name("digits.npz")) as stored:
        images, labels = torch.from_numpy(stored["images"]), torch.from_numpy(stored["labels"])
    test = torch.arange(len(labels)) % 5 == 0
    chosen = test if split == "test" else ~test
    return DataSet(images[chosen].unsqueeze(1).float() / 16, labels[chosen].long(), 10, "digits", split)


DEBIAN_FOLDER = "/usr/share/datasets/fashion-mnist"
SUBFOLDERS = ("", "fashion-mnist", "FashionMNIST/raw")
PREFIXES = {"train": "train", "test": "t10k"}

# The usual mean and standard deviation of the training pixels in [0, 1].
MEAN, STD = 0.2860, 0.3530


def fashion_mnist(split: str, root: str | os.PathLike[str] | None = None) -> DataSet:
    """One split of Fashion-MNIST, inputs (N, 1, 28, 28) standardised by the training set's mean and deviation.

    Args:
        split: "train" (60,000 images) or "test" (10,000).
        root: folder with the IDX files (plain or .gz), or with them in ``fashion-mnist`` or ``FashionMNIST/raw``;
            by default ``$SHARPSCOPE_DATA``, else Debian's folder.

    Raises: DataError if a file is missing, truncated or corrupt.
    """
    images = _read_idx(_find(f"{PREFIXES[split]}-images-idx3-ubyte", root), dimensions=3)
    targets_file = _find(f"{PREFIXES[split]}-labels-idx1-ubyte", root)
    targets = _read_idx(targets_file, dimensions=1)
    if len(images) != len(targets) or len(targets) == 0:
        raise DataError(f"{targets_file} must hold one label per image, got {len(targets)} for {len(images)} images.")
    if int(targets.max()) > 9:
        raise DataError(f"{targets_file} must hold labels from 0 to 9, got {int(targets.max())}.")
    inputs = images.unsqueeze(1).float().div_(255).sub_(MEAN).div_(STD)
    return DataSet(inputs, targets.long(), 10, "fashion-mnist", split)


def _find(name: str, root: str | os.PathLike[str] | None) -> Path:
    folder = Path(root or os.environ.get("SHARPSCOPE_DATA") or DEBIAN_FOLDER)
    for subfolder in SUBFOLDERS:
        for suffix in ("", ".gz"):
            path = folder / subfolder / (name + suffix)
            if path.is_file():
                return path
    files = ", ".join(f"{p}-{kind}-ubyte" for p in PREFIXES.values() for kind in ("images-idx3", "labels-idx1"))
    raise DataError(
        f"Fashion-MNIST needs {name} (or {name}.gz), which is not in {folder}. "
        f"On Debian or Ubuntu run 'apt install dataset-fashion-mnist'; elsewhere put the files {files} (plain or .gz) "
        "into one folder and pass it by --data-root or $SHARPSCOPE_DATA."
    )


def _read_idx(path: Path, dimensions: int) -> Tensor:
    """Read the uint8 tensor of an IDX file: magic number 0x0000080D for D dimensions, big-endian sizes, data."""
    try:
        raw = path.read_bytes()
        content = gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}). Download it again.") from error
    header = 4 + 4 * dimensions
    if len(content) < header or content[:4] != bytes((0, 0, 8, dimensions)):
        raise DataError(f"{path} is not an IDX file of {dimensions}-dimensional uint8 data. Download it again.")
    sizes = [int.from_bytes(content[4 * i : 4 * i + 4], "big") for i in range(1, dimensions + 1)]
    if len(content) != header + math.prod(sizes):
        raise DataError(
            f"{path} must hold {math.prod(sizes)} values, as its header says, got {len(content) - header}. "
            "Download it again."
        )
    if math.prod(sizes) == 0:
        return torch.empty(sizes, dtype=torch.uint8)
    # frombuffer needs writable memory, so a bytearray.
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header).reshape(sizes)
