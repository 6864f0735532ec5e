"""Two passes over one batch that see one and the same function of the weights.

SAM needs the gradient of the same loss at ``w`` and at ``w + e``. Whatever else changes between the two
passes (dropout masks) is noise in the difference it lives on, and whatever both passes change (BatchNorm's
running statistics) moves twice a step.
"""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import Optimizer

from sharpscope.errors import ArgumentError


class Pass:
    """A closure on its piece of the batch; again, with the same draws and with the buffers left as they were.

    Args:
        closure: called as ``closure(*tensors)``.
        ddp: whose ``no_sync`` keeps a pass to this process, or None.
        devices: whose default generators the closure may draw from.
    """

    def __init__(
        self, closure: Callable[..., Any], tensors: Sequence[Tensor], ddp: Any, devices: Iterable[torch.device]
    ) -> None:
        self._closure, self._tensors, self._ddp, self._devices = closure, tensors, ddp, devices
        self._replay: Callable[[], None] | None = None

    def __call__(self, local: bool) -> Any:
        """What the closure returns; ``local`` keeps its gradients from being averaged over processes."""
        again = self._replay is not None
        if self._replay is None:
            self._replay = random_state(self._devices)
        else:
            self._replay()
        # no_sync must hold for the forward pass too.
        alone = self._ddp.no_sync() if local and self._ddp is not None else nullcontext()
        with frozen_buffers() if again else nullcontext(), alone, torch.enable_grad():
            return self._closure(*self._tensors)


def random_state(devices: Iterable[torch.device]) -> Callable[[], None]:
    """Snapshot torch's default generators, on the CPU and on ``devices``; calling the result puts them back.

    Generators of Python's ``random``, of NumPy, and ``torch.Generator`` objects are not covered.
    """
    cpu_state = torch.get_rng_state()
    states: dict[torch.device, Tensor] = {}
    for device in devices:
        if device.type == "mps":
            states[device] = torch.mps.get_rng_state()
        elif device.type in ("cuda", "xpu"):
            states[device] = getattr(torch, device.type).get_rng_state(device)

    def replay() -> None:
        torch.set_rng_state(cpu_state)
        for device, state in states.items():
            if device.type == "mps":
                torch.mps.set_rng_state(state)
            else:
                getattr(torch, device.type).set_rng_state(state, device)

    return replay


@contextmanager
def frozen_buffers() -> Iterator[None]:
    """Leave the buffers of every module in training mode as they were: ``running_mean``, ``num_batches_tracked``, ...

    The modules work as always inside the ``with``: BatchNorm normalises by the statistics of the batch. What
    they wrote into their buffers is undone on exit, also on an error. Needs no reference to the model: each
    module that is called inside is seen, together with its children (a compiled or scripted module calls its
    children out of sight). Cost: one copy of the buffers, no gradients.

    Compiled models: ``torch.compile(model)`` warns of the global hook that this takes, without harm;
    ``model.compile()`` gets one graph break, so that ``fullgraph=True`` raises there.

    ``SAM.step(closure)`` does this for its second pass. In the two-call form, wrap the second forward *and*
    its backward, since autograd may hold on to a buffer until then::

        optimizer.first_step(zero_grad=True)
        with frozen_buffers():
            loss_fn(model(x), y).backward()
        optimizer.second_step(zero_grad=True)

    >>> import torch
    >>> from sharpscope.optim import frozen_buffers
    >>> norm = torch.nn.BatchNorm1d(1)
    >>> with frozen_buffers():
    ...     _ = norm(torch.full((4, 1), 5.0))
    >>> norm.running_mean
    tensor([0.])
    """
    seen: set[nn.Module] = set()
    slots: list[tuple[nn.Module, str, Tensor | None]] = []
    # Keyed by identity: two modules may share one buffer, and its first copy is the one to go back to.
    copies: dict[int, tuple[Tensor, Tensor]] = {}

    def save(module: nn.Module) -> None:
        if module in seen:
            return
        for child in module.modules():
            if child.training and child not in seen:
                seen.add(child)
                for name, buffer in child._buffers.items():
                    slots.append((child, name, buffer))
                    if buffer is not None and id(buffer) not in copies:
                        copies[id(buffer)] = (buffer, buffer.detach().clone())

    save_eagerly = torch.compiler.disable(save)  # type: ignore[no-untyped-call]

    def on_call(module: nn.Module, args: object) -> None:
        # torch.compile(model) came by here before its compiled region; model.compile() starts it earlier than
        # any hook. One graph break at that module is enough, since save looks at the children too.
        if not torch.compiler.is_compiling():
            save(module)
        elif module._compiled_call_impl is not None:
            save_eagerly(module)

    handle = register_module_forward_pre_hook(on_call)
    try:
        yield
    finally:
        handle.remove()
        with torch.no_grad():
            for buffer, copy in copies.values():
                buffer.copy_(copy)
        for module, name, original in slots:
            # A module may have put a new tensor in the buffer's place instead of writing into it.
            if module._buffers[name] is not original:
                module._buffers[name] = original


def check_rho(rho: object) -> None:
    if isinstance(rho, bool) or not isinstance(rho, numbers.Real) or not 0.0 <= float(rho) < math.inf:
        raise ArgumentError(f"rho must be a finite number >= 0, got {rho!r}. Foret et al. use 0.01 to 0.5.")


def check_base(base: object) -> None:
    what = "base_optimizer must be an optimizer class such as torch.optim.SGD"
    if isinstance(base, str):
        raise ArgumentError(f"{what}, got the string {base!r}. Pass the class itself.")
    if isinstance(base, Optimizer):
        name = type(base).__name__
        raise ArgumentError(f"{what}, got a finished {name}. Pass the class and its options: SAM(params, {name}, ...).")
    if not (isinstance(base, type) and issubclass(base, Optimizer)):
        raise ArgumentError(f"{what}, got {base!r}.")
    closure = inspect.signature(base.step).parameters.get("closure")
    nested = hasattr(base, "first_step")
    if nested or (closure is not None and closure.default is inspect.Parameter.empty):
        raise ArgumentError(
            f"{what}, got {base.__name__}, whose own step needs a closure. Pass one whose step does not."
        )


def dense_gradients(params: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of ``params``, all of which have one.

    Raises:
        ArgumentError: a gradient is sparse.
    """
    grads = [p.grad for p in params if p.grad is not None]
    sparse = next((g for g in grads if g.layout != torch.strided), None)
    if sparse is not None:
        raise ArgumentError(
            f"SAM needs dense gradients, got one of shape {tuple(sparse.shape)} with layout {sparse.layout}. "
            "Build the embedding with sparse=False."
        )
    return grads
