"""Published metrics: right answers and wrong neighbours of each, and laws that hold for any text."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rethinker.rewards.functions import boxed_reward
from rethinker.rewards.published import LONGEST, METRICS
from rethinker.samples import Query
from tests.speed import least_cpu_s

RIGHT = [  # metric, box, answer
    ("exact_str_match", "Up", "Up"),
    ("exact_str_match", " \\text{Up} ", "Up"),
    ("exact_str_match", "\\textbf{\\text{Up}}", "Up"),
    ("exact_str_match", '"Up"', "Up"),
    ("exact_str_match", "50\\%", "50%"),
    ("exact_str_match", "B", "B"),
    ("exact_str_match", "(B)", "B"),
    ("exact_str_match", "B. Paris", "B"),
    ("exact_str_match", "Banana", "B"),  # as published
    ("exact_str_match_case_insensitive", "up", "Up"),
    ("exact_str_match_case_insensitive", "b.", "B"),
    ("simple_str_match", "new york city", "New York-City."),
    ("simple_str_match", "e4e5", "e4 - e5"),
    ("simple_str_match", "12.5", "1 25"),  # as published: periods do not count
    ("general_single_numerical_match", "101", "100"),
    ("general_single_numerical_match", "99", "100"),
    ("general_single_numerical_match", "-99.5", "-100"),
    ("general_single_numerical_match", "0", "0.0"),
    ("general_single_numerical_match", "1,000", "1000"),
    ("general_single_numerical_match", "1{,}000", "1000"),
    ("general_single_numerical_match", "50\\%", "0.5"),
    ("general_single_numerical_match", "0.5", "50%"),
    ("general_single_numerical_match", "\\$5", "5"),
    ("general_single_numerical_match", "30^\\circ", "30"),
    ("general_single_numerical_match", "20°C", "20"),
    ("general_single_numerical_match", "x = 5", "5"),
    ("general_single_numerical_match", "\\approx 5.01", "5"),
    ("general_single_numerical_match", "\\frac{5}{3}", "1.667"),
    ("general_single_numerical_match", "\\dfrac{5}{3}", "5/3"),
    ("general_single_numerical_match", "\\frac12", "0.5"),
    ("general_single_numerical_match", "2\\sqrt{3}", "2 \\sqrt{3}"),  # a text
    ("general_single_numerical_match", "2\\pi", "6.28"),
    ("general_single_numerical_match", "2π", "6.2832"),
    ("general_single_numerical_match", "1.2 \\times 10^{5}", "120000"),
    ("general_single_numerical_match", "-(2 + 3) * 4", "-20"),
    ("general_single_numerical_match", "2^2^3", "64"),
    ("general_single_numerical_match", "-2^2", "-4"),
    ("general_single_numerical_match", "5 M", "5m"),  # no numbers: texts
    ("boxed_single_numerical_match", "\\frac{1}{2}", "\\boxed{0.5}"),
    ("mathvista_integer", "5", "5"),
    ("mathvista_integer", "5.9", "5"),  # as published: cut, not rounded
    ("mathvista_integer", "-5.9", "-5"),
    ("mathvista_integer", "5 \\text{ apples}", "5"),
    ("mathvista_integer", "1,200", "1200"),
    ("mathvista_float_1", "1.2", "1.2"),
    ("mathvista_float_1", "1.24 cm", "1.2"),
    ("mathvista_float_1", "x = 1.16", "1.2"),
    ("mathvista_float_2", "0.6", "0.60"),
    ("mathvista_float_2", "\\frac{1}{3}", "0.33"),
    ("two_decimals", "0.333", "\\frac{1}{3}"),
    ("two_decimals", "3.46", "2\\sqrt{3}"),
    ("two_decimals", "\\sqrt[3]{8}", "2"),
    ("two_decimals", "6.28", "2\\pi"),
    ("two_decimals", "2π + 1", "7.28"),
    ("two_decimals", "0.004", "0"),  # as published
    ("mmmu_open", "3.43", "3.429"),
    ("mmmu_open", "1,000.001", "1000"),
    ("mmmu_open", "V = 3.43 \\text{ m/s}", "3.429"),
    ("mmmu_open", "about 3.4291 m", "3.43"),
    ("mmmu_open", "2.5e3", "2500"),
    ("mmmu_open", "The Transformer", "transformer"),
    ("mmmu_open", "it is a transformer", "Transformer"),
    ("mmmu_open", "unknown", "no"),  # as published: a part of it
    ("mmmu_open", "the result is 5 =", "5"),  # nothing follows the sign
    ("mmmu_open", "x", "X"),
    ("mmmu_open", "vitamin x", "X"),
]
WRONG = [
    ("exact_str_match", "up", "Up"),
    ("exact_str_match", "Up.", "Up"),
    ("exact_str_match", "Upp", "Up"),
    ("exact_str_match", "C. B", "B"),
    ("exact_str_match", "b", "B"),
    ("exact_str_match", "B", "BB"),
    ("exact_str_match", "1.0", "1"),
    ("exact_str_match_case_insensitive", "u p", "Up"),
    ("exact_str_match_case_insensitive", "c", "B"),
    ("simple_str_match", "new york", "New York-City"),
    ("simple_str_match", "e4, e5", "e4 e5"),
    ("simple_str_match", "", "-"),
    ("general_single_numerical_match", "101.1", "100"),
    ("general_single_numerical_match", "98.9", "100"),
    ("general_single_numerical_match", "99", "-100"),
    ("general_single_numerical_match", "0.001", "0"),
    ("general_single_numerical_match", "50", "50%"),
    ("general_single_numerical_match", "50%", "50"),
    ("general_single_numerical_match", "5 m", "5"),  # as published: only $, ¥ and degrees are left out
    ("general_single_numerical_match", "5 or 6", "5"),
    ("general_single_numerical_match", "x = 6", "5"),
    ("general_single_numerical_match", "\\frac{5}{4}", "1.667"),
    ("general_single_numerical_match", "2\\sqrt{3}", "3.4641"),  # as published: no root is worked out
    ("general_single_numerical_match", "(5", "5"),
    ("general_single_numerical_match", "1/0", "5"),
    ("general_single_numerical_match", "(-8)^{1/3}", "-2"),  # a complex root
    ("general_single_numerical_match", "10^{400}", "5"),
    ("boxed_single_numerical_match", "0.6", "\\boxed{0.5}"),
    ("mathvista_integer", "6", "5"),
    ("mathvista_integer", "4.9", "5"),
    ("mathvista_integer", "five", "5"),
    ("mathvista_integer", "5", "five"),
    ("mathvista_float_1", "1.26", "1.2"),
    ("mathvista_float_1", "1.14", "1.2"),
    ("mathvista_float_2", "1.24", "1.2"),
    ("mathvista_float_1", "1e400", "1.2"),
    ("two_decimals", "0.34", "\\frac{1}{3}"),
    ("two_decimals", "3.47", "2\\sqrt{3}"),
    ("two_decimals", "6.29", "2\\pi"),
    ("two_decimals", "-0.5", "0.5"),
    ("two_decimals", "0.006", "0"),
    ("mmmu_open", "3.42", "3.429"),
    ("mmmu_open", "\\frac{24}{7}", "3.43"),  # as published: no fraction is worked out
    ("mmmu_open", "3.43 = 5", "3.429"),  # what follows the sign counts
    ("mmmu_open", "5m", "5"),  # as published: whole numbers stand alone
    ("mmmu_open", "answer 5 =", "4"),
    ("mmmu_open", "inductor", "transformer"),
    ("mmmu_open", "max", "X"),
    ("mmmu_open", "nan", "5"),
]


@pytest.mark.parametrize(("metric", "box", "answer"), RIGHT)
def test_right(metric, box, answer):
    """What the published scorer takes for the answer is right, by the reward too."""
    assert METRICS[metric](box, answer) is True
    query = Query("q", "?", answer, metadata={"published_metric": metric})
    assert boxed_reward(f"\\boxed{{{box}}}", answer, query) == 1.0


@pytest.mark.parametrize(("metric", "box", "answer"), WRONG)
def test_wrong(metric, box, answer):
    """Its neighbours are wrong, by the reward too."""
    assert METRICS[metric](box, answer) is False
    query = Query("q", "?", answer, metadata={"published_metric": metric})
    assert boxed_reward(f"\\boxed{{{box}}}", answer, query) == 0.0


@pytest.mark.parametrize(
    ("box", "answer", "reward"), [("x + 1", "1 + x", 1.0), ("5 cm", "5", 1.0), ("x", "2x", 0.0), ("\\sin{0}", "0", 1.0)]
)
def test_what_two_decimals_leaves_open(box, answer, reward, boxed_checker):
    """Where a side is no number the boxed check decides, in a worker too."""
    query = Query("q", "?", answer, metadata={"published_metric": "two_decimals"})
    assert METRICS["two_decimals"](box, answer) is None
    assert boxed_reward(f"\\boxed{{{box}}}", answer, query) == reward
    assert boxed_checker.score([("x", f"\\boxed{{{box}}}", query)]) == {"x": reward}


@pytest.mark.parametrize("name", [None, "no_such_metric", ["exact_str_match"], 3])
def test_other_metadata_changes_nothing(name, boxed_checker):
    """A name that is no metric, or no name at all, leaves the boxed check as it is."""
    query = Query("q", "?", "0.5", metadata={"published_metric": name})
    assert boxed_reward("\\boxed{1/2}", "0.5", query) == 1.0
    assert boxed_checker.score([("x", "\\boxed{1/2}", query)]) == {"x": 1.0}


def test_the_checker_asks_the_metric(boxed_checker):
    """Without a worker, and before the rules of the boxed check: those would take 1/2 for 0.5 and not 0.502."""
    query = Query("q", "?", "0.5", metadata={"published_metric": "exact_str_match"})
    near = Query("q", "?", "0.5", metadata={"published_metric": "general_single_numerical_match"})
    asked = [("a", "\\boxed{1/2}", query), ("b", "\\boxed{0.502}", near), ("c", "0.5", near)]
    assert boxed_checker.score(asked) == {"a": 0.0, "b": 1.0, "c": 0.0}


PIECES = (
    "1 20 3.5 .5 1,000 e5 + - * / ^ ( ) [ ] { } % $ ° = is nan inf \\frac \\sqrt \\pi \\times \\text \\boxed{".split()
)
TEXTS = st.one_of(st.text(max_size=60), st.lists(st.sampled_from(PIECES), max_size=30).map("".join))


@settings(max_examples=300, deadline=None)
@given(predicted=TEXTS, answer=TEXTS)
def test_no_text_raises(predicted, answer):
    """Every metric says true or false of any two texts (one of them may leave it open), and an empty box is wrong."""
    for name, metric in METRICS.items():
        assert metric(predicted, answer) in ((True, False, None) if name == "two_decimals" else (True, False))
        assert metric("  ", answer) is False


LONG_PIECES = ["=\n", "is \n", *"9^ 1, {a \\text{} 9 .9 -1e \\boxed{} \\, 1/ 2( a~ \\\\".split()]


@pytest.mark.parametrize("piece", PIECES + LONG_PIECES)
def test_no_text_takes_long(piece):
    """A text of the longest that is looked into, of whatever it is made, takes a metric less than 0.1 s."""
    calls = itertools.count()

    def judge(metric):
        long = (piece * LONGEST)[: LONGEST - 4] + f"{next(calls):04}"  # new, so in no cache
        for pair in (long, long[::-1]), (long[::-1], "5"), (long[:100], "5"), ("5", long):
            metric(*pair)

    for name, metric in METRICS.items():
        assert least_cpu_s(lambda metric=metric: judge(metric), times=3) < 0.1, name


def test_longer_texts_are_compared_to_the_letter():
    """Beyond that only the very text is right."""
    long = "A " * LONGEST
    for metric in METRICS.values():
        assert metric(long, f" {long}") is True and metric(long.lower(), long) is False
