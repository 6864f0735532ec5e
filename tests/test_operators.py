"""Gauss-Newton, Fisher, empirical Fisher and difference products against dense matrices from torch.func."""

from __future__ import annotations

import copy
import dataclasses
import functools
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev

from conftest import tiny_mlp
from dense import dense_hessian
from sharpscope import ArgumentError, AuditError, Objective, Problem, ProblemError, top_eigenvalues
from sharpscope.cli import main
from sharpscope.objective.audit import audit
from sharpscope.objective.micro_batches import MicroBatch, micro_batches
from sharpscope.operators import NAMES, curvature
from sharpscope.operators.fisher import uniform
from sharpscope.random_streams import stream_from

X = torch.randn(24, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.randint(0, 3, (24,), generator=torch.Generator().manual_seed(1))
SOFT = torch.softmax(torch.randn(24, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64), 1)
BITS = (SOFT > 0.3).double()
WEIGHT = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
TOKENS = torch.randint(0, 3, (24, 2), generator=torch.Generator().manual_seed(3))
TOKENS[::5, 1] = -100


def net(outputs: int = 3) -> nn.Sequential:
    return tiny_mlp(4, 4, outputs).double()


def tagger() -> nn.Module:
    return nn.Sequential(net(6), nn.Unflatten(1, (3, 2)))


def logarithmic() -> nn.Module:
    return nn.Sequential(net(), nn.LogSoftmax(1))


# name: model, loss, target; whether torch's reduction="none" gives a_i l_i for each term; and sum_i a_i.
CASES: dict[str, tuple[Callable[[], nn.Module], Any, Tensor, float]] = {
    "cross_entropy": (net, nn.CrossEntropyLoss(), Y, 24),
    "class weights": (net, nn.CrossEntropyLoss(WEIGHT), Y, float(WEIGHT[Y].sum())),
    "smoothing, weights and ignore_index": (
        net,
        nn.CrossEntropyLoss(WEIGHT, ignore_index=0, label_smoothing=0.2),
        Y,
        float(WEIGHT[Y[Y != 0]].sum()),
    ),
    "class probabilities": (net, nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.1), SOFT, 24),
    "tokens": (tagger, nn.CrossEntropyLoss(), TOKENS, float((TOKENS >= 0).sum())),
    "nll": (logarithmic, nn.NLLLoss(WEIGHT, ignore_index=2), Y, float(WEIGHT[Y[Y != 2]].sum())),
    "mse": (net, nn.MSELoss(), SOFT, 72),
    "bce": (net, nn.BCEWithLogitsLoss(WEIGHT, pos_weight=WEIGHT + 1), BITS, 72),
}


def summed(loss: nn.Module, reduction: str) -> nn.Module:
    other = copy.copy(loss)
    other.reduction = reduction
    return other


def product(problem: Problem, operator: str, seed: int = 0, **options: Any) -> Tensor:
    """The whole matrix, as products with the columns of the identity."""
    chosen = curvature(operator, torch.Generator().manual_seed(seed))
    objective = Objective(problem, curvature=chosen, **options)
    return objective.hvp(torch.eye(objective.num_params, dtype=objective.dtype))


def flat(model: nn.Module) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The weights as one vector, and the output on all of X as a function of it."""
    names = [(name, p.shape, p.numel()) for name, p in model.named_parameters()]

    def output(w: Tensor) -> Tensor:
        pieces = torch.split(w, [size for _, _, size in names])
        return functional_call(model, {n: p.view(s) for (n, s, _), p in zip(names, pieces, strict=True)}, (X,))

    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]), output


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-8) -> bool:
    return bool((found.double() - wanted).abs().max() <= tolerance * wanted.abs().max())


@functools.cache
def gauss_newton(name: str) -> Tensor:
    """J' H_L J / sum_i a_i by torch.func; of nll through the logits that log_softmax was given."""
    make, loss, target, weight = CASES[name]
    model = make()
    if name == "nll":
        loss = nn.CrossEntropyLoss(loss.weight, ignore_index=loss.ignore_index)
        model = model[0]
    w, output = flat(model)
    jacobian = jacrev(output)(w).flatten(0, -2)
    z = output(w).detach()
    middle = hessian(lambda z: summed(loss, "sum")(z, target))(z).reshape(z.numel(), z.numel())
    return jacobian.T @ middle @ jacobian / weight


class Segmenting(nn.Module):
    """A network whose output is a convolution's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 2, 3, padding=1).double(), nn.Conv2d(2, 3, 1).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu())


@pytest.mark.parametrize("operator", [name for name in NAMES if name != "finite-difference"])
def test_an_output_that_is_a_convolution_is_differentiated(operator: str) -> None:
    """Per-pixel losses of a convolution's output pass the audit, and the products are symmetric."""
    source = torch.Generator().manual_seed(0)
    x = torch.randn(8, 1, 4, 4, generator=source, dtype=torch.float64)
    y = torch.randint(0, 3, (8, 4, 4), generator=source)
    problem = Problem(model=Segmenting(), loss=nn.CrossEntropyLoss(), data=(x, y))
    objective = Objective(problem, curvature=curvature(operator))
    audit(objective)
    matrix = objective.hvp(torch.eye(objective.num_params, dtype=torch.float64))
    assert float((matrix - matrix.T).abs().max()) < 1e-14


@pytest.mark.parametrize("name", CASES)
def test_gauss_newton_matches_the_dense_one(name: str) -> None:
    """J' H_L J over unequal batches is torch.func's over all at once, whatever the loss's terms."""
    make, loss, target, _ = CASES[name]
    data = list(zip(X.split(7), target.split(7), strict=True))
    problem = Problem(model=make(), loss=loss, data=data)
    for micro_batch in ("loader", 5):
        assert close(product(problem, "ggn", micro_batch=micro_batch), gauss_newton(name))


@pytest.mark.parametrize("name", CASES)
def test_empirical_fisher_matches_the_dense_one(name: str) -> None:
    """sum_i a_i g_i g_i' / sum_i a_i over single loss terms, from the Jacobian of all of them."""
    make, loss, target, weight = CASES[name]
    w, output = flat(make())
    rows = jacrev(lambda w: summed(loss, "none")(output(w), target).flatten())(w)
    if name in ("class probabilities", "tokens", "mse", "bce", "cross_entropy"):
        a = torch.ones(len(rows), dtype=torch.float64)
    else:
        a = WEIGHT[target]
    expected = sum(torch.outer(g, g) / a_i for g, a_i in zip(rows, a, strict=True) if bool(g.any())) / weight
    problem = Problem(model=make(), loss=loss, data=(X, target))
    assert close(product(problem, "empirical-fisher", micro_batch=5), expected)


def several_outputs(seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    """A network of three outputs with 20 inputs, and targets in [0, 1]."""
    draw = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return model, torch.randn(20, 4, generator=draw, dtype=torch.float64), torch.rand(20, 3, generator=draw).double()


def gradient_of(model: nn.Module, value: Tensor) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()), retain_graph=True)])


LOSSES_OF_SEVERAL = {
    "mse": (nn.MSELoss(), lambda z, y: (z - y) ** 2),
    "bce": (nn.BCEWithLogitsLoss(), lambda z, y: z.exp().log1p() - y * z),
    "summed mse": (nn.MSELoss(reduction="sum"), lambda z, y: (z - y) ** 2),
}


@pytest.mark.parametrize("name", LOSSES_OF_SEVERAL)
def test_empirical_fisher_of_several_outputs_is_summed_over_output_elements(name: str) -> None:
    """With MSE and BCE E is the mean of g g' over all elements of the output, one by one."""
    loss, elements = LOSSES_OF_SEVERAL[name]
    model, x, y = several_outputs()
    rows = torch.stack([gradient_of(model, each) for each in elements(model(x), y).flatten()])
    problem = Problem(model=model, loss=loss, data=(x, y))
    assert close(product(problem, "empirical-fisher", micro_batch=7), rows.T @ rows / 60, 1e-12)


@pytest.mark.parametrize("name", LOSSES_OF_SEVERAL)
def test_empirical_fisher_of_a_loss_in_a_function_is_summed_over_examples(name: str) -> None:
    """In a function of one's own, E is the mean of g g' over examples, g of an example's mean loss."""
    _, elements = LOSSES_OF_SEVERAL[name]
    model, x, y = several_outputs()
    rows = torch.stack([gradient_of(model, each.mean()) for each in elements(model(x), y)])
    problem = Problem(model=model, loss=lambda z, y: elements(z, y).mean(), data=(x, y))
    found = product(problem, "empirical-fisher", micro_batch=7)
    assert close(found, rows.T @ rows / 20, 1e-12)
    known = Problem(model=model, loss=LOSSES_OF_SEVERAL[name][0], data=(x, y))
    assert not close(product(known, "empirical-fisher"), found, 0.1)


@pytest.mark.parametrize("name", CASES)
def test_fisher_is_that_of_drawn_targets(name: str) -> None:
    """Each term's gradient is that of torch's own loss at the drawn target, weighted as the loss weights its terms."""
    make, loss, target, weight = CASES[name]
    problem = Problem(model=make(), loss=loss, data=(X, target))
    objective = Objective(problem)
    likelihood = objective.terms.loss.likelihood
    assert likelihood is not None
    w, output = flat(make())
    z = output(w).detach()
    seed = stream_from(None, "fisher").initial_seed()
    shape = z.shape if likelihood.dim is None else z[:, :1].shape
    drawn = likelihood.draw(z, uniform(seed, next(micro_batches([(X, target)], None)), shape))
    plain: dict[str, Callable[[Tensor], Tensor]] = {
        "mse": lambda z: F.mse_loss(z, drawn, reduction="none"),
        "bce": lambda z: F.binary_cross_entropy_with_logits(z, drawn, reduction="none"),
        "nll": lambda z: F.nll_loss(z, drawn[:, 0], reduction="none"),
    }
    term = plain.get(name, lambda z: F.cross_entropy(z, drawn[:, 0], reduction="none"))
    rows = jacrev(lambda w: term(output(w)).flatten())(w)
    curvature_weight = likelihood.curvature_weight(z, target).expand(shape).flatten()
    expected = torch.einsum("in,i,im->nm", rows, curvature_weight, rows) / weight
    for micro_batch in (24, 5):
        assert close(product(problem, "fisher", micro_batch=micro_batch), expected)


@pytest.mark.parametrize("name", CASES)
def test_fisher_is_gauss_newton_on_average(name: str) -> None:
    """Over 400 draws its mean is the Gauss-Newton matrix, within five standard errors of its trace and corner."""
    make, loss, target, _ = CASES[name]
    problem = Problem(model=make(), loss=loss, data=(X, target))
    vector = torch.randn(Objective(problem).num_params, 1, generator=torch.Generator().manual_seed(5)).double()
    wanted = float(vector.T @ gauss_newton(name) @ vector)
    found = []
    for seed in range(400):
        objective = Objective(problem, curvature=curvature("fisher", torch.Generator().manual_seed(seed)))
        objective.terms.checked = True
        found.append(float(vector.T @ objective.hvp(vector)))
    sample = torch.tensor(found)
    assert abs(float(sample.mean()) - wanted) < 5 * float(sample.std()) / 20
    assert float(sample.std()) < wanted  # or the line above says nothing


@pytest.mark.parametrize("operator", NAMES)
@pytest.mark.parametrize("name", CASES)
def test_the_audit_accepts_every_operator_and_counts_itself(name: str, operator: str) -> None:
    """Symmetric, repeatable and additive products pass, in both precisions, and the bill is what was done."""
    make, loss, target, _ = CASES[name]
    for dtype in (torch.float32, torch.float64):
        problem = Problem(model=make().to(dtype), loss=loss, data=(X.to(dtype), target))
        objective = Objective(problem, dtype=dtype, curvature=curvature(operator))
        audit(objective, torch.Generator().manual_seed(0))
        assert objective.gradients > 0
        assert all(
            torch.equal(p, q) for p, q in zip(make().to(dtype).parameters(), problem.model.parameters(), strict=True)
        )


@pytest.mark.parametrize("operator", NAMES)
def test_cost_is_counted_as_stated(operator: str) -> None:
    """A block of K costs 1 + K times what the curvature states, in one pass; weight decay is added to each."""
    chosen = curvature(operator)
    plain, decayed = (
        Objective(
            Problem(model=net(), loss=nn.CrossEntropyLoss(), data=(X, Y), weight_decay=c),
            micro_batch=5,
            curvature=chosen,
        )
        for c in (0.0, 0.3)
    )
    block = torch.eye(plain.num_params, dtype=torch.float64)[:, :3]
    assert close(decayed.hvp(block), plain.hvp(block) + 0.3 * block, 1e-12)
    assert abs(plain.gradients - (1 + 3 * chosen.cost)) < 1e-9
    assert (plain.passes, plain.hvps) == (1, 3)


@pytest.mark.parametrize("operator", NAMES)
def test_a_kept_graph_gives_the_products_of_a_pass(operator: str) -> None:
    """Vectors pushed later, and twice, through the graphs of weighted micro-batches give the weighted mean."""
    problem = Problem(model=net(), loss=nn.CrossEntropyLoss(WEIGHT), data=(X, Y))
    objective = Objective(problem, micro_batch=6, curvature=curvature(operator))
    block = torch.randn(2, objective.num_params, generator=torch.Generator().manual_seed(0)).double()
    parts = list(micro_batches([(X, Y)], 6))
    doubled = Problem(model=net(), loss=nn.CrossEntropyLoss(WEIGHT), data=[(X, Y), (X[:6], Y[:6])])
    if operator == "fisher":  # the copy of the first six would draw other targets
        wanted, scales = objective.hvp(block.T), [1.0] * 4
    else:
        wanted, scales = Objective(doubled, micro_batch=6, curvature=curvature(operator)).hvp(block.T), [2.0, 1, 1, 1]
    with objective.measuring():
        graphs = [objective.graph(dataclasses.replace(p, scale=c)) for p, c in zip(parts, scales, strict=True)]
        weight = sum(float(g.weight) for g in graphs)
        for last in (False, True):
            found = sum(g.products(block, last) for g in graphs) / weight
            assert close(found.T, wanted, 1e-7 if operator == "finite-difference" else 1e-12)
        once, twice = (objective.graph(dataclasses.replace(parts[1], scale=c)).products(block) for c in (1.0, 2.0))
        assert close(twice, 2 * once, 1e-12)
    scaled = sum(float(g.loss) for g in graphs) / weight
    repeated = X if operator == "fisher" else torch.cat([X, X[:6]])
    labels = Y if operator == "fisher" else torch.cat([Y, Y[:6]])
    assert abs(scaled - float(F.cross_entropy(net()(repeated), labels, WEIGHT).detach())) < 1e-12


class Rich(nn.Module):
    """A model whose output is an object, a mapping, a tuple or a dict."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.body, self.form = net(), form

    def forward(self, x: Tensor) -> Any:
        z = self.body(x)
        forms = {
            "object": lambda: SimpleNamespace(logits=z, loss=None),
            "dict": lambda: {"logits": z, "hidden": x},
            "tuple": lambda: (z[:, :2], z[:, 2:]),
            "list": lambda: [z[:, :1], x, z[:, 1:]],
            "named": lambda: {"a": z[:, :2], "b": z[:, 2:]},
            "loss": lambda: SimpleNamespace(logits=z, loss=z.square().mean()),
            "set": lambda: {z},
        }
        return forms[self.form]()


@pytest.mark.parametrize(
    ("form", "loss"),
    [
        ("object", nn.CrossEntropyLoss()),
        ("dict", nn.CrossEntropyLoss()),
        ("object", lambda o, t: F.cross_entropy(o.logits, t)),
        ("dict", lambda o, t: F.cross_entropy(o["logits"], t)),
        ("tuple", lambda o, t: F.cross_entropy(torch.cat(o, 1), t)),
        ("list", lambda o, t: F.cross_entropy(torch.cat([o[0], o[2]], 1), t)),
        ("named", lambda o, t: F.cross_entropy(torch.cat([o["a"], o["b"]], 1), t)),
    ],
)
def test_outputs_of_every_form_have_a_gauss_newton_matrix(form: str, loss: Any) -> None:
    """Objects, mappings, tuples and lists are cut from the loss, known or the user's own."""
    problem = Problem(model=Rich(form), loss=loss, data=(X, Y))
    assert close(product(problem, "ggn", micro_batch=7), gauss_newton("cross_entropy"))


def test_a_custom_loss_has_an_empirical_fisher_over_examples() -> None:
    """A mean over the examples' losses is taken term by term; it equals the known loss's."""
    known = product(Problem(model=net(), loss=nn.CrossEntropyLoss(), data=(X, Y)), "empirical-fisher")
    own = Problem(model=net(), loss=lambda o, t: F.cross_entropy(o, t), data=(X, Y))
    assert close(product(own, "empirical-fisher", micro_batch=7), known, 1e-12)


class Stated:
    """A mean over a number of terms that the author states."""

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target)

    def terms(self, batch: Any) -> int:
        return len(batch[1])


MODEL = net()


@pytest.mark.parametrize(
    ("operator", "model", "loss", "message"),
    [
        ("ggn", net(), lambda o, t: o.mean(), "is linear in it"),
        ("ggn", MODEL, lambda o, t: F.cross_entropy(o, t) + MODEL[0].weight.square().sum(), "reads them itself"),
        ("ggn", Rich("loss"), lambda o, t: o.loss, "takes a loss from the output"),
        ("ggn", Rich("set"), lambda o, t: next(iter(o)).square().mean(), "got set"),
        ("ggn", net(), nn.NLLLoss(), "log-probabilities"),
        ("fisher", net(), nn.SmoothL1Loss(), "SmoothL1Loss states none"),
        ("empirical-fisher", net(), Stated(), "needs each loss term's gradient"),
        (
            "empirical-fisher",
            net(),
            nn.CrossEntropyLoss(torch.tensor([0.0, 1, 1]), label_smoothing=0.1),
            "positive weight",
        ),
    ],
    ids=["linear", "penalty", "own loss", "set", "nll", "no distribution", "stated terms", "zero weight"],
)
def test_what_an_operator_cannot_do_is_refused(operator: str, model: nn.Module, loss: Any, message: str) -> None:
    """A matrix that would be zero, infinite or another than its name says ends in one sentence."""
    target = SOFT if isinstance(loss, nn.SmoothL1Loss) else Y
    with pytest.raises(ProblemError, match=message):
        product(Problem(model=model, loss=loss, data=(X, target)), operator)


def test_an_unknown_operator_is_named_with_the_nearest() -> None:
    """A misspelt operator is an ArgumentError that lists all."""
    with pytest.raises(ArgumentError, match="Did you mean 'fisher'"):
        curvature("fischer")


class Once(torch.autograd.Function):
    """exp, whose backward refuses to be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * ctx.saved_tensors[0].exp()


class Cut(Once):
    """exp, whose backward cuts the gradient that it is given from its graph."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.detach() * ctx.saved_tensors[0].exp()


class Saved(Once):
    """exp, whose backward uses a saved number: no second derivative, but a Jacobian."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * ctx.saved_tensors[0].detach().exp()


class Custom(nn.Module):
    """A network that ends in a function of its own, or has a layer after it."""

    def __init__(self, function: type[Once], last: bool = False) -> None:
        super().__init__()
        head = nn.Identity() if last else nn.Linear(3, 3).double()
        self.body, self.head, self.function = net(), head, function

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function.apply(self.body(x)))


class Exp(Custom):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).exp())


@pytest.mark.parametrize("function", [Once, Cut, Saved])
def test_a_model_without_second_derivative_has_a_difference_hessian(function: type[Once]) -> None:
    """The Hessian is refused with that advice; differences then agree with the exact Hessian of the same function."""
    model = Custom(function)
    problem = Problem(model=model, loss=nn.CrossEntropyLoss(), data=(X, Y))
    with pytest.raises((ProblemError, AuditError), match="operator='finite-difference'"):
        audit(Objective(problem))
    objective = Objective(problem, curvature=curvature("finite-difference"))
    audit(objective)
    assert not objective.curvature.exact
    exact = Exp(function)
    exact.load_state_dict(model.state_dict())
    wanted = dense_hessian(exact, lambda call: F.cross_entropy(call(X), Y))
    assert close(objective.hvp(torch.eye(objective.num_params, dtype=torch.float64)), wanted, 1e-7)


@pytest.mark.parametrize("operator", ["ggn", "fisher", "empirical-fisher"])
def test_a_jacobian_that_is_cut_off_is_refused(operator: str) -> None:
    """Where J u would silently be wrong the audit says so; where only the second derivative is missing it passes."""
    problem = Problem(model=Custom(Cut), loss=nn.CrossEntropyLoss(), data=(X, Y))
    with pytest.raises(AuditError, match="must be symmetric"):
        audit(Objective(problem, curvature=curvature(operator)))
    # Where nothing is left of J, the products are zero, and so symmetric.
    with pytest.raises(ProblemError, match="Jacobian products must be"):
        audit(Objective(dataclasses.replace(problem, model=Custom(Cut, last=True)), curvature=curvature(operator)))
    audit(Objective(dataclasses.replace(problem, model=Custom(Saved)), curvature=curvature(operator)))


class Stopping:
    """A loss that is interrupted at its third call, where the weights are away from w."""

    calls = 0

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 3:
            raise KeyboardInterrupt
        return F.cross_entropy(output, target)


def test_differences_put_the_weights_back_bit_for_bit() -> None:
    """After a product, and after Ctrl-C in the middle of one, every weight is what it was; a zero vector gives zero."""
    model = net().float()
    before = [p.detach().clone() for p in model.parameters()]
    objective = Objective(
        Problem(model=model, loss=nn.CrossEntropyLoss(), data=(X.float(), Y)),
        dtype=torch.float32,  # on the model itself, not on a copy
        curvature=curvature("finite-difference"),
    )
    assert objective.terms.model is model
    block = torch.randn(objective.num_params, 2, generator=torch.Generator().manual_seed(0))
    block[:, 1] = 0
    found = objective.hvp(block)
    assert float(found[:, 0].norm()) > 0
    assert float(found[:, 1].norm()) == 0
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
    stopping = Problem(model=model, loss=Stopping(), data=(X.float(), Y))
    with pytest.raises(KeyboardInterrupt):
        Objective(stopping, dtype=torch.float32, curvature=curvature("finite-difference")).hvp(block)
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))


def test_differences_are_taken_in_float64_unless_asked_otherwise() -> None:
    """A float32 model with ReLUs has its exact Hessian to 1e-6 by default, and not in float32."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    problem = Problem(model=model, loss=nn.CrossEntropyLoss(), data=(X.float(), Y))
    exact = product(problem, "hessian", dtype=torch.float64)
    assert close(product(problem, "finite-difference"), exact, 1e-6)
    assert not close(product(problem, "finite-difference", dtype=torch.float32), exact, 1e-6)


def test_draws_belong_to_examples() -> None:
    """Uniform numbers depend on seed and place alone, and are uniform and uncorrelated."""
    data = [(X[:10], Y[:10]), (X[10:], Y[10:])]
    for size in (3, 24):
        rows = torch.cat([uniform(7, part, torch.Size((part.size, 2))) for part in micro_batches(data, size)])
        alone = torch.cat([uniform(7, part, torch.Size((part.size, 2))) for part in micro_batches(data, 1)])
        assert torch.equal(rows, alone)
    many = MicroBatch(None, 50_000, ((3, 100, 50_000),))
    u, v = uniform(1, many, torch.Size((50_000, 2))), uniform(2, many, torch.Size((50_000, 2)))
    assert 0 < float(u.min()) < 1e-3 < 1 - 1e-3 < float(u.max()) < 1
    columns = torch.stack([u[:, 0], u[:, 1], v[:, 0], u[:, 0].roll(1)])
    assert float((columns.mean(1) - 0.5).abs().max()) < 5 * (1 / 12 / 50_000) ** 0.5
    assert float((torch.corrcoef(columns) - torch.eye(4)).abs().max()) < 5 / 50_000**0.5


def test_differences_in_single_precision_say_how_far_they_are_off() -> None:
    """Every interval holds the dense eigenvalue in float32, and a tolerance finer than the products is not met."""
    for seed in range(8):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            x, y = torch.randn(300, 6), torch.randint(0, 3, (300,))
        model = tiny_mlp(6, 8, 3, seed=seed)
        true = dense_hessian(copy.deepcopy(model).double(), lambda call, x=x, y=y: F.cross_entropy(call(x.double()), y))
        wanted = torch.linalg.eigvalsh(true).flip(0)[:2]
        problem = Problem(model=model, loss=nn.CrossEntropyLoss(), data=(x, y))
        for tol in (1e-2, 1e-3):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                options = {"operator": "finite-difference", "dtype": torch.float32, "max_passes": 12}
                found = top_eigenvalues(problem, 2, tol, **options)
            done = torch.from_numpy(found.converged)
            inside = (torch.from_numpy(found.lower) <= wanted) & (wanted <= torch.from_numpy(found.upper))
            assert bool(inside[done].all())
            assert tol > 2e-3 or not bool(done.any())


def test_help_says_what_the_empirical_fisher_is_summed_over(capsys: pytest.CaptureFixture[str]) -> None:
    """`sharpscope eigen --help` and `density --help` say that the sum is over loss terms."""
    for command in ("eigen", "density"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert "summed over loss terms" in " ".join(capsys.readouterr().out.split())
