"""What a Hessian-vector product costs, in gradients of wall-clock time a vector, by method, model and size.

For each model: the time of one gradient over the examples, and of a product by each method, in turn, several rounds;
the ratio per vector is taken within each round and its median (least to most) is reported. Then how the time of a
product grows with the parameters n, the examples N and the vectors K of a block, as slopes on log-log scales.

    python benchmarks/hvp_cost.py [--block 5] [--rounds 5] [--examples 512] [--micro-batch 32] [--quick]
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hvp_methods
import torch
from report import aligned, machine
from torch import Tensor, nn
from transformer import Transformer, text_bytes

from sharpscope import Objective, Problem
from sharpscope.zoo import load_data, make_model

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "cnn": ("cnn", {}),
    "wide_resnet 10-2 batch norm": ("wide_resnet", {"depth": 10, "widen": 2, "norm": "batch"}),
    "wide_resnet 10-2 no norm": ("wide_resnet", {"depth": 10, "widen": 2, "norm": "none"}),
    "mlp": ("mlp", {"hidden": (256, 256)}),
    "transformer": ("transformer", {}),
}
CONTEXT = 64


def seconds(work: Callable[[], Any]) -> float:
    """Wall-clock of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def methods(objective: Objective, block: int) -> dict[str, tuple[hvp_methods.Product, int]]:
    """Each method's product and the number of vectors it is given."""
    return {
        "kept graph": (hvp_methods.kept(objective), 1),
        "rebuilt, block of 1": (hvp_methods.rebuilt(objective), 1),
        f"rebuilt, block of {block}": (hvp_methods.rebuilt(objective), block),
        "forward over reverse": (hvp_methods.forward_over_reverse(objective), 1),
        "finite difference": (hvp_methods.finite_difference(objective), 1),
    }


def objective_of(kind: str, options: dict[str, Any], examples: int, micro_batch: int, data: str) -> Objective:
    """A fresh model on the first examples of ``data``, or the transformer on as many sequences of bytes."""
    if kind == "transformer":
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            network: nn.Module = Transformer(context=CONTEXT, **options)
        inputs, labels, _ = text_bytes(examples, CONTEXT)
    else:
        loaded = load_data(data)
        inputs, labels = loaded.inputs[:examples], loaded.targets[:examples]
        network = make_model(kind, seed=0, shape=loaded.shape, classes=loaded.classes, **options)
    problem = Problem(model=network.eval(), loss=nn.CrossEntropyLoss(), data=(inputs, labels))
    return Objective(problem, micro_batch=micro_batch)


def vectors(objective: Objective, count: int) -> Tensor:
    """Random unit vectors (n, count)."""
    block = torch.randn(objective.num_params, count, generator=torch.Generator().manual_seed(0))
    return block / block.norm(dim=0)


def by_method(args: argparse.Namespace) -> list[list[str]]:
    """One row a model and method."""
    rows = [["model", "method", "parameters", "gradient s", "gradients a vector", "least to most", "differs by"]]
    for name in args.only or MODELS:
        kind, options = MODELS[name]
        objective = objective_of(kind, options, args.examples, args.micro_batch, args.data)
        block = vectors(objective, args.block)
        exact = objective.hvp(block[:, :1])
        ways = methods(objective, args.block)
        apart = {}
        for way, (product, _) in ways.items():  # a warm-up too
            apart[way] = float((product(block[:, :1])[:, 0] - exact[:, 0]).norm() / exact.norm())
        ratios: dict[str, list[float]] = {way: [] for way in ways}
        gradients = []
        for _ in range(args.rounds):
            gradients.append(seconds(objective.loss_and_gradient))
            for way, (product, count) in ways.items():
                taken = seconds(lambda p=product, b=block[:, :count]: p(b))
                ratios[way].append(taken / gradients[-1] / count)
        for way, found in ratios.items():
            rows.append(
                [
                    name,
                    way,
                    f"{objective.num_params:,}",
                    f"{statistics.median(gradients):.3f}",
                    f"{statistics.median(found):.2f}",
                    f"{min(found):.2f} to {max(found):.2f}",
                    f"{apart[way]:.0e}",
                ]
            )
    return rows


def scaling(args: argparse.Namespace) -> list[list[str]]:
    """One row a quantity and method: the seconds at each size, and their slope."""
    few, n_model = args.examples, "cnn"
    widths = [32, 64] if args.quick else [64, 128, 256, 512]
    counts = [few // 2, few] if args.quick else [few // 4, few // 2, few, 2 * few]
    blocks = [1, 2] if args.quick else [1, 2, 4, 8]
    cases = {
        "n, mlp of two layers": [
            (objective_of("mlp", {"hidden": (w, w)}, few, args.micro_batch, args.data), 1) for w in widths
        ],
        f"N, {n_model}": [(objective_of(n_model, {}, c, args.micro_batch, args.data), 1) for c in counts],
        f"K, {n_model}": [(objective_of(n_model, {}, few, args.micro_batch, args.data), k) for k in blocks],
    }
    rows = [["against", "method", "sizes", "seconds", "log-log slope"]]
    for what, points in cases.items():
        sizes = [{"n": o.num_params, "N": o.num_examples or 0, "K": k}[what[0]] for o, k in points]
        for way, make in (("kept graph", hvp_methods.kept), ("rebuilt", hvp_methods.rebuilt)):
            products = [(make(objective), vectors(objective, count)) for objective, count in points]
            times: list[list[float]] = [[] for _ in points]
            for product, block in products:
                product(block)
            for _ in range(args.rounds):
                for i, (product, block) in enumerate(products):
                    times[i].append(seconds(lambda p=product, b=block: p(b)))
            middle = [statistics.median(found) for found in times]
            shown = ", ".join(f"{t:.3g}" for t in middle)
            rows.append([what, way, ", ".join(f"{s:,}" for s in sizes), shown, f"{slope(sizes, middle):.2f}"])
    return rows


def slope(sizes: list[int], times: list[float]) -> float:
    """Least squares of ``log time`` on ``log size``."""
    x, y = [math.log(s) for s in sizes], [math.log(t) for t in times]
    return statistics.linear_regression(x, y).slope


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--block", type=int, default=5, help="vectors in a block")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--examples", type=int, default=512)
    parser.add_argument("--micro-batch", type=int, default=32)
    parser.add_argument("--data", default="fashion-mnist", help="digits or fashion-mnist")
    parser.add_argument("--only", nargs="+", choices=MODELS, metavar="MODEL", help=f"of {', '.join(MODELS)}")
    parser.add_argument(
        "--quick", action="store_true", help="digits, 64 examples, one round, not written: a smoke test"
    )
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "HVP_RESULTS.md")
    args = parser.parse_args()
    if args.quick:
        args.data, args.examples, args.rounds = "digits", 64, 1
    where = machine(torch.get_num_threads())
    title = (
        f"{where['date']}, {where['processor']}, Python {platform.python_version()}, sharpscope {where['sharpscope']}, "
        f"torch {where['torch']}; {args.data} (the transformer: bytes of text, {CONTEXT} a sequence), {args.examples} "
        f"examples in micro-batches of {args.micro_batch}, median of {args.rounds} rounds. A kept graph's building is "
        "not in its time. Differs by: relative to the rebuilt product, in float32."
    )
    parts = ["# Hessian-vector products", title, "## Gradients a vector", aligned(by_method(args))]
    parts += ["## Growth", aligned(scaling(args))]
    text = "\n\n".join(parts)
    print(text)
    if not args.quick:
        args.results.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
