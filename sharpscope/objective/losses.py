"""Losses as sums over their terms, ``sum_i a_i l_i`` and ``sum_i a_i``, so that batches of any size add up.

Each known loss is a function below. Its inner ``sums`` counts the terms of a batch, ``sum_i a_i``: labels that are not
ignored, by class weight, in ``_total_label_weight``; elements in ``_mse`` and ``_bce_with_logits``; of a loss that is
not known, ``loss.terms(batch)`` in ``_mean_times_terms``, or the examples in ``_mean_times_examples``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sharpscope.errors import ArgumentError, DataError, ProblemError

# Describes the position of an example of a batch in the data, for a message.
Where = Callable[[int], str]


@dataclass(frozen=True)
class SummedLoss:
    """A loss as a sum over its terms.

    Attributes:
        name: the name in results.
        sums: ``sums(output, target, batch, size) -> (sum_i a_i l_i, sum_i a_i)``, the first differentiable.
        check: ``check(output, target, where)`` raises DataError for a target that the loss cannot take.
        counts_terms: whether this module counts the terms; False for losses that are not known here.
        has_terms_method: whether the number of terms comes from ``loss.terms(batch)``.
        likelihood: the distribution whose negative log-likelihood it is, None where that is not known.
        ignore_index: of a loss of labels, the label that is not a loss term; None for other losses.
        class_dim: of a loss of labels, the output's dimension of classes.
        aligned: shifts the target so that each entry is the label of the output at the same position.
    """

    name: str
    sums: Callable[[Any, Any, Any, int], tuple[Tensor, Tensor]]
    check: Callable[[Any, Any, Where], None] = lambda output, target, where: None
    counts_terms: bool = True
    has_terms_method: bool = False
    likelihood: Likelihood | None = None
    ignore_index: int | None = None
    class_dim: int = 1
    aligned: Callable[[Any], Any] = lambda target: target


def summed_loss(loss: Callable[..., Any]) -> SummedLoss:
    """``loss`` as sums over its terms.

    A known module or functional form is summed whatever its ``reduction``. Any other loss must return the mean over
    ``loss.terms(batch)`` terms, or over the examples where it has no such method.

    Raises: ProblemError for an option of a known loss whose terms do not add up over batches.
    """
    if hasattr(loss, "terms"):
        return SummedLoss(
            _name(loss), functools.partial(_mean_times_terms, loss), counts_terms=False, has_terms_method=True
        )
    for module, build in _MODULES.items():
        # A subclass that overrides forward is a different loss.
        if isinstance(loss, module) and type(loss).forward is module.forward:
            return build(**{option: getattr(loss, option) for option in _OPTIONS[build]})
    if type(loss) is TokenCrossEntropy:
        return _token_cross_entropy(loss)
    function, options = (loss.func, loss.keywords) if isinstance(loss, functools.partial) else (loss, {})
    # Compared by identity, since a callable may not be hashable.
    known = next((build for known, build in _FUNCTIONS.items() if known is function), None)
    if known is not None:
        if isinstance(loss, functools.partial) and loss.args:
            raise ProblemError("Options of a functional loss must be keywords, got positional ones in partial().")
        unknown = sorted(set(options) - set(_OPTIONS[known]) - {"reduction"})
        if unknown:
            raise ProblemError(
                f"The option {unknown[0]!r} of {_name(function)} has no loss terms that add up over batches here. "
                "Pass a callable that returns the mean, with a terms(batch) method."
            )
        return known(**{name: value for name, value in options.items() if name != "reduction"})
    return SummedLoss(_name(loss), functools.partial(_mean_times_examples, loss), counts_terms=False)


class TokenCrossEntropy(nn.Module):
    """``-log softmax(z_bt)[y_bt]`` (nats), the mean over the tokens t of all sequences b that are not ignored.

    Takes logits (B, T, V), or an output with ``.logits``, and labels (B, T); torch's own cross-entropy takes logits
    (B, V, T). A batch has the weight of its tokens that are not ignored, whatever the padding.

    Args:
        shift: compare the logits of a token with the label of the next token, for a causal language model whose labels
            are its inputs; the first label is then not a loss term.
        ignore_index: the label that is not a loss term.
        label_smoothing: as in ``torch.nn.CrossEntropyLoss``.

    Raises: ArgumentError for a smoothing outside 0..1.

    >>> import sharpscope
    >>> import torch
    >>> logits, labels = torch.zeros(1, 3, 4), torch.tensor([[0, 2, -100]])
    >>> sharpscope.TokenCrossEntropy()(logits, labels)  # log 4: four words, all as likely
    tensor(1.3863)
    """

    def __init__(self, shift: bool = False, ignore_index: int = -100, label_smoothing: float = 0.0) -> None:
        super().__init__()
        if not 0 <= label_smoothing <= 1:
            raise ArgumentError(f"label_smoothing must be from 0 to 1, got {label_smoothing}.")
        self.shift, self.ignore_index, self.label_smoothing = shift, ignore_index, label_smoothing

    def forward(self, output: Any, target: Tensor) -> Tensor:
        """The mean over the tokens of one batch (nats)."""
        flat, labels = output_tensor(output).flatten(0, -2), self.aligned(target).flatten()
        return F.cross_entropy(flat, labels, ignore_index=self.ignore_index, label_smoothing=self.label_smoothing)

    def aligned(self, target: Tensor) -> Tensor:
        """The label (B, T) of each position: with ``shift`` that of the next token, the last one ignored."""
        return F.pad(target[:, 1:], (0, 1), value=self.ignore_index) if self.shift else target


def _cross_entropy(weight: Tensor | None = None, ignore_index: int = -100, label_smoothing: float = 0.0) -> SummedLoss:
    def sums(output: Any, target: Tensor, batch: Any, size: int) -> tuple[Tensor, Tensor]:
        logits = output_tensor(output)
        scale = _to_like(weight, logits)
        target = target if target.is_floating_point() else target.long()
        total = F.cross_entropy(
            logits, target, scale, ignore_index=ignore_index, reduction="sum", label_smoothing=label_smoothing
        )
        if target.is_floating_point():  # class probabilities: torch divides by the examples, weighted or not
            return total, total.new_tensor(logits.numel() / logits.shape[1])
        return total, _total_label_weight(target, scale, ignore_index, total)

    def check(output: Any, target: Any, where: Where) -> None:
        _check_labels(output_tensor(output), target, ignore_index, where)

    return SummedLoss(
        "cross_entropy",
        sums,
        check,
        likelihood=categorical(weight, ignore_index, label_smoothing),
        ignore_index=ignore_index,
    )


def _token_cross_entropy(loss: TokenCrossEntropy) -> SummedLoss:
    flat = _cross_entropy(None, loss.ignore_index, loss.label_smoothing)

    def sums(output: Any, target: Tensor, batch: Any, size: int) -> tuple[Tensor, Tensor]:
        return flat.sums(output_tensor(output).flatten(0, -2), loss.aligned(target).flatten(), batch, size)

    def check(output: Any, target: Any, where: Where) -> None:
        logits = output_tensor(output)
        if logits.dim() != 3 or not isinstance(target, Tensor) or target.is_floating_point():
            raise ProblemError(
                f"The loss of tokens must have logits (B, T, V) and labels (B, T), got {tuple(logits.shape)} and "
                f"{described(target)}. Take torch.nn.CrossEntropyLoss for another form."
            )
        flat.check(logits.movedim(-1, 1), target, where)

    per_token = categorical(None, loss.ignore_index, loss.label_smoothing, dim=-1)
    return SummedLoss(
        "token_cross_entropy",
        sums,
        check,
        likelihood=replace(
            per_token,
            weight=lambda output, target: per_token.weight(output, loss.aligned(target)),
            curvature_weight=lambda output, target: per_token.curvature_weight(output, loss.aligned(target)),
        ),
        ignore_index=loss.ignore_index,
        class_dim=-1,
        aligned=loss.aligned,
    )


def _nll(weight: Tensor | None = None, ignore_index: int = -100) -> SummedLoss:
    def sums(output: Any, target: Tensor, batch: Any, size: int) -> tuple[Tensor, Tensor]:
        log_probabilities = output_tensor(output)
        scale, target = _to_like(weight, log_probabilities), target.long()
        total = F.nll_loss(log_probabilities, target, scale, ignore_index=ignore_index, reduction="sum")
        return total, _total_label_weight(target, scale, ignore_index, total)

    def check(output: Any, target: Any, where: Where) -> None:
        _check_labels(output_tensor(output), target, ignore_index, where)

    return SummedLoss(
        "nll", sums, check, likelihood=categorical(weight, ignore_index, logarithms=True), ignore_index=ignore_index
    )


def _mse() -> SummedLoss:
    def sums(output: Any, target: Tensor, batch: Any, size: int) -> tuple[Tensor, Tensor]:
        prediction = output_tensor(output)
        total = F.mse_loss(prediction, target.to(prediction), reduction="sum")
        return total, total.new_tensor(prediction.numel())

    return SummedLoss("mse", sums, _check_same_shape, likelihood=gaussian())


def _bce_with_logits(weight: Tensor | None = None, pos_weight: Tensor | None = None) -> SummedLoss:
    def sums(output: Any, target: Tensor, batch: Any, size: int) -> tuple[Tensor, Tensor]:
        logits = output_tensor(output)
        total = F.binary_cross_entropy_with_logits(
            logits,
            target.to(logits),
            _to_like(weight, logits),
            pos_weight=_to_like(pos_weight, logits),
            reduction="sum",
        )
        # torch's mean divides by the elements, not by their weights.
        return total, total.new_tensor(logits.numel())

    def check(output: Any, target: Any, where: Where) -> None:
        _check_same_shape(output, target, where)
        dims = output_tensor(output).dim()
        for name, value in (("weight", weight), ("pos_weight", pos_weight)):
            if value is not None and value.dim() >= dims and value.shape[0] != 1:
                raise ProblemError(
                    f"{name} of BCEWithLogitsLoss must be the same for every example (fewer dimensions than the "
                    f"output), got shape {tuple(value.shape)}. Put per-example weights into a loss with terms(batch)."
                )

    return SummedLoss("bce_with_logits", sums, check, likelihood=bernoulli(weight, pos_weight))


_OPTIONS: dict[Callable[..., SummedLoss], tuple[str, ...]] = {
    _cross_entropy: ("weight", "ignore_index", "label_smoothing"),
    _nll: ("weight", "ignore_index"),
    _mse: (),
    _bce_with_logits: ("weight", "pos_weight"),
}
_MODULES: dict[type[nn.Module], Callable[..., SummedLoss]] = {
    nn.CrossEntropyLoss: _cross_entropy,
    nn.NLLLoss: _nll,
    nn.MSELoss: _mse,
    nn.BCEWithLogitsLoss: _bce_with_logits,
}
_FUNCTIONS: dict[Any, Callable[..., SummedLoss]] = {
    F.cross_entropy: _cross_entropy,
    F.nll_loss: _nll,
    F.mse_loss: _mse,
    F.binary_cross_entropy_with_logits: _bce_with_logits,
}


def _mean_times_terms(loss: Any, output: Any, target: Any, batch: Any, size: int) -> tuple[Tensor, Tensor]:
    terms = loss.terms(batch)
    value = _scalar(loss, output, target)
    count = value.new_tensor(terms) if not isinstance(terms, Tensor) else terms.detach().to(value)
    if count.numel() != 1:
        raise ProblemError(f"terms(batch) must return one number, got shape {tuple(count.shape)}.")
    # The mean over no terms is 0/0; a batch without terms has weight 0.
    return (value * count if float(count) else torch.zeros_like(value)), count.reshape(())


def _mean_times_examples(loss: Any, output: Any, target: Any, batch: Any, size: int) -> tuple[Tensor, Tensor]:
    value = _scalar(loss, output, target)
    return value * size, value.new_tensor(size)


def _scalar(loss: Any, output: Any, target: Any) -> Tensor:
    value = loss(output, target)
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise ProblemError(
            f"loss(output, target) must return one number, the mean over the batch; got {described(value)}."
        )
    return value.reshape(())


def _total_label_weight(target: Tensor, weight: Tensor | None, ignore_index: int, like: Tensor) -> Tensor:
    """``sum_i a_i``: a_i is 0 for ``ignore_index``, else the label's class weight, 1 without weights.

    ``categorical`` has the same a_i term by term.
    """
    counted = target != ignore_index
    if weight is None:
        return counted.sum().to(like)
    return weight[target.clamp(0, len(weight) - 1)].mul(counted).sum()


def _to_like(weight: Tensor | None, output: Tensor) -> Tensor | None:
    return None if weight is None else weight.detach().to(output)


def _check_labels(logits: Tensor, target: Any, ignore_index: int, where: Where) -> None:
    if not isinstance(target, Tensor):
        return
    expected = (*logits.shape[:1], *logits.shape[2:])
    if target.is_floating_point():
        if target.shape == logits.shape:
            return
        raise ProblemError(
            f"Labels must be integers, or probabilities of the logits' shape {tuple(logits.shape)}, got {target.dtype} "
            f"of shape {tuple(target.shape)}. Pass labels.long()."
        )
    if target.shape != expected:
        tokens = (
            " For logits (B, T, V) pass sharpscope.TokenCrossEntropy(), of a causal language model with shift=True."
            if target.shape == logits.shape[:-1] and logits.dim() > 2
            else ""
        )
        raise ProblemError(
            f"Labels for logits of shape {tuple(logits.shape)} must have shape {expected}, got {tuple(target.shape)}."
            f"{tokens}"
        )
    classes = logits.shape[1] if logits.dim() > 1 else logits.shape[0]
    target = target.long()
    wrong = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if bool(wrong.any()):
        position = int(wrong.reshape(len(target), -1).any(dim=1).nonzero()[0])
        label = int(target[wrong][0])
        raise DataError(f"Labels must lie in 0..{classes - 1}, got {label} in {where(position)}. Mend the data set.")


def _check_same_shape(output: Any, target: Any, where: Where) -> None:
    shape = output_tensor(output).shape
    if target.shape != shape:
        raise ProblemError(
            f"Output and target must have the same shape, got {tuple(shape)} and {tuple(target.shape)}: "
            "broadcasting would mix examples. Reshape one of them."
        )


def described(value: Any) -> str:
    """The shape of a tensor, or the type of any other ``value``, for a message."""
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _name(loss: Any) -> str:
    return getattr(loss, "__name__", None) or type(loss).__name__


def output_tensor(output: Any) -> Tensor:
    """The tensor in ``output`` that a known loss is applied to: itself, or its "logits".

    Raises: ProblemError for an output that is not a tensor and has no logits.
    """
    tensor = output if isinstance(output, Tensor) else find_logits(output)
    if tensor is not None:
        return tensor
    raise ProblemError(
        f"The model must return a tensor, or an object with .logits, for this loss; got {type(output).__name__}. "
        "Pass a loss(output, target) that picks what it needs."
    )


def find_logits(output: Any) -> Tensor | None:
    """The tensor ``output.logits`` or ``output["logits"]``, None where there is none."""
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) else None


# Of output and target, a number or vector for each loss term.
TermFunction = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Likelihood:
    """The distribution ``p(y | z)`` whose ``-log p`` is one loss term, z the part of the output it depends on.

    "Of terms" below is the shape of the output with ``dim`` of size 1, or the output's own where ``dim`` is None.

    Attributes:
        dim: the output's dimension over which one term extends, None where each element is a term.
        weight: ``weight(output, target)``: ``a_i``, of terms.
        curvature_weight: ``curvature_weight(output, target)``: the factor ``f_i`` by which term i's curvature in z is
            that of ``-log p``. It differs from ``a_i`` where the curvature depends on the target: label smoothing with
            class weights, pos_weight.
        draw: ``draw(output, uniform)``: targets sampled from p with uniform numbers, of terms.
        score: ``score(output, target)``: the derivative of ``-log p(target | z)`` in z, like the output.
        link: a function that leaves valid outputs unchanged and is applied before the loss, so that the loss is
            differentiated as a function of logits.
    """

    dim: int | None
    weight: TermFunction
    curvature_weight: TermFunction
    draw: TermFunction
    score: TermFunction
    link: Callable[[Tensor], Tensor] = lambda output: output

    def inner(self, left: Tensor, right: Tensor) -> Tensor:
        """The inner product over ``dim``, one number per term."""
        product = left * right
        return product if self.dim is None else product.sum(self.dim, keepdim=True)


def categorical(
    weight: Tensor | None, ignore_index: int, label_smoothing: float = 0.0, logarithms: bool = False, dim: int = 1
) -> Likelihood:
    """y is class c with probability softmax(z)_c; f_i is the total weight of the classes in the target.

    ``logarithms``: the output holds log-probabilities, which log_softmax does not change. ``dim``: that of classes.
    Its ``weight`` is the summand of ``_total_label_weight``.
    """

    def label_weights(output: Tensor, target: Tensor, smoothing: float) -> Tensor:
        scale = torch.ones(output.shape[dim]).to(output) if weight is None else weight.detach().to(output)
        if target.is_floating_point():
            smooth = target * (1 - smoothing) + smoothing / output.shape[dim]
            return (smooth.movedim(dim, -1) @ scale).unsqueeze(dim)
        counted = target != ignore_index
        label = scale[target.long().clamp(0, len(scale) - 1)]
        return (((1 - smoothing) * label + smoothing * scale.mean()) * counted).unsqueeze(dim)

    def weights(output: Tensor, target: Tensor) -> Tensor:
        # torch divides class probabilities by the examples, weighted or not.
        return (
            torch.ones_like(output.narrow(dim, 0, 1))
            if target.is_floating_point()
            else label_weights(output, target, 0.0)
        )

    def draw(output: Tensor, uniform: Tensor) -> Tensor:
        below = torch.softmax(output, dim).cumsum(dim) < uniform.to(output)
        return below.sum(dim, keepdim=True).clamp(max=output.shape[dim] - 1)

    def score(output: Tensor, target: Tensor) -> Tensor:
        return torch.softmax(output, dim).scatter_add(dim, target, torch.full_like(output.narrow(dim, 0, 1), -1.0))

    link = (lambda output: F.log_softmax(output, dim)) if logarithms else (lambda output: output)
    return Likelihood(dim, weights, lambda o, t: label_weights(o, t, label_smoothing), draw, score, link)


def gaussian() -> Likelihood:
    """y is normal with mean z and variance 1/2; its ``-log p`` is the squared error ``(z - y)^2``."""
    return Likelihood(
        None,
        lambda output, target: torch.ones_like(output),
        lambda output, target: torch.ones_like(output),
        lambda output, uniform: output + (torch.special.ndtri(uniform) * 0.5**0.5).to(output),
        lambda output, target: 2 * (output - target),
    )


def bernoulli(weight: Tensor | None, pos_weight: Tensor | None) -> Likelihood:
    """y is 1 with probability sigmoid(z), else 0; f_i is the element's weight, times 1 + (pos_weight - 1) target."""

    def curvature_weight(output: Tensor, target: Tensor) -> Tensor:
        factor = torch.ones_like(output)
        if pos_weight is not None:
            factor = 1 + (pos_weight.detach().to(output) - 1) * target.to(output)
        return factor if weight is None else factor * weight.detach().to(output)

    return Likelihood(
        None,
        lambda output, target: torch.ones_like(output),  # torch's mean divides by the elements, not by their weights
        curvature_weight,
        lambda output, uniform: (uniform.to(output) < torch.sigmoid(output)).to(output),
        lambda output, target: torch.sigmoid(output) - target,
    )
