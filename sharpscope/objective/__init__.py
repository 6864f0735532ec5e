"""The mean loss of a data set, its gradient and its curvature products, in full passes over the data.

Where to read: ``hessian.py`` is H v of one micro-batch (two calls of ``torch.autograd.grad``), ``losses.py`` how a loss
counts its terms, ``forward.py`` the forward pass, ``accumulate.py`` the sum over micro-batches, ``guards.py`` what is
wrapped around a micro-batch's graph, ``objective.py`` the public class.
"""

from sharpscope.objective.losses import TokenCrossEntropy
from sharpscope.objective.objective import Objective
from sharpscope.progress import Progress

__all__ = ["Objective", "Progress", "TokenCrossEntropy"]
