r"""A right answer, changed in one place, is wrong: classes of answers with generated neighbours of both kinds.

Every class makes an expected answer, other ways to write it, and answers that differ from it by what graders of this
kind have overlooked: a letter taken for a unit, the case of a symbol, a bracket, a base, an order, a last digit.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction

import pytest

from rethinker.rewards.answers import compare, math_equal
from tests.rewards.random_formulas import mutants, tree, worth, written

CASES_OF_A_CLASS = 120


@dataclass
class Case:
    """An expected answer, other right ones, and wrong ones."""

    answer: str
    right: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    question: str = ""
    choices: list[str] | None = None


Maker = Callable[[random.Random], Case]
CLASSES: dict[str, Maker] = {}


def of_class(make: Maker) -> Maker:
    CLASSES[make.__name__] = make
    return make


def verdict(case: Case, predicted: str) -> bool:
    return bool(compare(predicted, case.answer, question=case.question, choices=case.choices, equal=math_equal))


@of_class
def letters_after_digits(draw: random.Random) -> Case:
    """1+2t is no 3: the letter is a variable, not tons."""
    a, b, letter = draw.randint(1, 9), draw.randint(2, 9), draw.choice("tmgshlLNJWVAKnkab")
    other = draw.choice([c for c in "xyz" if c != letter])
    right = [
        f"{b}{letter}+{a}",
        f"{a}+{b}\\cdot {letter}",
        f"{a} + {b} {letter}",
        f"\\frac{{{2 * a}+{2 * b}{letter}}}{{2}}",
    ]
    wrong = [
        f"{a}+{b}",
        str(a + b),
        str(a),
        f"{b}{letter}",
        f"{a}-{b}{letter}",
        f"{a}+{b}{other}",
        f"{b}+{a + b}{letter}",
    ]
    return Case(f"{a}+{b}{letter}", right, wrong)


@of_class
def products_of_letters(draw: random.Random) -> Case:
    """3ab and 3mg are products, not 3 of something."""
    n, letters = draw.randint(2, 9), draw.choice(["ab", "mg", "ml", "ms", "xy", "mn", "kx", "rt", "st"])
    swapped = letters[::-1]
    right = [f"{n}{swapped}", f"{n} \\cdot {letters[0]} \\cdot {letters[1]}", f"{letters[0]} \\times {n}{letters[1]}"]
    wrong = [str(n), f"{n}{letters[0]}", f"{n + 1}{letters}", f"{n}{letters.upper()}", f"-{n}{letters}"]
    return Case(f"{n}{letters}", right, wrong)


@of_class
def functions_of_letters(draw: random.Random) -> Case:
    """sin 2t is no sin 2."""
    name, n, letter = draw.choice(["sin", "cos", "tan", "ln"]), draw.randint(2, 9), draw.choice("txm")
    right = [f"\\{name}({n}{letter})", f"{name}({n}{letter})", f"\\{name}\\left({letter}\\cdot {n}\\right)"]
    wrong = [f"\\{name} {n}", f"\\{name}({letter})", f"{n}\\{name} {letter}", f"\\{name} {n + 1}{letter}"]
    return Case(f"\\{name} {n}{letter}", right, wrong)


@of_class
def case_of_symbols(draw: random.Random) -> Case:
    """R is the outer radius and r the inner."""
    big = draw.choice("RMVNTSHABX")
    small, n = big.lower(), draw.randint(2, 9)
    answer, right = draw.choice(
        [
            (f"\\frac{{{big}}}{{{small}}}", [f"{big}/{small}", f"{big} \\div {small}"]),
            (f"{n}{big}+{small}", [f"{small}+{n}{big}", f"{small} + {big} \\cdot {n}"]),
            (f"\\pi({big}^2-{small}^2)", [f"\\pi {big}^2-\\pi {small}^2", f"({big}-{small})({big}+{small})\\pi"]),
            (f"{big}^{n}{small}", [f"{small}\\cdot {big}^{{{n}}}"]),
        ]
    )
    wrong = [answer.replace(big, "#").replace(small, big).replace("#", small).replace("\\" + big, "\\" + small)]
    wrong = [text for text in wrong if "\\" + big not in text] + [answer.replace(big, small), "0"]
    return Case(answer, right, [text for text in wrong if text != answer])


@of_class
def greek_case(draw: random.Random) -> Case:
    name = draw.choice(["omega", "delta", "sigma", "theta", "phi", "gamma"])
    n = draw.randint(2, 9)
    return Case(f"{n}\\{name}", [f"\\{name} \\cdot {n}"], [f"{n}\\{name.capitalize()}", str(n), f"\\{name}"])


@of_class
def one_letter(draw: random.Random) -> Case:
    letter = draw.choice("rmvnstkxyz")
    return Case(letter, [f"${letter}$", f"\\mathit{{{letter}}}"], [letter.upper(), chr(ord(letter) - 1), f"2{letter}"])


@of_class
def words(draw: random.Random) -> Case:
    """The case of words does not count."""
    first, second = draw.sample(["red", "blue", "north", "circle", "parallel", "increasing", "yes", "square"], 2)
    right = [first.upper(), first.capitalize(), f"\\text{{{first}}}", f"{first}.", f"**{first}**"]
    return Case(first, right, [second, f"not {first}", first[:-1], f"{first} {second}", first[::-1]])


@of_class
def side_by_side(draw: random.Random) -> Case:
    """Two numbers are no sum, no product and no longer number."""
    a, b = draw.randint(2, 9), draw.randint(10, 99)
    answer = draw.choice([a + b, a * b, int(f"{a}{b}")])
    return Case(
        str(answer),
        [f"{answer}.0", f"+{answer}"],
        [f"{a} {b}", f"({a}) {b}", f"{a}; {b}", f"{a}\\ {b}", f"{a}\\quad {b}"],
    )


@of_class
def numbered_parts(draw: random.Random) -> Case:
    n, value = draw.randint(1, 4), draw.randint(5, 99)
    unit = draw.choice(["cm", "kg", "m^2"])
    return Case(
        f"{value + n} {unit}", [f"{value + n}"], [f"({n}) {value} {unit}", f"{n} {value} {unit}", f"{value} {unit}"]
    )


@of_class
def brackets_multiply(draw: random.Random) -> Case:
    a, b = draw.randint(2, 9), draw.randint(2, 9)
    right = [f"{a}({b})", f"{a} \\cdot {b}", f"{a}\\times {b}"]
    return Case(str(a * b), right, [f"{a}({b + 1})", f"{a}+{b}" if a + b != a * b else f"{a}-{b}", f"({a}){b}"])


@of_class
def thousands(draw: random.Random) -> Case:
    n = draw.randint(10_000, 9_999_999)
    grouped = f"{n:,}"
    right = [grouped, *(grouped.replace(",", mark) for mark in (" ", "{,}", "\\,", ",\\!", ",\\! ", "\\ "))]
    return Case(
        str(n), right, [str(n + 1), str(n - 1), str(n * 10), grouped.replace(",", "."), grouped.replace(",", ";")]
    )


@of_class
def bases(draw: random.Random) -> Case:
    digits, base = f"1{draw.randint(0, 1)}{draw.randint(0, 1)}{draw.randint(0, 1)}", draw.choice([2, 3, 5, 8])
    wrong = [
        f"{digits}_{base + 1}",
        f"{digits}_{{{base + 7}}}",
        f"{digits}{base}",
        f"1{digits}_{base}",
        f"{digits}_{{10}}",
    ]
    return Case(
        f"{digits}_{base}", [f"{digits}_{{{base}}}", f"({digits})_{base}", f"{digits}_{{\\text{{{base}}}}}"], wrong
    )


@of_class
def equations(draw: random.Random) -> Case:
    """An equation is another one times a constant; one without a variable is only itself."""
    a, b, c = draw.randint(2, 9), draw.randint(2, 9), draw.randint(1, 30)
    k = draw.randint(2, 5)
    right = [
        f"{k * a}x+{k * b}y={k * c}",
        f"{c}={a}x+{b}y",
        f"{a}x={c}-{b}y",
        f"{a}x+{b}y-{c}=0",
        f"x=\\frac{{{c}-{b}y}}{{{a}}}",
    ]
    wrong = [
        "1=2",
        "x=x",
        "0=0",
        str(c),
        f"{a}x+{b}y={c + 1}",
        f"{a}x-{b}y={c}",
        f"{a}a+{b}b={c}",
        f"{a}x+{b}y",
        f"x={c}",
    ]
    wrong += [f"{a + 1}x+{b}y={c}", f"y={c}", f"{a}x+{b}y<{c}", f"{a}x+{b}y\\neq {c}", f"{a}X+{b}Y={c}"]
    return Case(f"{a}x+{b}y={c}", right, wrong)


@of_class
def quadratic_equations(draw: random.Random) -> Case:
    a, b = draw.randint(2, 20), draw.randint(21, 60)
    wrong = ["1=2", "2=2", f"x^2+{a}x+{b}=0", f"x^2-{a}x+{b}=1", f"x^2-{a}x-{b}=0", "x=x", f"x={a}", f"x^3-{a}x+{b}=0"]
    return Case(f"x^2-{a}x+{b}=0", [f"2x^2-{2 * a}x+{2 * b}=0", f"0=x^2-{a}x+{b}", f"x^2+{b}={a}x"], wrong)


@of_class
def sums_that_are_asked_for(draw: random.Random) -> Case:
    """A calculation as the answer: another one, true or false, is another answer."""
    a, b = draw.randint(3, 9), draw.randint(3, 9)
    answer = f"({a}+{b})\\times 2={2 * (a + b)}"
    return Case(
        answer,
        [f"({a}+{b}) \\times 2 = {2 * (a + b)}"],
        ["1+1=3", "1+1=2", f"{2 * (a + b)}", f"({a}-{b})\\times 2={2 * (a + b)}"],
    )


@of_class
def left_sides(draw: random.Random) -> Case:
    """A name may stand before the answer; an expression may not."""
    n = draw.randint(3, 60)
    names = [
        "x",
        "S_{\\triangle ABC}",
        "AB",
        "f(2)",
        "m\\angle A",
        "\\angle ABC",
        "V_1",
        "P(A)",
        "a_{10}",
        "\\theta",
        "\\overline{AB}",
    ]
    right = [f"{name}={n}" for name in draw.sample(names, 4)] + [f"x = {n - 1}+1 = {n}"]
    wrong = [
        f"2x={n}",
        f"x+5={n}",
        f"x^2={n}",
        f"{n}={n + 1}",
        f"x={n + 1}",
        f"x = {n}+1 = {n}",
        f"\\frac{{x}}{{2}}={n}",
        f"-x={n}",
        f"x>{n}",
    ]
    return Case(str(n), right, wrong)


@of_class
def left_sides_of_the_question(draw: random.Random) -> Case:
    n = draw.randint(3, 60)
    return Case(str(n), [f"x+5={n}"], [f"2x={n}", f"x={n - 5}", f"x+50={n}"], question="If 2x=10k, what is $x + 5$ ?")


@of_class
def pairs_with_names(draw: random.Random) -> Case:
    a, b = draw.sample(range(2, 30), 2)
    right = [f"(x,y)=({a},{b})", f"x={a}, y={b}", f"({a}, {b})", f"A({a},{b})", f"P = ({a},{b})"]
    return Case(
        f"({a},{b})", right, [f"(x,y)=({b},{a})", f"({b},{a})", f"[{a},{b}]", f"({a},{b + 1})", f"\\{{{a},{b}\\}}"]
    )


@of_class
def names_of_points(draw: random.Random) -> Case:
    a, b = draw.sample("ABCDEPQ", 2)
    return Case(
        a + b, [f"${a}{b}$", f"\\text{{{a}{b}}}"], [b + a, (a + b).lower(), a, b, f"{a}{b}{a}"], question="Which code?"
    )


@of_class
def letters_of_lengths(draw: random.Random) -> Case:
    """AB times CD is not AC times BD, but BA times CD."""
    right = ["BA\\cdot CD", "CD \\times AB", "DC\\cdot BA"]
    wrong = [
        "AC\\cdot BD",
        "AB\\cdot BD",
        "AB+CD",
        "ab\\cdot cd",
        "AB",
        "AD \\cdot BC",
        f"{draw.randint(2, 9)}AB\\cdot CD",
    ]
    return Case("AB\\cdot CD", right, wrong)


@of_class
def several_boxes(draw: random.Random) -> Case:
    a, b = draw.sample(range(1, 50), 2)
    return Case(
        f"\\boxed{{{a}}}, \\boxed{{{b}}}", [f"{a}, {b}", f"{b}, {a}"], [str(a), str(b), f"{a}, {b + 1}", f"{a}, {a}"]
    )


@of_class
def options_that_are_labels(draw: random.Random) -> Case:
    labels = draw.sample("abcde", 5)
    while any(label == "abcde"[i] for i, label in enumerate(labels)):
        labels = draw.sample("abcde", 5)
    place = draw.randrange(5)
    letter = "ABCDE"[place]
    wrong = [f"({label})" for i, label in enumerate(labels) if i != place] + [c for c in "ABCDE" if c != letter]
    return Case(letter, [letter, f"({labels[place]})"], wrong, choices=[f"({label})" for label in labels])


@of_class
def options_of_letters_alone(draw: random.Random) -> Case:
    letter, n = draw.choice("ABCDE"), draw.randint(10, 99)
    right = [letter, f"({letter})", f"({letter}) {n}", f"{letter}. {n}", f"\\text{{({letter})}} {n}"]
    return Case(letter, right, [f"({c}) {n}" for c in "ABCDE" if c != letter] + [str(n)], choices=list("ABCDE"))


@of_class
def options_with_text(draw: random.Random) -> Case:
    """A letter with its text is right, with another's wrong, whatever the text begins with."""
    n = draw.randint(10, 60)
    texts = draw.choice(
        [
            [f"({n},1)", f"({n},2)", f"({n},3)"],
            [f"+{n}", f"-{n}", f"+{n + 1}"],
            [f"{n}%", f"{n + 1}%", f"{n + 2}%"],
            [f".{n}", f".{n + 1}", f".{n + 2}"],
            [f"√{{{n}}}", f"√{{{n + 1}}}", f"2√{{{n}}}"],
            [f"{n}m", f"{n + 1}m", f"{n + 2}m"],
            [f"{n}^\\circ", f"{n + 1}^\\circ", f"{n + 2}^\\circ"],
        ]
    )
    right = ["B", f"(B) {texts[1]}", f"B: {texts[1]}", f"B. {texts[1]}", texts[1], f"（B）{texts[1]}", "{\\bf (B)}"]
    wrong = ["A", "C", f"(B) {texts[0]}", f"(A) {texts[1]}", texts[0], texts[2], f"(C) {texts[2]}"]
    return Case("B", right, wrong, choices=texts)


@of_class
def options_that_are_ratios(draw: random.Random) -> Case:
    a, b = draw.randint(1, 4), draw.randint(5, 9)
    choices = [f"{a}:{b + 1}", f"{a}:{b}", f"{b}:{a}"]
    right = [f"{a}:{b}", f"\\frac{{{a}}}{{{b}}}", f"{a}/{b}", "B"]
    return Case("B", right, [f"\\frac{{{b}}}{{{a}}}", f"{b}:{a}", f"{a}/{b + 1}", "A", str(a)], choices=choices)


@of_class
def orders(draw: random.Random) -> Case:
    """Where the question asks for an order, the order counts."""
    numbers = sorted(draw.sample(range(1, 90), 3))
    wrong = [", ".join(map(str, p)) for p in itertools.permutations(numbers) if list(p) != numbers]
    question = draw.choice(
        ["List the numbers in increasing order.", "Sort from smallest to largest.", "Arrange them in order."]
    )
    return Case(", ".join(map(str, numbers)), [",".join(map(str, numbers))], wrong, question=question)


@of_class
def no_orders(draw: random.Random) -> Case:
    """Where it does not, it does not: ordered pairs, sequences of numbers, an answer that is in no order itself."""
    numbers = draw.sample(range(1, 90), 3)
    while numbers in (sorted(numbers), sorted(numbers, reverse=True)):
        draw.shuffle(numbers)
    question = draw.choice(
        [
            "Find all ordered pairs. The integers are written in increasing order.",
            "Three terms of a geometric sequence; determine all values.",
            "In order to win, which numbers are needed?",
            "People are arranged in a circle. Which numbers are possible?",
        ]
    )
    right = [", ".join(map(str, p)) for p in itertools.permutations(numbers)]
    text = ", ".join(map(str, numbers))
    return Case(
        text, right, [f"{text}, 91", ", ".join(map(str, numbers[:2])), text.replace(str(numbers[0]), "95", 1)], question
    )


@of_class
def tuples(draw: random.Random) -> Case:
    numbers = draw.sample(range(1, 90), 3)
    text = ", ".join(map(str, numbers))
    wrong = [f"({', '.join(map(str, p))})" for p in itertools.permutations(numbers) if list(p) != numbers]
    return Case(f"({text})", [f"\\left({text}\\right)", text, f"[{text}]"], [*wrong, f"\\{{{text}\\}}", f"({text}, 1)"])


@of_class
def boxes(draw: random.Random) -> Case:
    numbers = [round(draw.random(), 2) for _ in range(4)]
    text = ", ".join(map(str, numbers))
    wrong = [f"[{', '.join(map(str, numbers[::-1]))}]"] if numbers != numbers[::-1] else []
    return Case(
        f"[{text}]", [f"({text})", f"[{text}]"], [*wrong, f"[{text}, 1]"], question="Where is the bounding box?"
    )


@of_class
def intervals(draw: random.Random) -> Case:
    a, b = sorted(draw.sample(range(-30, 30), 2))
    left, right = draw.choice("(["), draw.choice(")]")
    below, above = ("<" if left == "(" else "\\leq "), ("<" if right == ")" else "\\le ")
    same = [
        f"{left}{a}, {b}{right}",
        f"{a}{below}x{above}{b}",
        f"\\{{x \\mid {a}{below}x{above}{b}\\}}",
        f"x\\in {left}{a},{b}{right}",
    ]
    other = {"(": "[", "[": "(", ")": "]", "]": ")"}
    wrong = [
        f"{other[left]}{a},{b}{right}",
        f"{left}{a},{b}{other[right]}",
        f"{left}{a},{b + 1}{right}",
        f"{left}{b},{a}{right}",
    ]
    wrong += [f"{a}{below}x", f"{b}{below}x{above}{a}", f"{left}{a},\\infty)", f"{left}{a},{b}{right}\\cup(99,100)"]
    return Case(f"{left}{a},{b}{right}", same, wrong, question="For which x does it hold?")


@of_class
def half_lines(draw: random.Random) -> Case:
    n, letter = draw.randint(-20, 20), draw.choice("kxam")
    right = [
        f"{letter}<{n}",
        f"{n}>{letter}",
        f"\\{{{letter}: {letter}<{n}\\}}",
        f"(-\\infty, {n})",
        f"{letter} \\in (-\\infty,{n})",
    ]
    wrong = [
        f"{letter}>{n}",
        f"{letter}\\leq {n}",
        f"{letter}<{n + 1}",
        f"({n},\\infty)",
        f"(-\\infty,{n}]",
        f"{letter}={n}",
        str(n),
        f"{letter}\\neq {n}",
    ]
    return Case(f"(-\\infty,{n})", right, wrong)


@of_class
def unions(draw: random.Random) -> Case:
    a, b = sorted(draw.sample(range(-20, 20), 2))
    right = [
        f"({b},\\infty)\\cup(-\\infty,{a})",
        f"x<{a} or x>{b}",
        f"x < {a} \\text{{ or }} x > {b}",
        f"x>{b} or x<{a}",
    ]
    wrong = [
        f"({a},{b})",
        f"{a}<x<{b}",
        f"(-\\infty,{a}]\\cup({b},\\infty)",
        f"(-\\infty,{a})",
        f"x<{a} or x>{b + 1}",
        f"x<{a} or y>{b}",
    ]
    return Case(f"(-\\infty,{a})\\cup({b},\\infty)", right, wrong)


@of_class
def inequalities(draw: random.Random) -> Case:
    a, b, c = (draw.randint(2, 9) for _ in range(3))
    wrong = [
        f"{a}x+{b}y<{c}",
        f"{a}x+{b}y\\geq {c}",
        f"{a}x-{b}y>{c}",
        f"{a}x+{b}y={c}",
        f"-{a}x-{b}y>-{c}",
        f"{a}x+{b}y>{c + 1}",
    ]
    return Case(f"{a}x+{b}y>{c}", [f"{c}<{a}x+{b}y", f"{2 * a}x+{2 * b}y>{2 * c}", f"-{a}x-{b}y<-{c}"], wrong)


@of_class
def last_digits(draw: random.Random) -> Case:
    """Numbers that are nearly equal are not equal, however long they are."""
    n, places = draw.randint(10**5, 10**12), draw.randint(0, 5)
    text = f"{n / 10**places:.{places}f}" if n < 10**15 else str(n)
    near = [f"{(n + step) / 10**places:.{places}f}" for step in (1, -1, 10)]
    return Case(text, [f"+{text}", f"{text}0" if places else f"{text}.0"], [*near, f"-{text}", f"{text}1"])


@of_class
def huge_powers(draw: random.Random) -> Case:
    base, n = draw.choice([2, 3, 7]), draw.randint(200, 3000)
    right = [f"{base} \\cdot {base}^{{{n - 1}}}", f"{base}^{{{n}}}+0", f"\\frac{{{base}^{{{n + 1}}}}}{{{base}}}"]
    wrong = [
        f"{base}^{{{n}}}+1",
        f"{base}^{{{n}}}-1",
        f"{base}^{{{n + 1}}}",
        f"{base + 1}^{{{n}}}",
        f"{base}^{{{n}}}+\\sqrt{{2}}",
        "\\infty",
    ]
    return Case(f"{base}^{{{n}}}", right, wrong)


@of_class
def tiny_numbers(draw: random.Random) -> Case:
    """All near 0, and none equal to another."""
    n = draw.randint(15, 2000)
    answer, right, wrong = draw.choice(
        [
            (
                f"\\frac{{1}}{{{n}!}}",
                [f"1/{n}!", f"\\frac{{{n}}}{{{n}\\cdot {n}!}}"],
                [f"\\frac{{1}}{{{n - 2}!}}", f"1/{n + 1}!"],
            ),
            (
                f"e^{{-{n}}}",
                [f"\\frac{{1}}{{e^{{{n}}}}}"],
                [f"e^{{-{n + 1}}}", f"-e^{{-{n}}}", f"2e^{{-{n}}}", f"e^{{{n}}}"],
            ),
            (
                f"\\pi 10^{{-{n}}}",
                [f"\\frac{{\\pi}}{{10^{{{n}}}}}"],
                [f"\\pi 10^{{-{n + 1}}}", f"3.14 \\cdot 10^{{-{n}}}"],
            ),
            (
                f"-\\sqrt{{2}}\\cdot 10^{{-{n}}}",
                [f"-\\frac{{\\sqrt{{2}}}}{{10^{{{n}}}}}"],
                [f"\\sqrt{{2}}\\cdot 10^{{-{n}}}", "-10^{-19}"],
            ),
        ]
    )
    return Case(answer, right, [*wrong, "0", "0.0", "0.000001", "10^{-400}"])


@of_class
def rounded(draw: random.Random) -> Case:
    """A decimal of five digits and more may be the rounding of a fraction or a root, and nothing else."""
    top, bottom = draw.randint(10_000, 99_999), draw.choice([7, 11, 13, 17, 19])
    text, value = draw.choice(
        [
            (f"\\frac{{{top}}}{{{bottom}}}", Fraction(top, bottom)),
            (f"\\sqrt{{{top * bottom}}}", Fraction(math.isqrt(top * bottom * 10**30), 10**15)),
        ]
    )
    if value.denominator == 1 or math.isqrt(top * bottom) ** 2 == top * bottom:
        return rounded(draw)
    right = [f"{float(value):.{places}f}" for places in (3, 4, 5)]
    wrong = [f"{float(value) + step:.4f}" for step in (0.0002, -0.0002, 0.01, -0.01)] + [
        f"{float(value):.0f}",
        f"-{right[0]}",
    ]
    return Case(text, right, wrong)


@of_class
def rounded_as_asked(draw: random.Random) -> Case:
    top, bottom = draw.randint(10, 999), draw.choice([7, 11, 13, 17])
    if top % bottom == 0:
        return rounded_as_asked(draw)
    value = Fraction(top, bottom)
    text = f"{float(value):.2f}"
    wrong = [f"{float(value) + step:.2f}" for step in (0.01, -0.01, 1.0)]
    return Case(f"\\frac{{{top}}}{{{bottom}}}", [text], wrong, question="Round to the nearest hundredth.")


@of_class
def percents(draw: random.Random) -> Case:
    n = draw.randint(2, 99)
    return Case(
        f"{n / 100}", [f"{n}%", f"{n}\\%", f"{n} percent"], [f"{n}", f"{n / 100}%", f"{n + 1}%", f"-{n}%", f"{n * 10}%"]
    )


@of_class
def percents_that_are_asked_for(draw: random.Random) -> Case:
    n = draw.randint(2, 99)
    wrong = [f"{n / 100}", f"{n + 1}%", f"{n / 100}%", f"{n * 100}%"]
    return Case(f"{n}", [f"{n}%", f"{n}\\%"], wrong, question="What percentage is red?")


@of_class
def degrees(draw: random.Random) -> Case:
    k, n = draw.randint(1, 5), draw.choice([2, 3, 4, 6, 9, 12])
    angle = Fraction(180 * k, n)
    text = str(angle) if angle.denominator == 1 else f"\\frac{{{angle.numerator}}}{{{angle.denominator}}}"
    right = [f"{text}^\\circ", f"{text}°", f"\\frac{{{2 * k}\\pi}}{{{2 * n}}}"]
    return Case(
        f"\\frac{{{k}\\pi}}{{{n}}}",
        right,
        [text, f"{int(angle) + 1}^\\circ", f"-{text}^\\circ", f"\\frac{{{k}}}{{{n}}}", f"\\frac{{{k}\\pi}}{{{n + 1}}}"],
    )


@of_class
def spellings_of_degrees(draw: random.Random) -> Case:
    n = draw.randint(11, 179)
    right = [
        f"{n}^\\circ",
        f"{n}^{{\\circ}}",
        f"{n}*\\degree",
        f"{n}^o",
        f"{n}°",
        f"{n}",
        f"{n} degrees",
        f"{n}度",
        f"\\angle A={n}",
    ]
    return Case(f"{n}{{degrees}}", right, [f"{n + 1}^\\circ", f"{n}^\\circ C", f"{n}0", f"{n}%", f"{n} cm", f"-{n}"])


@of_class
def units(draw: random.Random) -> Case:
    n = draw.randint(2, 99)
    unit, other, chinese = draw.choice(
        [("cm", "m", "厘米"), ("kg", "g", "千克"), ("km", "mm", "公里"), ("ml", "cm", "毫升")]
    )
    right = [str(n), f"{n}\\text{{ {unit}}}", f"{n}\\,\\mathrm{{{unit}}}", f"{n}{chinese}", f"{n} {chinese}"]
    return Case(f"{n} {unit}", right, [f"{n} {other}", f"{n + 1} {unit}", f"{n} {unit}^2", f"-{n} {unit}", f"{n}x"])


@of_class
def full_width(draw: random.Random) -> Case:
    a, b = draw.randint(2, 99), draw.randint(1, 9)
    wide = str.maketrans("0123456789.", "０１２３４５６７８９．")
    right = [f"{a}.{b}".translate(wide), f"答案：{a}.{b}", f"≈{a}.{b}", f"\\approx {a}.{b}", f"x≈{a}.{b}"]
    return Case(f"{a}.{b}", right, [f"{a + 1}.{b}".translate(wide), f"{a}{b}".translate(wide), f"≈{a}.{10 - b}{b}"])


@of_class
def float_noise(draw: random.Random) -> Case:
    a, b = draw.randint(1, 99), draw.randint(1, 99)
    text, noisy = f"{(a + b) / 10:.1f}", a / 10 + b / 10
    return Case(text, [repr(noisy), f"{text}0"], [repr(noisy + 0.1), f"{text}0000000001", f"-{text}"])


@of_class
def repeating(draw: random.Random) -> Case:
    n = draw.randint(1, 8)
    right = [f"0.\\overline{{{n}}}", f"0.\\dot{{{n}}}", f"0.{str(n) * 3}...", f"0.{str(n) * 12}"]
    return Case(
        f"\\frac{{{n}}}{{9}}",
        right,
        [f"0.{n}", f"0.\\overline{{{n + 1 if n < 8 else 1}}}", f"0.0\\overline{{{n}}}", f"{n}.\\overline{{{n}}}"],
    )


@of_class
def damaged_latex(draw: random.Random) -> Case:
    a, b = draw.sample(range(1, 9), 2)
    right = [
        f"\frac{{{a}}}{{{b}}}",
        f"\\frac{a}{b}",
        f"\\dfrac{{{a}}}{b}",
        f"frac{{{a}}}{{{b}}}",
        f"\\\\frac{{{a}}}{{{b}}}",
        f"{a}⁄{b}",
    ]
    wrong = [f"\frac{{{b}}}{{{a}}}", f"\\frac{b}{a}", f"rac{{{a}}}{{{b}}}", f"\\frac{{{a}}}", f"{a}{b}"]
    return Case(f"\\frac{{{a}}}{{{b}}}", right, wrong)


@of_class
def half_braced(draw: random.Random) -> Case:
    n, letter = draw.randint(1, 9), draw.choice("bcd")
    right = [f"\\frac{{{n}+a}}{letter}", f"({n}+a)/{letter}", f"\\frac {{a+{n}}} {{{letter}}}"]
    return Case(
        f"\\frac{{{n}+a}}{{{letter}}}",
        right,
        [f"\\frac{{{n}}}{letter}+a", f"{n}+a/{letter}", f"\\frac{{{n}-a}}{letter}", f"\\frac{letter}{{{n}+a}}"],
    )


@of_class
def mixed_numbers(draw: random.Random) -> Case:
    whole, bottom = draw.randint(1, 9), draw.randint(3, 9)
    top = draw.randint(1, bottom - 1)
    value = Fraction(whole * bottom + top, bottom)
    right = [f"{whole}\\frac{{{top}}}{{{bottom}}}", f"{whole} {top}/{bottom}", f"{value.numerator}/{value.denominator}"]
    wrong = [
        f"{whole + 1}\\frac{{{top}}}{{{bottom}}}",
        f"\\frac{{{whole}{top}}}{{{bottom}}}",
        f"-{whole}\\frac{{{top}}}{{{bottom}}}",
    ]
    return Case(f"\\frac{{{value.numerator}}}{{{value.denominator}}}", right, wrong)


@of_class
def signs(draw: random.Random) -> Case:
    a, b = draw.randint(2, 9), draw.choice([2, 3, 5, 7])
    right = [
        f"{a}\\pm \\sqrt{{{b}}}",
        f"{a}-\\sqrt{{{b}}}, {a}+\\sqrt{{{b}}}",
        f"{a} ± √{b}",
        f"x={a}\\pm\\sqrt{{{b}}}",
    ]
    wrong = [
        f"{a}+\\sqrt{{{b}}}",
        f"{a}-\\sqrt{{{b}}}",
        f"\\pm {a}+\\sqrt{{{b}}}",
        f"-{a}\\pm\\sqrt{{{b}}}",
        f"{a}\\pm\\sqrt{{{b + 6}}}",
    ]
    return Case(f"{a}\\pm\\sqrt{{{b}}}", right, wrong)


@of_class
def formulas(draw: random.Random) -> Case:
    """Every mutant that is worth something else is wrong, and the formula in other words is right."""
    while True:
        node = tree(draw, draw.randint(1, 3))
        points = [{name: complex(draw.uniform(0.5, 2)) for name in "xyRrnXYN"} for _ in range(3)]
        try:
            values = [worth(node, point) for point in points]
            different = [
                mutant
                for mutant in mutants(node, draw)
                if any(abs(worth(mutant, p) - v) > 1e-6 * (1 + abs(v)) for p, v in zip(points, values, strict=True))
            ]
        except (ArithmeticError, ValueError):
            continue
        if all(1e-9 < abs(value) < 1e12 for value in values):
            break
    return Case(written(node, draw), [written(node, draw) for _ in range(3)], [written(m, draw) for m in different])


@pytest.mark.parametrize("name", CLASSES)
def test_neighbours_of_a_right_answer(name):
    """Right answers of a class are right, however they are written; each of them changed in one place is wrong."""
    draw = random.Random(name)
    for case in (CLASSES[name](draw) for _ in range(CASES_OF_A_CLASS)):
        assert verdict(case, case.answer), case
        assert [text for text in case.right if not verdict(case, text)] == [], case
        assert [text for text in case.wrong if verdict(case, text)] == [], case


def test_no_mutation_is_accepted():
    """Of 10,000 wrong neighbours, of all classes in turn, none is taken for right."""
    draw, asked, accepted = random.Random(1), 0, []
    for name in itertools.cycle(CLASSES):
        case = CLASSES[name](draw)
        accepted += [(name, case, text) for text in case.wrong if verdict(case, text)]
        asked += len(case.wrong)
        if asked >= 10_000:
            break
    assert accepted == []
