"""Repeat a forward and backward pass with the same random draws and without updating buffers twice.

SAM needs the gradient of the same loss at ``w`` and at ``w + e``. Different dropout masks in the two passes would add
noise to the difference, and BatchNorm's running statistics would be updated twice per step.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_pre_hooks
from torch.nn.parameter import is_lazy

from sharpscope.weights.tensor_lists import is_distributed, local


class ReplayedClosure:
    """Calls a closure on a chunk; later calls repeat the random draws of the first, and see the buffers that it saw.

    After each call the buffers are those after the first.

    Args:
        closure: called as ``closure(*tensors)``.
        ddp: DistributedDataParallel model, to skip its gradient averaging with ``no_sync``; or None.
        devices: devices of the default generators that the closure may use.
        modules: modules whose state is saved besides that of those that the closure calls; None if there is one call
            alone, so that nothing need be copied.
    """

    def __init__(
        self,
        closure: Callable[..., Any],
        tensors: Sequence[Tensor],
        ddp: Any,
        devices: Iterable[torch.device],
        modules: Sequence[nn.Module] | None,
    ) -> None:
        self._closure, self._tensors, self._ddp, self._devices = closure, tensors, ddp, devices
        self._modules = modules
        self._replay: Callable[[], None] | None = None
        self._before = ModuleState()

    def __call__(self, local: bool) -> Any:
        """Return what the closure returns; ``local`` does not average the gradients over processes."""
        # DDP requires no_sync around the forward pass too.
        no_sync = self._ddp.no_sync() if local and self._ddp is not None else nullcontext()
        if self._replay is None:
            self._replay = random_state(self._devices)
            for module in self._modules or ():
                self._before.save(module)
            with self._before.recorded() if self._modules is not None else nullcontext(), no_sync, torch.enable_grad():
                return self._closure(*self._tensors)
        self._replay()
        after = ModuleState()
        for module in self._before.modules:
            after.save(module)
        self._before.reshard()  # gathered at other weights
        try:
            self._before.restore()
            with after.recorded(), no_sync, torch.enable_grad():
                return self._closure(*self._tensors)
        except BaseException:
            self._before.reshard(failed=True)
            raise
        finally:
            after.restore()
            self._before.reshard()


class EmptyGradients:
    """Context in which the gradients of a pass start from empty, whether or not the caller zeroes them.

    When the first gradient arrives, each ``.grad`` that was not zeroed inside the context (it is the same tensor, in
    the same version) is set to None and kept in ``found``. A parameter that gets no gradient is then left without one.

    ``fully_shard`` adds gradients without a hook before it. There zeros stand in for ``.grad``; what was added to them
    once and to nothing else was not zeroed.

    Args:
        params: parameters that get gradients.
        first: ``first`` after an earlier pass, so that one hook suffices; None sets a hook on every parameter.

    Attributes:
        found: gradients that were not zeroed, by parameter.
        first: parameter whose gradient arrived first; None if that is unknown, or if anything was not zeroed.
    """

    def __init__(self, params: Iterable[Tensor], first: Tensor | None = None) -> None:
        self.found: dict[Tensor, Tensor] = {}
        self.first = first
        self._before: dict[Tensor, tuple[Tensor, Tensor, int]] = {}
        self._arrived = False
        # Each device has its own backward thread: none may accumulate before all of .grad is set aside.
        self._lock = threading.Lock()
        self._handles = []
        for p in params:
            if p.requires_grad and p.grad is not None:
                grad = before = p.grad
                if is_distributed(p):
                    grad = p.grad = torch.zeros_like(before)
                    self._handles.append(p.register_post_accumulate_grad_hook(self._after_first))  # type: ignore[no-untyped-call]
                self._before[p] = before, grad, _version_of(grad)
        watched = [first] if first is not None and first in self._before else list(self._before)
        self._handles += [p.register_hook(partial(self._set_aside, p)) for p in watched]  # type: ignore[no-untyped-call]

    def _set_aside(self, first: Tensor | None, _: Tensor | None = None) -> None:
        with self._lock:
            if not self._before:
                return
            for p, (before, grad, version) in self._before.items():
                if p.grad is grad and _version_of(grad) == version:
                    # DistributedDataParallel may write the next gradients into the memory of a view.
                    self.found[p] = before.clone() if before._is_view() else before
                    p.grad = None
            self._before.clear()
            self.first = None if self.found else first

    def _after_first(self, p: Tensor) -> None:
        with self._lock:
            self._arrived = True
            before, grad, version = self._before.pop(p, (p, None, 0))
            if grad is not None and p.grad is grad and _version_of(grad) == version + 1:
                self.found[p], self.first = before, None

    def close(self) -> None:
        """Remove the hooks. If no gradient has arrived, ``.grad`` is what it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for p, (before, grad, version) in self._before.items():
            if p.grad is grad and _version_of(grad) == version:
                p.grad = None if self._arrived else before
        self._before.clear()

    def __enter__(self) -> EmptyGradients:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._set_aside(None)  # no gradient arrived: what .grad holds is not of this pass
        self.close()


def _version_of(tensor: Tensor) -> int:
    """Number of changes in place, of a distributed tensor itself and of its shard, which count their own."""
    return tensor._version + local(tensor)._version if is_distributed(tensor) else tensor._version


def random_state(devices: Iterable[torch.device]) -> Callable[[], None]:
    """Save the state of torch's default generators, on the CPU and on ``devices``; calling the result restores it.

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
    """Restore the buffers of every module in training mode on exit: ``running_mean``, ``num_batches_tracked``, ...

    Attributes that are tensors, or hold nothing else, such as the state of an RNN, are restored too.

    The modules work as usual inside the ``with``: BatchNorm normalises by the statistics of the batch. Changes of
    their buffers are undone on exit, also on an error. Needs no reference to the model: a global hook registers each
    module that is called inside, and its children (which a compiled or scripted module calls without hooks).
    Cost: one copy of the buffers and of those attributes, no gradients.

    Compiled models: ``torch.compile(model)`` warns about the global hook, which is harmless;
    ``model.compile()`` gets one graph break, so ``fullgraph=True`` raises there.

    ``SAM.step(closure)`` also lets its second pass see the buffers that the first saw. In the two-call form the second
    pass sees them as the first left them: use ``step(closure)`` if the forward pass reads them in training mode.
    In the two-call form, wrap the second forward *and* its backward, since autograd may hold on to a buffer until
    then::

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
    state = ModuleState()
    try:
        with state.recorded():
            yield
    finally:
        state.restore()


# Attributes of every module, which hold its parameters, children and hooks.
_OWN = frozenset(vars(nn.Module()))


class ModuleState:
    """Copies of the buffers of modules in training mode, and of attributes that are tensors.

    Tuples, lists and dicts of tensors count too, such as the state of an LSTM. Of a tensor that requires gradients only
    the reference is saved, since autograd forbids most writes into it.
    """

    def __init__(self) -> None:
        self.modules: dict[nn.Module, None] = {}
        self._sharded: dict[Any, None] = {}  # modules of fully_shard
        self._slots: list[tuple[nn.Module, dict[str, Tensor | None], dict[str, Any]]] = []
        self._containers: list[tuple[Any, Any]] = []
        # Keyed by identity: two modules may share one buffer, and its first copy is the one to restore.
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}
        self._thread: int | None = None  # that records

    def save(self, module: nn.Module) -> None:
        """Copy the state of ``module`` and its children, except of modules that are saved already."""
        if module in self.modules:
            return
        for child in module.modules():
            if hasattr(type(child), "set_reshard_after_backward"):
                self._sharded[child] = None
            if child.training and child not in self.modules:
                self.modules[child] = None
                attributes = {k: v for k, v in vars(child).items() if k not in _OWN}
                self._slots.append((child, dict(child._buffers), attributes))
                for value in (*child._buffers.values(), *attributes.values()):
                    if _is_state(value):
                        self._copy(value)

    def _copy(self, value: Any) -> None:
        if isinstance(value, Tensor):
            # Nobody can write into a tensor that overlaps itself, such as an expanded one.
            writable = not is_lazy(value) and torch._debug_has_internal_overlap(value) != 1
            if id(value) not in self._copies and writable and not value.requires_grad:
                self._copies[id(value)] = (value, value.detach().clone())
        elif isinstance(value, tuple | list | dict):
            if not isinstance(value, tuple):
                self._containers.append((value, value.copy()))
            for entry in value.values() if isinstance(value, dict) else value:
                self._copy(entry)

    @torch.no_grad()
    def restore(self) -> None:
        """Write the copies back."""
        for tensor, copy in self._copies.values():
            tensor.copy_(copy)
        for container, entries in self._containers:
            container.clear()
            (container.update if isinstance(container, dict) else container.extend)(entries)
        # A module may have replaced a tensor by a new one instead of writing into it, or have added one.
        for module, buffers, attributes in self._slots:
            _put_back(module._buffers, buffers)
            _put_back(vars(module), attributes)

    def reshard(self, failed: bool = False) -> None:
        """Discard the parameters that ``fully_shard`` has gathered, so that the next pass gathers the current ones.

        ``failed``: after an error amid a pass, where newer versions of torch need ``reset_iter_state`` of the root.
        """
        for module in self._sharded:
            if failed and hasattr(module, "reset_iter_state"):
                with suppress(RuntimeError):  # not the root
                    module.reset_iter_state()
            else:
                module.reshard()

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Save each module that this thread calls inside, before its first call; another thread may train its own."""
        global _save_eagerly
        self._thread = threading.get_ident()
        if _save_eagerly is _save:
            _save_eagerly = torch.compiler.disable(_save)  # type: ignore[no-untyped-call]
        _recording.append(self)
        _global_forward_pre_hooks[_HOOK] = _on_call
        try:
            yield
        finally:
            _recording.remove(self)
            if not _recording:
                del _global_forward_pre_hooks[_HOOK]


# torch.compile guards on the keys of the hooks: a new one in every step would compile the model again.
_HOOK = -1
_recording: list[ModuleState] = []


def _save(module: nn.Module) -> None:
    for state in _recording:
        if state._thread == threading.get_ident():
            state.save(module)


# ``_save``, not to be compiled; made by the first step, not on import, since it loads torch's compiler.
_save_eagerly: Callable[[nn.Module], None] = _save


def _on_call(module: nn.Module, args: object) -> None:
    # torch.compile(model) runs this hook before its compiled region; model.compile() starts compiling before any hook.
    # One graph break at that module suffices, since save visits its children too.
    if not torch.compiler.is_compiling():
        _save(module)
    elif module._compiled_call_impl is not None:
        _save_eagerly(module)


def _put_back(now: dict[str, Any], before: Mapping[str, Any]) -> None:
    """Make the state in the dict ``now`` that of ``before``: replaced, new and deleted entries."""
    for name in [n for n, value in now.items() if n not in before and n not in _OWN and _is_state(value)]:
        del now[name]
    for name, value in before.items():
        if now.get(name) is not value and (_is_state(value) or _is_state(now.get(name))):
            now[name] = value


def _is_state(value: Any) -> bool:
    """Whether ``value`` is a tensor, or a tuple, list or dict of nothing but tensors and None; a Parameter is not."""
    if isinstance(value, tuple | list | dict):
        return all(v is None or _is_state(v) for v in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, Tensor) and not isinstance(value, nn.Parameter)
