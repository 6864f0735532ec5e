"""Ratios, intervals and tables of results built by hand."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Annotated

import numpy as np
import pytest
import torch

import sharpscope
from sharpscope import Cost, DataError, EigenResult, Estimate, Measure, OutputError, Ratio
from sharpscope.checkpoint import write_checkpoint
from sharpscope.plot import sharpness_over_training
from sharpscope.results import side_by_side
from sharpscope.results.serialization import Array, Shape
from sharpscope.training import Recipe, train


def result(values: list[float], half: float = 0.01, converged: bool = True, **provenance: object) -> EigenResult:
    array = np.array(values)
    return EigenResult(
        eigenvalues=array,
        residuals=np.full(len(array), half),
        lower=array - half,
        upper=array + half,
        converged=np.full(len(array), converged),
        loss=0.5,
        gradient_norm=0.1,
        cost=Cost(3, 20, 43.5, 1.25),
        provenance=provenance,
    )


def test_the_ratio_holds_every_pair_of_values_in_the_intervals() -> None:
    """The ratio's interval runs from lower_1/upper_k to upper_1/lower_k."""
    ratio = result([8.0, 4.0, 2.0], 0.5).ratio
    assert (ratio.k, ratio.value) == (3, 4.0)
    assert (ratio.lower, ratio.upper) == (7.5 / 2.5, 8.5 / 1.5)


@pytest.mark.parametrize(
    ("values", "half", "reason"),
    [
        ([3.0, -1.0], 0.1, "lambda_2 is not positive"),
        ([3.0, 0.0], 0.1, "lambda_2 is not positive"),
        ([3.0, 0.05], 0.1, "the interval of lambda_2 reaches zero"),
        ([3.0], 0.1, "a ratio needs k of at least 2"),
    ],
)
def test_a_meaningless_ratio_is_none_with_a_reason(values: list[float], half: float, reason: str) -> None:
    """No number is printed where lambda_k is not surely positive, in the table neither."""
    r = result(values, half)
    assert r.ratio == Ratio(len(values), None, None, None, reason)
    assert len(values) == 1 or reason in r.summary()
    assert str(r) == r.summary()


def test_the_json_has_the_agreed_keys(tmp_path: Path) -> None:
    """The saved object carries the analysis, the numbers with their intervals, the ratio and the cost."""
    result([2.0, 1.0], checkpoint="a.pt", sha256="0").save(tmp_path / "r.json")
    said = json.loads((tmp_path / "r.json").read_text())
    assert said["analysis"] == "eigen"
    assert said["lambda_max"] == 2.0
    assert set(said["ratio"]) == {"k", "value", "lower", "upper", "reason"}
    assert said["cost"] == {"passes": 3, "hvps": 20, "gradients": 43.5, "seconds": 1.25}
    keys = {"checkpoint", "sha256", "loss", "gradient_norm", "eigenvalues", "residuals", "lower", "upper", "converged"}
    assert keys <= set(said)


def test_provenance_is_kept_as_json_can_hold_it(tmp_path: Path) -> None:
    """What is not finite becomes null, NumPy's numbers plain ones, and a key of the result's own is refused."""
    given = {"metrics": {"test_loss": float("inf"), "n": np.int64(3)}, "shape": (1, 8), "where": tmp_path}
    result([2.0, 1.0], **given).save(tmp_path / "r.json")
    said = json.loads((tmp_path / "r.json").read_text())
    assert said["metrics"] == {"test_loss": None, "n": 3}
    assert (said["shape"], said["where"], said["format"]) == ([1, 8], str(tmp_path), 1)
    for key in ("analysis", "loss", "cost"):
        with pytest.raises(DataError, match=key):
            result([2.0, 1.0], **{key: 1})


def test_ratios_of_different_k_are_told_apart() -> None:
    """In a table of results with different k each ratio names its own; with k = 1 there is no such column."""
    text = str(side_by_side([result([4.0, 2.0]), result([4.0, 2.0, 1.0])]))
    assert "lambda_max/lambda_k" in text
    assert "(k=2)" in text
    assert "(k=3)" in text
    alone = str(side_by_side([result([4.0])]))
    assert "/" not in alone.partition("\n\n")[0]
    assert "ratio" not in alone


def test_both_ends_stand_under_their_names_whatever_k() -> None:
    """Side by side, lambda_min of one pair and of two pairs are one row; what one result lacks is empty."""
    one, two = result([4.0, -2.0], which="both"), result([5.0, 3.0, -1.0, -2.5], which="both")
    lines = str(side_by_side([one, two])).splitlines()
    rows = {line.split()[0]: [float(cell) for cell in re.findall(r" (-?[\d.]+) ±", line)] for line in lines if line}
    assert rows["lambda_max"] == [4.0, 5.0]
    assert rows["lambda_2"] == [3.0]
    assert rows["lambda_n-1"] == [-1.0]
    assert rows["lambda_min"] == [-2.0, -2.5]


def test_the_notes_say_what_was_measured_on_what() -> None:
    """Wrong labels, SAM, the epoch, and which of two files of one name, stand below the table."""
    recipe = {"optimizer": "sgd", "rho": 0.1}
    given = {"data": "digits", "split": "train", "label_noise": 0.2, "recipe": recipe, "epoch": 3, "num_examples": 9}
    text = str(side_by_side([result([2.0, 1.0], checkpoint=f"{f}/last.pt", **given) for f in ("sgd", "sam")]))
    assert "9 examples of digits (train, 20% wrong labels)" in text
    assert "SAM around sgd, rho 0.1, epoch 3" in text
    assert text.splitlines()[0].split() == ["checkpoint", "sgd/last.pt", "sam/last.pt"]


def test_a_table_is_turned_where_that_is_narrower() -> None:
    """Two results of five eigenvalues are columns, twenty of one are rows; both ways say the same."""
    several = [result([5.0, 4.0, 3.0, 2.0, 1.0])] * 2, [result([2.0])] * 20
    few, many = (str(side_by_side(results)) for results in several)
    assert few.splitlines()[0].split()[0] == many.splitlines()[0].split()[0] == "checkpoint"
    assert few.splitlines()[1].startswith("lambda_max")
    assert "lambda_max" in many.splitlines()[0]
    for text in (few, many):
        assert max(map(len, text.partition("\n\n")[0].splitlines())) <= 80


def test_every_result_is_shown_saved_and_put_beside_others() -> None:
    """Each class of results has what docs/reference.md says of them, and a place in side_by_side."""
    kinds = {getattr(sharpscope, name) for name in sharpscope.__all__ if name.endswith("Result")}
    assert len(kinds) == 8
    for kind in kinds:
        assert all(callable(getattr(kind, name)) for name in ("summary", "table", "save", "load")), kind
    with pytest.raises(DataError) as refused:
        side_by_side([])
    assert all(kind.__name__ in str(refused.value) for kind in kinds)


def test_vectors_of_another_run_are_not_taken_for_this_ones(tmp_path: Path) -> None:
    """An .npz beside the JSON whose eigenvalues differ is ignored."""
    np.savez(tmp_path / "r.npz", eigenvectors=np.eye(2), eigenvalues=np.array([9.0, 1.0]))
    result([2.0, 1.0]).save(tmp_path / "r.json")
    assert EigenResult.load(tmp_path / "r.json").eigenvectors is None
    with pytest.raises(DataError, match="vectors=True"):
        result([2.0, 1.0]).save(tmp_path / "r.json", vectors=True)
    for foreign in (b"junk", b""):
        (tmp_path / "r.npz").write_bytes(foreign)
        assert EigenResult.load(tmp_path / "r.json").eigenvectors is None
    with pytest.raises(OutputError, match=r"Name it \.json"):
        result([2.0, 1.0]).save(tmp_path / "r.npz")


@dataclass(frozen=True, eq=False)
class Wider(EigenResult):
    """A result with a field more."""

    gaps: Annotated[Array, Shape("k")] | None = None


def test_a_new_field_is_one_line(tmp_path: Path) -> None:
    """It is saved, read back as annotated, None in files without it, and refused with another type or length."""
    old = result([2.0, 1.0], seed=3)
    wider = Wider(**vars(old), gaps=np.array([1.0, 0.5]))
    wider.save(tmp_path / "r.json")
    again = Wider.load(tmp_path / "r.json")
    assert again.gaps is not None
    np.testing.assert_array_equal(again.gaps, [1.0, 0.5])
    assert again.to_dict() == wider.to_dict() == {**old.to_dict(), "gaps": [1.0, 0.5]}
    assert again.provenance == {"seed": 3}
    assert Wider.from_dict(old.to_dict()).gaps is None
    for wrong, came in (([1.0, "text"], "got text"), ([1.0], "got 1 and 2"), ([True, False], "got a boolean")):
        with pytest.raises(DataError, match=rf"'gaps'.*{came}"):
            Wider.from_dict({**old.to_dict(), "gaps": wrong})


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"analysis": "eigen"}', '{"analysis": "slice"}'])
def test_other_files_are_no_results(text: str, tmp_path: Path) -> None:
    """What save did not write ends in a DataError."""
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(DataError):
        EigenResult.load(tmp_path / "r.json")
    with pytest.raises(DataError):
        EigenResult.load(tmp_path / "missing.json")


@pytest.mark.parametrize(
    ("value", "half", "shown"),
    [
        (1.2346, 0.0002, "1.2346 ±0.0002"),
        (1.23456, 0.0002, "1.2346 ±0.0003"),
        (1.23456, 0.00011, "1.23456 ±0.00011"),
        (123.4, 7.0, "123 ±8"),
        (123.0, 70.0, "123 ±70"),
        (28.0, 11.48, "28 ±12"),
        (1.5e-6, 1e-9, "1.500e-06 ±1e-09"),
        (2.5e7, 3e3, "2.5000e+07 ±3e+03"),
        (2.0, 0.0, "2"),
    ],
)
def test_a_number_is_shown_to_the_digits_it_has(value: float, half: float, shown: str) -> None:
    """The value to the last digit of the half-width, which is rounded up from there."""
    assert str(Estimate(value, half)) == shown


def test_a_printed_interval_holds_the_interval_and_is_not_much_longer() -> None:
    """Over 2,000 numbers of all sizes its ends are outside, and it is at most 1.6 times as long as the wider side."""
    rng = np.random.default_rng(0)
    for _ in range(2000):
        value = rng.normal() * 10 ** rng.uniform(-6, 8)
        half = abs(value) * 10 ** rng.uniform(-6, 1)
        lower, upper = value - half * rng.uniform(0.3, 1), value + half
        shown, reach = map(float, str(Measure("trace", value, None, lower, upper)).split(" ±"))
        assert shown - reach <= lower + 1e-5 * half
        assert shown + reach >= upper - 1e-5 * half
        assert reach <= 1.6 * half


def test_the_table_marks_what_has_not_converged() -> None:
    """Each unsure value carries a question mark, and a note says so."""
    unsure = result([2.0, 1.0], converged=False, checkpoint="x/a.pt", tol=1e-3)
    text = str(side_by_side([unsure, result([3.0, 1.0, 0.5])]))
    assert text.count("±0.01 ?") == 2
    assert "a.pt: NOT CONVERGED to the tolerance 0.001 (marked ?): lambda_max, lambda_2." in text
    assert "lambda_max/lambda_k" in text


def test_what_has_not_converged_or_is_paid_for_claims_and_advises_nothing() -> None:
    """No interval over the data for values that are unsure, and no --certify where it was given or is refused."""
    sampling = {"lower": [1.9, 0.9], "upper": [2.1, 1.1], "examples": 5, "confidence": 0.95}
    sure, unsure = (result([2.0, 1.0], converged=done) for done in (True, False))
    said = {done: str(replace(r, sampling=sampling)) for done, r in ((True, sure), (False, unsure))}
    assert "95 % intervals: lambda_max 1.9 to 2.1" in said[True]
    assert "95 %" not in said[False]
    assert "not all eigenvalues have converged" in said[False]
    assert "may be about other eigenvalues" in said[False]
    missed = np.array([0.01, 0.4])
    proof = {"eps": 0.1, "above": 1.2, "probability": 0.004, "runs": 1, "steps": 9, "kuczynski_wozniakowski": 1.0}
    assert "--certify pays" in str(replace(sure, missed_probability=missed))
    assert "--certify pays" not in str(replace(sure, missed_probability=missed, certificate=proof))
    for which, words in (("smallest", "below"), ("both", "no probability is stated")):
        shown = str(replace(sure, missed_probability=missed, provenance={**sure.provenance, "which": which}))
        assert words in shown
        assert "--certify" not in shown


def test_a_result_shows_itself_in_a_notebook() -> None:
    """The HTML holds the numbers and escapes names."""
    html = result([2.0, 1.0], checkpoint="<b>.pt")._repr_html_()
    assert "2.00 ±0.01" in html
    assert "&lt;b&gt;.pt" in html


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception while writing leaves the target as it was and no temporary file."""
    (tmp_path / "a").write_text("old")

    def fail(contents: object, stream: IO[bytes]) -> None:
        stream.write(b"half")
        raise RuntimeError

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(RuntimeError):
        write_checkpoint(tmp_path / "a", state_dict={}, model="mlp", model_args={}, data={}, loss="mse")
    assert (tmp_path / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_places_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    """A folder, and a path below a file, are no places for a result."""
    (tmp_path / "file").write_text("")
    for place in (tmp_path, tmp_path / "file" / "r.json"):
        with pytest.raises(OutputError):
            train(Recipe(model="mlp"), place)


def test_the_training_figure_shows_the_results_numbers() -> None:
    """Lines run through lambda_max and the ratio at each epoch, sorted, with the intervals as bars."""
    runs = {
        "a": [result([v, 1.0], epoch=e, metrics={"lr": 0.1}) for e, v in ((2, 3.0), (0, 1.0))],
        "b": [result([2.0, -1.0], epoch=0, metrics={})],
    }
    left, right = sharpness_over_training(runs)
    points = [line.get_xydata().tolist() for line in left.lines]
    assert [[0, 1.0], [2, 3.0]] in points
    assert [[0, 20.0], [2, 20.0]] in [marks.get_offsets().tolist() for marks in left.collections]  # 2/eta at lr 0.1
    assert [[0, 1.0], [2, 3.0]] in [line.get_xydata().tolist() for line in right.lines]
    with pytest.raises(DataError, match="epoch"):
        sharpness_over_training({"c": [result([1.0, 0.5])]})
