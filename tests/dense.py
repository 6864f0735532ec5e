"""The oracle: the dense float64 Hessian of a mean loss, by forward-over-reverse, which the package never uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, hessian


def dense_hessian(model: nn.Module, mean_loss: Callable[[Callable[..., Tensor]], Tensor], names: str = "") -> Tensor:
    """The Hessian (n, n) of ``mean_loss(call)`` in the trainable parameters whose name starts with ``names``.

    ``call(*inputs)`` runs the model, in eval mode and float64, at the parameters that are differentiated.
    """
    model = model.double().eval()
    params = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad and k.startswith(names)}

    def loss(flat: Tensor) -> Tensor:
        parts = torch.split(flat, [p.numel() for p in params.values()])
        given = {k: part.view_as(p) for (k, p), part in zip(params.items(), parts, strict=True)}
        return mean_loss(lambda *inputs, **kwargs: functional_call(model, given, inputs, kwargs))

    with patch.object(F, "layer_norm", _layer_norm):
        return hessian(loss)(torch.cat([p.reshape(-1) for p in params.values()]))


def _layer_norm(x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
    """In plain operations: torch's own, differentiated forward over reverse, gives an unsymmetric Hessian (2.13)."""
    over = tuple(range(-len(shape), 0))
    centred = x - x.mean(over, keepdim=True)
    normed: Tensor = centred / (centred.square().mean(over, keepdim=True) + eps).sqrt()
    normed = normed if weight is None else normed * weight
    return normed if bias is None else normed + bias


def top(matrix: Tensor, k: int = 5) -> Tensor:
    """The k largest eigenvalues, descending."""
    return torch.linalg.eigvalsh(matrix).flip(0)[:k]
