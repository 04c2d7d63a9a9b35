r"""What counts as the right answer: a table of pairs, and laws that hold for any text."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rethinker.rewards.answers import compare, extract_boxed, undecided
from rethinker.rewards.functions import boxed_reward
from rethinker.samples import Query
from tests.rewards.helpers import answers_match

SAME = [  # predicted, answer
    ("red", "red"),
    ("Red.", "red"),
    ("  yes ", "Yes"),
    ("\\text{red}", "red"),
    ("\\textbf{\\text{red}}", "red"),
    ("**red**", "red"),
    ('"red"', "red"),
    ("red", "\\boxed{red}"),
    ("3:30 PM", "3:30 pm"),
    ("New  York", "new york"),
    # numbers
    ("5", "5.0"),
    ("5.", "5"),
    ("$5$", "5"),
    ("{5}", "5"),
    ("+5", "5"),
    ("- 5", "-5"),
    ("−5", "-5"),
    ("1,234", "1234"),
    ("1{,}234", "1,234"),
    ("1\\,234", "1234"),
    ("1234567.50", "1,234,567.5"),
    ("1/2", "0.5"),
    ("\\frac{1}{2}", "0.5"),
    ("\\dfrac12", "1/2"),
    ("-\\frac{1}{2}", "-0.5"),
    ("1/3", "0.333333"),
    ("1 1/2", "1.5"),
    ("1\\frac{1}{2}", "\\frac{3}{2}"),
    ("1.2\\times 10^{5}", "120000"),
    ("1.2 × 10^5", "120,000"),
    ("2e-3", "0.002"),
    ("10^{5}", "100000"),
    (".5", "0.5"),
    # percent, as the module documents
    ("50%", "50\\%"),
    ("50", "50%"),
    ("0.5", "50%"),
    ("1/2", "50%"),
    ("50 percent", "50%"),
    ("50%", "0.5"),
    # units
    ("5 cm", "5"),
    ("5", "5 cm"),
    ("5cm", "5 \\text{ cm}"),
    ("5 centimeters", "5 cm"),
    ("12 square meters", "12 m^2"),
    ("12 m²", "12\\ \\mathrm{m}^{2}"),
    ("60 km/h", "60 kilometers per hour"),
    ("60^\\circ", "60"),
    ("60 degrees", "60°"),
    ("25 degrees Celsius", "25°C"),
    ("$5", "5 dollars"),
    ("\\$5.00", "5"),
    ("5 million", "5,000,000"),
    ("7 apples", "7 apple"),
    ("7", "7 apples"),
    ("10\\sqrt{2} cm", "10\\sqrt{2}"),
    # assignments
    ("x=5", "5"),
    ("5", "x = 5"),
    ("y = 2x+1", "2x+1"),
    ("\\angle ABC = 60°", "60"),
    ("x \\in [0,1]", "[0, 1]"),
    ("H_2O", "H2O"),
    ("-\\infty", "-infinity"),
    # lists
    ("1, 2", "2, 1"),
    ("1 and 2", "1, 2"),
    ("x=1 or x=2", "1, 2"),
    ("\\{2, 1\\}", "\\{1, 2\\}"),
    ("2, 1", "\\{1, 2\\}"),
    ("(1, 2)", "(1,2)"),
    ("1, 2", "(1, 2)"),
    ("(0.5, \\frac{1}{4})", "(1/2, 0.25)"),
    ("100, 200", "200, 100"),
    ("[0, 1)", "[0,1)"),
    ("3 cm, 4 cm", "3, 4"),
    ("red, blue", "blue, red"),
    ("\\sqrt{8}, 1", "1, 2\\sqrt{2}"),
    # mathematics
    ("\\sqrt{8}", "2\\sqrt{2}"),
    ("sqrt(8)", "2√2"),
    ("(x-1)(x+1)", "x^2-1"),
    ("\\frac{\\sqrt{3}}{3}", "\\frac{1}{\\sqrt{3}}"),
    ("2π", "2\\pi"),
    ("6.283185", "2\\pi"),
    ("\\pm 2", "2, -2"),
    ("x > 3", "3 < x"),
    ("(-\\infty, 3) \\cup (5, \\infty)", "(-\\infty,3)\\cup(5,\\infty)"),
    ("2:3", "2 : 3"),
    ("\\sin^2 x + \\cos^2 x", "1"),
    ("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}"),
]

DIFFERENT = [
    ("red", "blue"),
    ("", "5"),
    ("dark red", "red"),
    ("yes", "no"),
    ("not 5", "5"),
    ("红色", "蓝色"),
    ("5", "6"),
    ("5", "-5"),
    ("1000001", "1000000"),
    ("123456789", "123456788"),
    ("3.14", "3.14159"),
    ("0.33", "1/3"),
    ("0.3333", "1/3"),
    ("0.00000001", "0.00000002"),
    ("1e400000000", "1"),
    ("1,23", "123"),
    ("50%", "50"),
    ("0.5%", "50%"),
    ("5%", "50%"),
    ("5 cm", "5 m"),
    ("5 mW", "5 MW"),
    ("12 m^2", "12 m^3"),
    ("60 km/h", "60 km"),
    ("5m", "5"),
    ("5x", "5"),
    ("5", "5m"),
    ("5", "5 million"),
    ("7 apples", "7 pears"),
    ("$5", "5 euros"),
    ("10\\sqrt{2} cm", "10\\sqrt{2} m"),
    ("5 or 6", "5"),
    ("5, 6", "5"),
    ("y=5", "x=5"),
    ("(2, 1)", "(1, 2)"),
    ("2, 1", "(1, 2)"),
    ("[0, 1]", "[0, 1)"),
    ("[1, 2]", "(1, 2)"),
    ("1, 2, 3", "1, 2"),
    ("1, 1", "1, 2"),
    ("(1, 2)", "\\{1, 2\\}"),
    ("200, 100", "(100, 200)"),
    ("2:3", "2/3"),
    ("\\sqrt{8}", "\\sqrt{2}"),
    ("x^2+1", "x^2-1"),
    ("x", "y"),
    ("god", "dog"),
    ("A" * 5000, "A"),
    ("Beijing", "B"),
    ("Cat", "C"),
    ("AB", "A"),
]


@pytest.mark.parametrize(("predicted", "answer"), SAME)
def test_right(predicted, answer, query):
    """Answers that a person would mark as right."""
    assert answers_match(predicted, answer, query(answer=answer))


@pytest.mark.parametrize(("predicted", "answer"), DIFFERENT)
def test_wrong(predicted, answer, query):
    """Answers that a person would mark as wrong, most of them near a right one."""
    assert not answers_match(predicted, answer, query(answer=answer))


@pytest.mark.parametrize(("predicted", "answer"), SAME + DIFFERENT)
def test_a_quick_verdict_is_the_final_one(predicted, answer):
    """What the trainer decides without mathematics is what the worker would have decided."""
    quick = compare(predicted, answer, equal=undecided)
    assert quick in (None, (predicted, answer) in SAME)


PAGE = Path(__file__).parents[2] / "docs" / "answers.md"
ROWS = [
    [re.findall(r"`([^`]+)`", cell) for cell in line.strip("|").split(" | ")[:3]]
    for line in PAGE.read_text().splitlines()
    if line.startswith("| `")
]


@pytest.mark.parametrize(("expected", "right", "wrong"), ROWS, ids=lambda cell: cell[0])
def test_the_page_about_answers_is_true(expected, right, wrong, query):
    """docs/answers.md: what stands under right is right, and what stands under wrong is wrong."""
    (answer,) = expected
    assert [text for text in right if not answers_match(text, answer, query(answer=answer))] == []
    assert [text for text in wrong if answers_match(text, answer, query(answer=answer))] == []


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("so \\boxed{5}", "5"),
        ("\\boxed{1} no, \\boxed{2}.", "2"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{\\{1,2\\}}", "\\{1,2\\}"),
        ("\\boxed{\\left\\{1\\right.}", "\\left\\{1\\right."),
        ("\\boxed {a}", "a"),
        ("\\boxed{\\boxed{5}}", "5"),
        ("\\boxed{}", ""),
        ("\\boxed{1} and \\boxed{2", None),
        ("\\boxed{1\\}", None),
        ("boxed{5}", None),
        ("5", None),
        ("", None),
    ],
)
def test_extract_boxed(text, content):
    """The last box counts, with its nested braces; one that never closes is no answer."""
    assert extract_boxed(text) == content


def test_an_answer_outside_the_box_scores_0(query):
    """METHOD's fault 4: the right answer without a box is worth nothing, whatever the answer says."""
    for answer in ("5", "\\boxed{5}", "B"):
        assert (
            boxed_reward(f"The answer is {answer.strip('}').removeprefix(chr(92) + 'boxed{')}", answer, query()) == 0.0
        )
        assert boxed_reward(answer if "box" in answer else f"\\boxed{{{answer}}}", answer, query()) == 1.0
    assert boxed_reward("\\boxed{5", "5", query()) == 0.0
    assert boxed_reward("\\boxed{5} or rather \\boxed{6}", "5", query()) == 0.0


braced = st.recursive(
    st.text(st.characters(exclude_characters="{}\\"), max_size=5),
    lambda inner: st.lists(inner.map(lambda s: "{" + s + "}") | inner | st.just("\\{"), max_size=4).map("".join),
)


@given(before=st.text(max_size=20), content=braced, after=st.text(max_size=20))
def test_extract_boxed_gives_back_what_was_boxed(before, content, after):
    """Any content with balanced braces comes back unchanged, whatever surrounds the box."""
    assert extract_boxed(f"{before}\\boxed{{{content}}}{after.replace('boxed', '')}") == content


@given(st.text())
def test_extract_boxed_never_raises(text):
    """Any text has a last box or none."""
    found = extract_boxed("\\boxed{" + text)
    assert found is None or found in text


pieces = st.sampled_from(
    "\\frac{1}{2} \\sqrt{ } { ( ) [ ] \\{ \\} 1 2 0 / . , ; - + = % $ \\$ A B (A) A. cm m^2 ° x \\pm \\boxed{ \\text{ "
    "and or \\left \\right ^ _ & \\\\ : million yes no \\infty 10^ e5 ** ' \" \0 ² ٣ ½".split(" ")
) | st.just(" ")
odd = st.lists(pieces, max_size=12).map("".join) | st.text(max_size=12)


@settings(max_examples=400)
@given(predicted=odd, answer=odd, question=st.sampled_from(["", "Which?\nA. London\nB. Paris", "What percent?"]))
@example(predicted="1/0", answer="\\frac{1}{0}", question="")
@example(predicted="(" * 500, answer="(" * 400, question="")
@example(predicted="1e9999", answer="1e-9999", question="")
def test_comparing_never_raises(predicted, answer, question):
    """Rules 1 to 4 give a verdict for any two texts, and it is the same each time."""
    verdict = compare(predicted, answer, question=question, equal=undecided)
    assert verdict in (True, False, None)
    assert compare(predicted, answer, question=question, equal=undecided) is verdict


@settings(max_examples=60)
@given(predicted=st.lists(pieces, max_size=5).map("".join), answer=st.lists(pieces, max_size=5).map("".join))
def test_checking_never_raises(predicted, answer, boxed_checker):
    """Nor does mathematics, whatever sympy makes of it."""
    query = Query("q", "", answer)
    assert boxed_checker.score([("a", f"\\boxed{{{predicted}}}", query)])["a"] in (0.0, 1.0)


@given(st.text(min_size=1).filter(str.strip))
def test_an_answer_matches_itself(answer):
    """Every answer is equal to itself, unless it is a box, which stands for its content."""
    assert "\\boxed" in answer or answers_match(answer, answer)
