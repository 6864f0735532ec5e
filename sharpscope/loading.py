"""From a checkpoint file to the Problem it stands for."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from sharpscope.checkpoint import Checkpoint, load_weights, read_checkpoint
from sharpscope.checkpoint.problem_file import problem_of
from sharpscope.errors import ArgumentError, CheckpointError, ProblemError, first_line, nearest
from sharpscope.importing import imported
from sharpscope.objective import TokenCrossEntropy
from sharpscope.problem import Problem
from sharpscope.sampling.subsample import count_examples, random_subset
from sharpscope.zoo import MODELS, DataSet, load_data, make_model, model_arguments

Factory = Callable[..., nn.Module]

# Models that problem files gave, and whose weights they hold.
_FILLED: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()

LOSSES: dict[str, Callable[[], nn.Module]] = {
    "cross_entropy": nn.CrossEntropyLoss,
    "mse": nn.MSELoss,
    "bce_with_logits": nn.BCEWithLogitsLoss,
    "nll": nn.NLLLoss,
    "token_cross_entropy": TokenCrossEntropy,
    "next_token": partial(TokenCrossEntropy, shift=True),
}


def load(
    path: str | os.PathLike[str],
    *,
    model: str | Factory | None = None,
    model_args: Mapping[str, Any] | None = None,
    data: Any = None,
    data_root: str | os.PathLike[str] | None = None,
    split: str = "train",
    examples: int | None = None,
    seed: int = 0,
    loss: str | Callable[..., Any] | None = None,
    params: str | Sequence[str] | None = None,
    mode: str | None = None,
    weight_decay: float | None = None,
    trust: bool = False,
    weights: str | None = None,
    prefix: str | None = None,
    problem: str | os.PathLike[str] | None = None,
    partial: bool = False,
    trust_pickle: bool = False,
) -> Problem:
    """The Problem of a checkpoint: its model at its weights, its loss, and the data it was trained on.

    Args:
        path: a file of ``sharpscope train``, or a plain state dict (then ``model`` and ``data`` are needed).
        model: in place of the file's: a bundled name, a function that builds the model, or
            "package.module:function", which is imported.
        model_args: keyword arguments for the model. They are laid over the file's when the model is the file's;
            a bundled model without ``shape`` or ``classes`` takes those of a bundled data set.
        data: in place of the file's: the name of a bundled set, with its true labels, or anything that
            ``Problem`` takes as data. The file's own set comes with the label noise that it was trained on.
        data_root: the folder of a bundled set that is read from files.
        split: "train" or "test", of a bundled set.
        examples: take only so many examples, drawn without replacement; needs data whose number is known.
        seed: decides which examples.
        loss: in place of the file's: a key of ``LOSSES`` or a callable. A file that does not say takes cross-entropy on
            a bundled data set.
        params, mode, weight_decay: as in ``Problem``; what is given goes before what ``problem()`` says.
        trust: import the factory that the *file* names when it is not a bundled one. This runs other people's code.
        weights: the key of the state dict in the file, with dots between nested ones; by default the usual names.
        prefix: of the names in the state dict, as "module."; by default it is found.
        problem: a Python file that defines ``problem()``, or "package.module:function", which returns the Problem whose
            model is given the file's weights; in place of model, data and loss. It is run.
        partial: what the file does not hold stays as the model is built, as the frozen weights under adapters.
        trust_pickle: unpickle whatever the file holds, which runs other people's code; a pickled module is the model.

    Raises: CheckpointError for a file that cannot be read, trusted or matched; ArgumentError for an unknown name or
        a wrong argument; DataError when the data are missing.

    >>> import sharpscope
    >>> import torch
    >>> torch.save(torch.nn.Linear(3, 1, bias=False).state_dict(), "weights.pt")
    >>> def factory():
    ...     return torch.nn.Linear(3, 1, bias=False)
    >>> data = torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.zeros(3, 1)
    >>> problem = sharpscope.load("weights.pt", model=factory, data=data, loss="mse")
    >>> print(f"{sharpscope.top_eigenvalues(problem, k=1).lambda_max:.2f}")
    6.00
    """
    checkpoint = read_checkpoint(path, weights, trust_pickle=trust_pickle)
    if problem is not None:
        given = {"model": model, "model_args": model_args or None, "data": data, "data_root": data_root, "loss": loss}
        double = [name for name, value in {**given, "trust": trust or None}.items() if value is not None]
        if double:
            raise ArgumentError(f"problem says what model, data and loss are; leave {', '.join(double)} out.")
        found = _own(problem_of(problem, split), os.fspath(problem), split, params, mode, weight_decay)
        if _FILLED.setdefault(found.model, checkpoint.sha256) != checkpoint.sha256:
            raise ProblemError(
                f"problem() of {problem} must build a new model at each call, but gave one that holds another "
                "checkpoint's weights, which would be lost. Build the model inside problem()."
            )
    else:
        source, label_noise = _data(checkpoint, data, data_root, split)
        bundled = isinstance(source, DataSet)
        built_from, args = _model(checkpoint, model, model_args, source, trust)
        found = Problem(
            model=_bundled(checkpoint, built_from, args) if built_from in MODELS else _built(built_from, args),
            loss=_loss(checkpoint, loss, bundled),
            data=(source.inputs, source.targets) if isinstance(source, DataSet) else source,
            params="*" if params is None else params,
            mode="eval" if mode is None else mode,
            weight_decay=0.0 if weight_decay is None else weight_decay,
            provenance={
                "data": source.name if isinstance(source, DataSet) else type(source).__name__,
                "split": source.split if isinstance(source, DataSet) else None,
                "label_noise": label_noise if bundled else None,
                "model": built_from if isinstance(built_from, str) else _name(built_from),
                "model_args": dict(args),
                "recipe": dict(checkpoint.recipe),
                "epoch": checkpoint.epoch,
                "metrics": dict(checkpoint.metrics),
            },
        )
    return replace(
        found,
        data=found.data if examples is None else random_subset(found.data, examples, seed),
        provenance={
            "split_examples": count_examples(found.data),
            **found.provenance,
            **_filled(found.model, checkpoint, prefix, partial),
            "examples_seed": None if examples is None else seed,
        },
    )


def _own(
    found: Problem,
    source: str,
    split: str,
    params: str | Sequence[str] | None,
    mode: str | None,
    weight_decay: float | None,
) -> Problem:
    """What the user's ``problem()`` gave, with what was asked for over what it says."""
    return replace(
        found,
        params=found.params if params is None else params,
        mode=found.mode if mode is None else mode,
        weight_decay=found.weight_decay if weight_decay is None else weight_decay,
        provenance={
            "data": type(found.data).__name__,
            "split": split,
            **found.provenance,
            "problem": source,
            "model": _name(type(found.model)),
        },
    )


def _filled(model: nn.Module, checkpoint: Checkpoint, prefix: str | None, partial: bool) -> dict[str, Any]:
    """Put the file's weights into ``model``, and say which weights of which file they are."""
    try:
        taken = load_weights(model, checkpoint.state_dict, prefix, partial=partial)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error
    return {
        "checkpoint": os.fspath(checkpoint.path),
        "sha256": checkpoint.sha256,
        "weights_key": checkpoint.weights,
        "weights_prefix": taken,
        "weights_partial": partial,
        "weights_left_out": [*checkpoint.others, *(k for k in checkpoint.state_dict if not k.startswith(taken))],
    }


def _data(checkpoint: Checkpoint, data: Any, root: str | os.PathLike[str] | None, split: str) -> tuple[Any, float]:
    """The data, a DataSet if bundled, and the fraction of its labels that is noise."""
    if isinstance(data, str):
        return load_data(data, split, root=root), 0.0
    if data is not None:
        return data, 0.0
    spec = checkpoint.data
    if not spec:
        raise CheckpointError(
            f"The checkpoint {checkpoint.path} is a plain state dict, which does not say what it was trained on. "
            f"Pass --model and --data, or run sharpscope init {checkpoint.path} for a problem file to fill in."
        )
    noise = spec.get("label_noise", 0.0)
    loaded = load_data(spec["name"], split, root=root, label_noise=noise, noise_seed=spec.get("noise_seed", 0))
    return loaded, noise if split == "train" else 0.0


def _loss(checkpoint: Checkpoint, loss: str | Callable[..., Any] | None, bundled: bool) -> Callable[..., Any]:
    if callable(loss):
        return loss
    name = loss or checkpoint.loss or ("cross_entropy" if bundled else None)
    if name is None:
        raise ArgumentError(
            f"The checkpoint {checkpoint.path} is a plain state dict, which does not say its loss. "
            f"Pass loss= (--loss), one of {', '.join(LOSSES)} or a callable."
        )
    if name not in LOSSES:
        raise ArgumentError(nearest("loss", name, LOSSES))
    return LOSSES[name]()


def _model(
    checkpoint: Checkpoint, model: str | Factory | None, given: Mapping[str, Any] | None, source: Any, trust: bool
) -> tuple[str | Factory, dict[str, Any]]:
    """What builds the network, and with which arguments."""
    wanted = checkpoint.model if model is None else model
    if wanted is None and checkpoint.module is not None:
        return _itself(checkpoint.module), dict(given or {})
    if wanted is None:
        raise CheckpointError(
            f"The checkpoint {checkpoint.path} is a plain state dict, which does not say what model it belongs to. "
            f"Pass --model and --data, or run sharpscope init {checkpoint.path} for a problem file to fill in."
        )
    if model is None and ":" in str(wanted) and not trust:
        raise CheckpointError(
            f"The checkpoint {checkpoint.path} wants its model built by {wanted}, which is other people's code. "
            "Pass --model to name it yourself, or --trust if you trust the file."
        )
    args = {**(checkpoint.model_args if wanted == checkpoint.model else {}), **(given or {})}
    if wanted not in MODELS:
        return wanted, args
    if isinstance(source, DataSet):
        args = {"shape": source.shape, "classes": source.classes, **args}
    return wanted, model_arguments(wanted, **args) if isinstance(wanted, str) else args


def _bundled(checkpoint: Checkpoint, name: Any, args: Mapping[str, Any]) -> nn.Module:
    try:
        return make_model(name, **args)
    except (RuntimeError, MemoryError, OverflowError) as error:
        raise CheckpointError(
            f"The model {name} of {checkpoint.path} cannot be built with {dict(args)}: {first_line(error)}. Check "
            "--model-args, and whether the file is whole."
        ) from error


def _itself(module: nn.Module) -> Factory:
    """A factory of a pickled module, which is there already."""

    def factory() -> nn.Module:
        return module

    factory.__module__, factory.__qualname__ = type(module).__module__, type(module).__qualname__
    return factory


def _built(wanted: str | Factory, args: Mapping[str, Any]) -> nn.Module:
    factory = _factory(wanted)
    try:
        inspect.signature(factory).bind(**args)
    except TypeError as error:
        raise ArgumentError(
            f"{_name(factory)} does not take these model arguments: {error}. Pass --model-args."
        ) from error
    except ValueError:
        pass  # a builtin without a signature
    network = factory(**args)
    if not isinstance(network, nn.Module):
        raise ArgumentError(f"{_name(factory)} must return a torch.nn.Module, got {type(network).__name__}.")
    return network


def _factory(wanted: str | Factory) -> Factory:
    if isinstance(wanted, nn.Module):
        raise ArgumentError("model must be a name or a function that builds the model, got a model. Pass its class.")
    if not isinstance(wanted, str):
        return wanted
    if ":" not in wanted:
        raise ArgumentError(f"{nearest('model', wanted, MODELS)} Or name a function, as package.module:function.")
    return imported(wanted)


def _name(factory: Factory) -> str:
    return f"{getattr(factory, '__module__', '?')}:{getattr(factory, '__qualname__', type(factory).__name__)}"
