"""The table of eigenvalues, with the notes that a reader must have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from sharpscope.results.record import CERTAIN, POINT_AND_PRICE, names_of, origin_notes, point_and_price
from sharpscope.results.table import Table
from sharpscope.tables import narrower, with_bound

if TYPE_CHECKING:
    from sharpscope.results.eigen import EigenResult


def _rows(results: Sequence[EigenResult]) -> list[list[str]]:
    """A heading and one row a result: checkpoint, lambda_1..lambda_k, ratio (for k > 1), loss, gradient norm, cost."""
    ks = {result.ratio.k for result in results}
    widest = max(results, key=lambda result: len(result.eigenvalues))
    k, with_ratio = len(widest.labels), any(r.which in ("largest", "both") and r.ratio.k > 1 for r in results)
    ratio_head = [f"lambda_max/lambda_{widest.ratio.k if len(ks) == 1 else 'k'}"] if with_ratio else []
    rows = [["checkpoint", *widest.labels, *ratio_head, *POINT_AND_PRICE]]
    for r, name in zip(results, names_of([r.provenance for r in results]), strict=True):
        intervals = zip(r.eigenvalues, r.lower, r.upper, r.converged, strict=True)
        values = [with_bound(v, low, up) + ("" if sure else " ?") for v, low, up, sure in intervals]
        ratio = r.ratio
        shown = "-" if ratio.value is None else with_bound(ratio.value, ratio.lower or 0.0, ratio.upper or np.inf)
        if ratio.value is not None and not (r.converged[0] and r.converged[ratio.k - 1]):
            shown += " ?"
        if len(ks) > 1:
            shown += f" (k={ratio.k})"
        measured = [*values, *[""] * (k - len(values)), *([shown] if with_ratio else [])]
        rows.append([name, *measured, *point_and_price(r.loss, r.gradient_norm, r.cost)])
    return rows


def _notes(results: Sequence[EigenResult]) -> list[str]:
    """What a reader of the table must know: the data, the mode, what has not converged, ratios that mean nothing."""
    notes = []
    for r, name in zip(results, names_of([r.provenance for r in results]), strict=True):
        p = r.provenance
        # Of a sample what it leaves open is more than the bounds in the table, and comes first.
        if sampled := _sampled(r):
            notes.append(f"{name}: {sampled}")
        notes += origin_notes(name, p)
        notes += [f"{name}: {said}" for said in (_missed(r), _certified(r)) if said]
        if r.ratio.value is None and r.ratio.k > 1 and r.which in ("largest", "both"):
            notes.append(f"{name}: no ratio, since {r.ratio.reason}.")
        if not r.converged.all():
            missing = np.flatnonzero(~r.converged)
            which = "all" if len(missing) == len(r.converged) > 5 else ", ".join(r.labels[i] for i in missing)
            notes.append(
                f"{name}: NOT CONVERGED to the tolerance {p.get('tol', '?')} (marked ?): {which}. Their intervals may "
                f"be about other eigenvalues. {_remedy(r)}"
            )
    return notes


def _missed(result: EigenResult) -> str:
    """How sure it is that nothing larger was missed, as far as the run's random vectors say."""
    if result.which not in ("largest", "smallest"):
        return "no probability is stated of eigenvalues that were missed; that goes with --which largest or smallest."
    if result.missed_probability is None:
        return ""
    first, last = float(result.missed_probability[0]), float(result.missed_probability[-1])
    side = "above" if result.which == "largest" else "below"
    if first >= 0.995:
        unknown = "nothing is known of eigenvalues that were missed"
        return f"{unknown}; power iteration may skip some." if result.provenance.get("method") == "power" else ""
    said = f"an eigenvalue {side} {result.labels[0]} was missed with probability at most {_percent(first)}"
    if len(result.labels) > 1:
        said += f", {side} {result.labels[-1]} " + ("not excluded" if last >= 0.995 else f"at most {_percent(last)}")
    pays = last > CERTAIN and result.which == "largest" and not result.certificate
    return said + ("; --certify pays for less." if pays else ".")


def _certified(result: EigenResult) -> str:
    """What --certify paid for."""
    proof = result.certificate
    if not proof:
        return ""
    if proof["probability"] > CERTAIN:
        return f"NO CERTIFICATE: after {proof['runs']} runs one above {proof['above']:.4g} is not excluded."
    where = f"above {proof['above']:.4g} (lambda_{result.ratio.k} + {proof['eps']:g} lambda_max)"
    return f"certificate, {proof['steps']} steps: one {where} was missed with probability at most " + (
        f"{_percent(proof['probability'])}."
    )


def _sampled(result: EigenResult) -> str:
    """The intervals over the data."""
    if not result.sampling:
        return ""
    s = result.sampling
    if not result.converged.all():
        return "no intervals for all the data of which these are a sample: not all eigenvalues have converged."
    if s["lower"] is None:
        return f"no intervals for all the data of which these are a sample: {s['reason']}."
    pairs = zip(result.labels, s["lower"], s["upper"], strict=True)
    said = [f"{label} {low:.3g} to {high:.3g}" for label, low, high in pairs]
    if s.get("ratio"):
        said.append(f"lambda_max/lambda_{result.ratio.k} {s['ratio']['lower']:.3g} to {s['ratio']['upper']:.3g}")
    sure = f"{100 * s['confidence']:.3g} %"
    return f"for all the data of which these are {s['examples']} examples, {sure} intervals: {', '.join(said)}."


def _percent(probability: float) -> str:
    return f"{100 * max(probability, 1e-6):.2g} %"


def _remedy(result: EigenResult) -> str:
    half = float((result.upper - result.lower).max()) / 2
    rounding = 64 * float(np.finfo(np.float32).eps) * float(np.abs(result.eigenvalues).max())
    if result.provenance.get("dtype") == "float32" and half <= rounding:
        return f"float32 rounding leaves ±{half:.0e}: lift the computation to float64 (--dtype float64)."
    return "Allow more passes (--max-passes), or a larger tolerance (--tol)."


def eigen_table(results: Sequence[EigenResult]) -> Table:
    """A row a result, or a column where that is narrower."""
    return Table(narrower(_rows(results)), _notes(results))
