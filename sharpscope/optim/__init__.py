"""SAM and its variants as ``torch.optim`` optimizers."""

from sharpscope.optim.replay import frozen_buffers
from sharpscope.optim.sam import SAM
from sharpscope.optim.variants import ASAM, GSAM, FriendlySAM, LookSAM

__all__ = ["ASAM", "GSAM", "SAM", "FriendlySAM", "LookSAM", "frozen_buffers"]
