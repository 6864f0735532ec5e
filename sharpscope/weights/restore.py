"""Restoring a model and the global random state bit for bit."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@contextmanager
def preserved(*modules: Any, data: Any = None) -> Iterator[None]:
    """Restore buffers, train/eval modes and all random states when the block ends, on exceptions too.

    Parameters and ``.grad`` are not copied, because a measurement does not change them. Random states: torch (CPU and
    accelerators), NumPy, ``random``, and the generators of a DataLoader.

    Args:
        modules: models and losses; anything that is not a Module is ignored.
        data: a DataLoader or any other data.
    """
    with ExitStack() as stack:
        for module in modules:
            if isinstance(module, nn.Module):
                stack.enter_context(_module(module))
        stack.enter_context(_random_state(data))
        yield


@contextmanager
def _module(module: nn.Module) -> Iterator[None]:
    children = list(module.modules())
    modes = [(child, child.training) for child in children]
    slots = [(child, dict(child._buffers)) for child in children if not isinstance(child, torch.jit.ScriptModule)]
    # A scripted module cannot gain or lose buffers.
    fixed = [list(child.buffers(recurse=False)) for child in children if isinstance(child, torch.jit.ScriptModule)]
    # An inference tensor cannot be written to outside inference mode.
    copies = [
        (buffer, buffer.detach().clone())
        for buffers in (*(held.values() for _, held in slots), *fixed)
        for buffer in buffers
        if buffer is not None and not buffer.is_inference()
    ]
    try:
        yield
    finally:
        for child, training in modes:
            child.training = training
        for child, buffers in slots:
            child._buffers.clear()
            child._buffers.update(buffers)
        with torch.no_grad():
            for buffer, copy in copies:
                # Compared by value, because BatchNorm's kernels do not increase the version counter, and an expanded
                # buffer cannot be written to.
                if not _same_bits(buffer, copy):
                    buffer.copy_(copy)


def _same_bits(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors are equal and so are the signs of their zeros."""
    return all(
        torch.equal(a, b) and (not a.is_floating_point() or torch.equal(a.signbit(), b.signbit()))
        for a, b in zip(strided(one), strided(two), strict=True)
    )


def strided(tensor: Tensor) -> tuple[Tensor, ...]:
    """``tensor`` itself, or the indices and values that a sparse tensor consists of."""
    if tensor.layout == torch.sparse_coo:
        return tensor._indices(), tensor._values()
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return tensor.ccol_indices(), tensor.row_indices(), tensor.values()
    return (tensor,)


@contextmanager
def _random_state(data: Any) -> Iterator[None]:
    generators = [generator for generator in _generators(data) if isinstance(generator, torch.Generator)]
    states = [generator.get_state() for generator in generators]
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        if mps is not None:
            torch.mps.set_rng_state(mps)
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _generators(data: Any) -> Iterator[Any]:
    inner = getattr(getattr(data, "batch_sampler", None), "sampler", None)
    for holder in (data, getattr(data, "sampler", None), inner):
        yield getattr(holder, "generator", None)
