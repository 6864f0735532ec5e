"""What a page says in words: its title, its glossary, and what its numbers do not say."""

from __future__ import annotations

from sharpscope.report.markup import tag, text
from sharpscope.results.comparison import Comparison
from sharpscope.results.comparison.intervals import KINDS
from sharpscope.results.comparison.rows import Row

TERMS = {
    "Hessian": "the matrix of second derivatives of the mean loss by the weights; its eigenvalues are the curvatures "
    "of the loss along its eigenvectors",
    "lambda_k": "the k-th largest algebraic eigenvalue of the Hessian, with multiplicity; without weight decay",
    "spectral density": "the share of eigenvalues near each value, (1/n) sum_i delta(t - lambda_i), smoothed by a "
    "Gaussian of the width stated",
    "random line, random plane": "weights w + t d with normal random d, each filter of d scaled to the size of its "
    "filter of w (Li et al. 2018), alike for all checkpoints",
    "barrier": "max over 0 <= t <= 1 of L(t) - ((1 - t) L(0) + t L(1)) on the straight line between two checkpoints "
    "(Frankle et al. 2020)",
    "gradient, as a unit of cost": "one forward and backward pass over all the examples of an analysis; a "
    "Hessian-vector product costs about two more",
    "pass": "one walk over all the examples of an analysis",
}


def title_of(comparison: Comparison) -> str:
    """What is compared, in a line."""
    groups = comparison.groups
    if groups:
        named = [f"{group} ({len(runs)} run{'s' * (len(runs) > 1)})" for group, runs in groups.items()]
    else:
        named = [subject.name for subject in comparison.subjects]
    if len(named) == 1:
        return f"Sharpness of {named[0]}"
    if len(named) > 3:
        return f"Sharpness of {len(named)} {'groups' if groups else 'checkpoints'} side by side"
    return f"Sharpness of {', '.join(named[:-1])} and {named[-1]}"


def glossary(rows: list[Row]) -> str:
    """Every quantity of the table by what defines it, the figures' terms, and the kinds of interval."""
    meant: dict[str, list[str]] = {}
    for row in rows:
        meant.setdefault(row.definition, []).append(row.label)
    kinds = dict.fromkeys(r.interval for row in rows for r in row.readings if r is not None)
    entries = [_entry(labels, definition) for definition, labels in meant.items()]
    entries += [_entry([term], said) for term, said in TERMS.items()]
    entries += [_entry([f"Interval: {kind}"], KINDS[kind].meaning) for kind in kinds if kind in KINDS]
    return tag("dl", *entries, class_="glossary")


def _entry(terms: list[str], said: str) -> str:
    return tag("div", *(tag("dt", text(term)) for term in terms), tag("dd", text(f"{_capital(said)}.")))


def _capital(said: str) -> str:
    """A sentence's first letter, unless it begins with a symbol's name."""
    return f"{said[:1].upper()}{said[1:]}" if said.split()[0].isalpha() else said


def limits(comparison: Comparison, rows: list[Row]) -> str:
    """What the numbers of this comparison do not say."""
    said = [_runs(comparison), _better(), *_sampled(comparison, rows)]
    return tag(
        "ul", *(tag("li", tag("strong", text(head)), " ", text(rest)) for head, rest in said if rest), class_="limits"
    )


def _runs(comparison: Comparison) -> tuple[str, str]:
    groups = comparison.groups
    fewest = min(map(len, groups.values()), default=1)
    if fewest < 2 and max(map(len, groups.values()), default=1) > 1:
        alone = ", ".join(group for group, runs in groups.items() if len(runs) == 1)
        return (
            "One run says nothing of the scatter.",
            f"There is a single run of {alone}, which has no interval over runs: another seed of it may differ by as "
            "much as two runs of the other group do.",
        )
    if fewest < 2:
        return (
            "One seed says nothing in general.",
            "These are single runs. Another seed of the same recipe may differ by as much as two of them do; several "
            "runs of each recipe, compared as groups, tell the recipe from chance.",
        )
    return (
        f"{fewest} runs of a group are few.",
        "The intervals are of these recipes with other seeds, on this model and these data, and take the scatter over "
        "runs for normal. They say nothing of another architecture, data set or learning rate.",
    )


def _better() -> tuple[str, str]:
    return (
        "Flatter is not better by itself.",
        "Rescaling a ReLU network changes its eigenvalues and not its function (Dinh et al. 2017), and over many "
        "settings sharpness is only weakly tied to test error, at times the wrong way (Andriushchenko et al. 2023). "
        "Test loss and accuracy are in the table; look there for what is better.",
    )


def _sampled(comparison: Comparison, rows: list[Row]) -> list[tuple[str, str]]:
    found = [
        (
            "A bound on the numerical error is no more than that.",
            "It holds on the examples measured. Fewer or other examples have another Hessian: the largest eigenvalue "
            "of a subset is often tens of per cent off that of all the data.",
        )
    ]
    part = sorted(
        {
            (what, int(counted), int(whole))
            for s in comparison.subjects
            for what, r in s.results.items()
            if (counted := r.provenance.get("num_examples")) and (whole := r.provenance.get("split_examples"))
            if counted < whole
        }
    )
    if part:
        told = "; ".join(f"{what} on {counted:,} of {whole:,} examples" for what, counted, whole in part)
        found.append(("Not all the data were used for everything:", f"{told}."))
    if any(s.line is not None or s.surface is not None for s in comparison.subjects):
        found.append(
            (
                "A slice shows one or two of all directions.",
                "In a random direction the curvature is near the mean eigenvalue, not near lambda_max: a slice that "
                "looks round does not contradict a sharp direction that it misses.",
            )
        )
    if any(row.label.startswith("m-sharpness") for row in rows):
        found.append(
            (
                "An ascent finds a lower bound of a maximum.",
                "m-sharpness is as large as these steps found it; a longer ascent may find more, and not equally much "
                "more for every checkpoint.",
            )
        )
    unsure = [f"{row.label} of {s.name}" for row in rows for s, r in zip(comparison.subjects, row.readings, strict=True)
              if r is not None and not r.converged]  # fmt: skip
    if unsure:
        found.append(("Not converged, marked with a question mark:", f"{'; '.join(unsure)}."))
    return found
