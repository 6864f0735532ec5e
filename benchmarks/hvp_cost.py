"""What a Hessian-vector product in a block costs, in gradients of wall-clock time a vector.

For each model: the time of one gradient over the examples, and of one block of K products, in turn, several rounds;
the ratio per vector is taken within each round and its median is printed.

    python benchmarks/hvp_cost.py [--block 5] [--rounds 5] [--examples 512] [--micro-batch 32]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from typing import Any

import torch

from sharpscope import Objective, Problem
from sharpscope.zoo import load_data, make_model

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "cnn": ("cnn", {}),
    "wide_resnet 10-2 batch norm": ("wide_resnet", {"depth": 10, "widen": 2, "norm": "batch"}),
    "wide_resnet 10-2 no norm": ("wide_resnet", {"depth": 10, "widen": 2, "norm": "none"}),
    "mlp": ("mlp", {"hidden": (256, 256)}),
}


def seconds(work: Any) -> float:
    """Wall-clock of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    """Print one row a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--block", type=int, default=5, help="vectors in a block")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--examples", type=int, default=512)
    parser.add_argument("--micro-batch", type=int, default=32)
    parser.add_argument("--data", default="fashion-mnist", help="digits or fashion-mnist")
    args = parser.parse_args()
    data = load_data(args.data)
    inputs, labels = data.inputs[: args.examples], data.targets[: args.examples]
    print(
        f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads, {args.data}, "
        f"{len(labels)} examples in micro-batches of {args.micro_batch}, block of {args.block}, {args.rounds} rounds"
    )
    print(f"{'model':30}{'parameters':>12}{'gradient s':>12}{'gradients a vector: median':>28}{'min':>8}{'max':>8}")
    for name, (model, options) in MODELS.items():
        network = make_model(model, seed=0, shape=data.shape, classes=data.classes, **options)
        problem = Problem(model=network, loss=torch.nn.CrossEntropyLoss(), data=(inputs, labels))
        objective = Objective(problem, micro_batch=args.micro_batch)
        block = torch.randn(objective.num_params, args.block, generator=torch.Generator().manual_seed(0))
        objective.hvp(block[:, :1])  # warm-up
        ratios, gradients = [], []
        for _ in range(args.rounds):
            gradient = seconds(objective.loss_and_gradient)
            ratios.append(seconds(lambda o=objective, b=block: o.hvp(b)) / gradient / args.block)
            gradients.append(gradient)
        middle = statistics.median(ratios)
        print(
            f"{name:30}{objective.num_params:12}{statistics.median(gradients):12.3f}{middle:28.2f}"
            f"{min(ratios):8.2f}{max(ratios):8.2f}"
        )


if __name__ == "__main__":
    main()
