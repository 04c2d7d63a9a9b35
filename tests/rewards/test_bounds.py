"""Law 11: every comparison ends, whatever it is asked to compare: mathematics, traps for patterns, books."""

from __future__ import annotations

import contextlib

import pytest

from rethinker.config import RewardConfig
from rethinker.rewards import answers, choices, mathematics, quantities
from rethinker.rewards.checker import AnswerChecker
from rethinker.samples import Query
from tests.speed import least_cpu_s

HARD = [  # pairs that a solver would not finish
    ("9^{9^{9^{9}}} + \\sqrt{2}", "10^{10^{10}}+1"),
    ("x^{\\sin x} = \\cos(e^x)", "\\ln(x) = \\tan(x^2+1)"),
    ("\\tan(\\tan(\\tan(x)))", "\\sin(\\sin(\\sin(x)))"),
    ("e^{e^{e^{e^{e}}}}", "e^{e^{e^{e^{e+1}}}}"),
    ("((((9!)!)!)!)!", "((((8!)!)!)!)!"),
    ("1/2006!", "1/2004!"),
    ("\\binom{4000}{2000}", "\\binom{4000}{2001}"),
    ("(x+1)^{99999}", "(x+1)^{99998}(x+1)"),
    ("+".join(f"\\sin({i}x)" for i in range(150)), "+".join(f"\\sin({i}x)" for i in range(1, 150))),
    ("x" + "%" * 999, "5"),
    ("5", "A B " * 500),
    ("(" * 400 + "x" + ")" * 400, "x+1"),
    (
        "\\{" + ",".join(f"\\sqrt{{{i}}}x" for i in range(60)) + "\\}",
        "\\{" + ",".join(f"{i}^{{0.5}}x" for i in range(1, 61)) + "\\}",
    ),
]


@pytest.mark.parametrize(("predicted", "answer"), HARD)
def test_hard_mathematics_ends_by_itself(predicted, answer):
    """Law 11: no pair takes 2 s, on a core of its own, whatever it asks to compute."""

    def judge() -> None:
        with contextlib.suppress(mathematics.BudgetError):
            answers.compare(predicted, answer, equal=answers.math_equal)

    assert least_cpu_s(judge, times=2) < 2.0


def test_a_check_that_costs_too_much_is_counted(boxed_checker):
    """Law 11: an answer beyond the budget of operations scores 0 and is counted; identical answers share the check."""
    predicted, answer = HARD[-1]
    query, failed = Query(id="q", question="", answer=answer), boxed_checker.failures.total()
    items = [(f"r{i}", f"\\boxed{{{predicted}}}", query) for i in range(8)] + [("ok", f"\\boxed{{{answer}}}", query)]
    assert boxed_checker.score(items) == {**{f"r{i}": 0.0 for i in range(8)}, "ok": 1.0}
    assert boxed_checker.failures.total() == failed + 8


MANY = ",".join(f"a_{{{{{i}}}}}+b{{0}}" for i in range(64))


def test_string_work_is_bounded(monkeypatch):
    """Law 11: what is compared without a worker, and so without a deadline, ends at once: an answer that is a book, a
    quadratic trap for a pattern, sets within sets, options without text."""
    traps = [
        ("\\boxed{" + "a1" * 450 + "}", Query("q", "", "a1" * 500_000 + "(")),
        ("\\boxed{" + "a1" * 500_000 + "}", Query("q", "", "a1" * 500_000 + "(")),
        ("\\boxed{" + sets("x", 9, 3) + "}", Query("q", "", sets("y", 9, 3))),
        ("\\boxed{" + sets("x", 22, 2) + "}", Query("q", "", sets("y", 22, 2))),
        ("\\boxed{" + "{" * 10_000 + "5" + "}" * 10_000 + "}", Query("q", "", "5")),
        ("\\boxed{" + "{" * 1_000_000, Query("q", "", "5")),
        ("\\boxed{(1}", Query("q", "(A) x (B) y", "(1", metadata={"choices": ["", "(1"]})),
        ("\\boxed{x}", Query("q", "", "x y", metadata={"choices": "{[]: 1}"})),
        ("\\boxed{x}", Query("q", "", "x y", metadata={"choices": "-" * 1_000_000 + "1"})),
        ("\\boxed{x}", Query("q", "A. " * 300_000, "B")),
        (
            "\\boxed{" + MANY.format("") + "}",
            Query("q", "", "B", metadata={"choices": [MANY.format(i) for i in range(8)]}),
        ),
        ("\\boxed{" + "A" * 28 + "1=5}", Query("q", "", "5")),
        ("\\boxed{" + "AB AC " * 160 + "1=5}", Query("q", "", "5")),
        ("\\boxed{" + "1" * 320 + ".5}", Query("q", "", "5")),
        ("\\boxed{" + "\\boxed{1}" * 26 + "x}", Query("q", "", "5")),
        ("\\boxed{5}", Query("q", "", "$\\boxed{3}$, $\\boxed{4}$, $\\boxed{5}$, $\\boxed{6}$, $\\boxed{7}$ cm")),
        ("\\boxed{5}", Query("q", "", "\\boxed{1} \\boxed{2}" + " " * 1000 + "cm")),
    ]
    # What is left to a worker is not asked here.
    monkeypatch.setattr(AnswerChecker, "_run", lambda self, calls, lengths: [[(0.0, "")] for _ in calls])
    with AnswerChecker(RewardConfig(workers=1)) as checker:
        for response, query in traps:

            def judge(items=(("a", response, query),)) -> None:
                for cached in (
                    answers.clean,
                    choices._in_question,
                    quantities.parse_quantity,
                    quantities.canonical_unit,
                ):
                    cached.cache_clear()
                checker.score(items)

            assert least_cpu_s(judge, times=2) < 1.0, response[:60]


def sets(item: str, width: int, depth: int) -> str:
    return item if depth == 0 else "\\{" + ",".join([sets(item, width, depth - 1)] * width) + "\\}"
