"""The command line on a file of weights and a ``problem.py``, both on disk, as a user has them."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dense import dense_hessian, top
from sharpscope import Problem
from sharpscope.cli import main
from sharpscope.objective.micro_batches import map_tensors

Call = Callable[..., Any]
Mean = Callable[[Call, Any], Tensor]


def saved(folder: Path, problem: Callable[[], Problem], seed: int = 7) -> Path:
    """The state dict of the problem's model, drawn with ``seed``, as torch.save writes it."""
    torch.manual_seed(seed)
    path = folder / f"{problem.__name__}.pt"
    torch.save(problem().model.state_dict(), path)
    return path


def printed(command: str, path: Path, problem: Callable[[], Problem], *options: str, status: int = 0) -> Any:
    """What ``sharpscope COMMAND path --problem FILE --json`` prints, the file's ``problem()`` being ``problem``.

    Where ``status`` is not 0 or 3 it is what stderr says.
    """
    source = path.with_name(f"problem_{problem.__name__}.py")
    source.write_text(f"from {problem.__module__} import {problem.__name__} as problem\n")
    torch.manual_seed(99)  # the weights must come from the file, not from how problem() draws them
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        came = main([command, str(path), "--problem", str(source), "--json", *options])
    assert came == status, (came, err.getvalue(), out.getvalue()[:1500])
    return json.loads(out.getvalue()) if status in (0, 3) else err.getvalue()


def eigenvalues(path: Path, problem: Callable[[], Problem], *options: str, tol: str = "1e-8") -> list[float]:
    """The top five that ``sharpscope eigen`` finds in float64."""
    exact = ("--dtype", "float64", "--tol", tol)
    found: list[float] = printed("eigen", path, problem, *exact, *options)["eigenvalues"]
    return found


def reference(path: Path, problem: Callable[[], Problem], mean: Mean) -> list[float]:
    """The top five of the dense Hessian at the file's weights."""
    given = problem()
    given.model.load_state_dict(torch.load(path))
    data = map_tensors(given.data, lambda t: t.double() if t.is_floating_point() else t)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            return top(dense_hessian(given.model, lambda call: mean(call, data))).tolist()
    finally:
        torch.set_default_dtype(default)


def cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    return -logits.log_softmax(-1)[int(label)]


def each_class(call: Call, data: Any) -> Tensor:
    """The mean over examples of a batch (input, ..., label), one by one."""
    *inputs, target = data
    found = [cross_entropy(call(*(t[i : i + 1] for t in inputs))[0], target[i]) for i in range(len(target))]
    return torch.stack(found).mean()
