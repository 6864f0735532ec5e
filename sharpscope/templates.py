"""Write a problem file for a checkpoint of unknown origin, as far as the checkpoint shows what it must hold."""

from __future__ import annotations

import ast
import json
import os
import shlex
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sharpscope.checkpoint import Checkpoint, read_checkpoint
from sharpscope.checkpoint.unpickling import INDEX
from sharpscope.errors import ArgumentError, CheckpointError
from sharpscope.zoo import make_model, model_arguments

# Of data parallelism, torch.compile, and a module that holds the network as .model.
WRAPPERS = ("module.", "_orig_mod.", "model.")


@dataclass(frozen=True, eq=False, kw_only=True)
class Seen:
    """What a checkpoint shows of its model.

    Attributes:
        checkpoint: its weights.
        layout: "state dict", "Lightning", "Hugging Face", "PEFT" or "distributed".
        prefix: what a wrapper seems to have put before every name.
        folder: where Hugging Face's configuration is, with its contents in ``config``.
        zoo_model: the bundled model that it is of.
    """

    checkpoint: Checkpoint
    layout: str
    prefix: str = ""
    folder: Path | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    zoo_model: ZooModel | None = None


def look(path: str | os.PathLike[str], weights: str | None = None) -> Seen:
    """What the checkpoint in ``path`` shows; no code of it is run. ``weights`` is as in ``read_checkpoint``.

    Raises: CheckpointError for a file that cannot be read, or one of ``sharpscope train``, which says all itself.
    """
    checkpoint = read_checkpoint(path, weights)
    place = checkpoint.path
    if checkpoint.model is not None:
        raise CheckpointError(
            f"The checkpoint {place} says itself that it is of {checkpoint.model} on {checkpoint.data['name']}, and "
            f"needs no problem file. Run sharpscope eigen {place}."
        )
    names = list(checkpoint.state_dict)
    folder = place if place.is_dir() else place.parent
    if _of_hugging_face(place):
        if all(name.startswith("base_model.") for name in names) and (folder / "adapter_config.json").is_file():
            config = _json(folder / "adapter_config.json")
            return Seen(checkpoint=checkpoint, layout="PEFT", folder=folder, config=config)
        config = _json(folder / "config.json") if (folder / "config.json").is_file() else {}
        if {"architectures", "model_type"} & set(config):  # a config.json may be of anybody's training script
            return Seen(checkpoint=checkpoint, layout="Hugging Face", folder=folder, config=config)
    if checkpoint.hyper_parameters is not None:
        first = {name.partition(".")[0] for name in names}
        prefix = f"{first.pop()}." if len(first) == 1 and all("." in name for name in names) else ""
        return Seen(checkpoint=checkpoint, layout="Lightning", prefix=prefix)
    prefix = _wrapping(names)
    shapes = {name.removeprefix(prefix): tuple(value.shape) for name, value in checkpoint.state_dict.items()}
    return Seen(
        checkpoint=checkpoint,
        layout="distributed" if (place / INDEX).is_file() else "state dict",
        prefix=prefix,
        zoo_model=recognised(shapes),
    )


def _wrapping(names: list[str]) -> str:
    """The wrappers' names that all ``names`` start with, "module._orig_mod." for instance."""
    prefix = ""
    while True:
        more = next((w for w in WRAPPERS if all(name.startswith(prefix + w) for name in names)), None)
        if more is None:
            return prefix
        prefix += more


def _of_hugging_face(place: Path) -> bool:
    """A folder, or a file whose name is one that Hugging Face's libraries give."""
    return place.is_dir() or place.name.startswith(("model.safetensors", "pytorch_model", "adapter_model"))


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} must be the model's configuration as JSON, but is damaged. Copy it again."
        ) from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(found).__name__}. Copy it again.")
    return found


Shapes = Mapping[str, tuple[int, ...]]

# One input, and the number of classes, of each bundled data set: Fashion-MNIST's files need not be here.
INPUTS: dict[str, tuple[tuple[int, int, int], int]] = {"digits": ((1, 8, 8), 10), "fashion-mnist": ((1, 28, 28), 10)}


@dataclass(frozen=True)
class ZooModel:
    """``make_model(name, **args)`` for each data set in ``data``; ``args`` are those that are not the default."""

    name: str
    args: Mapping[str, Any]
    data: tuple[str, ...]

    @property
    def options(self) -> list[str]:
        """The command line's options for the first of the data sets."""
        given = [f"{key}={_option(value)}" for key, value in self.args.items()]
        return ["--model", self.name, *(["--model-args", *given] if given else []), "--data", self.data[0]]


def recognised(shapes: Shapes) -> ZooModel | None:
    """The bundled model that has exactly these names and shapes for some bundled data set, None where none has."""
    for name, guess in GUESSES.items():
        try:
            args = guess(shapes)
        except (LookupError, ValueError):
            continue
        fitting = tuple(data for data, (shape, classes) in INPUTS.items() if _fits(name, args, shape, classes, shapes))
        if fitting:
            default = model_arguments(name)
            return ZooModel(name, {key: value for key, value in args.items() if value != default[key]}, fitting)
    return None


def _fits(name: str, args: Mapping[str, Any], shape: tuple[int, ...], classes: int, shapes: Shapes) -> bool:
    try:
        with torch.device("meta"):  # shapes alone: no numbers are made
            built = make_model(name, shape=shape, classes=classes, **args).state_dict()
    except ArgumentError:
        return False
    return {key: tuple(value.shape) for key, value in built.items()} == dict(shapes)


def _mlp(shapes: Shapes) -> dict[str, Any]:
    return {"hidden": tuple(shape[0] for key, shape in shapes.items() if key.endswith("weight"))[:-1]}


def _cnn(shapes: Shapes) -> dict[str, Any]:
    kernels = [shape for shape in shapes.values() if len(shape) == 4]
    first_linear, *_ = [shape for shape in shapes.values() if len(shape) == 2]
    return {"channels": tuple(shape[0] for shape in kernels), "hidden": first_linear[0]}


def _wide_resnet(shapes: Shapes) -> dict[str, Any]:
    base = shapes["stem.weight"][0]
    widen = shapes["blocks.0.conv1.weight"][0] // base
    blocks = sum(key.endswith("conv1.weight") for key in shapes)
    return {
        "depth": 2 * blocks + 4,
        "widen": widen,
        "norm": "batch" if "norm.weight" in shapes else "none",
        "base": base,
    }


GUESSES: dict[str, Callable[[Shapes], dict[str, Any]]] = {"mlp": _mlp, "cnn": _cnn, "wide_resnet": _wide_resnet}


def _option(value: Any) -> str:
    """``value`` as ``--model-args`` takes it: (8,) as "8,", which the shell leaves alone."""
    if isinstance(value, tuple) and value:
        return ",".join(map(str, value)) + ("," if len(value) == 1 else "")
    return str(value)


def command(seen: Seen, out: Path) -> str:
    """The one that takes the problem file ``out``."""
    # A PEFT file holds the adapter alone.
    partial = ["--partial"] if seen.layout == "PEFT" else []
    return _eigen(seen, "--problem", str(out), *partial)


def command_without_file(seen: Seen) -> str:
    """The one that names the bundled model which the checkpoint is of, and the first of the data it may be for."""
    assert seen.zoo_model is not None
    return _eigen(seen, *seen.zoo_model.options)


def _eigen(seen: Seen, *options: str) -> str:
    checkpoint = seen.checkpoint
    weights = ["--weights", checkpoint.weights] if checkpoint.others else []
    return shlex.join(["sharpscope", "eigen", str(checkpoint.path), *options, *weights])


# What stands for the user's own module.
PLACEHOLDER = "my_package"
ARGUMENTS = "with the arguments it was trained with; the weights come from the checkpoint"
CROSS_ENTROPY = "torch.nn.CrossEntropyLoss()"

TENSORS = [
    "# return inputs, labels  # tensors of N examples: inputs (N, ...) as in training, normalisation too; labels (N,)",
    "# return torch.utils.data.DataLoader(dataset, batch_size=256, shuffle=False)  # of (inputs, labels)",
]
TEXTS = [
    '# batch = transformers.AutoTokenizer.from_pretrained({tokenizer})(texts, padding=True, return_tensors="pt")',
    '# return {{**batch, "labels": {labels}}}',
    "# or a list of such dicts, each of one length",
]
IMAGES = [
    '# return {"pixel_values": images, "labels": labels}  # (N, channels, height, width) and (N,)',
    "# or a list of such dicts",
]
# -100 stands for what is no loss term, here the padding.
EACH_TOKEN = 'batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)'

# The class that builds a base model, by the adapter's task.
TASKS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}


@dataclass(frozen=True, kw_only=True)
class Form:
    """The code of a problem file.

    Attributes:
        modules: what is imported besides sharpscope and torch.
        own: the import of the function or class that builds the model.
        constants: lines after the imports.
        model: lines that bind ``model``.
        loss: the expression of the loss, with a comment.
        data: commented lines that return the data, one of which the user takes.
    """

    modules: tuple[str, ...] = ()
    own: str = ""
    constants: tuple[str, ...] = ()
    model: tuple[str, ...]
    loss: str = f"{CROSS_ENTROPY}  # or MSELoss(), BCEWithLogitsLoss(), or any loss(output, target) that is a mean"
    data: tuple[str, ...] = tuple(TENSORS)


def form(seen: Seen, out: Path) -> Form:
    """The code for what was seen, in a problem file that lies at ``out``."""
    if seen.layout == "PEFT":
        return _adapter(seen, out)
    if seen.layout == "Hugging Face":
        return _transformer(seen, out)
    if seen.layout == "Lightning":
        return _lightning(seen)
    if seen.zoo_model is not None:
        args = [_code(seen.zoo_model.name), *(f"{key}={_code(value)}" for key, value in seen.zoo_model.args.items())]
        return Form(
            own="from sharpscope.zoo import make_model",
            model=(f"model = make_model({', '.join(args)})  # whose names and shapes these are",),
        )
    return _own_class()


def _own_class() -> Form:
    return Form(own=_placeholder("MyModel", "your class"), model=(f"model = MyModel()  # {ARGUMENTS}",))


def _placeholder(name: str, what: str) -> str:
    return f"from {PLACEHOLDER} import {name}  # {what}; its module may lie beside this file"


def _lightning(seen: Seen) -> Form:
    shown = seen.checkpoint.hyper_parameters or {}
    plain = {key: value for key, value in shown.items() if key.isidentifier() and _literal(value)}
    return Form(
        own=_placeholder("MyModule", "your LightningModule, or the network in it"),
        constants=_assigned("HYPER_PARAMETERS", plain) if plain else (),
        model=(f"model = MyModule({'**HYPER_PARAMETERS' if plain else ''})  # {ARGUMENTS}",),
    )


def _transformer(seen: Seen, out: Path) -> Form:
    named = seen.config.get("architectures")
    architecture = named[0] if isinstance(named, list) and named else None
    # auto_map: the class is Python code beside the weights, not one of transformers.
    known = isinstance(architecture, str) and architecture.isidentifier() and architecture[0].isupper()
    if not isinstance(architecture, str) or not known or "auto_map" in seen.config:
        return _own_class()
    assert seen.folder is not None
    loss, data = _task(architecture, seen.config, "FOLDER")
    return Form(
        modules=("transformers",),
        constants=(f"FOLDER = {_beside(seen.folder, out)}",),
        model=(
            "config = transformers.AutoConfig.from_pretrained(FOLDER)",
            f"model = transformers.{architecture}(config)  # the weights come from the checkpoint",
        ),
        loss=loss,
        data=data,
    )


def _adapter(seen: Seen, out: Path) -> Form:
    base, task = seen.config.get("base_model_name_or_path"), str(seen.config.get("task_type"))
    auto, named = TASKS.get(task, "AutoModel"), isinstance(base, str) and base != ""
    assert seen.folder is not None
    loss, data = _task(auto, {"is_encoder_decoder": task == "SEQ_2_SEQ_LM"}, "BASE" if named else "...")
    return Form(
        modules=("peft", "transformers"),
        own="" if named else _placeholder("base_model", "builds the base model, which the adapter does not name"),
        constants=(*([f"BASE = {_base(str(base), out)}"] if named else []), f"FOLDER = {_beside(seen.folder, out)}"),
        model=(
            f"base = transformers.{auto}.from_pretrained(BASE)" if named else "base = base_model()",
            "adapter = peft.PeftConfig.from_pretrained(FOLDER)",
            "adapter.inference_mode = False  # saved adapters are frozen, and what is frozen is not measured",
            "model = peft.get_peft_model(base, adapter)",
        ),
        loss=loss,
        data=data,
    )


def _base(name: str, out: Path) -> str:
    """The expression of a base model: from the problem file on where it is a folder here, else its name on the hub."""
    return _beside(Path(name), out) if Path(name).is_dir() else _code(name)


def _task(architecture: str, config: Mapping[str, Any], tokenizer: str) -> tuple[str, tuple[str, ...]]:
    """The loss and the data of an architecture, which its name tells in transformers."""

    def texts(labels: str) -> tuple[str, ...]:
        return tuple(line.format(tokenizer=tokenizer, labels=labels) for line in TEXTS)

    writes = any(part in architecture for part in ("ForConditionalGeneration", "Seq2SeqLM"))
    if writes and config.get("is_encoder_decoder"):
        return "sharpscope.TokenCrossEntropy()  # each token of the target", texts("targets")
    if writes or "ForCausalLM" in architecture or "LMHeadModel" in architecture:
        return "sharpscope.TokenCrossEntropy(shift=True)  # each token from those before it", texts(EACH_TOKEN)
    if "ForMaskedLM" in architecture:
        return "sharpscope.TokenCrossEntropy()  # the masked tokens", texts("labels")
    if "ForTokenClassification" in architecture:
        return "sharpscope.TokenCrossEntropy()  # each token's class", texts("labels")
    if "ForSequenceClassification" in architecture:
        return _classes(config), texts("labels")
    if "ForImageClassification" in architecture:
        return _classes(config), tuple(IMAGES)
    return f"{CROSS_ENTROPY}  # or any loss(output, target) that is a mean", texts("labels")


def _classes(config: Mapping[str, Any]) -> str:
    kinds = {
        "regression": "torch.nn.MSELoss()  # labels (N, outputs)",
        "multi_label_classification": "torch.nn.BCEWithLogitsLoss()  # labels (N, outputs)",
    }
    return kinds.get(str(config.get("problem_type")), f"{CROSS_ENTROPY}  # labels (N,)")


def _beside(folder: Path, out: Path) -> str:
    """The expression of ``folder``: from the problem file on, unless the user gave it absolute."""
    if folder.is_absolute():
        return _code(str(folder))
    return f"Path(__file__).parent / {_code(Path(os.path.relpath(folder, out.parent)).as_posix())}"


def _assigned(name: str, values: Mapping[str, Any]) -> tuple[str, ...]:
    items = (f"    {_code(key)}: {_code(value)}," for key, value in values.items())
    return f"{name} = {{  # as the file shows them", *items, "}"


def _code(value: Any) -> str:
    """The literal of ``value``, in double quotes where it is text without any."""
    text = repr(value)
    return f'"{text[1:-1]}"' if isinstance(value, str) and text[0] == "'" and '"' not in text else text


def _literal(value: Any) -> bool:
    """Whether the repr of ``value`` is code that gives it back and does nothing else."""
    try:
        return bool(ast.literal_eval(repr(value)) == value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return False


ENDS = 3  # names shown of either end
WIDTH = 116  # 120 with "# " and some room
LAYOUTS = {
    "state dict": "a state dict",
    "Lightning": "a Lightning checkpoint",
    "Hugging Face": "a Hugging Face model",
    "PEFT": "a PEFT adapter",
    "distributed": "weights of torch.distributed.checkpoint",
}


def header(seen: Seen, purpose: str) -> list[str]:
    """The comment's lines. What does not print is escaped, so that no name in a file can end the comment."""
    facts = [purpose, "", _holds(seen), *_names(seen), *_hints(seen)]
    return [line for fact in facts for line in _comment(fact)]


def _holds(seen: Seen) -> str:
    checkpoint, tensors = seen.checkpoint, seen.checkpoint.state_dict
    where = f" under {checkpoint.weights!r}" if checkpoint.weights else ""
    others = f" (others, for --weights: {', '.join(map(repr, checkpoint.others))})" if checkpoint.others else ""
    weights = {name: t for name, t in tensors.items() if t.is_floating_point() and ".running_" not in f".{name}"}
    kinds = Counter(str(t.dtype).removeprefix("torch.") for t in weights.values())
    count = sum(t.numel() for t in weights.values())
    return (
        f"{checkpoint.path.name or checkpoint.path} holds {LAYOUTS[seen.layout]}{where}{others}: {len(tensors)} "
        f"tensors, {count:,} parameters, {' and '.join(kinds) or 'none of floating point'}."
    )


def _names(seen: Seen) -> list[str]:
    """The first and last names with their shapes; two blanks before a line keep it from being filled."""
    tensors = seen.checkpoint.state_dict
    width = max(map(len, tensors))
    named = tensors.items() if _ordered(seen) else sorted(tensors.items())
    rows = [f"  {name.ljust(width)}  {'x'.join(map(str, t.shape)) or 'scalar'}" for name, t in named]
    return rows if len(rows) <= 2 * ENDS + 1 else [*rows[:ENDS], "  ...", *rows[-ENDS:]]


def _hints(seen: Seen) -> list[str]:
    tensors = seen.checkpoint.state_dict
    facts = []
    if seen.prefix:
        facts.append(f"The prefix {seen.prefix!r} of all names is taken off unless your model's names have it too.")
    last = [name for name, t in tensors.items() if t.dim() >= 2][-1:]
    if last and _ordered(seen):
        count = len(tensors[last[0]])
        what = "outputs: as many as classes, perhaps" if count > 1 else "output: MSELoss or BCEWithLogitsLoss, perhaps"
        facts.append(f"The last weight, {last[0]}, has {count} {what}.")
    if any(name.endswith("running_mean") for name in tensors):
        facts.append(
            "There is BatchNorm. It is measured with its running statistics; with those of the batches as in training: "
            'Problem(..., mode="train").'
        )
    foreign = [name for name in seen.checkpoint.foreign if not name.startswith(("torch.", "collections."))]
    if foreign:
        facts.append(f"Classes of the objects beside or around the weights, which were not run: {', '.join(foreign)}.")
    if seen.layout == "Lightning":
        shown = ", ".join(seen.checkpoint.hyper_parameters or ())
        facts.append(f"Hyper parameters in the file: {shown or 'none that can be read'}.")
    if seen.layout == "PEFT":
        facts.append("Only the adapter's weights are measured: the base model's are frozen, and so constants.")
    if seen.zoo_model is not None:
        facts.append(
            f"Names and shapes are those of sharpscope's own {seen.zoo_model.name}. If the data are "
            f"{' or '.join(seen.zoo_model.data)}, no problem file is needed: {command_without_file(seen)}"
        )
    return facts


def _ordered(seen: Seen) -> bool:
    """Whether the names come in the model's order; safetensors has them in none."""
    return seen.layout not in ("Hugging Face", "PEFT") and seen.checkpoint.path.suffix != ".safetensors"


def _comment(fact: str) -> list[str]:
    plain = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in fact)
    if plain.startswith("  "):
        return [f"# {plain}"]
    return [f"# {line}" for line in textwrap.wrap(plain, WIDTH, break_on_hyphens=False, break_long_words=False)] or [
        "#"
    ]


TODO = "data() must return your data. Take one of the forms above this line."


def problem_text(seen: Seen, out: Path) -> str:
    """The problem file for what was seen, to lie at ``out``: Python that runs once class and data are filled in.

    Until then it ends in a ProblemError. Nothing of the checkpoint gets into it as code: its names are comments or
    literals.
    """
    code = form(seen, out)
    lines = [
        *header(seen, f"Model, loss and data for `{command(seen, out)}`."),
        "",
        *_imports(code),
        "",
        *([*code.constants, ""] if code.constants else []),
        "",
        'def problem(split="train"):',
        *(f"    {line}" for line in code.model),
        f"    loss = {code.loss}",
        "    return sharpscope.Problem(model=model, loss=loss, data=data(split))",
        "",
        "",
        "def data(split):",
        "    # The same examples in the same order at every pass, so without shuffling and augmentation:",
        *(f"    {line}" for line in code.data),
        f'    raise sharpscope.ProblemError("{TODO}")',
    ]
    return "\n".join(lines) + "\n"


def open_lines(text: str) -> list[str]:
    """What of a problem file is to be filled in, as "line 12 (your class)"."""
    marks = {f"from {PLACEHOLDER} import": "your class", TODO: "your data"}
    return [
        f"line {i} ({what})"
        for i, line in enumerate(text.splitlines(), start=1)
        for mark, what in marks.items()
        if mark in line and not line.startswith("#")
    ]


def _imports(code: Form) -> list[str]:
    standard = ["from pathlib import Path", ""] if any("Path(" in line for line in code.constants) else []
    modules = sorted(["import sharpscope", "import torch", *(f"import {name}" for name in code.modules)])
    return [*standard, *modules, *(["", code.own] if code.own else [])]
