"""sharpscope init: the problem file it writes needs the user's class and data, and nothing else."""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint
from torch import Tensor, nn

from dense import dense_hessian, top
from sharpscope import EigenResult, TokenCrossEntropy, load
from sharpscope.cli import main
from sharpscope.errors import CheckpointError, OutputError
from sharpscope.templates import inspect_checkpoint as look
from sharpscope.templates import problem_text
from sharpscope.training import Recipe, train
from sharpscope.zoo import load_data, make_model

MINE = """
import torch


class MyModel(torch.nn.Module):
    def __init__(self, width=5):
        super().__init__()
        self.body, self.head = torch.nn.Linear(4, width), torch.nn.Linear(width, 3)
        self.norm = torch.nn.BatchNorm1d(width)

    def forward(self, x):
        return self.head(torch.tanh(self.norm(self.body(x))))


def examples(split):
    generator = torch.Generator().manual_seed(len(split))
    return torch.randn(30, 4, generator=generator), torch.randint(0, 3, (30,), generator=generator)
"""
FORMS = "# return inputs, labels  # tensors"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a user stands, with his own module."""
    (tmp_path / "networks.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "networks", raising=False)
    return tmp_path


def own() -> tuple[nn.Module, Callable[[str], tuple[Tensor, Tensor]]]:
    names: dict[str, Any] = {}
    exec(MINE, names)
    return names["MyModel"](), names["examples"]


def written(checkpoint: str, *argv: str) -> str:
    assert main(["init", checkpoint, *argv]) == 0
    text = Path("problem.py").read_text()
    compile(text, "problem.py", "exec")
    assert max(map(len, text.splitlines())) <= 120
    return text


def filled(text: str, old: str, new: str) -> str:
    assert old in text
    text = text.replace(old, new)
    Path("problem.py").write_text(text)
    return text


def unfinished(checkpoint: str, capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What `sharpscope eigen` says of a problem file that is not filled in: one sentence, with its line."""
    capsys.readouterr()
    assert main(["eigen", checkpoint, "--problem", "problem.py", *argv]) == 1
    out, err = capsys.readouterr()
    # transformers and its progress bars talk on stderr too.
    said = [line for line in err.splitlines() if line.startswith("sharpscope:")]
    assert (out, len(said), "Traceback" in err) == ("", 1, False)
    return said[0]


def measured(checkpoint: str, *argv: str) -> list[float]:
    given = ["--problem", "problem.py", "--k", "2", "--out", "e.json", "--overwrite", "--dtype", "float64"]
    assert main(["eigen", checkpoint, *given, *argv]) == 0
    return EigenResult.load("e.json").eigenvalues.tolist()


def expected(model: nn.Module, loss: Callable[..., Tensor], target: Tensor, *inputs: Tensor, **named: Tensor) -> Any:
    dense = dense_hessian(model, lambda call: loss(call(*inputs, **named), target))
    return pytest.approx(top(dense, 2).tolist(), rel=1e-3)


@pytest.mark.parametrize("layout", ["plain", "ddp", "nested", "lightning", "safetensors", "dcp"])
def test_a_file_of_ones_own_needs_its_class_and_data(
    folder: Path, capsys: pytest.CaptureFixture[str], layout: str
) -> None:
    """Each open line is told in turn; once both are filled in the eigenvalues are those of the dense Hessian."""
    model, examples = own()
    state = model.state_dict()
    prefix = {"ddp": "module._orig_mod.", "lightning": "net."}.get(layout, "")
    saved = {prefix + name: value for name, value in state.items()}
    checkpoint = "w.pt"
    if layout == "nested":
        torch.save({"epoch": 3, "model_state_dict": saved, "ema": {k: v + 1 for k, v in saved.items()}}, checkpoint)
    elif layout == "lightning":
        more = {"pytorch-lightning_version": "2.6.6", "hyper_parameters": {"width": 5}, "epoch": 1}
        torch.save({"state_dict": saved, **more}, checkpoint)
    elif layout == "safetensors":
        checkpoint = "w.safetensors"
        pytest.importorskip("safetensors.torch").save_file(saved, checkpoint)
    elif layout == "dcp":
        checkpoint = "shards"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that this is one process
            torch.distributed.checkpoint.save({"model": saved}, checkpoint_id=checkpoint)
    else:
        torch.save(saved, checkpoint)

    text = written(checkpoint)
    named = "MyModule" if layout == "lightning" else "MyModel"
    shown = capsys.readouterr().out
    lines = text.splitlines()
    at_class = next(i for i, line in enumerate(lines, 1) if line.startswith("from my_package"))
    at_data = next(i for i, line in enumerate(lines, 1) if "raise" in line)
    assert f"line {at_class} (your class) and line {at_data} (your data)" in shown
    assert shown.splitlines()[-1].strip().startswith(f"sharpscope eigen {checkpoint} --problem problem.py")
    assert all(fact in text for fact in ("9 tensors, 53 parameters, float32", "5x4", "BatchNorm"))
    assert ("head.weight, has 3 outputs" in text) == (layout != "safetensors")
    assert not prefix or f"The prefix '{prefix}'" in text

    assert f"problem.py, line {at_class}: No module named 'my_package'" in unfinished(checkpoint, capsys)
    text = filled(text, f"from my_package import {named}", f"from networks import MyModel as {named}, examples")
    assert f"problem.py, line {at_data}: data() must return your data" in unfinished(checkpoint, capsys)
    filled(text, FORMS, "return examples(split)  #")
    argv = ["--weights", "model_state_dict"] if layout == "nested" else []
    inputs, labels = examples("train")
    assert measured(checkpoint, *argv) == expected(model, nn.CrossEntropyLoss(), labels, inputs.double())
    assert EigenResult.load("e.json").provenance["weights_prefix"] == prefix


def test_the_weights_that_were_chosen_are_those_of_the_commands(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--weights goes on into the command that is shown, and another of the file's is named."""
    state = own()[0].state_dict()
    torch.save({"model": state, "ema": {"inner": state}}, "w.pt")
    text = written("w.pt", "--weights", "ema.inner")
    assert "--problem problem.py --weights ema.inner" in capsys.readouterr().out
    assert "under 'ema.inner' (others, for --weights: 'model')" in text


def test_lightnings_hyper_parameters_become_arguments(folder: Path) -> None:
    """What is a literal is passed to the class; what is not is named alone."""
    pytest.importorskip("lightning")
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self, width: int, names: tuple[str, ...], scale: Tensor) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net, self.second = nn.Linear(2, width), nn.Linear(2, 2)

    trainer = lightning.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", barebones=False)
    trainer.strategy.connect(Module(3, ("a", "b"), torch.ones(2)))
    trainer.save_checkpoint("l.ckpt")
    text = written("l.ckpt")
    assert "a Lightning checkpoint under 'state_dict'" in text
    assert "Hyper parameters in the file: width, names, scale." in text
    found: dict[str, Any] = {}
    exec(text[text.index("HYPER_PARAMETERS") : text.index("def problem")], found)
    assert found["HYPER_PARAMETERS"] == {"width": 3, "names": ("a", "b")}
    assert "MyModule(**HYPER_PARAMETERS)" in text


def test_objects_beside_lightnings_weights_are_named_and_left(folder: Path) -> None:
    """A hyper parameter of a class of his keeps neither the others nor the weights from being read."""
    more = {"pytorch-lightning_version": "2", "hyper_parameters": {"width": 3, "recipe": Recipe(epochs=1)}}
    torch.save({"state_dict": {"net.w": torch.ones(2, 2)}, **more}, "l.ckpt")
    text = written("l.ckpt")
    assert "Hyper parameters in the file: width, recipe." in text
    assert "which were not run: sharpscope.training.Recipe." in text
    assert '"width": 3' in text
    assert '"recipe"' not in text


def test_nothing_of_a_checkpoint_becomes_code(folder: Path) -> None:
    """Line breaks in names, keys and configurations stay in comments and literals."""
    evil = "x\nraise SystemExit(7)\r\n\u2028'''\"\"\"\\"
    state = {evil + "weight": torch.ones(2, 2)}
    torch.save(state, "a.pt")
    torch.save({evil: state, "also": state, "state_dict": state}, "b.pt")
    more = {"pytorch-lightning_version": "2", "hyper_parameters": {evil: 1, "good": evil, "odd": float("nan")}}
    torch.save({"state_dict": {evil + ".w": torch.ones(2, 2)}, **more}, "c.pt")
    paths = [Path("a.pt"), Path("b.pt"), Path("c.pt")]
    for name, config in (
        ("config.json", {"architectures": [evil], "problem_type": evil}),
        ("adapter_config.json", {"base_model_name_or_path": evil, "task_type": evil}),
    ):
        paths.append(Path(name.partition(".")[0]))
        paths[-1].mkdir()
        (paths[-1] / name).write_text(json.dumps(config))
        torch.save({f"base_model.{evil}": torch.ones(2, 2)}, paths[-1] / "pytorch_model.bin")
    for path in paths:
        text = problem_text(look(path), Path("problem.py"))
        namespace: dict[str, Any] = {}
        code = "\n".join(line for line in text.splitlines() if "my_package" not in line and "import peft" not in line)
        exec(code.replace("import transformers", ""), {"__file__": "problem.py"}, namespace)
        assert {"problem", "data"} <= set(namespace)
        assert namespace.get("BASE", evil) == evil
        assert namespace.get("HYPER_PARAMETERS", {"good": evil}) == {"good": evil}


@pytest.mark.parametrize(
    ("name", "args", "data", "options"),
    [
        ("mlp", {}, "digits", ["--model", "mlp", "--data", "digits"]),
        ("mlp", {"hidden": (8,)}, "fashion-mnist", ["--model-args", "hidden=8,", "--data", "fashion-mnist"]),
        ("mlp", {"hidden": ()}, "digits", ["--model-args", "'hidden=()'"]),
        ("cnn", {"channels": (4, 6, 5), "hidden": 7}, "digits", ["channels=4,6,5", "hidden=7"]),
        ("wide_resnet", {"widen": 1, "base": 4, "norm": "none"}, "digits", ["widen=1", "norm=none", "base=4"]),
        ("wide_resnet", {"depth": 16, "widen": 1, "base": 2}, "digits or fashion-mnist", ["depth=16", "base=2"]),
    ],
)
def test_a_bundled_model_is_recognised(
    folder: Path, capsys: pytest.CaptureFixture[str], name: str, args: dict[str, Any], data: str, options: list[str]
) -> None:
    """Its name and arguments are told, make the same model, and leave only the data open in the file."""
    shape = (1, 28, 28) if data == "fashion-mnist" else (1, 8, 8)
    torch.save({f"module.{k}": v for k, v in make_model(name, shape=shape, **args).state_dict().items()}, "w.pt")
    text = written("w.pt")
    shown = capsys.readouterr().out
    assert f"not needed if the data are {data}" in shown
    assert "(your class)" not in shown
    direct = shown.splitlines()[-1].strip()
    assert all(option in direct for option in options)
    if data != "fashion-mnist":
        from sharpscope.cli import parser

        given = parser().parse_args([arg.strip("'") for arg in direct.split()[1:]])
        from sharpscope.cli.options import load as loaded

        model = loaded(given, "w.pt").model
        filled(text, FORMS, "return torch.zeros(3, 1, 8, 8), torch.zeros(3, dtype=torch.long)  #")
        mine = load("w.pt", problem="problem.py").model
        assert [p.shape for p in mine.parameters()] == [p.shape for p in model.parameters()]


def test_the_bundled_data_are_those_that_the_recognition_knows() -> None:
    """The shape and classes of digits, which it does not read."""
    from sharpscope.templates import INPUTS

    digits = load_data("digits")
    assert INPUTS["digits"] == (digits.shape, digits.classes)


def test_another_model_is_not_taken_for_a_bundled_one(folder: Path) -> None:
    """One more tensor, another shape or other names."""
    state = make_model("mlp").state_dict()
    for other in (
        {**state, "more": torch.ones(1)},
        {**state, "3.weight": torch.ones(9, 64), "3.bias": torch.ones(9)},
        {f"a{name}": value for name, value in state.items()},
    ):
        torch.save(other, "w.pt")
        assert look("w.pt").zoo_model is None


def test_a_sharpscope_checkpoint_needs_no_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It says its model and data itself: exit status 1 with the command to run, and nothing is written."""
    train(Recipe(model="mlp", model_args={"hidden": (4,)}, epochs=1), folder / "own.pt")
    assert main(["init", "own.pt", "--out", "new/problem.py"]) == 1
    assert "of mlp on digits, and needs no problem file. Run sharpscope eigen own.pt." in capsys.readouterr().err
    assert not (folder / "new").exists()


def test_a_file_is_never_overwritten_unasked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without --overwrite the user's problem.py stays; another suffix and the checkpoint itself are refused."""
    torch.save(own()[0].state_dict(), "w.pt")
    Path("problem.py").write_text("mine")
    assert main(["init", "w.pt"]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert Path("problem.py").read_text() == "mine"
    written("w.pt", "--overwrite")
    assert main(["init", "w.pt", "--out", "problem.txt"]) == 1
    assert "Name it .py" in capsys.readouterr().err
    assert issubclass(OutputError, OSError)
    assert {p.name for p in folder.iterdir() if p.suffix != ".pyc"} >= {"problem.py", "w.pt"}
    assert not list(folder.glob(".problem*"))


def test_a_damaged_configuration_is_told(folder: Path) -> None:
    """config.json that is no JSON object ends in one sentence."""
    torch.save({"w": torch.ones(2, 2)}, "pytorch_model.bin")
    for text, said in (("{", "damaged"), ("[]", "got list")):
        Path("config.json").write_text(text)
        with pytest.raises(CheckpointError, match=said):
            look(".")


HUGGING_FACE = {
    "GPT2LMHeadModel": (
        "GPT2Config",
        {"n_embd": 4, "n_layer": 1, "n_head": 2, "n_positions": 6, "vocab_size": 7},
        True,
    ),
    "BertForMaskedLM": ("BertConfig", {}, False),
    "BertForTokenClassification": ("BertConfig", {"num_labels": 7}, False),
    "BertForSequenceClassification": ("BertConfig", {"num_labels": 3}, None),
}
BERT = {
    "hidden_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 5,
    "vocab_size": 7,
    "max_position_embeddings": 6,
}
# Token 0 is BERT's padding, whose embedding takes no gradient.
TEXTS = """
def batch():
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(4, 5, dtype=torch.long)
    mask[1:, 3:] = 0
    tokens = torch.randint(1, 7, (4, 5), generator=generator)
    return {"input_ids": tokens, "attention_mask": mask}, torch.randint(0, 3, (4,), generator=generator)
"""


def texts() -> tuple[dict[str, Tensor], Tensor]:
    names: dict[str, Any] = {"torch": torch}
    exec(TEXTS, names)
    batch, labels = names["batch"]()
    return batch, labels


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("architecture", HUGGING_FACE)
def test_a_hugging_face_folder_needs_its_data(
    folder: Path, capsys: pytest.CaptureFixture[str], architecture: str
) -> None:
    """Model, loss and batch form are those of the architecture; the eigenvalues agree with the dense Hessian."""
    transformers = pytest.importorskip("transformers")
    config_class, options, shift = HUGGING_FACE[architecture]
    config = getattr(transformers, config_class)(**(options if "GPT2" in architecture else {**BERT, **options}))
    config._attn_implementation = "eager"
    model = getattr(transformers, architecture)(config)
    model.save_pretrained("hf")
    Path("sub").mkdir()
    assert main(["init", "hf", "--out", "sub/problem.py"]) == 0
    assert 'Path(__file__).parent / "../hf"' in Path("sub/problem.py").read_text()
    text = written("hf")
    assert "(your class)" not in capsys.readouterr().out
    assert "data() must return your data" in unfinished("hf", capsys)

    batch, labels = texts()
    each = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    form = next(line for line in text.splitlines() if line.strip().startswith("# return {**batch"))
    mine = "each" if shift is not None else "labels"
    got = f"batch, labels = given()\n    each = {EACH}\n    " + form.strip()[2:].replace("labels}", f"{mine}}}")
    text = filled(text, form.strip(), got)
    Path("problem.py").write_text(text + TEXTS.replace("def batch", "def given"))
    loss = nn.CrossEntropyLoss() if shift is None else TokenCrossEntropy(shift=shift)
    target = labels if shift is None else each
    named = {**batch, "use_cache": False} if "GPT2" in architecture else batch
    assert measured("hf") == expected(model, lambda o, y: loss(o.logits, y), target, **named)


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_needs_partial_and_is_measured_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The base is built from its name, the adapter's weights come from the file, and only they are measured."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    config_class, options, _ = HUGGING_FACE["GPT2LMHeadModel"]
    model = transformers.GPT2LMHeadModel(getattr(transformers, config_class)(**options))
    model.save_pretrained("base")
    adapter = peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True)
    base = transformers.AutoModelForCausalLM.from_pretrained("base", attn_implementation="eager")
    adapted = peft.get_peft_model(base, adapter)
    for weight in (p for p in adapted.parameters() if p.requires_grad):
        nn.init.normal_(weight)  # peft starts one factor at zero
    adapted.save_pretrained("lora")

    text = written("lora")
    shown = capsys.readouterr().out
    assert "--problem problem.py --partial" in shown
    assert "(your class)" not in shown
    assert 'BASE = Path(__file__).parent / "base"' in text
    assert "data() must return your data" in unfinished("lora", capsys, "--partial")
    batch, _ = texts()
    form = next(line for line in text.splitlines() if line.strip().startswith("# return {**batch"))
    text = filled(text, form.strip(), "batch, _ = given()\n    " + form.strip()[2:])
    Path("problem.py").write_text(text + TEXTS.replace("def batch", "def given"))
    each = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    loss, named = TokenCrossEntropy(shift=True), {**batch, "use_cache": False}
    assert measured("lora", "--partial") == expected(adapted, lambda o, y: loss(o.logits, y), each, **named)
    assert json.loads(Path("e.json").read_text())["num_params"] == sum(
        p.numel() for p in adapted.parameters() if p.requires_grad
    )


EACH = 'batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)'


@pytest.mark.parametrize(
    ("config", "loss"),
    [
        ({"architectures": ["ViTForImageClassification"]}, "CrossEntropyLoss()"),
        ({"architectures": ["BertForSequenceClassification"], "problem_type": "regression"}, "MSELoss()"),
        ({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, "TokenCrossEntropy()"),
        ({"architectures": ["LlavaForConditionalGeneration"]}, "TokenCrossEntropy(shift=True)"),
        ({"architectures": ["LlamaForCausalLM"]}, "TokenCrossEntropy(shift=True)"),
        ({"architectures": ["Mine"], "auto_map": {}}, "MyModel"),
        ({"model_type": "mine"}, "MyModel"),
        ({"learning_rate": 0.1}, "holds a state dict"),
    ],
)
def test_the_loss_is_that_of_the_architecture(folder: Path, config: dict[str, Any], loss: str) -> None:
    """By its name, or its configuration; a class that transformers lacks, or another's config.json, is the user's."""
    Path("config.json").write_text(json.dumps(config))
    torch.save({"w": torch.ones(2, 2)}, "pytorch_model.bin")
    for path in (".", "pytorch_model.bin"):
        text = problem_text(look(path), Path("problem.py"))
        compile(text, "problem.py", "exec")
        assert loss in text
    assert ("pixel_values" in text) == ("Image" in str(config))


def test_the_commands_of_the_documentation_are_real() -> None:
    """Every `sharpscope ...` line of docs/your-own-checkpoint.md parses."""
    from sharpscope.cli import parser

    text = (Path(__file__).parent.parent / "docs" / "your-own-checkpoint.md").read_text(encoding="utf-8")
    lines = re.findall(r"^    (?:\$ |  )sharpscope (.*)$", text, flags=re.MULTILINE)
    assert len(lines) >= 15
    for line in lines:
        parser().parse_args(line.split())


def test_the_file_in_the_documentation_is_what_init_writes(folder: Path) -> None:
    """For the network that it shows, under the prefix of DataParallel."""
    text = (Path(__file__).parent.parent / "docs" / "your-own-checkpoint.md").read_text(encoding="utf-8")
    network, problem, *_ = re.findall(r"```python noexec\n(.*?)```", text, flags=re.DOTALL)
    names: dict[str, Any] = {"__name__": "net"}
    exec(network, names)
    torch.save(nn.DataParallel(names["Net"](12)).state_dict(), "weights.pt")
    assert written("weights.pt") == problem
