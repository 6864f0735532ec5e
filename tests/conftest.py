"""What holds for every test."""

import os

import matplotlib
import pytest
import torch

from sharpscope import DataError
from sharpscope.zoo import load_data

# Figures are drawn, never shown.
matplotlib.use("Agg")

# Of several processes each has one thread, and so have those that it starts.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True)
def _same_start() -> None:
    """Models that a test makes are the same at every run, in whatever order tests run."""
    torch.manual_seed(0)


@pytest.fixture
def _fashion_mnist() -> None:
    """The real Fashion-MNIST is here; in CI it must be, elsewhere the test is skipped and pytest says why."""
    try:
        load_data("fashion-mnist", "test")
    except DataError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
