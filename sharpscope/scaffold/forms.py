"""The code that a problem file needs, by the layout of the checkpoint."""

from __future__ import annotations

import ast
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sharpscope.scaffold.seen import Seen

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
