"""The comment that a problem file starts with: what the checkpoint showed."""

from __future__ import annotations

import textwrap
from collections import Counter

from sharpscope.scaffold.command import command_without_file
from sharpscope.scaffold.seen import Seen

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
