"""Sharpness-aware minimisation as honest ``torch.optim`` optimizers."""

from sharpscope.optim.passes import frozen_buffers
from sharpscope.optim.sam import SAM

__all__ = ["SAM", "frozen_buffers"]
