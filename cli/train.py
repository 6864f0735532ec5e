"""``sharpscope train``: train a bundled model, with or without SAM, into a self-describing checkpoint."""

from __future__ import annotations

import argparse
import math
from typing import Any

from sharpscope.cli import options, terminal


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """The command's options."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "train",
        help="train a bundled model with or without SAM",
        description="Train a bundled model on a bundled data set, with SGD or any torch optimizer, with or without SAM "
        "around it. OUT is replaced whole after every epoch; --resume goes on after an interruption, to the same bits. "
        "--monitor measures the sharpness on the way, into OUT.monitor.json, and leaves the weights as they would be.",
    )
    parser.add_argument("--out", required=True, help="checkpoint file to write")
    parser.add_argument("--model", default="cnn", help="mlp, cnn or wide_resnet (default cnn)")
    parser.add_argument("--model-args", metavar="K=V", nargs="+", help="such as depth=16 norm=none, or hidden=64,64")
    parser.add_argument("--data", default="digits", help="digits or fashion-mnist (default digits)")
    options.add_data_root(parser)
    parser.add_argument(
        "--optimizer",
        default="sgd",
        help="sam, asam, gsam, looksam, friendlysam (each around SGD) or any torch optimizer (default sgd)",
    )
    parser.add_argument(
        "--rho",
        type=float,
        help="SAM's radius; puts SAM around any --optimizer but adadelta (default 0.05, for asam 0.5)",
    )
    parser.add_argument("--variant", default="sam", help="with --rho: which of SAM's relatives (default sam)")
    parser.add_argument(
        "--sam-args",
        metavar="K=V",
        nargs="+",
        help="more arguments of it: adaptive=filter, ascent_steps=2, alpha=0.3",
    )
    parser.add_argument("--m", type=int, help="examples that share a perturbation of SAM (default: the batch)")
    parser.add_argument("--p", default="2", choices=("2", "inf"), help="norm of SAM's ball (default 2)")
    parser.add_argument("--lr", type=float, default=0.05, help="initial learning rate (default 0.05)")
    parser.add_argument("--momentum", type=float, help="default 0.9 for SGD, torch's own elsewhere")
    parser.add_argument("--weight-decay", type=float, default=5e-4, help="default 5e-4")
    parser.add_argument(
        "--decoupled", action="store_true", help="decay the weights by lr * weight decay, not the gradient"
    )
    parser.add_argument("--batch-size", type=int, default=64, help="default 64")
    parser.add_argument("--epochs", type=int, default=40, help="default 40")
    parser.add_argument("--schedule", default="cosine", help="cosine or constant (default cosine)")
    parser.add_argument("--label-noise", type=float, default=0.0, metavar="F", help="fraction of wrong training labels")
    parser.add_argument("--noise-seed", type=int, default=0, help="decides which labels are wrong (default 0)")
    options.add_seed(parser, "of initial weights, order and dropout")
    parser.add_argument("--save-epochs", default="", metavar="LIST", help="epochs to keep besides: 0,1,50%%,last")
    parser.add_argument(
        "--monitor",
        type=int,
        metavar="N",
        help="measure lambda_max of the training loss at the start and every N steps; ? marks what has not converged",
    )
    parser.add_argument(
        "--monitor-examples", type=int, default=32, metavar="N", help="training examples it is measured on (default 32)"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run in OUT, or start it")
    parser.add_argument("--overwrite", action="store_true", help="start anew in place of an earlier run")
    options.add_device(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Train with a bar on stderr and print the last epoch's metrics, and what the monitor measured."""
    from sharpscope.results import MonitorResult
    from sharpscope.training import Recipe, monitor_path, train

    recipe = Recipe(
        model=args.model,
        model_args=options.key_values(args.model_args),
        data=args.data,
        optimizer=args.optimizer,
        rho=args.rho,
        variant=args.variant,
        m=args.m,
        sam_args=options.key_values(args.sam_args),
        p=math.inf if args.p == "inf" else 2.0,
        lr=args.lr,
        momentum=args.momentum,
        weight_decay=args.weight_decay,
        decoupled=args.decoupled,
        batch_size=args.batch_size,
        epochs=args.epochs,
        schedule=args.schedule,
        label_noise=args.label_noise,
        noise_seed=args.noise_seed,
        seed=args.seed,
    )
    with terminal.steps_bar() as progress:
        checkpoint = train(
            recipe,
            args.out,
            resume=args.resume,
            overwrite=args.overwrite,
            save_epochs=args.save_epochs.split(",") if args.save_epochs else (),
            data_root=args.data_root,
            device=options.device(args.device),
            progress=progress,
            monitor=args.monitor,
            monitor_examples=args.monitor_examples,
        )
    records = monitor_path(args.out)
    if args.monitor is not None and records.exists():  # a finished run that is given again may have none
        terminal.emit(f"{MonitorResult.load(records)}\nIn {records}; sharpscope plot draws it.\n")
    m = checkpoint.metrics
    terminal.emit(
        f"{args.out}: epoch {checkpoint.epoch}, train loss {m['train_loss']:.4f} accuracy {m['train_accuracy']:.2%}, "
        f"test loss {m['test_loss']:.4f} accuracy {m['test_accuracy']:.2%}\nNext: sharpscope eigen {args.out}"
    )
    return 0
