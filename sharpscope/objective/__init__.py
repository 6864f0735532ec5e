"""The mean loss of a data set, its gradient and its curvature products, in full passes over the data.

Start with ``double_backprop.py``: H v of one micro-batch in two calls of ``torch.autograd.grad``. ``losses.py`` writes
losses as sums over their terms, ``forward_loss.py`` runs the forward pass, ``accumulate.py`` sums over micro-batches,
``cost_and_out_of_memory.py`` wraps a micro-batch's graph, and ``objective.py`` has the public class.
"""

from sharpscope.objective.losses import TokenCrossEntropy
from sharpscope.objective.objective import Objective
from sharpscope.progress import Progress

__all__ = ["Objective", "Progress", "TokenCrossEntropy"]
