"""What counts as right in its context: the options, and what the question asks for."""

from __future__ import annotations

import pytest

from tests.rewards.helpers import answers_match

IN_LINES = "What is the capital of France?\nA. London\nB. Paris\nC. Rome\nAnswer with the letter."
IN_BRACKETS = "What is the capital of France? (A) London (B) Paris (C) Rome"
IN_LATEX = "What is it? $\\textbf{(A)}\\ London \\qquad\\textbf{(B)}\\ Paris \\qquad\\textbf{(C)}\\ Rome$"
IN_ONE_LINE = "What is the capital of France? Options: A. London B. Paris C. Rome"
LETTERS_RIGHT = ["B", "b", "(B)", "B.", "B)", "[B]", "Option B", "answer: B", "\\text{B}", "\\textbf{(B)}", "$B$"]
TEXTS_RIGHT = ["Paris", "paris.", "B. Paris", "(B) Paris", "B: Paris", "B) Paris", "\\text{Paris}", "B. \\text{Paris}"]
CHOICES_WRONG = [
    "A",
    "D",
    "Beijing",
    "Be",
    "Pari",
    "London",
    "B. London",
    "A. Paris",
    "BC",
    "B, C",
    "B or C",
    "AB",
    "",
    "2",
]


@pytest.mark.parametrize("question", [IN_LINES, IN_BRACKETS, IN_ONE_LINE, IN_LATEX])
@pytest.mark.parametrize("answer", ["B", "(B)", "Paris", "B. Paris", "\\boxed{B}"])
def test_choices(question, answer, query):
    """A choice is its letter, its text, or both, compared whole: Beijing is not B."""
    asked = query(question, answer)
    assert [p for p in LETTERS_RIGHT + TEXTS_RIGHT if not answers_match(p, answer, asked)] == []
    assert [p for p in CHOICES_WRONG if answers_match(p, answer, asked)] == []


@pytest.mark.parametrize(
    "choices",
    [
        ["London", "Paris", "Rome"],
        ["A. London", "B. Paris", "C. Rome"],
        {"A": "London", "B": "Paris"},
        "['London', 'Paris']",
    ],
)
def test_choices_given_apart_from_the_question(choices, query):
    """Options may come as metadata: a list, a mapping, or text of either."""
    asked = query("What is the capital of France?", "B", choices=choices)
    assert all(answers_match(p, "B", asked) for p in ("B", "Paris", "B. Paris"))
    assert not any(answers_match(p, "B", asked) for p in ("A", "London", "Beijing", "B. London"))


def test_choices_whose_options_are_in_the_image(query):
    """Without known options only the letter counts, alone or in front of a text."""
    asked = query("Which figure comes next?", "B")
    assert all(answers_match(p, "B", asked) for p in ("B", "(B)", "B. the circle", "option B"))
    assert not any(answers_match(p, "B", asked) for p in ("Beijing", "A", "C. B", "big", "the circle"))


def test_choices_that_are_numbers(query):
    """An option's value may be written otherwise, even if that takes mathematics; another option's value is wrong."""
    asked = query("Which one?\n(A) $\\frac{1}{2}$\n(B) $\\sqrt{4}$\n(C) 5 cm\n(D) 1:2", "A")
    right = {"A": ["0.5", "A. 1/2"], "B": ["2", "\\sqrt{4}"], "C": ["5", "5 cm"], "D": ["1:2"]}
    for letter, texts in right.items():
        for text in texts:
            assert [x for x in "ABCD" if answers_match(text, x, asked)] == [letter], text


def test_several_letters(query):
    """A multiple-select answer is a set of letters."""
    asked = query("Which are prime?\nA. 2\nB. 4\nC. 5", "A, C")
    assert all(answers_match(p, "A, C", asked) for p in ("AC", "C, A", "A and C", "(A, C)", "A,C"))
    assert not any(answers_match(p, "A, C", asked) for p in ("A", "C", "ABC", "AB"))


def test_percent_without_a_sign_needs_a_question_about_percent(query):
    """An answer of 50 accepts 50% if the question asks for a percentage, and only then."""
    assert answers_match("50%", "50", query("What percentage of the cars is red?"))
    assert not answers_match("50%", "50", query("How many cars are red?"))
    assert not answers_match("50%", "0.5", query("What percentage of the cars is red?"))


def test_a_counted_noun_may_be_repeated_from_the_question(query):
    """7 apples is 7 if the question counts apples."""
    assert answers_match("7 apples", "7", query("How many apples are there?"))
    assert not answers_match("7 pears", "7", query("How many apples are there?"))


def test_a_list_is_ordered_when_the_question_asks_for_order(query):
    """Bare lists are sets unless the question asks to rank, sort or order."""
    assert not answers_match("2, 1", "1, 2", query("List the numbers in increasing order."))
    assert answers_match("1, 2", "1, 2", query("List the numbers in increasing order."))


LETTERS = ["A", "B", "C", "D", "E"]
WRONG_IN_CONTEXT = [  # predicted, answer, question, choices
    # of several boxes one, and what stands beside a box
    *[
        ("2", answer, "", None)
        for answer in (
            "\\boxed{1}\\text{ and }\\boxed{2}",
            "\\boxed{1}\\quad\\boxed{2}",
            "\\boxed{1} \\\\ \\boxed{2}",
            "\\boxed{1}/\\boxed{2}",
            "\\boxed{1}或\\boxed{2}",
            "x=\\boxed{1}, y=\\boxed{2}",
            "The values are \\boxed{1} and \\boxed{2}.",
            "(1) \\boxed{1} (2) \\boxed{2}",
        )
    ],
    ("-\\boxed{5}", "5", "", None),
    ("1/\\boxed{5}", "5", "", None),
    # equations that hold never, or always
    ("x+1=x", "x+3=x", "", None),
    ("y-y=3", "x-x=5", "", None),
    ("\\sin^2x+\\cos^2x=2", "x+1=x", "", None),
    # only the right side
    ("x(x+1)=6", "6", "", None),
    ("n(n+1)=6", "6", "", None),
    ("a(b+c)=3", "3", "", None),
    ("x(40)=120", "120", "", None),
    ("x/y=2", "2", "", None),
    ("b:a=3:4", "3:4", "Find the ratio a:b", None),
    ("\\frac{BC}{AB}=3", "3", "Find \\frac{AB}{BC}", None),
    ("\\cos A = 1/2", "1/2", "Find sin A", None),
    ("x+5=10", "10", "If x+5=15, what is x?", None),
    ("3x+5=60", "60", "The angles are 3x+5 and 2x. Solve for x", None),
    ("x^2=16", "16", "x^2=256. Find positive x", None),
    ("a+b=5", "5", "What is a+b+c?", None),
    ("a+b=5", "5", "What is 2(a+b)?", None),
    ("diameter=5", "5", "What is the radius?", None),
    ("x=5", "5", "What is y?", None),
    # values in the order of other names
    ("1,2", "a=2,b=1", "", None),
    ("y=5,x=3", "(5,3)", "", None),
    ("(y,x)=(5,3)", "(5,3)", "", None),
    ("60,30", "∠A = 30°, ∠B = 60°", "", None),
    # orders
    ("3,1,2", "2,3,1", "Arrange the steps in the correct order", None),
    ("B,A", "A,B", "In which order do they finish?", None),
    ("2,1", "1,2", "Find the values of a and b, respectively", None),
    ("2,1", "1,2", "从小到大写出", None),
    ("B A C", "A B C", "", None),
    # several options
    ("(C) or (D)", "C", "", LETTERS),
    ("C. D", "C", "", LETTERS),
    ("(C)49, (D)50", "C", "", LETTERS),
    ("A: no, B", "A", "", LETTERS),
    ("(A) is wrong, (B) is right", "A", "", LETTERS),
    ("A: 5 or B: 6", "A", "", None),
    ("A", "(A) 5 (B) 6", "", None),
    ("(C) \\frac{3}{4}", "C", "Which one?\nA、\\frac{3}{4}\nB、\\frac{1}{2}\nC、\\frac{1}{3}", None),
    ("34 cm", "B", "", ["13m", "34m"]),
    ("2", "B", "", ["1a", "2a"]),
    ("h", "H", "Which height?", None),
    ("c", "C", "Find the constant C", None),
    # what only looks like a unit or a counted thing
    ("v_0", "v_0 s", "", None),
    ("2^{n}", "2^{n} L", "", None),
    ("\\frac{a}{b}", "\\frac{a}{b} m", "", None),
    ("5", "5 dozen", "", None),
    ("5", "5 factorial", "", None),
    ("5", "5万", "", None),
    # words of the question that ask for nothing
    ("0.7", "\\frac{2}{3}", "The round table seats 6; find the exact probability.", None),
    ("5%", "5", "The shop gives a 20% discount; how many dollars does he save?", None),
    ("11", "11_5", "the base of the triangle", None),
    ("[1,2]", "(1,2)", "At which points is f increasing? Give the interval.", None),
    ("0:1:2", "0:3:4", "What is the ratio?", None),
    # branches
    ("|x-5|", "5-x", "", None),
    ("|x+100|", "x+100", "", None),
    ("\\sqrt{(x+10)^2}", "x+10", "", None),
    ("2+-3", "-1,5", "", None),
    ("0 500", "500", "", None),
    ("x2", "x_2", "", None),
    ("NaCL", "NaCl", "", None),
    ("IR^2", "RI^2", "", None),
    # another name than the one asked for
    ("\\angle B=60°", "60°", "Find \\angle A", None),
    ("BC=5", "5", "Find AB", None),
    ("f(3)=5", "5", "Find f(2)", None),
    ("x_1=5", "5", "Find x_2", None),
    ("radius=5", "5", "Find the diameter of the circle, whose radius is in the figure.", None),
    ("x+5=4", "4", "Find \\sqrt{x+5}", None),
    ("2x=60", "60", "Find x when the angles are 2x and 3x", None),
    ("length=3,width=5", "3,5", "Find the width and length.", None),
    # statements, names and formulas of chemistry
    ("2", "(1)(2)", "", None),
    ("6", "(2)(3)", "", None),
    ("nacl", "NaCl", "", None),
    ("AABb", "AaBb", "", None),
    # what a spelling must not change
    ("\\frac{b}{a}", "\\frac1{ab}", "", None),
    ("x^{2/3}", "x^2\\over 3", "", None),
    ("123", "1\\;2\\;3", "", None),
    ("p", "\\sim p", "", None),
    ("上下", "上下左右", "", None),
    ("b\\sqrt{a}", "√ab", "", None),
    ("A_1", "a_1", "", None),
    ("12345678901234567.0", "12345678901234600", "", None),
    # nouns that change the number
    ("5", "5 millions", "", None),
    ("3", "3 twelfths", "", None),
    ("5", "5 hours thirty minutes", "", None),
    ("5 men", "5", "How many women are there?", None),
    ("2\\sqrt{3}", "2\\sqrt{3} s^2", "", None),
    # hedged letters
    ("A 5 B 6", "A", "", LETTERS),
    ("A. No, it is B", "A", "", LETTERS),
    ("(A) is not the answer", "A", "", LETTERS),
    ("A \\cup B", "A", "", LETTERS),
    ("0.7", "\\frac{2}{3}", "Find the distance from P to its nearest neighbour.", None),
    ("x=5=7", "x=7", "", None),
    ("b", "a=b", "", None),
    ("y \\in (1,2)", "x \\in (1,2)", "", None),
    ("5-x=3", "|x-5|=3", "", None),
    ("|x-20000|", "20000-x", "", None),
    ("500", "5 hundred thousand", "", None),
    ("1 .5", "1.5", "", None),
    ("x=2x+3", "2x+3", "", None),
    ("\\sqrt23", "\\sqrt{23}", "", None),
    ("\\pm1\\pm2", "3,-3", "", None),
    ("p", "~p", "", None),
    ("\\frac{1}{2}", "\\frac{1}{2} mg", "", None),
]
RIGHT_IN_CONTEXT = [
    ("1,2", "The values are \\boxed{1} and \\boxed{2}.", "", None),
    ("x=1,y=2", "x=\\boxed{1}, y=\\boxed{2}", "", None),
    ("0.3333333333333333", "1/3", "", None),
    ("1.4142135623730951", "\\sqrt{2}", "", None),
    ("33.333333333333336\\%", "1/3", "", None),
    ("60%", "0.6", "After a 20% increase, what is the probability?", None),
    ("\\sqrt{28}\\approx 5.3", "5.3", "", None),
    ("y=3,x=5", "(5,3)", "", None),
    ("(x,y)=(5,3)", "x=5,y=3", "", None),
    ("x+5=10", "10", "Find the value of $x + 5$.", None),
    ("2a=5", "5", "What is 2a?", None),
    ("\\sin A = 3/5", "3/5", "Find sin A", None),
    ("a:b=3:4", "3:4", "Find the ratio a:b", None),
    ("3,4", "(1) 3; (2) 4", "", None),
    ("101_2", "101", "Write it in base 2.", None),
    ("101_{(2)}", "101_2", "", None),
    ("2\\pi\\text{m}", "2\\pi", "", None),
    ("\\begin{cases}x=1\\\\y=2\\end{cases}", "x=1,y=2", "", None),
    ("{1\\over2}", "0.5", "", None),
    ("60^{\\text{o}}", "60", "", None),
    ("5", "B", "", ["A．4", "B．5"]),
    ("5", "B", "", ["A、4", "B、5"]),
    ("5", "B", "Which?\n(a) 4 (b) 5 (c) 6", None),
    ("5", "B", "Which? A．4B．5C．6D．7", None),
    ("故选B", "B", "", ["4", "5"]),
    ("B is correct", "B", "", ["4", "5"]),
    ("B (6,2,1)", "B", "", ["(6,1,1)", "(6,2,1)"]),
    ("C 49", "C", "", LETTERS),
    ("(A)(B)", "AB", "", ["x", "y", "z"]),
    # powers, which are huge far from 0
    ("e^(2x)", "e^{2x}", "", None),
    ("ar^{n-1}", "a r^{n-1}", "", None),
    ("3^{2n}", "9^n", "", None),
    ("(x-1)e^x+C", "xe^x-e^x+C", "", None),
    ("2^n n!", "n!\\cdot2^n", "", None),
    # names
    ("x=5", "5", "What is a possible value of x?", None),
    ("r=5", "5", "A circle has area 25π. Find a radius.", None),
    ("x=3,y=4", "(3,4)", "Find x and y.", None),
    ("n=4,m=3", "(4,3)", "Find (n,m)", None),
    ("\\angle ABC=50°", "50", "What is the measure of angle B?", None),
    ("\\pi\\over 2", "\\frac{\\pi}{2}", "", None),
    ("\\frac{1}{ab}", "\\frac1{ab}", "", None),
    ("5.196\\approx 5.2", "5.2", "", None),
    ("AD", "D", "", ["AB", "CD", "AC", "AD"]),
    ("9.8 m s^{-2}", "9.8 m/s^2", "", None),
    ("10\\,\\Omega", "10 Ω", "", None),
    ("25^{\\circ}\\text{C}", "25 °C", "", None),
    ("x > -1 and x <= 2", "-1<x\\leq 2", "", None),
    ("a bar chart", "bar chart", "", None),
    ("(1), (2)", "(1)(2)", "", None),
    ("B", "B. the circle", "Which figure?", None),
]


@pytest.mark.parametrize(("predicted", "answer", "question", "choices"), RIGHT_IN_CONTEXT)
def test_right_in_its_context(predicted, answer, question, choices, query):
    """What a person would accept, the question and the options being what they are."""
    assert answers_match(predicted, answer, query(question, answer, choices=choices))


@pytest.mark.parametrize(("predicted", "answer", "question", "choices"), WRONG_IN_CONTEXT)
def test_wrong_in_its_context(predicted, answer, question, choices, query):
    """What looks like the answer, or was it under another question."""
    assert not answers_match(predicted, answer, query(question, answer, choices=choices))
