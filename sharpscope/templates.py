"""Write a problem file for a checkpoint of unknown origin, filled in as far as the checkpoint shows its contents.

``inspect_checkpoint`` finds the layout; ``TEMPLATES`` has one row for each layout, with the code that builds its model.
"""

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

# Prefixes of data parallelism, torch.compile, and a module that holds the network as .model.
WRAPPERS = ("module.", "_orig_mod.", "model.")
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class ZooModel:
    """``make_model(name, **args)`` for each data set in ``data``; ``args`` leaves out defaults."""

    name: str
    args: Mapping[str, Any]
    data: tuple[str, ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class CheckpointInfo:
    """What a checkpoint shows of its model.

    Attributes:
        checkpoint: the weights.
        layout: "state dict", "Lightning", "Hugging Face", "PEFT" or "distributed".
        prefix: prefix of every name, as a wrapper adds it.
        folder: folder of Hugging Face's configuration, whose contents are ``config``.
        zoo_model: the bundled model with these names and shapes, if there is one.
    """

    checkpoint: Checkpoint
    layout: str
    prefix: str = ""
    folder: Path = Path()
    config: Mapping[str, Any] = field(default_factory=dict)
    zoo_model: ZooModel | None = None


def inspect_checkpoint(path: str | os.PathLike[str], weights: str | None = None) -> CheckpointInfo:
    """Find the layout of the checkpoint in ``path`` and what it shows of its model, without running its code.

    Args:
        path: file or folder.
        weights: key of the state dict, as in ``read_checkpoint``.

    Raises: CheckpointError for a file that cannot be read, or one of ``sharpscope train``, which needs no problem file.
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
    # A folder, or a file with a name that the libraries of Hugging Face give.
    hugging_face = place.is_dir() or place.name.startswith(("model.safetensors", "pytorch_model", "adapter_model"))
    if hugging_face:
        if all(name.startswith("base_model.") for name in names) and (folder / "adapter_config.json").is_file():
            config = _read_json(folder / "adapter_config.json")
            return CheckpointInfo(checkpoint=checkpoint, layout="PEFT", folder=folder, config=config)
        config = _read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
        if {"architectures", "model_type"} & set(config):  # else some training script's config.json
            return CheckpointInfo(checkpoint=checkpoint, layout="Hugging Face", folder=folder, config=config)
    if checkpoint.hyper_parameters is not None:
        first_names = {name.partition(".")[0] for name in names}
        prefix = f"{first_names.pop()}." if len(first_names) == 1 and all("." in name for name in names) else ""
        return CheckpointInfo(checkpoint=checkpoint, layout="Lightning", prefix=prefix)
    prefix = ""
    while added := next((w for w in WRAPPERS if all(name.startswith(prefix + w) for name in names)), ""):
        prefix += added
    shapes = {name.removeprefix(prefix): tuple(value.shape) for name, value in checkpoint.state_dict.items()}
    return CheckpointInfo(
        checkpoint=checkpoint,
        layout="distributed" if (place / INDEX).is_file() else "state dict",
        prefix=prefix,
        zoo_model=match_zoo_model(shapes),
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} must be the model's configuration as JSON, but is damaged. Copy it again."
        ) from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(config).__name__}. Copy it again.")
    return config


# Shape of one input and number of classes of each bundled data set; Fashion-MNIST's files may not be installed.
INPUTS: dict[str, tuple[tuple[int, int, int], int]] = {"digits": ((1, 8, 8), 10), "fashion-mnist": ((1, 28, 28), 10)}


def match_zoo_model(shapes: Shapes) -> ZooModel | None:
    """The bundled model with exactly these names and shapes on some bundled data set, or None."""
    for name, arguments_of in ZOO_ARGUMENTS.items():
        try:
            args = arguments_of(shapes)
        except (LookupError, ValueError):
            continue
        data = tuple(d for d, (shape, classes) in INPUTS.items() if _shapes(name, shape, classes, args) == dict(shapes))
        if data:
            default = model_arguments(name)
            return ZooModel(name, {key: value for key, value in args.items() if value != default[key]}, data)
    return None


def _shapes(name: str, shape: tuple[int, ...], classes: int, args: Mapping[str, Any]) -> Shapes:
    """Names and shapes of a bundled model; empty where it cannot have these arguments."""
    try:
        with torch.device("meta"):  # allocates nothing
            model = make_model(name, shape=shape, classes=classes, **args)
    except ArgumentError:
        return {}
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


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


ZOO_ARGUMENTS: dict[str, Callable[[Shapes], dict[str, Any]]] = {"mlp": _mlp, "cnn": _cnn, "wide_resnet": _wide_resnet}


def command(info: CheckpointInfo, out: Path) -> str:
    """The command line that measures the checkpoint with the problem file ``out``."""
    return _eigen(info, "--problem", str(out), *TEMPLATES[info.layout].options)


def command_without_file(info: CheckpointInfo) -> str:
    """The command line that names the bundled model, and the first of the data sets that it fits."""
    zoo_model = info.zoo_model
    assert zoo_model is not None
    args = [f"{key}={_option(value)}" for key, value in zoo_model.args.items()]
    model_args = ["--model-args", *args] if args else []
    return _eigen(info, "--model", zoo_model.name, *model_args, "--data", zoo_model.data[0])


def _eigen(info: CheckpointInfo, *options: str) -> str:
    checkpoint = info.checkpoint
    weights = ["--weights", checkpoint.weights] if checkpoint.others else []
    return shlex.join(["sharpscope", "eigen", str(checkpoint.path), *options, *weights])


def _option(value: Any) -> str:
    """``value`` in the syntax of ``--model-args``: (8,) is "8,", which needs no quotes in a shell."""
    if isinstance(value, tuple) and value:
        return ",".join(map(str, value)) + ("," if len(value) == 1 else "")
    return str(value)


# Stands for the user's own module.
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
# -100 marks positions without a loss term, here the padding.
EACH_TOKEN = 'batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)'

# The class that builds a base model, by the adapter's task.
TASKS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}


@dataclass(frozen=True, kw_only=True)
class Code:
    """The lines of a problem file that depend on the checkpoint.

    Attributes:
        modules: modules imported besides sharpscope and torch.
        factory: import line of the function or class that builds the model.
        constants: lines after the imports.
        model: lines that bind ``model``.
        loss: the expression of the loss, with a comment.
        data: commented lines that return the data; the user keeps one.
    """

    modules: tuple[str, ...] = ()
    factory: str = ""
    constants: tuple[str, ...] = ()
    model: tuple[str, ...]
    loss: str = f"{CROSS_ENTROPY}  # or MSELoss(), BCEWithLogitsLoss(), or any loss(output, target) that is a mean"
    data: tuple[str, ...] = tuple(TENSORS)


def _user_class(info: CheckpointInfo, out: Path) -> Code:
    return Code(factory=_placeholder("MyModel", "your class"), model=(f"model = MyModel()  # {ARGUMENTS}",))


def _placeholder(name: str, what: str) -> str:
    return f"from {PLACEHOLDER} import {name}  # {what}; its module may lie beside this file"


def _lightning(info: CheckpointInfo, out: Path) -> Code:
    hyper_parameters = info.checkpoint.hyper_parameters or {}
    plain = {key: value for key, value in hyper_parameters.items() if key.isidentifier() and _is_literal(value)}
    return Code(
        factory=_placeholder("MyModule", "your LightningModule, or the network in it"),
        constants=_assigned("HYPER_PARAMETERS", plain) if plain else (),
        model=(f"model = MyModule({'**HYPER_PARAMETERS' if plain else ''})  # {ARGUMENTS}",),
    )


def _transformer(info: CheckpointInfo, out: Path) -> Code:
    architectures = info.config.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else None
    # auto_map: the class is Python code in the folder, not part of transformers.
    known = isinstance(architecture, str) and architecture.isidentifier() and architecture[0].isupper()
    if not isinstance(architecture, str) or not known or "auto_map" in info.config:
        return _user_class(info, out)
    loss, data = _loss_and_data(architecture, info.config, "FOLDER")
    return Code(
        modules=("transformers",),
        constants=(f"FOLDER = {_path_code(info.folder, out)}",),
        model=(
            "config = transformers.AutoConfig.from_pretrained(FOLDER)",
            f"model = transformers.{architecture}(config)  # the weights come from the checkpoint",
        ),
        loss=loss,
        data=data,
    )


def _adapter(info: CheckpointInfo, out: Path) -> Code:
    base, task = info.config.get("base_model_name_or_path"), str(info.config.get("task_type"))
    auto, named = TASKS.get(task, "AutoModel"), isinstance(base, str) and base != ""
    loss, data = _loss_and_data(auto, {"is_encoder_decoder": task == "SEQ_2_SEQ_LM"}, "BASE" if named else "...")
    return Code(
        modules=("peft", "transformers"),
        factory="" if named else _placeholder("base_model", "builds the base model, which the adapter does not name"),
        constants=(
            *([f"BASE = {_base_code(str(base), out)}"] if named else []),
            f"FOLDER = {_path_code(info.folder, out)}",
        ),
        model=(
            f"base = transformers.{auto}.from_pretrained(BASE)" if named else "base = base_model()",
            "adapter = peft.PeftConfig.from_pretrained(FOLDER)",
            "adapter.inference_mode = False  # saved adapters are frozen, and what is frozen is not measured",
            "model = peft.get_peft_model(base, adapter)",
        ),
        loss=loss,
        data=data,
    )


def _bundled_model(info: CheckpointInfo, out: Path) -> Code:
    assert info.zoo_model is not None
    args = (f"{key}={_literal_code(value)}" for key, value in info.zoo_model.args.items())
    call = f"make_model({', '.join([_literal_code(info.zoo_model.name), *args])})"
    return Code(
        factory="from sharpscope.zoo import make_model", model=(f"model = {call}  # whose names and shapes these are",)
    )


@dataclass(frozen=True, kw_only=True)
class Template:
    """How one layout of checkpoint becomes a problem file.

    Attributes:
        description: the layout, in the file's first comment.
        code: the lines of the file, from the checkpoint and the path of the file.
        ordered: whether the tensors come in the model's order.
        options: options of the command line that measures it.
    """

    description: str
    code: Callable[[CheckpointInfo, Path], Code]
    ordered: bool = True
    options: tuple[str, ...] = ()


TEMPLATES = {
    "state dict": Template(description="a state dict", code=_user_class),
    "distributed": Template(description="weights of torch.distributed.checkpoint", code=_user_class),
    "Lightning": Template(description="a Lightning checkpoint", code=_lightning),
    "Hugging Face": Template(description="a Hugging Face model", code=_transformer, ordered=False),
    # The file holds the adapter alone.
    "PEFT": Template(description="a PEFT adapter", code=_adapter, ordered=False, options=("--partial",)),
    # A state dict or distributed checkpoint with the names and shapes of a bundled model; described by its layout.
    "bundled model": Template(description="", code=_bundled_model),
}


def _base_code(name: str, out: Path) -> str:
    """The expression of a base model: a path from the problem file if it is a folder, else its name on the hub."""
    return _path_code(Path(name), out) if Path(name).is_dir() else _literal_code(name)


def _loss_and_data(architecture: str, config: Mapping[str, Any], tokenizer: str) -> tuple[str, tuple[str, ...]]:
    """Loss and data of an architecture, by its class name in transformers."""

    def texts(labels: str) -> tuple[str, ...]:
        return tuple(line.format(tokenizer=tokenizer, labels=labels) for line in TEXTS)

    generates = any(part in architecture for part in ("ForConditionalGeneration", "Seq2SeqLM"))
    if generates and config.get("is_encoder_decoder"):
        return "sharpscope.TokenCrossEntropy()  # each token of the target", texts("targets")
    if generates or "ForCausalLM" in architecture or "LMHeadModel" in architecture:
        return "sharpscope.TokenCrossEntropy(shift=True)  # each token from those before it", texts(EACH_TOKEN)
    if "ForMaskedLM" in architecture:
        return "sharpscope.TokenCrossEntropy()  # the masked tokens", texts("labels")
    if "ForTokenClassification" in architecture:
        return "sharpscope.TokenCrossEntropy()  # each token's class", texts("labels")
    if "ForSequenceClassification" in architecture:
        return _classification_loss(config), texts("labels")
    if "ForImageClassification" in architecture:
        return _classification_loss(config), tuple(IMAGES)
    return f"{CROSS_ENTROPY}  # or any loss(output, target) that is a mean", texts("labels")


def _classification_loss(config: Mapping[str, Any]) -> str:
    kinds = {
        "regression": "torch.nn.MSELoss()  # labels (N, outputs)",
        "multi_label_classification": "torch.nn.BCEWithLogitsLoss()  # labels (N, outputs)",
    }
    return kinds.get(str(config.get("problem_type")), f"{CROSS_ENTROPY}  # labels (N,)")


def _path_code(folder: Path, out: Path) -> str:
    """The expression of ``folder``: relative to the problem file, unless the user gave an absolute path."""
    if folder.is_absolute():
        return _literal_code(str(folder))
    return f"Path(__file__).parent / {_literal_code(Path(os.path.relpath(folder, out.parent)).as_posix())}"


def _assigned(name: str, values: Mapping[str, Any]) -> tuple[str, ...]:
    items = (f"    {_literal_code(key)}: {_literal_code(value)}," for key, value in values.items())
    return f"{name} = {{  # as the file shows them", *items, "}"


def _literal_code(value: Any) -> str:
    """The literal of ``value``, in double quotes if it is text that contains none."""
    text = repr(value)
    return f'"{text[1:-1]}"' if isinstance(value, str) and text[0] == "'" and '"' not in text else text


def _is_literal(value: Any) -> bool:
    """Whether the repr of ``value`` is code that gives it back and does nothing else."""
    try:
        return bool(ast.literal_eval(repr(value)) == value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return False


ENDS = 3  # names shown at each end of a long list
WIDTH = 116  # of a comment; 118 with "# "


def header(info: CheckpointInfo, purpose: str) -> list[str]:
    """The file's first comment. Characters that do not print are escaped, so that no name can end the comment."""
    facts = [purpose, "", _holds(info), *_names(info), *_hints(info)]
    return [line for fact in facts for line in _comment(fact)]


def _holds(info: CheckpointInfo) -> str:
    checkpoint, tensors = info.checkpoint, info.checkpoint.state_dict
    where = f" under {checkpoint.weights!r}" if checkpoint.weights else ""
    others = f" (others, for --weights: {', '.join(map(repr, checkpoint.others))})" if checkpoint.others else ""
    weights = {name: t for name, t in tensors.items() if t.is_floating_point() and ".running_" not in f".{name}"}
    kinds = Counter(str(t.dtype).removeprefix("torch.") for t in weights.values())
    count = sum(t.numel() for t in weights.values())
    return (
        f"{checkpoint.path.name or checkpoint.path} holds {TEMPLATES[info.layout].description}{where}{others}: "
        f"{len(tensors)} tensors, {count:,} parameters, {' and '.join(kinds) or 'none of floating point'}."
    )


def _names(info: CheckpointInfo) -> list[str]:
    """The first and last names with their shapes; two leading blanks keep a line from being wrapped."""
    tensors = info.checkpoint.state_dict
    width = max(map(len, tensors))
    named = tensors.items() if _in_model_order(info) else sorted(tensors.items())
    rows = [f"  {name.ljust(width)}  {'x'.join(map(str, t.shape)) or 'scalar'}" for name, t in named]
    return rows if len(rows) <= 2 * ENDS + 1 else [*rows[:ENDS], "  ...", *rows[-ENDS:]]


def _hints(info: CheckpointInfo) -> list[str]:
    tensors = info.checkpoint.state_dict
    facts = []
    if info.prefix:
        facts.append(f"The prefix {info.prefix!r} of all names is taken off unless your model's names have it too.")
    last = [name for name, t in tensors.items() if t.dim() >= 2][-1:]
    if last and _in_model_order(info):
        count = len(tensors[last[0]])
        what = "outputs: as many as classes, perhaps" if count > 1 else "output: MSELoss or BCEWithLogitsLoss, perhaps"
        facts.append(f"The last weight, {last[0]}, has {count} {what}.")
    if any(name.endswith("running_mean") for name in tensors):
        facts.append(
            "There is BatchNorm. It is measured with its running statistics; with those of the batches as in training: "
            'Problem(..., mode="train").'
        )
    foreign = [name for name in info.checkpoint.foreign if not name.startswith(("torch.", "collections."))]
    if foreign:
        facts.append(f"Classes of the objects beside or around the weights, which were not run: {', '.join(foreign)}.")
    if info.layout == "Lightning":
        shown = ", ".join(info.checkpoint.hyper_parameters or ())
        facts.append(f"Hyper parameters in the file: {shown or 'none that can be read'}.")
    if info.layout == "PEFT":
        facts.append("Only the adapter's weights are measured: the base model's are frozen, and so constants.")
    if info.zoo_model is not None:
        facts.append(
            f"Names and shapes are those of sharpscope's own {info.zoo_model.name}. If the data are "
            f"{' or '.join(info.zoo_model.data)}, no problem file is needed: {command_without_file(info)}"
        )
    return facts


def _in_model_order(info: CheckpointInfo) -> bool:
    """Whether the tensors come in the model's order; safetensors sorts them."""
    return TEMPLATES[info.layout].ordered and info.checkpoint.path.suffix != ".safetensors"


def _comment(fact: str) -> list[str]:
    plain = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in fact)
    if plain.startswith("  "):
        return [f"# {plain}"]
    return [f"# {line}" for line in textwrap.wrap(plain, WIDTH, break_on_hyphens=False, break_long_words=False)] or [
        "#"
    ]


TODO = "data() must return your data. Take one of the forms above this line."


def problem_text(info: CheckpointInfo, out: Path) -> str:
    """The problem file for a checkpoint, to be saved as ``out``: it runs once class and data are filled in.

    Until then it raises ProblemError. Nothing from the checkpoint becomes code: its names are comments or literals.
    """
    layout = "bundled model" if info.zoo_model is not None else info.layout
    code = TEMPLATES[layout].code(info, out)
    lines = [
        *header(info, f"Model, loss and data for `{command(info, out)}`."),
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


def unfinished_lines(text: str) -> list[str]:
    """The lines of a problem file that the user must fill in, as "line 12 (your class)"."""
    marks = {f"from {PLACEHOLDER} import": "your class", TODO: "your data"}
    return [
        f"line {i} ({what})"
        for i, line in enumerate(text.splitlines(), start=1)
        for mark, what in marks.items()
        if mark in line and not line.startswith("#")
    ]


def _imports(code: Code) -> list[str]:
    standard = ["from pathlib import Path", ""] if any("Path(" in line for line in code.constants) else []
    modules = sorted(["import sharpscope", "import torch", *(f"import {name}" for name in code.modules)])
    return [*standard, *modules, *(["", code.factory] if code.factory else [])]
