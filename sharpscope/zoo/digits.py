"""The 1,797 handwritten digits of UCI's optical recognition set, 8 by 8 pixels.

E. Alpaydin and C. Kaynak (1998), Optical Recognition of Handwritten Digits, UCI Machine Learning Repository,
https://doi.org/10.24432/C50P49, licensed CC BY 4.0; values and order are those of scikit-learn's ``load_digits``.
``DIGITS.txt`` beside this file says what was changed.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from sharpscope.zoo.dataset import DataSet


def digits(split: str, root: str | os.PathLike[str] | None = None) -> DataSet:
    """One split, inputs (N, 1, 8, 8) scaled from 0..16 to [0, 1]: every fifth digit (360) is "test", 1,437 "train".

    ``root`` is not used: the set comes with the package.
    """
    with np.load(Path(__file__).with_name("digits.npz")) as stored:
        images, labels = torch.from_numpy(stored["images"]), torch.from_numpy(stored["labels"])
    test = torch.arange(len(labels)) % 5 == 0
    chosen = test if split == "test" else ~test
    return DataSet(images[chosen].unsqueeze(1).float() / 16, labels[chosen].long(), 10, "digits", split)
