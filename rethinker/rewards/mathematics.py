r"""Whether two expressions are equal: each is read as a formula, and both are computed at the same points.

A formula that differs anywhere differs at almost every point, so a few points decide; rational numbers are computed
exactly, all others to 60 digits and more, so that 2^{1000} is not 2^{1000}+1 and 1/2006! is not 1/2004!. Nothing is
simplified or solved: every comparison ends, within milliseconds for what people write.
What `formulas` cannot read equals its own text only.
"""

from __future__ import annotations

import math
import re
import threading
import zlib
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from typing import Any

from mpmath.ctx_mp import MPContext
from mpmath.libmp import to_rational

from rethinker.rewards.formulas import Node, UnreadableError, read_formula, symbols_of
from rethinker.rewards.quantities import parse_quantity, rounds_to
from rethinker.rewards.rules import Rules

_TRIGONOMETRY = re.compile(r"(?:sin|cos|tan|cot|sec|csc)")

# What one answer may cost, in operations on numbers of 60 digits; about half a second.
BUDGET = 50_000
# Bounds of what is computed: an exact number of more bits, a power beyond e to this, an angle beyond this.
EXACT_BITS = 100_000
LARGEST_POWER = 10**6
LARGEST_FACTORIAL = 5_000
LARGEST_ANGLE = 10**60
# Digits to compare by, and to make sure; a number beyond 10 to the power of the last is none.
DIGITS, MORE_DIGITS, MOST_DIGITS = 60, 400, 5_000

_MP = MPContext()
_NEAR = _MP.mpf(10) ** (10 - DIGITS)  # of two numbers that are equal
_SPENT = threading.local()
_BUSY = threading.Lock()  # the context's precision is one for all threads


class BudgetError(Exception):
    """An answer that takes more operations than one may."""


def spend(operations: int) -> None:
    """Count operations of the answer under way.

    Raises:
        BudgetError: there have been more than one answer may take.
    """
    _SPENT.left = getattr(_SPENT, "left", BUDGET) - operations
    if _SPENT.left < 0:
        raise BudgetError(f"the answer takes more than {BUDGET} operations")


def start_budget() -> None:
    """Let the next answer cost what one may; see BUDGET."""
    _SPENT.left = BUDGET


def same_expression(predicted: str, answer: str, rules: Rules) -> bool:
    """Whether two cleaned texts are equal as formulas.

    Args:
        predicted: without units, lists, relations.
        answer: likewise.
        rules: what a rounded decimal and an angle in degrees may be equal to.
    """
    pairs = [(predicted, answer)] if rules.degrees or ("°" in predicted) == ("°" in answer) else []
    if ("°" in predicted) != ("°" in answer) and not any(
        "\\pi" in side or _TRIGONOMETRY.search(side) for side in (predicted, answer)
    ):
        pairs.append((predicted.replace("°", ""), answer.replace("°", "")))  # the unit of an angle, left out by one
    return any(_same(left, right, rules) for left, right in pairs)


def same_equation(left: tuple[str, str], right: tuple[str, str], ordered: bool) -> bool:
    """Whether two relations, each of two cleaned sides, say the same: one is the other times a constant.

    Args:
        left: the sides of a relation.
        right: the sides of the other.
        ordered: of inequalities the constant is positive.
    """
    differences = [_difference(*sides) for sides in (left, right)]
    if None in differences or not all(symbols_of(node) for node in differences):
        return False  # without a variable an equation is true or false, and nothing else
    names = sorted(set().union(*map(symbols_of, differences)))
    with _BUSY:
        try:
            points = [[_lifted(_value(node, point, DIGITS)) for node in differences] for point in _points(names)]
            if any(_is_zero(value) for point in points for value in point):
                return False
            if any(abs(point[0] - points[0][0]) <= _NEAR * abs(point[0]) for point in points[1:]):
                return False  # without its variables, as x+1=x
            ratios = [first / second for first, second in points]
        except (UnreadableError, ArithmeticError, ValueError):
            return False
        for point in _far_points(names) if any(map(_has_branches, differences)) else ():
            try:
                first, second = (_lifted(_value(node, point, DIGITS)) for node in differences)
                ratios.append(first / second)
            except (UnreadableError, ArithmeticError, ValueError):
                continue
        positive = not ordered or (ratios[0].imag == 0 and ratios[0].real > 0)
        return positive and all(abs(ratio - ratios[0]) <= _NEAR * abs(ratios[0]) for ratio in ratios)


def plain(text: str) -> str:
    """The text without spaces that separate nothing, and with one sign for products."""
    text = re.sub(r"\\cdot(?![A-Za-z])|\\times(?![A-Za-z])", "*", text)
    return re.sub(r"(?<![A-Za-z0-9.])\s+|\s+(?![A-Za-z0-9.])", "", text)


def _same(left: str, right: str, rules: Rules) -> bool:
    for split_names in (False, True):
        first, second = read_formula(left, split_names), read_formula(right, split_names)
        if first is None or second is None:
            return False
        names = [any(len(name) > 1 and name.isupper() for name in symbols_of(node)) for node in (first, second)]
        if split_names is False and names == [True, True]:
            return _equal_everywhere(first, second)
        if _equal_everywhere(first, second) or _rounded(left, second, rules) or _rounded(right, first, rules):
            return True
        if True not in names:  # an R and an I side by side may be the name RI of the other
            return False
    return False


def _rounded(text: str, node: Node, rules: Rules) -> bool:
    """Whether a text is a decimal, and the rounding of a formula without variables."""
    decimal = parse_quantity(text)
    if (
        not rules.rounding
        or decimal is None
        or decimal.unit
        or not decimal.step
        or symbols_of(node)
        or node[0] == "number"
    ):
        return False
    with _BUSY:
        try:
            value = _value(node, {}, DIGITS)
        except (UnreadableError, ArithmeticError, ValueError):
            return False
        if not isinstance(value, Fraction):
            if value.imag != 0 or not _MP.isfinite(value):
                return False
            value = Fraction(*to_rational(value.real._mpf_))
    return rounds_to(value, decimal, rules)


def _equal_everywhere(left: Node, right: Node) -> bool:
    """Whether two formulas have the same value at every point that is tried."""
    if left == right:
        return True
    names = sorted(symbols_of(left) | symbols_of(right))
    with _BUSY:
        try:
            if not all(_equal_at(left, right, point) for point in _points(names)):
                return False
        except (UnreadableError, ArithmeticError, ValueError):
            return False
        if not names or not (_has_branches(left) or _has_branches(right)):
            return True
        # |x-5| is 5-x for small x: such formulas are compared elsewhere as well, where they have a value.
        for point in _far_points(names):
            try:
                if not _equal_at(left, right, point):
                    return False
            except (UnreadableError, ArithmeticError, ValueError):
                continue
        return True


@lru_cache(maxsize=16384)
def _has_branches(node: Node) -> bool:
    """Whether a formula may be one thing here and another there."""
    branches = node[0] in ("abs", "root", "floor", "ceil", "log", "ln", "^") or str(node[0]).startswith("arc")
    return branches or any(_has_branches(operand) for operand in node[1:] if isinstance(operand, tuple))


def _equal_at(left: Node, right: Node, point: dict[str, Fraction]) -> bool:
    """Equal to all digits, and the nearer, the more are computed: a difference of 0 is told from a small one."""
    first, second = _value(left, point, DIGITS), _value(right, point, DIGITS)
    if isinstance(first, Fraction) and isinstance(second, Fraction):
        return first == second
    apart, size = abs(_lifted(first) - _lifted(second)), max(abs(_lifted(first)), abs(_lifted(second)))
    if not _MP.isfinite(apart) or apart > max(size, 1) * _MP.mpf(10) ** (-DIGITS // 2):
        return False
    more = MORE_DIGITS + (max(0, int(_MP.log10(size))) if size else 0)
    if more > MOST_DIGITS:
        raise UnreadableError
    first, second = _value(left, point, more), _value(right, point, more)
    nearer = abs(_lifted(first) - _lifted(second))
    return nearer <= max(apart * _MP.mpf(10) ** (-DIGITS // 2), size * _MP.mpf(10) ** (10 - more))


def _far_points(names: list[str]) -> Iterator[dict[str, Fraction]]:
    """Points where a formula with branches may be on another of them."""
    return (point for scale in (40, 4_000, 10**6, Fraction(1, 1_000)) for point in _points(names, scale))


def _points(names: list[str], scale: int | Fraction = 1) -> Iterator[dict[str, Fraction]]:
    """Values of the variables: first all positive, then of both signs. One point is enough without variables."""
    for number in range(4 if names else 1):
        draws = {name: zlib.crc32(f"{name} {number}".encode()) for name in names}
        # +++, +-+, -+-, ---
        signs = {name: (1, (-1) ** i, -((-1) ** i), -1)[number] for i, name in enumerate(names)}
        yield {name: Fraction(signs[name] * scale * (200 + draw % 3989), 997) for name, draw in draws.items()}


@lru_cache(maxsize=4096)
def _difference(left: str, right: str) -> Node | None:
    sides = read_formula(left), read_formula(right)
    return None if None in sides else ("+", sides[0], ("-", sides[1]))


def _lifted(value: Any) -> Any:
    return _MP.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value


def _is_zero(value: Any) -> bool:
    return value == 0 if isinstance(value, Fraction) else abs(value) < _MP.mpf(10) ** (-DIGITS // 2)


def _value(node: Node, point: dict[str, Fraction], digits: int) -> Any:
    """The value of a formula at a point: a Fraction where it is exact, else a number of `digits` digits."""
    _MP.dps = digits
    return _computed(node, point)


def _computed(node: Node, point: dict[str, Fraction]) -> Any:
    operation = node[0]
    spend(max(1, _MP.dps // DIGITS))
    if operation == "number":
        return node[1]
    if operation == "symbol":
        return point[node[1]]
    if operation == "constant":
        return {"pi": _MP.pi, "e": _MP.e, "i": _MP.mpc(0, 1), "°": _MP.pi / 180}[node[1]] * _MP.mpf(1)
    operands = [_computed(operand, point) for operand in node[1:]]
    value = (_OPERATIONS.get(operation) or _elementary(operation))(*operands)
    if isinstance(value, Fraction):
        bits = value.numerator.bit_length() + value.denominator.bit_length()
        return value if bits <= EXACT_BITS else _lifted(value)
    return value


def _exact(operands: tuple[Any, ...]) -> bool:
    return all(isinstance(operand, Fraction) for operand in operands)


def _arithmetic(exact: Any) -> Any:
    def compute(*operands: Any) -> Any:
        return exact(*(operands if _exact(operands) else map(_lifted, operands)))

    return compute


def _power(base: Any, exponent: Any) -> Any:
    if base == 0 and not (isinstance(exponent, Fraction) and exponent > 0):
        raise UnreadableError
    if _exact((base, exponent)) and exponent.denominator == 1:
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if abs(exponent) * bits <= EXACT_BITS:
            return base ** int(exponent)
    base, power = _lifted(base), _lifted(exponent)
    if base != 0 and abs(power * _MP.log(abs(base))) > LARGEST_POWER:
        raise UnreadableError
    if base.imag == 0 and base.real < 0 and isinstance(exponent, Fraction) and exponent.denominator % 2:
        sign = -1 if exponent.numerator % 2 else 1  # the real root, as of \sqrt[3]{-8}
        return sign * _MP.power(-base.real, power)
    return _MP.power(base, power)


def _root(value: Any, index: Any) -> Any:
    if index == 0:
        raise UnreadableError
    return _power(value, 1 / index)


def _factorial(value: Any) -> Any:
    if isinstance(value, Fraction) and value.denominator == 1:
        if not 0 <= value <= LARGEST_FACTORIAL:
            raise UnreadableError
        return Fraction(math.factorial(int(value)))
    if abs(value) > LARGEST_FACTORIAL:
        raise UnreadableError
    return _MP.factorial(_lifted(value))


def _binomial(n: Any, k: Any) -> Any:
    if _exact((n, k)) and n.denominator == k.denominator == 1 and 0 <= k <= n <= LARGEST_FACTORIAL:
        return Fraction(math.comb(int(n), int(k)))
    if abs(n) > LARGEST_FACTORIAL or abs(k) > LARGEST_FACTORIAL:
        raise UnreadableError
    return _MP.binomial(_lifted(n), _lifted(k))


def _logarithm(value: Any, base: Any) -> Any:
    if value == 0 or base in (0, 1):
        raise UnreadableError
    return _MP.log(_lifted(value)) / _MP.log(_lifted(base))


def _integer(exact: Any, inexact: Any) -> Any:
    def compute(value: Any) -> Any:
        if isinstance(value, Fraction):
            return Fraction(exact(value))
        if value.imag or abs(value - _MP.nint(value.real)) < _MP.mpf(10) ** (-DIGITS // 2):
            raise UnreadableError  # its rounding error decides
        return Fraction(int(inexact(value.real)))

    return compute


def _elementary(name: str) -> Any:
    def compute(value: Any) -> Any:
        value = _lifted(value)
        if abs(value) > (LARGEST_POWER if name in ("exp", "sinh", "cosh", "tanh") else LARGEST_ANGLE):
            raise UnreadableError
        if name == "ln":
            if value == 0:
                raise UnreadableError
            return _MP.log(value)
        return getattr(_MP, {"arcsin": "asin", "arccos": "acos", "arctan": "atan"}.get(name, name))(value)

    return compute


_OPERATIONS = {
    "+": _arithmetic(lambda a, b: a + b),
    "-": _arithmetic(lambda a: -a),
    "*": _arithmetic(lambda a, b: a * b),
    "/": _arithmetic(lambda a, b: a / b),
    "abs": _arithmetic(abs),
    "^": _power,
    "root": _root,
    "!": _factorial,
    "binomial": _binomial,
    "log": _logarithm,
    "floor": _integer(math.floor, _MP.floor),
    "ceil": _integer(math.ceil, _MP.ceil),
}
