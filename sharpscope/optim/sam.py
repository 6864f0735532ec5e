"""SAM around any ``torch.optim`` optimizer."""

from __future__ import annotations

import gc
import inspect
import math
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT

from sharpscope.errors import ArgumentError, require_count
from sharpscope.optim.ascent import AscentSteps, GradientSum, check_rho, dense_gradients, split_batch
from sharpscope.optim.replay import EmptyGradients, ReplayedClosure
from sharpscope.weights.norm_ball import Ball, norm_of, norm_on_device, settled_norm, widened
from sharpscope.weights.perturbation import cosine
from sharpscope.weights.tensor_lists import local

Loss = TypeVar("Loss")
T = TypeVar("T")

# Float32 rounding gives a cosine above 0.999999; bfloat16 weights of a trained network gave 0.56.
_MIN_COSINE = 0.9

# Two gradients of one batch at one w differ by rounding: under bfloat16 autocast by up to 0.4 %.
_SAME_GRADIENT = 0.01

# stacklevel of a warning that points to the caller of step(), by where the gradient was taken: our frames, and torch's
# two wrappers of step() or one of first_step() and second_step().
_CALLER = {"w": 5, "w + e": 6}


# What two-step recipes keep in the state of a parameter between their two steps.
_TWO_STEP_STATE = frozenset(("old_p", "e_w", "old_g"))

# Group entry of the variants with a memory: the number of steps that it covers.
_STEPS = "sam_steps"


class _Progress(Generic[T]):
    """An attribute that steps change.

    It is kept in one dict, ``_progress``: trainers wrap an optimizer in an object of a subclass that copies or forwards
    its attributes, and what ``first_step`` of the wrapper sets must reach the optimizer.
    """

    def __init__(self, start: T) -> None:
        self._start = start

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, optimizer: SAM | None, owner: type) -> T:
        value: T = self._start if optimizer is None else optimizer._progress.get(self._name, self._start)
        return value

    def __set__(self, optimizer: SAM, value: T) -> None:
        optimizer._progress[self._name] = value


class SAM(Optimizer):
    """``w <- base step at w with grad L(w + e)``, ``e = rho g / ||g||_2`` (p = 2) or ``rho sign(g)`` (p = inf).

    ``g = grad L(w)``, and its norm is over all parameter groups. SAM and the base optimizer share ``param_groups``,
    ``state`` and ``defaults``, so schedulers, ``add_param_group`` and ``load_state_dict`` apply to both, and
    ``state_dict()`` resumes bit for bit, also through ``torch.distributed.checkpoint``. SAM also loads the state dict
    of the base optimizer alone. A group may set its own ``rho``. With ``maximize=True`` the perturbation descends.

    Parameters may be distributed tensors, as after ``torch.distributed.fsdp.fully_shard``: each process moves its
    shards, and norms are over all of them. All processes must call ``step`` with the same number of chunks. Whatever
    fails at ``w + e``, the weights are restored bit for bit.

    A step whose gradient is zero or not finite at ``w``, or not finite at ``w + e``, is skipped: weights and state do
    not change, ``skipped_steps`` is incremented, and a RuntimeWarning is issued (not with a GradScaler, which causes
    such steps when it tries a larger scale).

    Args:
        params: parameters, named parameters or groups, as for any optimizer; real, with dense gradients.
        base_optimizer: an optimizer *class*, such as ``torch.optim.SGD``.
        rho: radius of the perturbation, >= 0, in units of the weights (of the scaled weights if ``adaptive``).
        p: norm of the perturbation, 2 or inf (``float("inf")`` or ``"inf"``).
        adaptive: None, "elementwise" or "filter": scale the ball by the magnitudes of the weights, see
            ``sharpscope.weights.norm_ball``.
        eta: constant added to those magnitudes.
        ascent_steps: number k of ascent steps of length ``rho / k``, each along the gradient at the current point.
        normalize: False takes ``e = rho D^2 g``, without a norm (Andriushchenko and Flammarion 2022); p = 2 only.
        m: examples per perturbation (Foret et al. 2021, section 4.1). ``step(closure, *batch)`` splits the batch into
            chunks of m (the last may be smaller), perturbs for each chunk separately, and averages the gradients at
            ``w + e``. None: one perturbation for all examples of a closure.
        ddp: the ``DistributedDataParallel`` model, so that each process perturbs with its own gradient; m is then at
            most the batch of one process. Without it, DDP averages the first gradient too, and all processes use
            the same perturbation.
        base_options: options of ``base_optimizer`` that share a name with an argument here, such as the ``alpha`` of
            RMSprop and ASGD under GSAM and LookSAM: ``GSAM(..., RMSprop, alpha=0.4, base_options={"alpha": 0.9})``.
        options: passed to ``base_optimizer``: ``lr``, ``momentum``, ``weight_decay``, ...

    Attributes:
        skipped_steps: number of skipped steps.
        num_gradients: gradients computed so far, in units of one batch.
        effective_m: examples per perturbation in the last step, over all processes; None if step() was called without
            the batch.

    Cost: 1 + ascent_steps gradients per step, and a copy of the weights; with several chunks also a sum of gradients.

    Raises: ArgumentError for an argument outside its domain, complex parameters, those of the older
        ``FullyShardedDataParallel``, sparse gradients, or a base optimizer with a ``rho`` of its own, such as Adadelta.

    Source: Foret et al. 2021, Algorithm 1 and Eq. 2. The released code differs: it has the L2 penalty in the loss of
        both passes; here the base optimizer applies weight decay at ``w``, as in Eq. 1. The paper does not define the
        step for ``||g|| = 0``.

    >>> import torch
    >>> from sharpscope.optim import SAM
    >>> w = torch.nn.Parameter(torch.tensor(1.0))
    >>> optimizer = SAM([w], torch.optim.SGD, rho=0.5, lr=0.1)
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = w**2 / 2
    ...     loss.backward()
    ...     return loss
    >>> optimizer.step(closure).item(), w.data  # L(w), and 1 - 0.1 (1 + 0.5)
    (0.5, tensor(0.8500))
    """

    base_optimizer: Optimizer
    m: int | None
    skipped_steps = _Progress(0)
    num_gradients = _Progress(0.0)
    effective_m: _Progress[int | None] = _Progress(None)

    # Attributes copied and pickled besides those of every optimizer; variants add theirs.
    _copied_attributes: tuple[str, ...] = ("base_optimizer", "m", "_ascent", "_ddp")
    # What a variant remembers of each parameter from step to step: its name in the parameter's state; None: nothing.
    _memory_name: str | None = None
    # Whether ``_combine`` needs the gradient at w as well as that at w + e.
    _uses_gradient_at_w: bool = False
    # Whether every step takes two gradients, so that first_step and second_step can be called.
    _supports_two_calls: bool = True
    # GradScaler.step then calls step() whatever it found in .grad, with grad_scale set: step() names the right call.
    _step_supports_amp_scaling: bool = True
    # Gradient at w, stored for ``_combine`` between first_step and second_step.
    _at_w: _Progress[GradientSum | None] = _Progress(None)
    # Hooks between first_step and second_step, and the parameter whose gradient arrives first in a pass.
    _second_pass: _Progress[EmptyGradients | None] = _Progress(None)
    _first_gradient: _Progress[Tensor | None] = _Progress(None)
    _rounding_reported = _Progress(False)
    # Modules that hold the parameters, as references that do not keep them.
    _owners: _Progress[list[Callable[[], nn.Module | None]] | None] = _Progress(None)
    # Schedulers read this to warn about a missing optimizer step; second_step() counts as a step.
    _opt_called = _Progress(False)

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: type[Optimizer],
        rho: float = 0.05,
        *,
        p: float | str = 2,
        adaptive: str | None = None,
        eta: float = 0.0,
        ascent_steps: int = 1,
        normalize: bool = True,
        m: int | None = None,
        ddp: Any = None,
        base_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        _check_base(base_optimizer)
        check_rho(rho)
        for name, count in (("ascent_steps", ascent_steps), ("m", 1 if m is None else m)):
            require_count(name, count)
        ball = Ball(p, adaptive, eta)  # type: ignore[arg-type]
        if not normalize and ball.p != 2:
            raise ArgumentError("normalize=False needs p=2, got p=inf, which always steps by rho sign(g).")
        if ddp is not None and not hasattr(ddp, "no_sync"):
            raise ArgumentError(f"ddp must be the DistributedDataParallel model, got {type(ddp).__name__}.")
        self._progress: dict[str, Any] = {}
        make_base: Callable[..., Optimizer] = base_optimizer
        twice = sorted(set(options) & set(base_options or {}))
        if twice:
            raise ArgumentError(f"{twice[0]} must be given once, got it as an argument and in base_options. Drop one.")
        base = make_base(params, **options, **(base_options or {}))
        if "rho" in base.defaults:
            raise ArgumentError(
                f"{base_optimizer.__name__} has a rho of its own (default {base.defaults['rho']!r}), and the groups "
                "that it shares with SAM can hold only one. Use another base optimizer, or this one without SAM."
            )
        base.defaults["rho"] = rho
        if self._memory_name is not None:
            base.defaults[_STEPS] = 0
        super().__init__(base.param_groups, base.defaults)
        self.base_optimizer = base
        self.state = base.state  # some optimizers, such as Adagrad, fill it in their constructor
        self._ascent, self.m, self._ddp = AscentSteps(ball, ascent_steps, normalize), m, ddp
        self._link()
        if self.state:
            self._initialise_memory()

    def _link(self) -> None:
        # By __setstate__ of the base, since some optimizers convert old checkpoints there.
        shared = {"defaults": self.defaults, "state": self.state, "param_groups": self.param_groups}
        with self._hidden_memory():
            self.base_optimizer.__setstate__(shared)

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_while_perturbed("a copy")
        counts = {name: value for name, value in self._progress.items() if isinstance(value, int | float)}
        copied = {name: getattr(self, name) for name in self._copied_attributes}
        return {**super().__getstate__(), **copied, "_progress": counts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._link()

    def state_dict(self) -> dict[str, Any]:
        """State of the base optimizer and the shared groups, including ``rho``; the base optimizer can load it too.

        What a variant remembers of a parameter is an entry of the parameter's state, so that
        ``torch.distributed.checkpoint`` saves and loads it like that of any optimizer.

        Raises: ArgumentError if the weights are perturbed, or if state or groups are no longer the base optimizer's.
        """
        self._refuse_while_perturbed("state_dict()")
        self._require_shared()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of SAM, or of the base optimizer alone, which does not change ``rho``.

        The memory of another variant is left out.

        Raises: ArgumentError if the weights are perturbed, or for a state dict of a SAM that keeps the state of its
            base optimizer elsewhere.
        """
        self._refuse_while_perturbed("load_state_dict()")
        params, radii = self._params(), [group["rho"] for group in self.param_groups]
        base_state, memory = self._base_state(state_dict)
        groups, state = self.param_groups, self.state
        super().load_state_dict({**state_dict, "state": base_state})
        # In place: a trainer's wrapper and the optimizer inside share these objects.
        groups[:], loaded = self.param_groups, dict(self.state)
        state.clear()
        state.update(loaded)
        self.param_groups, self.state = groups, state
        self._link()
        steps = max(int(group.get(_STEPS, 0)) for group in self.param_groups) if memory else 0
        for group, rho in zip(self.param_groups, radii, strict=True):
            group.setdefault("rho", rho)
            group.pop(_STEPS, None)
        if self._memory_name is None:
            return
        self._set_steps(steps)
        # After the base's own loading, which casts to the precision of the weights.
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, p in zip(ids, params, strict=True):
            if i in memory:
                self.state[p][self._memory_name] = memory[i].to(p.device)

    def _base_state(self, state_dict: dict[str, Any]) -> tuple[dict[Any, Any], dict[Any, Tensor]]:
        """The state that is for the base optimizer, and the memory of this variant, by the keys of ``state_dict``."""
        names = {kind._memory_name for kind in _kinds(SAM)} - {None}
        state, memory, between = {}, {}, 0
        for key, entries in state_dict["state"].items():
            if self._memory_name in entries:
                memory[key] = entries[self._memory_name]
            of_base = {name: v for name, v in entries.items() if name not in names | _TWO_STEP_STATE}
            between += not _TWO_STEP_STATE.isdisjoint(entries)
            if of_base:
                state[key] = of_base
        if between and not state:
            raise ArgumentError(
                f"The state dict holds none of the state of the base optimizer, only what its SAM needs within a step "
                f"({', '.join(sorted(_TWO_STEP_STATE))}). Pass the state_dict() of its base_optimizer, or, if there "
                'is only this one, {**state_dict, "state": {}}, with which momentum and the like start anew.'
            )
        adaptive = "adaptive" not in self.defaults and any(g.get("adaptive") for g in state_dict["param_groups"])
        if adaptive and self._ascent.ball.scaling != "elementwise":
            raise ArgumentError(
                "The state dict is of a SAM with adaptive=True, but this one has "
                f'adaptive={self._ascent.ball.scaling!r}. Build it with adaptive="elementwise".'
            )
        return state, memory

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to SAM and to the base optimizer; its options may include ``rho``.

        Raises: ArgumentError for ``rho`` outside its domain, or complex parameters.
        """
        check_rho(param_group.get("rho", self.defaults["rho"]))
        self._owners = None
        # Absent only in the constructor, which passes groups that the base optimizer already has.
        if hasattr(self, "base_optimizer"):
            self.base_optimizer.add_param_group(param_group)
        else:
            super().add_param_group(param_group)
        if any(p.is_complex() for p in self.param_groups[-1]["params"]):
            self.param_groups.pop()
            raise ArgumentError("SAM needs real parameters, got complex ones. Pass torch.view_as_real(parameter).")
        if any(getattr(p, "_fsdp_flattened", False) for p in self.param_groups[-1]["params"]):
            self.param_groups.pop()
            raise ArgumentError(
                "SAM needs the norm of the whole gradient, but FullyShardedDataParallel hides which shard a parameter "
                "is. Shard the model with torch.distributed.fsdp.fully_shard."
            )
        if self._memory_name is not None:
            self.param_groups[-1][_STEPS] = self.param_groups[0][_STEPS]

    @torch.no_grad()
    def step(self, closure: Callable[..., Loss] | None = None, *batch: Tensor, scaler: Any = None) -> Loss:
        """Call ``closure`` at ``w`` and at ``w + e``, then step the base optimizer.

        Both passes draw the same dropout masks: torch's default generators are replayed. Draw from NumPy, ``random`` or
        other generators before the closure. Both passes see the same buffers, such as BatchNorm's statistics or the
        state of an RNN, which are updated once: those of modules in training mode that hold the parameters or that the
        closure calls, and their attributes that are tensors (or tuples, lists or dicts of them). State that the closure
        keeps itself is not covered. The weights are restored from a copy, even if ``closure`` raises. To clip the
        gradient at ``w + e``, use ``base_optimizer.register_step_pre_hook``.

        Args:
            closure: zeroes the gradients, computes the loss, calls backward and returns the loss. Both calls must use
                the same examples, so load them outside. To accumulate over micro-batches, call backward for each of
                them inside; the perturbation is then that of the whole batch. A closure that does not zero the
                gradients may find none in ``.grad``, or those of its own examples from a backward before the step;
                each pass starts from empty gradients.
            batch: tensors passed to the closure, as ``closure(inputs, targets)``. With ``m``, each call gets ``m`` rows
                and must return their mean loss.
            scaler: a ``torch.amp.GradScaler``; the closure calls ``scaler.scale(loss).backward()``. Call only
                ``scaler.update()`` afterwards.

        Returns: what the closure returned at ``w``: the loss, or a tuple that begins with it. With ``m``, the mean loss
            over all examples; every further entry of a tuple becomes a list with an entry for each chunk.

        Cost: 1 + ascent_steps gradients.

        Raises: ArgumentError without a closure, if called by ``scaler.step(optimizer)``, for m without the batch, for
            sparse gradients, for gradients of other examples that the closure does not zero, or between ``first_step``
            and ``second_step``.
        """
        self._refuse_while_perturbed("step()")
        if closure is None and self._only_initialises():
            self.base_optimizer.step()
            self._initialise_memory()
            return None  # type: ignore[return-value]
        if hasattr(self, "grad_scale"):
            # Set by GradScaler.step, which does not remove it after an error.
            vars(self).pop("grad_scale")
            vars(self).pop("found_inf", None)
            raise ArgumentError(
                "SAM.step unscales the gradients of both passes itself, but was called by scaler.step(optimizer). Call "
                "optimizer.step(closure, scaler=scaler) instead, then scaler.update()."
            )
        if closure is None:
            two_calls = ", or call first_step() and second_step()" if self._has_two_calls() else ""
            raise ArgumentError(
                f"{type(self).__name__}.step needs a closure, since it takes two gradients: pass step(closure) with a "
                f"function that zeroes the gradients, calls backward and returns the loss{two_calls}. With a "
                "torch.amp.GradScaler, call step(closure, scaler=scaler) instead of scaler.step(optimizer)."
            )
        self._require_shared()
        self._start_step()
        chunks = split_batch(batch, self.m)
        self.effective_m = self._examples(batch)
        perturbs = self._perturbs()
        # False with m and ddp: processes with different numbers of chunks would call different collectives.
        single_chunk = len(chunks) == 1 and (self._ddp is None or self.m is None)
        inverse_scale = 1.0 if scaler is None else 1.0 / scaler.get_scale()
        # Sums are needed only for several chunks, or for a variant that combines both gradients.
        at_w = GradientSum(self._params()) if self._uses_gradient_at_w and perturbs else None
        at_e = None if single_chunk else GradientSum(self._params())
        outputs: list[Any] = []
        for i, (tensors, share) in enumerate(chunks):
            modules = self._modules() if perturbs else None
            replayed = ReplayedClosure(closure, tensors, self._ddp, self._devices(), modules)
            loss, found = self._gradient(replayed, share, local=perturbs or not single_chunk)
            outputs.append(loss)
            if i == 0:
                self._refuse_other_gradients(found, comparable=single_chunk and self._ddp is None)
            if self.m is not None:
                self._require_loss(loss, several=len(chunks) > 1)
            if at_w is not None:
                at_w.add(share * inverse_scale)
            if perturbs:
                try:
                    reason = self._gradient_at_perturbed(replayed, share, single_chunk, inverse_scale)
                except BaseException:
                    self._ascent.restore()  # again: an interrupt may have come within the first
                    raise
                if reason is not None:
                    self._skip(reason, "w", scaler)
                    return self._output(outputs, [1.0])  # type: ignore[no-any-return]
            if at_e is not None:
                at_e.add(share)
        if self._ddp is not None:
            for total in (at_w, at_e):
                if total is not None:
                    total.all_reduce_mean(self._ddp.process_group)
        if at_e is not None:
            at_e.write_to_grad()
        self._descend(at_w, scaler, perturbed=perturbs and single_chunk)
        return self._output(outputs, [share for _, share in chunks])  # type: ignore[no-any-return]

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Move the weights to ``w + e`` with the gradients in ``.grad``; ``second_step`` completes the step.

        The gradients of the second pass replace those of the first, also without ``zero_grad``.

        Unlike ``step(closure)``, dropout draws new masks in the second pass, and BatchNorm is updated twice unless the
        second pass runs in ``frozen_buffers()``. Step hooks of SAM do not run.

        Args:
            zero_grad: zero the gradients afterwards.

        Raises: ArgumentError if called twice without ``second_step``, for sparse gradients, and with m, ddp or several
            ascent steps, which need ``step(closure)``.
        """
        self._refuse_while_perturbed("first_step()")
        self._require_shared()
        self._start_step()
        if not self._has_two_calls():
            raise ArgumentError(
                "first_step() and second_step() are for two gradients in every step, not for m, ddp, several "
                "ascent_steps or LookSAM: call step(closure, *batch)."
            )
        self.num_gradients += 2
        if self._uses_gradient_at_w:
            self._at_w = GradientSum(self._params())
            self._at_w.add(1.0)
        try:
            reason = self._ascent.step(self.param_groups, self._ascent_direction, 1.0)
            if reason is not None:
                self._ascent.begin_at_w()
                self._skip(reason, "w")
            if zero_grad:
                self.zero_grad()
            self._second_pass = EmptyGradients(self._params())
        except BaseException:
            self._ascent.restore()
            raise

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Restore ``w`` and step the base optimizer with the gradients in ``.grad``.

        Args:
            zero_grad: zero the gradients afterwards.

        Raises: ArgumentError without ``first_step`` before.
        """
        if not self._ascent.is_perturbed:
            raise ArgumentError("second_step() must follow first_step(), got none. Call first_step() before it.")
        try:
            if self._second_pass is not None:
                self._second_pass.close()
                self._second_pass = None
        finally:
            moved = self._ascent.restore()
        if moved:
            self._descend(self._at_w)
        self._at_w = None
        if zero_grad:
            self.zero_grad()

    @property
    def is_perturbed(self) -> bool:
        """Whether the weights are at w + e, between ``first_step`` and ``second_step``."""
        return self._ascent.is_perturbed

    @property
    def p(self) -> float:
        """Norm of the perturbation, 2 or infinity."""
        return self._ascent.ball.p

    @property
    def plain(self) -> bool:
        """Whether the gradient is ``grad L(w + rho g / ||g||_2)``, as in the paper: one ascent step, no variant."""
        hooks = ("_perturbs", "_ascent_direction", "_combine")
        unchanged = all(getattr(type(self), name) is getattr(SAM, name) for name in hooks)
        return unchanged and self._ascent.ball == Ball() and self._ascent.steps == 1 and self._ascent.normalize

    def _require_shared(self) -> None:
        base = self.base_optimizer
        if base.state is not self.state or base.param_groups is not self.param_groups:
            raise ArgumentError(
                "SAM and its base optimizer share state and param_groups, but one of them was replaced by another "
                "object. Change them in place (optimizer.state.clear(), optimizer.param_groups[:] = ...), or load a "
                "state dict by load_state_dict of SAM, not of base_optimizer."
            )

    # Hooks for variants.

    def _start_step(self) -> None:
        """Called at the beginning of a step."""

    def _perturbs(self) -> bool:
        """Whether this step takes the gradient at w + e."""
        return True

    def _ascent_direction(self, weights: Sequence[Tensor], grads: list[Tensor]) -> list[Tensor]:
        """Direction of ascent from the gradients of ``weights``; by default the gradients themselves."""
        return grads

    def _combine(self, at_w: GradientSum | None) -> None:
        """Replace ``.grad``, the gradient at w + e, by that for the base step; ``at_w`` is the gradient at w."""

    # What a variant remembers. It lies in the state of the base optimizer, which must not take it for its own.

    def _steps(self) -> int:
        """Number of steps that the memory covers."""
        return int(self.param_groups[0][_STEPS])

    def _set_steps(self, steps: int) -> None:
        for group in self.param_groups:
            group[_STEPS] = steps

    def _memory(self) -> dict[Tensor, Tensor]:
        """What the variant remembers, by parameter; empty before its first step."""
        return self._stored_memory() if self._steps() else {}

    def _stored_memory(self) -> dict[Tensor, Tensor]:
        name = self._memory_name
        return {} if name is None else {p: kept[name] for p, kept in self.state.items() if name in kept}

    def _set_memory(self, memory: Mapping[Tensor, Tensor], steps: int) -> None:
        if self._memory_name is None:
            return
        for p in self._stored_memory():
            del self.state[p][self._memory_name]
        for p, value in memory.items():
            self.state[p][self._memory_name] = value
        self._set_steps(steps)

    def _initialise_memory(self) -> None:
        # With the rest of the state, so that torch.distributed.checkpoint finds every name that it is to load.
        self._set_memory({p: torch.zeros_like(widened(p)) for p in self._params() if p.requires_grad}, steps=0)

    @contextmanager
    def _hidden_memory(self) -> Iterator[None]:
        # Base optimizers initialise the state of a parameter if it is empty, and otherwise expect it to be theirs.
        memory = self._stored_memory()
        for p in memory:
            del self.state[p][self._memory_name]
            if not self.state[p]:
                del self.state[p]
        try:
            yield
        finally:
            for p, value in memory.items():
                self.state[p][self._memory_name] = value

    def _only_initialises(self) -> bool:
        """Whether step() is called to initialise the state, as ``torch.distributed.checkpoint`` does.

        It sets the learning rates and the gradients to 0 for that.
        """
        grads = [p.grad for p in self._params() if p.requires_grad]
        return (
            not self.state
            and all(float(group.get("lr", 1.0)) == 0.0 for group in self.param_groups)
            and all(grad is not None and not local(grad).any() for grad in grads)
        )

    # Forward and backward passes, and the base step.

    def _gradient(self, replayed: ReplayedClosure, share: float, local: bool) -> tuple[Any, dict[Tensor, Tensor]]:
        """What the closure returns, and the gradients before the pass, where the closure did not zero them."""
        self.num_gradients += share
        with EmptyGradients(self._params(), self._first_gradient) as gradients:
            loss = replayed(local)
        self._first_gradient = gradients.first
        return loss, gradients.found

    def _has_two_calls(self) -> bool:
        return self.m is None and self._ddp is None and self._ascent.steps == 1 and self._supports_two_calls

    def _require_loss(self, output: Any, several: bool) -> None:
        loss = output[0] if isinstance(output, tuple | list) and output else output
        if several and not isinstance(loss, Tensor | float | int):
            what = f"{type(output).__name__} whose first entry is {type(loss).__name__}"
            raise ArgumentError(
                f"With m={self.m} the closure must return the mean loss of its chunk, or a tuple that begins with it, "
                f"got {type(output).__name__ if loss is output else what}."
            )

    def _output(self, outputs: list[Any], shares: list[float]) -> Any:
        """What ``step`` returns, from what the closure returned at w for each chunk."""
        first = outputs[0]
        if self.m is not None and isinstance(first, tuple | list) and first:
            loss, *others = zip(*outputs, strict=True)
            return (self._output(list(loss), shares), *map(list, others))
        return first if len(outputs) == 1 else sum(loss * share for loss, share in zip(outputs, shares, strict=True))

    def _refuse_other_gradients(self, found: dict[Tensor, Tensor], comparable: bool) -> None:
        """Raise unless the gradients ``found`` before the step are zero, or those of pass 1, now in ``.grad``.

        ``comparable``: whether ``.grad`` is the gradient of the whole batch.
        """
        dense_gradients(list(found))
        if not found or norm_of(list(found.values())) == 0.0:
            return
        if comparable:
            now = {p: p.grad for p in self._params() if p.grad is not None}
            norm = norm_of(list(now.values()))
            difference = norm_of(
                [_or_zeros(now.get(p), p) - _or_zeros(found.get(p), p).to(p) for p in {**now, **found}]
            )
            # Without a finite gradient the step is skipped, which warns.
            if not 0.0 < norm < math.inf or difference <= _SAME_GRADIENT * norm:
                return
        for p in self._params():
            if p.requires_grad:
                p.grad = found.get(p)
        raise ArgumentError(
            "SAM.step needs gradients of the closure's examples alone, but .grad holds others that the closure does "
            "not zero, and SAM cannot take those at w + e. Call optimizer.zero_grad() in the closure. To accumulate "
            "micro-batches, call backward for all of them in the closure; in a trainer, set its gradient accumulation "
            "to 1 and use larger batches."
        )

    def _gradient_at_perturbed(
        self, replayed: ReplayedClosure, share: float, single_chunk: bool, inverse_scale: float
    ) -> str | None:
        """Replace ``.grad`` by the chunk's gradient at w + e; return the reason if the whole step must be skipped."""
        try:
            for i in range(self._ascent.steps):
                reason = self._ascent.step(self.param_groups, self._ascent_direction, inverse_scale)
                # If other processes wait for the last pass, or other chunks are not done, continue with e = 0: a zero
                # gradient adds nothing, and a gradient that is not finite skips the step for all.
                if reason is not None and i == 0 and single_chunk and self._ddp is None:
                    return reason
                if reason is not None and i > 0 and not (single_chunk and self._ddp is not None):
                    break  # .grad is the gradient at the end of the last ascent step
                last = reason is not None or i + 1 == self._ascent.steps
                self._gradient(replayed, share, local=not (last and single_chunk))
                if last:
                    break
        finally:
            self._ascent.restore()
        return None

    def _descend(self, at_w: GradientSum | None, scaler: Any = None, *, perturbed: bool = True) -> None:
        if scaler is not None:
            scaler.unscale_(self.base_optimizer)
        grads = dense_gradients([p for p in self._params() if p.grad is not None])
        both = grads if at_w is None else [*grads, *at_w.sums.values()]
        # Only checked for being finite, so the gradients' own precision suffices; settled_norm checks in float64.
        norm = norm_on_device(both, None)
        # One transfer for both checks, since each synchronisation stalls the device.
        lost, self._ascent.rounding = self._ascent.rounding, None
        total, *rounding = (norm if lost is None else torch.cat([norm, lost.to(norm)])).tolist()
        if rounding:
            self._report_rounding(cosine(*rounding))
        total = settled_norm(total, both)
        # With one chunk, a zero gradient at w is reported already; at w + e it is allowed.
        if not math.isfinite(total) or (total == 0.0 and not perturbed):
            self._skip("is zero" if total == 0.0 else "is not finite", "w + e", unscaled=scaler)
            return
        self._combine(at_w)
        with self._hidden_memory():
            if scaler is None:
                self.base_optimizer.step()
            else:
                scaler.step(self.base_optimizer)
        self._opt_called = True

    def _skip(self, what: str, where: str, scaler: Any = None, unscaled: Any = None) -> None:
        self.skipped_steps += 1
        if scaler is not None:
            scaler.unscale_(self.base_optimizer)  # so that scaler.update() counts this step
        if scaler is not None or unscaled is not None:
            return
        cause = "Does the closure call backward?" if what == "is zero" else "Check the data and the learning rate."
        warnings.warn(
            f"SAM skipped a step: the gradient at {where} {what}. Weights and optimizer state are unchanged; "
            f"skipped_steps counts such steps. {cause}",
            RuntimeWarning,
            stacklevel=_CALLER[where],
        )

    def _report_rounding(self, cosine: float) -> None:
        if cosine < _MIN_COSINE and not self._rounding_reported:
            self._rounding_reported = True
            low = any(p.element_size() < 4 for p in self._params())
            weights = "float16 or bfloat16" if low else str(self._params()[0].dtype).removeprefix("torch.")
            remedy = (
                "Keep the weights in float32 and run the forward pass under torch.autocast." if low else "Raise rho."
            )
            warnings.warn(
                f"Rounding to {weights} weights rotated SAM's perturbation: its cosine with the exact one is "
                f"{cosine:.2f} and should be above {_MIN_COSINE}. {remedy}",
                RuntimeWarning,
                stacklevel=_CALLER["w + e"],
            )

    def _refuse_while_perturbed(self, what: str) -> None:
        if self._ascent.is_perturbed:
            raise ArgumentError(
                f"{what} needs the weights w, but they are perturbed to w + e since first_step(). "
                "Call second_step() first."
            )

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _modules(self) -> list[nn.Module]:
        """The modules that hold the parameters: a closure may call a method of theirs, or a compiled function."""
        if self._owners is None:
            # Once: it takes about 0.1 s. type(), since some objects lie about their class or raise; without _modules a
            # module is half built.
            params = set(self._params())
            modules = [m for m in gc.get_objects() if issubclass(type(m), nn.Module) and hasattr(m, "_modules")]
            self._owners = [weakref.ref(m) for m in modules if not params.isdisjoint(m.parameters())]
        return [module for reference in self._owners if (module := reference()) is not None]

    def _devices(self) -> set[torch.device]:
        return {p.device for p in self._params()}

    def _examples(self, batch: Sequence[Tensor]) -> int | None:
        if not batch:
            return None
        size = len(batch[0]) if self.m is None else min(self.m, len(batch[0]))
        together = self._ddp is None and torch.distributed.is_available() and torch.distributed.is_initialized()
        return size * torch.distributed.get_world_size() if together else size


def _kinds(kind: type[SAM]) -> list[type[SAM]]:
    return [kind, *(k for child in kind.__subclasses__() for k in _kinds(child))]


def _or_zeros(tensor: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if tensor is None else tensor


def _check_base(base: object) -> None:
    what = "base_optimizer must be an optimizer class such as torch.optim.SGD"
    if isinstance(base, str):
        raise ArgumentError(f"{what}, got the string {base!r}. Pass the class itself.")
    if isinstance(base, Optimizer):
        name = type(base).__name__
        raise ArgumentError(
            f"{what}, got an instance of {name}. Pass the class and its options: SAM(params, {name}, ...)."
        )
    if not (isinstance(base, type) and issubclass(base, Optimizer)):
        raise ArgumentError(f"{what}, got {base!r}.")
    closure = inspect.signature(base.step).parameters.get("closure")
    nested = hasattr(base, "first_step")
    if nested or (closure is not None and closure.default is inspect.Parameter.empty):
        raise ArgumentError(f"{what}, got {base.__name__}, whose step needs a closure. Pass one whose step does not.")
