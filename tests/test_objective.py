"""The objective against the dense float64 Hessian, and against one large batch."""

from __future__ import annotations

import copy
import functools
import itertools
import random
import weakref
from collections import namedtuple
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset

from conftest import tiny_mlp
from dense import dense_hessian
from sharpscope import (
    ArgumentError,
    AuditError,
    DataError,
    Objective,
    Problem,
    ProblemError,
    measure_sharpness,
    top_eigenvalues,
)
from sharpscope.objective.micro_batches import num_examples_hint
from sharpscope.objective.objective import RENAMED
from sharpscope.weights.kernels import differentiable_kernels
from sharpscope.zoo import load_data, make_model

X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.randint(0, 3, (40,), generator=torch.Generator().manual_seed(1))
SOFT = torch.softmax(torch.randn(40, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64), 1)
BITS = (SOFT > 0.3).double()
WEIGHT = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)


def net(inputs: int = 6, outputs: int = 3) -> nn.Sequential:
    return tiny_mlp(inputs, 5, outputs).double()


def batches(size: int, *columns: Tensor) -> list[tuple[Tensor, ...]]:
    return list(zip(*(torch.split(column, size) for column in columns), strict=True))


def full_hessian(problem: Problem, **options: Any) -> Tensor:
    objective = Objective(problem, **options)
    return objective.hvp(torch.eye(objective.num_params, dtype=objective.dtype))


def test_former_names_of_an_objective_warn_and_work() -> None:
    """Methods and attributes that were renamed are found under their former names, with a FutureWarning."""
    objective = Objective(Problem(model=net(), loss=nn.CrossEntropyLoss(), data=(X, Y)), micro_batch=7)
    block = torch.ones(objective.num_params, 1, dtype=objective.dtype)
    with pytest.warns(FutureWarning, match="hvp_partwise is now Objective.hvp_per_batch") as caught:
        product, per_batch = objective.hvp_partwise(block)  # type: ignore[attr-defined]
    assert len(caught) == 1
    expected, expected_per_batch = objective.hvp_per_batch(block)
    assert torch.equal(product, expected)
    assert torch.equal(per_batch.forms, expected_per_batch.forms)
    for old, new in RENAMED.items():
        with pytest.warns(FutureWarning, match=f"Objective.{old} is now Objective.{new}"):
            assert getattr(objective, old) == getattr(objective, new)
    with pytest.raises(AttributeError, match="no attribute 'hvp_piecewise'"):
        objective.hvp_piecewise(block)  # type: ignore[attr-defined]


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-12) -> bool:
    return bool((found.double() - wanted).abs().max() <= tolerance * wanted.abs().max())


LOSSES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], Tensor]] = {
    # ours: the loss as a user has it; theirs: torch's own mean over one large batch.
    "cross_entropy": (nn.CrossEntropyLoss(), F.cross_entropy, Y),
    "functional": (F.cross_entropy, F.cross_entropy, Y),
    "class weights": (nn.CrossEntropyLoss(WEIGHT), functools.partial(F.cross_entropy, weight=WEIGHT), Y),
    "ignore_index": (nn.CrossEntropyLoss(ignore_index=1), functools.partial(F.cross_entropy, ignore_index=1), Y),
    "smoothing, weights and ignore_index": (
        nn.CrossEntropyLoss(WEIGHT, ignore_index=0, label_smoothing=0.2),
        functools.partial(F.cross_entropy, weight=WEIGHT, ignore_index=0, label_smoothing=0.2),
        Y,
    ),
    "class probabilities": (nn.CrossEntropyLoss(WEIGHT), functools.partial(F.cross_entropy, weight=WEIGHT), SOFT),
    "sum": (nn.CrossEntropyLoss(reduction="sum"), F.cross_entropy, Y),
    "none": (nn.CrossEntropyLoss(WEIGHT, reduction="none"), functools.partial(F.cross_entropy, weight=WEIGHT), Y),
    "partial": (
        functools.partial(F.cross_entropy, weight=WEIGHT, ignore_index=2, reduction="sum"),
        functools.partial(F.cross_entropy, weight=WEIGHT, ignore_index=2),
        Y,
    ),
    "nll": (
        nn.NLLLoss(WEIGHT, ignore_index=2),
        functools.partial(F.nll_loss, weight=WEIGHT, ignore_index=2),
        Y,
    ),
    "mse": (nn.MSELoss(), F.mse_loss, SOFT),
    "mse sum": (nn.MSELoss(reduction="sum"), F.mse_loss, SOFT),
    "bce": (
        nn.BCEWithLogitsLoss(WEIGHT, pos_weight=WEIGHT + 1),
        functools.partial(F.binary_cross_entropy_with_logits, weight=WEIGHT, pos_weight=WEIGHT + 1),
        BITS,
    ),
    "functional bce": (F.binary_cross_entropy_with_logits, F.binary_cross_entropy_with_logits, BITS),
    "plain callable": (
        lambda output, target: F.l1_loss(output.exp(), target),
        lambda o, t: F.l1_loss(o.exp(), t),
        SOFT,
    ),
    "module unknown here": (nn.SmoothL1Loss(), F.smooth_l1_loss, SOFT),
}


@pytest.mark.parametrize("name", LOSSES)
def test_unequal_batches_match_one_large_batch(name: str) -> None:
    """Loss, gradient and Hessian over batches of 7 and a last one of 5 equal those of torch's mean over all at once."""
    ours, theirs, target = LOSSES[name]
    model = net()
    problem = Problem(model=model, loss=ours, data=batches(7, X, target))
    objective = Objective(problem, micro_batch="loader")
    loss, gradient = objective.loss_and_gradient()
    expected = theirs(model(X), target)
    assert abs(loss - expected.item()) < 1e-13
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    assert torch.allclose(gradient, torch.cat([g.reshape(-1) for g in wanted]), atol=1e-14)
    hessian = dense_hessian(model, lambda call: theirs(call(X), target))
    for micro_batch in ("loader", 3, 40):
        assert close(full_hessian(problem, micro_batch=micro_batch), hessian)
    top_eigenvalues(problem, k=1)  # the audit accepts it


def test_last_small_batch_of_outliers_counts_by_its_examples() -> None:
    """Two outliers in a last batch of 2 weigh 2 of 42 examples, not one vote of six."""
    inputs, labels = torch.cat([X, 8 * X[:2]]), torch.cat([Y, Y[:2]])
    model = net()
    truth = torch.linalg.eigvalsh(dense_hessian(model, lambda call: F.cross_entropy(call(inputs), labels)))[-1]
    result = top_eigenvalues(
        Problem(model=model, loss=nn.CrossEntropyLoss(), data=batches(8, inputs, labels)), k=1, tol=1e-9
    )
    assert abs(result.lambda_max - float(truth)) < 1e-9 * float(truth)


def test_tokens_count_and_padding_does_not() -> None:
    """With (N, C, T) logits and ignored positions each counted token has one vote, whatever its sequence's length."""
    tokens = torch.randint(0, 4, (9, 5), generator=torch.Generator().manual_seed(0))
    target = tokens.clone()
    target[0, 1:], target[1, 3:], target[2] = -100, -100, -100

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(4, 3), nn.Linear(3, 4)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embed(ids).cumsum(1).tanh()).transpose(1, 2)

    model = Tagger().double()
    expected = dense_hessian(model, lambda call: F.cross_entropy(call(tokens), target))
    problem = Problem(model=model, loss=nn.CrossEntropyLoss(), data=batches(2, tokens, target))
    assert close(full_hessian(problem, micro_batch=1), expected)


class MeanOverTerms:
    """A user's loss: the mean over the target entries that are not NaN-marked by -1."""

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(output[target >= 0], target[target >= 0])

    def terms(self, batch: Any) -> float:
        return float((batch[1] >= 0).sum())


def test_terms_hook_weights_a_custom_loss() -> None:
    """A callable with terms(batch) is weighted by it; a batch without terms counts for nothing."""
    target = SOFT.clone()
    target[:12, 1:], target[20:22] = -1, -1
    model, loss = net(), MeanOverTerms()
    # Boolean indexing has no vmap rule, so the oracle writes the same mean with a mask.
    mask = (target >= 0).double()
    expected = dense_hessian(model, lambda call: ((call(X) - target).square() * mask).sum() / mask.sum())
    problem = Problem(model=model, loss=loss, data=batches(4, X, target))
    for micro_batch in (1, 2, 40):
        assert close(full_hessian(problem, micro_batch=micro_batch), expected)


def test_a_loss_that_is_no_mean_is_refused() -> None:
    """A sum, and a mean over unequal numbers of terms without terms(batch), are caught before any work."""
    target = SOFT.clone()
    target[:3, 1:] = -1
    for loss in (nn.L1Loss(reduction="sum"), lambda o, t: F.mse_loss(o[t >= 0], t[t >= 0])):
        with pytest.raises(ProblemError, match=r"terms\(batch\)"):
            top_eigenvalues(Problem(model=net(), loss=loss, data=(X, target)), k=1)


def test_examples_that_see_each_other_are_refused_or_kept_together() -> None:
    """A loss across the batch is refused where batches would be cut, and right where the loader's are kept."""

    def centred(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output - output.mean(0), target)

    model, data = net(), batches(8, X, Y)
    with pytest.raises(ProblemError, match="micro_batch='loader'"):
        top_eigenvalues(Problem(model=model, loss=centred, data=data), k=1)
    hessian = sum(dense_hessian(model, lambda call, b=b: centred(call(b[0]), b[1])) for b in data) / len(data)
    assert close(full_hessian(Problem(model=model, loss=centred, data=data), micro_batch="loader"), hessian)


@pytest.mark.parametrize("micro_batch", [1, 13, 40])
@pytest.mark.parametrize("loader", [7, 16, 40])
def test_neither_loader_nor_micro_batch_size_changes_the_product(loader: int, micro_batch: int) -> None:
    """H V of wide_resnet, both norms, on 40 digits is the same to 1e-10 for every pair of sizes."""
    data = load_data("digits")
    inputs, labels = data.inputs[:40].double(), data.targets[:40]
    for norm in ("batch", "none"):
        model = make_model("wide_resnet", seed=0, base=2, widen=1, norm=norm).double()
        block = torch.randn(
            sum(p.numel() for p in model.parameters()), 2, generator=torch.Generator().manual_seed(0)
        ).double()
        one = Problem(model=model, loss=nn.CrossEntropyLoss(), data=(inputs, labels))
        cut = Problem(model=model, loss=nn.CrossEntropyLoss(), data=batches(loader, inputs, labels))
        wanted = Objective(one, micro_batch=40).hvp(block)
        assert close(Objective(cut, micro_batch=micro_batch).hvp(block), wanted, 1e-10)


Pair = namedtuple("Pair", "inputs target")


class Rich(nn.Module):
    """A model that takes keywords, and returns an object that carries its own loss."""

    def __init__(self) -> None:
        super().__init__()
        self.body = net()

    def forward(self, inputs: Tensor, scale: Tensor | None = None, labels: Tensor | None = None) -> Any:
        logits = self.body(inputs if scale is None else inputs * scale[:, None])
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SimpleNamespace(logits=logits, loss=loss)


SCALE = torch.linspace(0.5, 1.5, 40, dtype=torch.float64)


@pytest.mark.parametrize(
    ("data", "loss", "scale"),
    [
        (Pair(X, Y), nn.CrossEntropyLoss(), 1),
        ([Pair(X[:9], Y[:9]), Pair(X[9:], Y[9:])], nn.CrossEntropyLoss(), 1),
        ((X, SCALE, Y), nn.CrossEntropyLoss(), SCALE),
        ({"inputs": X, "target": Y}, nn.CrossEntropyLoss(), 1),
        ([{"inputs": X[:9], "y": Y[:9]}, {"inputs": X[9:], "y": Y[9:]}], nn.CrossEntropyLoss(), 1),
        ({"inputs": X, "scale": SCALE, "labels": Y}, lambda output, target: output.loss, SCALE),
        (DataLoader(TensorDataset(X, SCALE, Y), batch_size=11), nn.CrossEntropyLoss(), SCALE),
        (TensorDataset(X, Y), nn.CrossEntropyLoss(), 1),
        ((X.numpy(), Y.numpy()), nn.CrossEntropyLoss(), 1),
    ],
    ids=["namedtuple", "namedtuples", "triple", "dict", "dicts", "own loss", "DataLoader", "Dataset", "NumPy"],
)
def test_batches_of_every_form_give_the_same_hessian(data: Any, loss: Any, scale: Any) -> None:
    """Tuples, dicts, loaders, data sets and arrays are one data set, and an output object's logits or loss are used."""
    model = Rich()
    x = X * scale[:, None] if isinstance(scale, Tensor) else X
    expected = dense_hessian(model.body, lambda call: F.cross_entropy(call(x), Y))
    for micro_batch in (4, 40):
        assert close(full_hessian(Problem(model=model, loss=loss, data=data), micro_batch=micro_batch), expected)


def test_batches_that_cannot_be_joined_are_still_weighted_right() -> None:
    """Sequences padded to different lengths stay apart, and each example still counts once."""
    short, long = X[:10, :3], X[10:]

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = net(1)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x.sum(1, keepdim=True))

    model = Sum()
    joined = torch.cat([short.sum(1, keepdim=True), long.sum(1, keepdim=True)])
    expected = dense_hessian(model.body, lambda call: F.cross_entropy(call(joined), Y))
    data = [(short, Y[:10]), (long, Y[10:])]
    assert close(full_hessian(Problem(model=model, loss=nn.CrossEntropyLoss(), data=data), micro_batch=25), expected)


def test_keys_and_not_their_order_say_what_a_column_of_a_batch_is() -> None:
    """Batches whose keys come in another order, at any depth, give the right loss, Hessian, m-sharpness."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = net(3)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.body(10 * a - b)

    class Nested(Scaled):
        def forward(self, pair: dict[str, Tensor]) -> Tensor:
            return super().forward(pair["a"], pair["b"])

    flat = [{"a": X[i : i + 2, :3], "b": X[i : i + 2, 3:], "y": Y[i : i + 2]} for i in range(0, 40, 2)]
    flat[1::2] = [dict(reversed(list(batch.items()))) for batch in flat[1::2]]
    nested = [({key: value for key, value in batch.items() if key != "y"}, batch["y"]) for batch in flat]
    model = Scaled()
    columns = 10 * X[:, :3] - X[:, 3:]
    loss = F.cross_entropy(model.body(columns), Y)
    expected = dense_hessian(model.body, lambda call: F.cross_entropy(call(columns), Y))
    whole = Problem(model=model.body, loss=nn.CrossEntropyLoss(), data=batches(2, columns, Y))
    (rise,) = measure_sharpness(whole, ("m-sharpness",), m=(2,), rho=(0.1,)).measures
    for network, data in ((model, flat), (Nested(), nested)):
        network.body.load_state_dict(model.body.state_dict())
        problem = Problem(model=network, loss=nn.CrossEntropyLoss(), data=data)
        for micro_batch in (None, 4, 40):
            objective = Objective(problem, micro_batch=micro_batch)
            assert objective.loss_and_gradient()[0] == pytest.approx(loss.item(), rel=1e-12)
            assert close(full_hessian(problem, micro_batch=micro_batch), expected)
        (found,) = measure_sharpness(problem, ("m-sharpness",), m=(2,), rho=(0.1,)).measures
        assert found.value == pytest.approx(rise.value, rel=1e-9)


class Awkward(nn.Module):
    """Tied, unused and frozen parameters, a buffer that forward changes, BatchNorm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.again = self.first
        self.frozen = nn.Linear(6, 6)
        self.frozen.requires_grad_(False)
        self.unused = nn.Linear(2, 2)
        self.norm, self.drop, self.head = nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.head(self.drop(self.norm(self.again(self.frozen(self.first(x).tanh()).tanh()))))


def awkward() -> Awkward:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = Awkward().double()
        model(X)
    return model


def test_unused_parameters_count_as_zero_curvature_and_tied_ones_once() -> None:
    """The Hessian has one row for each trainable number: tied once, unused zero, frozen none."""
    model = awkward()
    objective = Objective(Problem(model=model, loss=nn.CrossEntropyLoss(), data=(X, Y)))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert objective.num_params == sum(dict(model.named_parameters())[name].numel() for name in names)
    ours = objective.hvp(torch.eye(objective.num_params, dtype=torch.float64))

    def forward(call: Callable[..., Tensor]) -> Tensor:
        return F.cross_entropy(call(X), Y)

    oracle = copy.deepcopy(model)
    del oracle._buffers["calls"]
    oracle.calls = 0  # a plain number, which torch.func allows to change
    assert close(ours, dense_hessian(oracle, forward))
    assert float(ours.diagonal().abs().min()) == 0.0


def test_parameters_are_chosen_by_pattern() -> None:
    """params= gives the diagonal block of the chosen parameters, also by a tied parameter's second name."""
    model = awkward()
    whole = full_hessian(Problem(model=model, loss=nn.CrossEntropyLoss(), data=(X, Y)))
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    starts = dict(zip(sizes, itertools.accumulate([0, *sizes.values()]), strict=False))
    for patterns, names in ((["head.*"], ["head.weight", "head.bias"]), ("again.bias", ["first.bias"])):
        block = full_hessian(Problem(model=model, loss=nn.CrossEntropyLoss(), data=(X, Y), params=patterns))
        rows = [i for name in names for i in range(starts[name], starts[name] + sizes[name])]
        assert close(block, whole[rows][:, rows])
    for patterns, message in (("fc.*", "none of"), ("frozen.*", "frozen. Set requires_grad")):
        with pytest.raises(ProblemError, match=message):
            Objective(Problem(model=model, loss=nn.CrossEntropyLoss(), data=(X, Y), params=patterns))


def fingerprint(model: nn.Module) -> dict[str, Any]:
    state = {f"tensor {k}": v.clone() for k, v in model.state_dict().items()}
    state |= {f"mode {k}": m.training for k, m in model.named_modules()}
    state |= {f"requires_grad {k}": p.requires_grad for k, p in model.named_parameters()}
    state |= {f"grad {k}": None if p.grad is None else p.grad.clone() for k, p in model.named_parameters()}
    state |= {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": np.random.get_state()[1].copy()}
    return state


def same(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The names of what differs."""
    equal = {
        k: torch.equal(v, after[k]) if isinstance(v, Tensor) else bool(np.all(v == after[k])) for k, v in before.items()
    }
    return [k for k, v in equal.items() if not v]


class Interrupting(list):  # type: ignore[type-arg]
    """A list of batches whose walk is interrupted, as by Ctrl-C, from the third walk on."""

    walks = 0

    def __iter__(self) -> Iterator[Any]:
        self.walks += 1
        for item in super().__iter__():
            if self.walks > 3:
                raise KeyboardInterrupt
            yield item


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("ending", ["result", "exception", "interrupt"])
def test_the_model_is_left_bit_for_bit(mode: str, ending: str) -> None:
    """Buffers, modes, gradients, requires_grad and all random states survive success, exceptions and Ctrl-C."""
    model = awkward()
    model.drop.p = 0.0
    model.norm.eval()
    for p in model.head.parameters():
        p.grad = torch.ones_like(p)
    loader = DataLoader(TensorDataset(X, Y), batch_size=10, generator=torch.Generator().manual_seed(0))
    data: Any = loader if ending == "result" else batches(10, X, Y)
    if ending == "exception":
        data = batches(10, X, torch.where(torch.arange(40) == 33, 7, Y))
    if ending == "interrupt":
        data = Interrupting(data)
    state = loader.generator.get_state()
    before = fingerprint(model)
    problem = Problem(model=model, loss=nn.CrossEntropyLoss(), data=data, mode=mode)
    if ending == "result":
        top_eigenvalues(problem, k=2)
    else:
        with pytest.raises(DataError if ending == "exception" else KeyboardInterrupt):
            top_eigenvalues(problem, k=2)
    assert same(before, fingerprint(model)) == []
    assert torch.equal(state, loader.generator.get_state())


def test_batchnorm_in_train_mode_uses_the_loaders_batches_and_moves_no_statistics() -> None:
    """Mode "train" measures each loader batch by its own statistics and says so; running ones stay."""
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()
    before = fingerprint(model)
    problem = Problem(model=model, loss=nn.CrossEntropyLoss(), data=batches(8, X, Y), mode="train")
    result = top_eigenvalues(problem, k=1, tol=1e-9)
    assert same(before, fingerprint(model)) == []
    assert result.provenance["batchnorm"] == "batch statistics"

    class ByHand(nn.Module):
        def __init__(self, norm: nn.BatchNorm1d) -> None:
            super().__init__()
            self.weight, self.bias = norm.weight, norm.bias

        def forward(self, x: Tensor) -> Tensor:
            return (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt() * self.weight + self.bias

    manual = nn.Sequential(model[0], ByHand(model[1]), model[2], model[3])
    parts = [dense_hessian(manual, lambda call, b=b: F.cross_entropy(call(b[0]), b[1])) for b in batches(8, X, Y)]
    hessian = sum(parts) / len(parts)
    assert abs(result.lambda_max - float(torch.linalg.eigvalsh(hessian)[-1])) < 1e-9


@pytest.mark.parametrize("layer", ["module", "functional"])
def test_dropout_left_on_is_refused(layer: str) -> None:
    """A model that draws a new mask at every pass has no Hessian; the error says what to turn off."""

    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.drop = net(), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(self.drop(x) if layer == "module" else F.dropout(x))

    mode = "train" if layer == "module" else "eval"
    problem = Problem(model=Dropping(), loss=nn.CrossEntropyLoss(), data=(X, Y), mode=mode)
    with pytest.raises(AuditError, match="dropout is on in drop" if layer == "module" else "draws random numbers"):
        top_eigenvalues(problem)
    if layer == "module":
        top_eigenvalues(Problem(model=Dropping(), loss=nn.CrossEntropyLoss(), data=(X, Y)), k=1)


class Augmented:
    """Batches with new noise at every walk."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return ((x + 0.1 * torch.randn_like(x), y) for x, y in batches(10, X, Y))


class Growing:
    """Batches that change only past the examples that the audit looks at."""

    walks = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.walks += 1
        yield X.repeat(7, 1), Y.repeat(7)
        yield X * (1 + 0.1 * self.walks), Y


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=True), DataError, "shuffle=False"),
        (Augmented(), AuditError, "shuffles or augments"),
        (Growing(), AuditError, "Every pass must see the same loss"),
        ((b for b in batches(8, X, Y)), DataError, "walked several times"),
        ([], DataError, "at least one example"),
        ((X[:0], Y[:0]), DataError, "at least one example"),
        ([X, Y], ProblemError, r"\(input, ..., target\)"),
        ([{"inputs": X, "labelz": Y}], ProblemError, "got the keys inputs, labelz"),
        (X, DataError, "got Tensor"),
        (7, DataError, "got int"),
    ],
    ids=["shuffled", "augmented", "later batches", "generator", "empty", "no rows", "tensors", "keys", "tensor", "int"],
)
def test_data_that_are_no_fixed_data_set_are_refused(data: Any, error: type[Exception], message: str) -> None:
    """A loader that shuffles, augments, runs dry or is no data ends in one sentence that says what to do."""
    with pytest.raises(error, match=message):
        top_eigenvalues(Problem(model=net(), loss=nn.CrossEntropyLoss(), data=data), k=1)


def test_a_custom_function_with_a_wrong_second_derivative_is_refused() -> None:
    """An autograd function whose backward is not differentiable as written shows as an unsymmetric Hessian."""

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.pow(3)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return gradient * 3 * x.detach() ** 2 * x.flip(0) / x.flip(0).detach()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = net()

        def forward(self, x: Tensor) -> Tensor:
            return Wrong.apply(self.body(x))

    with pytest.raises(AuditError, match="symmetric"):
        top_eigenvalues(Problem(model=Net(), loss=nn.MSELoss(), data=(X, SOFT)), k=1)


def test_a_model_without_second_derivative_is_refused() -> None:
    """once_differentiable, a backward on saved numbers, and detach end in a ProblemError, not in a wrong number."""

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.exp()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient * ctx.saved_tensors[0].exp()

    class Saved(Once):
        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient * ctx.saved_tensors[0].detach().exp()

    class Net(nn.Module):
        def __init__(self, last: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.body, self.last = net(), last

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.body(x))

    for last, message in (
        (Once.apply, "no true second derivative"),
        (Saved.apply, "no true second derivative"),
        (Tensor.detach, "must depend on the chosen parameters"),
    ):
        with pytest.raises(ProblemError, match=message):
            top_eigenvalues(Problem(model=Net(last), loss=nn.MSELoss(), data=(X, SOFT)), k=1)


def test_a_linear_loss_has_zero_curvature() -> None:
    """A loss that is linear in the weights gives k zeros, converged, and no ratio."""
    model = nn.Linear(6, 1).double()
    result = top_eigenvalues(Problem(model=model, loss=lambda output, target: output.mean(), data=(X, Y)), k=3)
    assert result.eigenvalues.tolist() == [0.0, 0.0, 0.0]
    assert result.converged.all()
    assert result.ratio.value is None
    assert result.ratio.reason == "lambda_3 is not positive"


def test_attention_is_differentiated_twice() -> None:
    """scaled_dot_product_attention, whose fused kernels have no second derivative, agrees with the dense Hessian."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.head = nn.Linear(4, 12), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            # Four dimensions, heads and all: only those reach a fused kernel.
            q, k, v = (t.view(len(x), -1, 2, 2).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            return self.head(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).mean(1))

    model = Attention().double()
    inputs = torch.randn(40, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def plain(call: Callable[..., Tensor]) -> Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return F.cross_entropy(call(inputs), Y)

    problem = Problem(model=model, loss=nn.CrossEntropyLoss(), data=(inputs, Y))
    assert close(full_hessian(problem), dense_hessian(model, plain))
    assert close(full_hessian(problem, dtype=torch.float32), dense_hessian(model, plain), 1e-5)


class Encoder(nn.Module):
    """torch's own attention modules, whose fused path in eval mode knows no derivative, with a padding mask."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.head = kind, nn.Linear(4, 3)
        if kind == "attention":
            self.body: nn.Module = nn.MultiheadAttention(4, 2, batch_first=True)
        else:
            layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.1, batch_first=True)
            self.body = layer if kind == "layer" else nn.TransformerEncoder(layer, 2, enable_nested_tensor=True)

    def forward(self, x: Tensor) -> Tensor:
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
        padding[:, -1] = True
        if self.kind == "attention":
            return self.head(self.body(x, x, x, key_padding_mask=padding, need_weights=False)[0].mean(1))
        return self.head(self.body(x, src_key_padding_mask=padding)[:, :-1].mean(1))


@pytest.mark.parametrize("frozen", ["", "body.", "body.layers.0."])
@pytest.mark.parametrize("kind", ["attention", "layer", "encoder"])
def test_torchs_own_attention_modules_stay_off_their_fast_path(kind: str, frozen: str) -> None:
    """In eval mode, frozen or not, their products are differences of the gradient, and the fast path is on again."""
    model = Encoder(kind).double().eval()
    for name, p in model.named_parameters():
        p.requires_grad_(not frozen or not name.startswith(frozen))
    inputs = torch.randn(12, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    problem = Problem(model=model, loss=nn.CrossEntropyLoss(), data=(inputs, Y[:12]))
    objective = Objective(problem)
    block = torch.randn(objective.num_params, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ends = []
    torch.backends.mha.set_fastpath_enabled(False)
    for sign in (1, -1):
        moved = copy.deepcopy(model)
        chosen = [p for p in moved.parameters() if p.requires_grad]
        pieces = torch.split(1e-6 * sign * block[:, 0], [p.numel() for p in chosen])
        with torch.no_grad():
            for p, piece in zip(chosen, pieces, strict=True):
                p += piece.view_as(p)
        ends.append(torch.autograd.grad(F.cross_entropy(moved(inputs), Y[:12]), chosen))
    torch.backends.mha.set_fastpath_enabled(True)
    slope = torch.cat([(a - b).reshape(-1) for a, b in zip(*ends, strict=True)]) / 2e-6
    assert close(objective.hvp(block)[:, 0], slope, 1e-7)
    assert torch.backends.mha.get_fastpath_enabled()


def test_recurrent_networks_on_cuda_stay_off_cudnn() -> None:
    """cuDNN, whose recurrent backward cannot be differentiated, is off for them alone, and on again afterwards."""
    before = torch.backends.cudnn.enabled
    for model, wanted in ((nn.LSTM(2, 3), False), (nn.Linear(2, 3), before)):
        with differentiable_kernels(model, torch.device("cuda")):
            assert torch.backends.cudnn.enabled == wanted
        assert torch.backends.cudnn.enabled == before


def test_a_recurrent_network_agrees_with_the_dense_hessian() -> None:
    """An LSTM on the CPU, whose flat weights live beside its parameters, is differentiated as it stands."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = nn.LSTM(2, 3, batch_first=True), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.cell(x.view(-1, 3, 2))[0][:, -1])

    model = Recurrent().double()
    ours = full_hessian(Problem(model=model, loss=nn.CrossEntropyLoss(), data=batches(9, X, Y)))
    params = list(model.parameters())
    grads = torch.autograd.grad(F.cross_entropy(model(X), Y), params, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in grads])
    rows = [torch.cat([h.reshape(-1) for h in torch.autograd.grad(g, params, retain_graph=True)]) for g in flat]
    assert close(ours, torch.stack(rows))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_are_lifted(dtype: torch.dtype) -> None:
    """A bfloat16 model is measured in float32 at exactly its weights, and stays as it is."""
    model = net().to(dtype)
    before = fingerprint(model)
    problem = Problem(model=model, loss=nn.CrossEntropyLoss(), data=(X, Y))
    objective = Objective(problem)
    assert objective.dtype == torch.float32
    exact = dense_hessian(copy.deepcopy(model), lambda call: F.cross_entropy(call(X), Y))
    assert close(full_hessian(problem), exact, 1e-5)
    assert close(full_hessian(problem, dtype=torch.float64), exact, 1e-12)
    assert same(before, fingerprint(model)) == []


def test_an_enclosing_no_grad_or_autocast_changes_nothing() -> None:
    """The product is the same inside torch.no_grad and inside a bfloat16 autocast."""
    problem = Problem(model=net().float(), loss=nn.CrossEntropyLoss(), data=(X.float(), Y))
    plain = full_hessian(problem)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(full_hessian(problem), plain)


def test_weight_decay_is_added_to_the_diagonal_when_asked() -> None:
    """weight_decay=c adds c to each eigenvalue, c w to the gradient and c/2 |w|^2 to the loss."""
    model = net()
    data = (X, Y)
    plain = Problem(model=model, loss=nn.CrossEntropyLoss(), data=data)
    decayed = Problem(model=model, loss=nn.CrossEntropyLoss(), data=data, weight_decay=0.3)
    w = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    (loss, gradient), (more, other) = (Objective(p).loss_and_gradient() for p in (plain, decayed))
    assert abs(more - loss - 0.15 * float(w.square().sum())) < 1e-13
    assert torch.allclose(other - gradient, 0.3 * w)
    shift = top_eigenvalues(decayed, tol=1e-9).eigenvalues - top_eigenvalues(plain, tol=1e-9).eigenvalues
    assert np.allclose(shift, 0.3, atol=1e-9)


def broken(where: int) -> Tensor:
    inputs = X.clone()
    inputs[where, 2] = float("nan")
    return inputs


def test_what_is_not_finite_is_named() -> None:
    """NaN in the data, a weight, or only in the Hessian names the batch and example, or the parameter."""
    for micro_batch in (None, 16):
        problem = Problem(model=net(), loss=nn.CrossEntropyLoss(), data=batches(8, broken(37), Y))
        with pytest.raises(DataError, match="example 5 of batch 4 holds NaN"):
            top_eigenvalues(problem, micro_batch=micro_batch)
    model = net()
    with torch.no_grad():
        model[2].bias[1] = float("inf")
    with pytest.raises(ProblemError, match=r"2\.bias holds NaN or infinity"):
        top_eigenvalues(Problem(model=model, loss=nn.CrossEntropyLoss(), data=(X, Y)))
    zero = X.clone()
    zero[3] = 0

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(6, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.scale).square().sum(1).sqrt()

    with pytest.raises(DataError, match="The gradient must be finite, but that of example 3 of batch 0"):
        top_eigenvalues(Problem(model=Root(), loss=lambda o, t: o.mean(), data=(zero, Y)), k=1)


def test_labels_out_of_range_are_named() -> None:
    """A label that the logits have no class for is named with its place, whatever the batches."""
    labels = Y.clone()
    labels[29] = 3
    with pytest.raises(DataError, match=r"Labels must lie in 0\.\.2, got 3 in example 5 of batch 3"):
        top_eigenvalues(Problem(model=net(), loss=nn.CrossEntropyLoss(), data=batches(8, X, labels)))


def test_targets_that_would_broadcast_are_refused() -> None:
    """(N, 1) outputs against (N,) targets would average N^2 differences; the shapes are named instead."""
    with pytest.raises(ProblemError, match=r"\(40, 1\) and \(40,\)"):
        top_eigenvalues(Problem(model=net(6, 1), loss=nn.MSELoss(), data=(X, X[:, 0])), k=1)
    weighted = nn.BCEWithLogitsLoss(weight=torch.ones(40, 1))
    with pytest.raises(ProblemError, match="per-example weights"):
        top_eigenvalues(Problem(model=net(6, 1), loss=weighted, data=(X, (X[:, :1] > 0).double())), k=1)


def test_a_loss_without_terms_is_refused() -> None:
    """A data set in which every target is ignored has no mean loss."""
    with pytest.raises(DataError, match="positive total weight"):
        top_eigenvalues(Problem(model=net(), loss=nn.CrossEntropyLoss(), data=(X, torch.full_like(Y, -100))), k=1)


def test_gradients_are_not_accumulated_nor_graphs_kept() -> None:
    """.grad stays None, and no output of the model outlives a call."""
    model = net()
    outputs: list[weakref.ref[Tensor]] = []
    handle = model.register_forward_hook(lambda module, args, output: outputs.append(weakref.ref(output)))
    problem = Problem(model=model, loss=nn.CrossEntropyLoss(), data=(X, Y))
    product = Objective(problem).hvp(torch.eye(sum(p.numel() for p in model.parameters()), dtype=torch.float64))
    handle.remove()
    assert not product.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert outputs
    assert all(reference() is None for reference in outputs)


def test_cost_is_counted_in_gradients() -> None:
    """A block of K costs 1 + 2K gradients and one pass; the audit is in the bill."""
    objective = Objective(Problem(model=net(), loss=nn.CrossEntropyLoss(), data=(X, Y)))
    objective.hvp(torch.eye(objective.num_params, dtype=torch.float64)[:, :3])
    assert (objective.gradients, objective.passes, objective.hvps) == (7.0, 1, 3)
    objective.loss_and_gradient()
    assert (objective.gradients, objective.passes, objective.hvps) == (8.0, 2, 3)
    result = top_eigenvalues(Problem(model=net(), loss=nn.CrossEntropyLoss(), data=(X, Y)))
    assert result.cost.gradients > result.cost.passes + 2 * result.cost.hvps
    ours = lambda output, target: F.cross_entropy(output, target)  # noqa: E731
    audited = top_eigenvalues(Problem(model=net(), loss=ours, data=(X, Y)))
    assert audited.cost.passes == result.cost.passes + 2  # the data set is cut in two ways to see that ours is a mean


def test_the_micro_batch_is_chosen_by_measuring_on_large_data() -> None:
    """On enough data one of the candidate sizes is chosen and recorded; the number is the same either way."""
    inputs, labels = X.repeat(150, 1), Y.repeat(150)
    problem = Problem(model=net(), loss=nn.CrossEntropyLoss(), data=(inputs, labels))
    measured, fixed = (top_eigenvalues(problem, k=1, method="lanczos", micro_batch=m) for m in (None, 1000))
    assert measured.provenance["micro_batch"] in (64, 128, 256, 512)
    assert abs(measured.lambda_max - fixed.lambda_max) < 1e-10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"micro_batch": 0}, "micro_batch"),
        ({"dtype": torch.float16}, "dtype"),
        ({"k": 0}, "k must"),
        ({"k": 10**6}, "k must"),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    """Bad options are ArgumentErrors."""
    with pytest.raises(ArgumentError, match=message):
        top_eigenvalues(Problem(model=net(), loss=nn.CrossEntropyLoss(), data=(X, Y)), **options)


def test_a_problem_of_wrong_parts_is_refused() -> None:
    """Model, loss and mode are checked when the Problem is made."""
    for parts, message in (
        ({"model": 1}, "torch.nn.Module"),
        ({"loss": 1}, "callable"),
        ({"mode": "test"}, "'eval' or 'train'"),
    ):
        with pytest.raises(ProblemError, match=message):
            Problem(**{"model": net(), "loss": nn.MSELoss(), "data": (X, Y), **parts})  # type: ignore[arg-type]


class Endless:
    """A sampler that does not know how many it gives."""

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(range(9))


def test_the_examples_that_a_loader_will_give_are_known() -> None:
    """Samplers and dropped last batches count; what has no length, or batches of the user's making, is not guessed."""
    data = TensorDataset(torch.randn(23, 2), torch.zeros(23))
    given = {
        23: DataLoader(data, batch_size=5),
        20: DataLoader(data, batch_size=5, drop_last=True),
        7: DataLoader(data, batch_size=5, sampler=SequentialSampler(range(7))),
    }
    unknown = [
        DataLoader(data, batch_sampler=BatchSampler(SequentialSampler(data), 4, True)),
        DataLoader(data, batch_size=5, sampler=Endless()),  # type: ignore[arg-type]
    ]
    for count, loader in [*given.items(), *((None, loader) for loader in unknown)]:
        assert num_examples_hint(loader) == count
        assert count in (None, sum(len(x) for x, _ in loader))
