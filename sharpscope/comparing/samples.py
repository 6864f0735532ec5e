"""A sample of a problem's examples, in whatever form it has its data."""

from __future__ import annotations

from dataclasses import replace

from sharpscope.examples import count_examples, some_examples
from sharpscope.problem import Problem


def sampled(problem: Problem, examples: int | None, seed: int) -> Problem:
    """``problem`` on ``examples`` of its examples, drawn without replacement, the same from the same seed.

    On all of them where there are no more, or where they cannot be counted.
    """
    count = count_examples(problem.data)
    if examples is None or count is None or examples >= count:
        return problem
    said = {"split_examples": count, **problem.provenance, "examples_seed": seed}
    return replace(problem, data=some_examples(problem.data, examples, seed), provenance=said)
