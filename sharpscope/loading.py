"""Load a checkpoint file as a Problem: model, loss and data."""

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

# sha256 of the checkpoint loaded into each model of a problem file, to detect a model that is loaded twice.
_LOADED: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()

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
    """Load a checkpoint as a Problem: the model with its trained weights, the loss, and the training data.

    A file of ``sharpscope train`` names its model, data and loss; arguments override them. For any other checkpoint,
    pass ``model``, ``data`` and ``loss``, or ``problem``.

    Args:
        path: checkpoint file or folder, see ``sharpscope.checkpoint.read_checkpoint``.
        model: a bundled name, a function that builds the model, or "package.module:function", which is imported.
        model_args: keyword arguments of the model, merged into the file's if the model is the file's. ``shape`` and
            ``classes`` of a bundled model default to those of a bundled data set.
        data: name of a bundled data set (with true labels), or any ``data`` of ``Problem``. By default the file's data
            set with the label noise of its training.
        data_root: folder of a bundled data set that is read from files.
        split: "train" or "test", for a bundled data set or a ``problem()`` that takes it.
        examples: number of examples to draw without replacement; None: all. Needs data of known size.
        seed: seed of that draw.
        loss: a key of ``LOSSES`` or a callable ``loss(output, target)``. Defaults to the file's, else to cross-entropy
            on a bundled data set.
        params, mode, weight_decay: as for ``Problem``; None takes the value of ``problem()``, or Problem's default.
        trust: import the model factory that the *file* names, which **runs its code**.
        weights: key of the state dict in the file, dotted if nested; by default one of the usual names.
        prefix: prefix of the names in the state dict, such as "module."; detected by default.
        problem: a Python file that defines ``problem()``, or "package.module:function", which **is run**. It returns
            the Problem into whose model the weights are loaded; replaces ``model``, ``data`` and ``loss``.
        partial: parameters that the file lacks keep their values, such as the frozen weights under an adapter.
        trust_pickle: unpickle the whole file, which **runs its code**; a pickled module then becomes the model.

    Raises: CheckpointError if the file cannot be read, is not trusted or does not match the model; ArgumentError for
        an unknown name or an invalid argument; DataError if the data are missing; ProblemError if ``problem()`` fails.

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
            raise ArgumentError(f"problem already defines model, data and loss; leave {', '.join(double)} out.")
        found = _overridden(problem_of(problem, split), os.fspath(problem), split, params, mode, weight_decay)
        if _LOADED.setdefault(found.model, checkpoint.sha256) != checkpoint.sha256:
            raise ProblemError(
                f"problem() of {problem} must build a new model at each call, but returned one with the weights of "
                "another checkpoint, which would be overwritten. Build the model inside problem()."
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
            **_load_into(found.model, checkpoint, prefix, partial),
            "examples_seed": None if examples is None else seed,
        },
    )


def _overridden(
    found: Problem,
    source: str,
    split: str,
    params: str | Sequence[str] | None,
    mode: str | None,
    weight_decay: float | None,
) -> Problem:
    """The Problem of a user's ``problem()``, overridden by the arguments that are not None."""
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


def _load_into(model: nn.Module, checkpoint: Checkpoint, prefix: str | None, partial: bool) -> dict[str, Any]:
    """Load the file's weights into ``model``; return their provenance."""
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
    """The data, a DataSet if bundled, and the fraction of noisy labels."""
    if isinstance(data, str):
        return load_data(data, split, root=root), 0.0
    if data is not None:
        return data, 0.0
    spec = checkpoint.data
    if not spec:
        raise CheckpointError(
            f"The checkpoint {checkpoint.path} is a plain state dict, which does not name its training data. "
            f"Pass --model and --data, or run sharpscope init {checkpoint.path} to write a template of a problem file."
        )
    noise = spec.get("label_noise", 0.0)
    version = spec.get("noise_version", 1)  # files of 0.1.0 have none
    seed = spec.get("noise_seed", 0)
    loaded = load_data(spec["name"], split, root=root, label_noise=noise, noise_seed=seed, noise_version=version)
    return loaded, noise if split == "train" else 0.0


def _loss(checkpoint: Checkpoint, loss: str | Callable[..., Any] | None, bundled: bool) -> Callable[..., Any]:
    if callable(loss):
        return loss
    name = loss or checkpoint.loss or ("cross_entropy" if bundled else None)
    if name is None:
        raise ArgumentError(
            f"The checkpoint {checkpoint.path} is a plain state dict, which does not name its loss. "
            f"Pass loss= (--loss), one of {', '.join(LOSSES)} or a callable."
        )
    if name not in LOSSES:
        raise ArgumentError(nearest("loss", name, LOSSES))
    return LOSSES[name]()


def _model(
    checkpoint: Checkpoint, model: str | Factory | None, given: Mapping[str, Any] | None, source: Any, trust: bool
) -> tuple[str | Factory, dict[str, Any]]:
    """The factory or name of the model, and its arguments."""
    wanted = checkpoint.model if model is None else model
    if wanted is None and checkpoint.module is not None:
        return _constant_factory(checkpoint.module), dict(given or {})
    if wanted is None:
        raise CheckpointError(
            f"The checkpoint {checkpoint.path} is a plain state dict, which does not name its model. "
            f"Pass --model and --data, or run sharpscope init {checkpoint.path} to write a template of a problem file."
        )
    if model is None and ":" in str(wanted) and not trust:
        raise CheckpointError(
            f"The checkpoint {checkpoint.path} builds its model with {wanted}, which would run that code. "
            "Pass --model to name the model yourself, or --trust if you trust the file."
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
            "--model-args, and that the file is complete."
        ) from error


def _constant_factory(module: nn.Module) -> Factory:
    """A factory that returns the unpickled ``module``."""

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
        raise ArgumentError(f"{nearest('model', wanted, MODELS)} Or pass a function as package.module:function.")
    return imported(wanted)


def _name(factory: Factory) -> str:
    return f"{getattr(factory, '__module__', '?')}:{getattr(factory, '__qualname__', type(factory).__name__)}"
