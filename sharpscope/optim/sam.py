"""SAM over any ``torch.optim`` optimizer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from sharpscope.errors import ArgumentError
from sharpscope.optim.arguments import check_base, check_rho
from sharpscope.optim.ascent import ascent_direction, cosine, dense_gradients, norm_on_device, perturb, settled_norm
from sharpscope.optim.passes import frozen_buffers, random_state

Loss = TypeVar("Loss")

# Rounding to nearest leaves float32 above 0.999999; bfloat16 weights of a trained network reach 0.56.
_LEAST_COSINE = 0.9

# Frames from warnings.warn to the line that called step(): two of ours, step, and torch's two wrappers.
_CALLER = 6


class SAM(Optimizer):
    """``w <- base step at w with grad L(w + e)``, ``e = rho g / ||g||_2`` (p = 2) or ``rho sign(g)`` (p = inf).

    ``g = grad L(w)`` and its norm run over all parameter groups. The base optimizer and SAM share one
    ``param_groups``, one ``state`` and one ``defaults``, so a scheduler, ``add_param_group`` and
    ``load_state_dict`` reach both, and ``state_dict()`` resumes momentum and moments bit for bit; it also loads
    the checkpoint of the bare base optimizer. A group may set its own ``rho``. With ``maximize=True`` the
    perturbation descends instead.

    A gradient that is zero or not finite at ``w``, or not finite at ``w + e``, leaves weights and state
    untouched, warns (RuntimeWarning), and adds one to ``skipped_steps``.

    Args:
        params: parameters, named parameters or groups, as for any optimizer; real and with dense gradients.
        base_optimizer: an optimizer *class*, such as ``torch.optim.SGD``.
        rho: radius of the perturbation, >= 0, in the units of the weights.
        p: norm of the ball, 2 or inf (``float("inf")`` or ``"inf"``).
        base_options: passed to ``base_optimizer``: ``lr``, ``momentum``, ``weight_decay``, ...

    Cost: 2 gradients a step, and one copy of the weights.

    Raises:
        ArgumentError: an argument outside its domain, complex parameters, sparse gradients.

    Source: Foret et al. 2021, Algorithm 1 and Eq. 2. Departures: the released code has the L2 penalty in the
    loss of both passes; here weight decay is the base optimizer's, at ``w``, as in Eq. 1. The published
    algorithm does not say what to do when ``||g|| = 0``.
    """

    base_optimizer: Optimizer
    p: float
    skipped_steps: int

    # (weights, their copies) from the perturbation to the restore; two empty lists when the step is skipped.
    _backup: tuple[list[Tensor], list[Tensor]] | None = None
    _rounding: Tensor | None = None
    _rounding_reported: bool = False

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: type[Optimizer],
        rho: float = 0.05,
        *,
        p: float | str = 2,
        **base_options: Any,
    ) -> None:
        check_base(base_optimizer)
        check_rho(rho)
        if p not in (2, math.inf, "inf"):
            raise ArgumentError(f"p must be 2 or inf, got {p!r}. Pass p=2, p=float('inf') or p='inf'.")
        make_base: Callable[..., Optimizer] = base_optimizer
        base = make_base(params, **base_options)
        base.defaults["rho"] = rho
        super().__init__(base.param_groups, base.defaults)
        self.base_optimizer = base
        self.state = base.state  # some bases, Adagrad for one, fill it in their constructor
        self.p = float(p)
        self.skipped_steps = 0
        self._link()

    def _link(self) -> None:
        # The base's own __setstate__, since some bases convert old checkpoints there.
        shared = {"defaults": self.defaults, "state": self.state, "param_groups": self.param_groups}
        self.base_optimizer.__setstate__(shared)

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_while_perturbed("a copy")
        own = {name: getattr(self, name) for name in ("base_optimizer", "p", "skipped_steps")}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._link()

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state and the shared groups, ``rho`` among their options; loads into the base too.

        Raises:
            ArgumentError: the weights are perturbed.
        """
        self._refuse_while_perturbed("state_dict()")
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over state and options of a checkpoint of SAM, or of the base alone: ``rho`` then stays as it is.

        Raises:
            ArgumentError: the weights are perturbed.
        """
        self._refuse_while_perturbed("load_state_dict()")
        radii = [group["rho"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, rho in zip(self.param_groups, radii, strict=True):
            group.setdefault("rho", rho)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to SAM and to the base optimizer; ``rho`` may be among its options.

        Raises:
            ArgumentError: ``rho`` outside its domain, or complex parameters.
        """
        check_rho(param_group.get("rho", self.defaults["rho"]))
        # Absent only while the constructor hands over the groups that the base already has.
        if hasattr(self, "base_optimizer"):
            self.base_optimizer.add_param_group(param_group)
        else:
            super().add_param_group(param_group)
        if any(p.is_complex() for p in self.param_groups[-1]["params"]):
            self.param_groups.pop()
            raise ArgumentError("SAM needs real parameters, got complex ones. Pass torch.view_as_real of them.")

    @torch.no_grad()
    def step(self, closure: Callable[[], Loss] | None = None) -> Loss:
        """Calls ``closure`` at ``w`` and at ``w + e``, steps the base optimizer, returns ``L(w)``.

        Needs no backward before it. Both passes draw the same dropout masks (torch's default generators are
        replayed; draws from NumPy, ``random`` or own generators belong before the closure), and buffers such
        as BatchNorm's statistics move once. The weights are put back by copy, also if ``closure`` raises.

        Args:
            closure: the ordinary one: zero the gradients, forward, backward, return the loss. Both calls must
                see the same examples, so fetch them outside. To accumulate over micro-batches, call backward
                for each of them inside; perturbation and step then belong to the whole batch.

        Cost: 2 gradients.

        Raises:
            ArgumentError: no closure; sparse gradients; called between ``first_step`` and ``second_step``.
        """
        if closure is None:
            raise ArgumentError(
                "SAM.step needs a closure, since it takes two gradients: pass step(closure) with a function that "
                "zeroes the gradients, calls backward and returns the loss, or call first_step() and second_step()."
            )
        self._refuse_while_perturbed("step()")
        replay = random_state({p.device for group in self.param_groups for p in group["params"]})
        with torch.enable_grad():
            loss = closure()
        try:
            if self._ascend():
                replay()
                with frozen_buffers(), torch.enable_grad():
                    closure()
        finally:
            perturbed = self._restore()
        if perturbed:
            self._descend()
        return loss

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """``w <- w + e`` from the gradients in ``.grad``; the first half of the two-call form.

        Dropout then draws new masks in your second pass, and BatchNorm counts it unless you wrap it in
        ``frozen_buffers()``; ``step(closure)`` takes care of both. Step hooks of SAM do not run.

        Args:
            zero_grad: zero the gradients afterwards.

        Raises:
            ArgumentError: called twice without ``second_step``; sparse gradients.
        """
        self._refuse_while_perturbed("first_step()")
        try:
            self._ascend()
        except BaseException:
            self._restore()
            raise
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Put ``w`` back and step the base optimizer with the gradients in ``.grad``.

        Args:
            zero_grad: zero the gradients afterwards.

        Raises:
            ArgumentError: no ``first_step`` came before.
        """
        if self._backup is None:
            raise ArgumentError("second_step() must follow first_step(), got none. Call first_step() before it.")
        if self._restore():
            self._descend()
        if zero_grad:
            self.zero_grad()

    def _ascend(self) -> bool:
        groups = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        weights = [p for params in groups for p in params]
        grads = dense_gradients(weights)
        norm = settled_norm(float(norm_on_device(grads)), grads)
        self._rounding = None
        if not 0.0 < norm < math.inf:
            self._backup = ([], [])
            self._skip("is zero" if norm == 0.0 else "is not finite", "w")
            return False
        for group in self.param_groups:
            check_rho(group["rho"])
        # Stored before the first weight is touched, so that an interrupt at any point finds it.
        self._backup = (weights, [w.detach().clone() for w in weights])
        for group, params in zip(self.param_groups, groups, strict=True):
            if params:
                direction, scale = ascent_direction(dense_gradients(params), norm, self.p)
                sign = -1.0 if group.get("maximize") else 1.0
                sums = perturb(params, direction, sign * float(group["rho"]) * scale)
                if sums is not None:
                    self._rounding = sums if self._rounding is None else self._rounding + sums.to(self._rounding)
        # Under an autocast that encloses the whole step, the second pass would take w's cached low-precision copy.
        torch.clear_autocast_cache()
        return True

    def _restore(self) -> bool:
        if self._backup is None:
            return False
        weights, copies = self._backup
        if weights:
            torch._foreach_copy_(weights, copies)
            torch.clear_autocast_cache()
        self._backup = None
        return bool(weights)

    def _descend(self) -> None:
        grads = dense_gradients([p for group in self.param_groups for p in group["params"] if p.grad is not None])
        norm = norm_on_device(grads)
        # One transfer for both checks: each wait for the device costs the time that it could have run ahead.
        values = norm if self._rounding is None else torch.cat([norm, self._rounding.to(norm)])
        total, *rounding = values.tolist()
        self._rounding = None
        if rounding:
            self._report_rounding(cosine(*rounding))
        if not math.isfinite(settled_norm(total, grads)):
            self._skip("is not finite", "w + e")
            return
        self.base_optimizer.step()
        # What a scheduler looks at before it complains that no step came before it; second_step() is one too.
        self._opt_called = True

    def _skip(self, what: str, where: str) -> None:
        self.skipped_steps += 1
        cause = "Does the closure call backward?" if what == "is zero" else "Check the data and the learning rate."
        warnings.warn(
            f"SAM skipped a step: the gradient at {where} {what}. Weights and optimizer state are unchanged; "
            f"skipped_steps counts such steps. {cause}",
            RuntimeWarning,
            stacklevel=_CALLER,
        )

    def _report_rounding(self, cosine: float) -> None:
        if cosine < _LEAST_COSINE and not self._rounding_reported:
            self._rounding_reported = True
            warnings.warn(
                "Rounding to float16 or bfloat16 weights turned SAM's perturbation: its cosine with the wished one is "
                f"{cosine:.2f}, and should be above {_LEAST_COSINE}. Keep the weights in float32 and run the forward "
                "pass under torch.autocast.",
                RuntimeWarning,
                stacklevel=_CALLER,
            )

    def _refuse_while_perturbed(self, what: str) -> None:
        if self._backup is not None:
            raise ArgumentError(
                f"{what} needs the weights w, but they are perturbed to w + e since first_step(). "
                "Call second_step() first."
            )
