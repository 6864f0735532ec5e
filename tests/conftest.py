"""What holds for every test."""

import matplotlib
import pytest
import torch

# Figures are drawn, never shown.
matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def _same_start() -> None:
    """Models that a test makes are the same at every run, in whatever order tests run."""
    torch.manual_seed(0)
