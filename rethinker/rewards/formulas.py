r"""Formulas: what a text in LaTeX or plain notation means as mathematics.

The reader takes what has one meaning and leaves everything else alone: two numbers side by side, a letter before a
digit, a number in another base, x/2y, commands it does not know.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from typing import Any

from rethinker.rewards.spelling import FUNCTIONS, THOUSANDS

Node = tuple[Any, ...]
"""(operation, operands...); leaves are ("number", Fraction), ("symbol", name) and ("constant", name)."""

_LETTERS = frozenset(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho varrho sigma tau "
    "upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega infty ell hbar nabla "
    "emptyset reals".split()
)
_DECORATIONS = frozenset(
    "vec hat bar overline overrightarrow overleftrightarrow widehat widetilde tilde mathcal mathbb mathfrak".split()
)
_CLOSING = {"(": ")", "[": "]", "{": "}"}
_TOKEN = re.compile(
    r"(?P<repeating>\d*\.\d*(?:\\overline|\\dot|\\bar)\{\d+\})|(?P<number>\d+(?:\.\d+)?|\.\d+)"
    r"|(?P<command>\\[A-Za-z]+|\\[{}|])|(?P<letters>[A-Za-z]+)|(?P<space>\s+)|(?P<other>.)",
    re.DOTALL,
)
_RAISED_FIRST = re.compile(r"([A-Za-z])\^(\{[^{}]*\}|\w)_(\{[^{}]*\}|\w)")  # v^2_0 is v_0^2
# Brackets within brackets, and tokens: Python's stack bears what these let grow.
DEEPEST, LONGEST = 40, 300


class UnreadableError(ValueError):
    """A text that is no formula with one meaning, or a formula without a value that can be computed."""


@lru_cache(maxsize=16384)
def read_formula(text: str, split_names: bool = False) -> Node | None:
    """The formula of a text; None if it has not one meaning. Names such as AB are one symbol, or split into letters."""
    try:
        reader = _Reader(text, split_names)
        node = reader.sum()
        return None if reader.kind else node
    except (UnreadableError, RecursionError):
        return None


@lru_cache(maxsize=16384)
def symbols_of(node: Node) -> frozenset[str]:
    """The variables of a formula."""
    if node[0] == "symbol":
        return frozenset([node[1]])
    return frozenset().union(*(symbols_of(operand) for operand in node[1:] if isinstance(operand, tuple)))


class _Reader:
    """Recursive descent over the tokens of a text. `kind` and `text` are those of the next token, "" at the end."""

    def __init__(self, text: str, split_names: bool) -> None:
        text = _RAISED_FIRST.sub(r"\1_\3^\2", THOUSANDS.sub("", text))
        self._tokens = list(_tokens(text, split_names))
        if len(self._tokens) > LONGEST:
            raise UnreadableError
        self._at, self._depth, self._bars = -1, 0, 0
        self._next()

    def _next(self) -> str:
        before = self.text if self._at >= 0 else ""
        self._at += 1
        self.kind, self.text = self._tokens[self._at] if self._at < len(self._tokens) else ("", "")
        return before

    def _take(self, text: str) -> bool:
        found = self.text == text and bool(self.kind)
        if found:
            self._next()
        return found

    def _expect(self, text: str) -> None:
        if not self._take(text):
            raise UnreadableError

    def sum(self) -> Node:
        self._depth += 1
        if self._depth > DEEPEST:
            raise UnreadableError
        node = self._signed()
        while self.text in ("+", "-"):
            sign = self._next()
            term = self._signed()
            node = ("+", node, term if sign == "+" else ("-", term))
        self._depth -= 1
        return node

    def _signed(self) -> Node:
        negative = False
        while self.text in ("+", "-"):
            negative ^= self._next() == "-"
        term = self._product()
        return ("-", term) if negative else term

    def _product(self) -> Node:
        node, last = self._first_factor()
        divided = False
        while True:
            if self.text in ("*", "\\cdot", "\\times"):
                self._next()
                negative = self._take("-")
                last = self._factor()
                node, divided = ("*", node, ("-", last) if negative else last), False
            elif self.text == "/":
                self._next()
                negative = self._take("-")
                numbers, last = last[0] == "number", self._factor()
                # 3/4 x is the product of both, but x/2y has two readings.
                node, divided = ("/", node, ("-", last) if negative else last), not (numbers and last[0] == "number")
            elif self._starts_factor() or (last[0] != "number" and self._starts_power()):
                if divided:
                    raise UnreadableError
                last = self._factor()
                node = ("*", node, last)
            else:
                return node

    def _first_factor(self) -> tuple[Node, Node]:
        """The first factor of a product, a mixed number such as 2\\frac{1}{2} as one."""
        whole = self.kind == "number" and self.text.isdigit()
        node = self._factor()
        if whole and node[0] == "number" and self.text == "\\frac":
            fraction = self._factor()
            top, bottom = fraction[1], fraction[2] if len(fraction) > 2 else None
            if top[0] == "number" and bottom[0] == "number":
                if not 0 < top[1] < bottom[1]:
                    raise UnreadableError
                node = ("+", node, fraction)
                return node, node
            return ("*", node, fraction), fraction
        return node, node

    def _starts_factor(self) -> bool:
        """Whether the next token goes on with a product. A number does not: 3 4 is two numbers, and x2 may be x_2."""
        if self.kind == "letters":
            return True
        if self.kind == "command":
            return self.text not in ("\\}", "\\rfloor", "\\rceil")
        return self.text in ("(", "[", "{") or (self.text == "|" and not self._bars)

    def _starts_power(self) -> bool:
        """Whether the next token is a number with an exponent, as in 2^6 3^5 and \\pi 10^{-7}."""
        return self.kind == "number" and self._tokens[self._at + 1 : self._at + 2] == [("other", "^")]

    def _factor(self) -> Node:
        node = self._postfixed(self._atom())
        if self.text == "^":
            self._next()
            node = self._postfixed(("^", node, self._exponent()))
        if self.text == "^":
            raise UnreadableError
        return node

    def _postfixed(self, node: Node) -> Node:
        while self.text in ("!", "°", "%") and self.kind:
            sign = self._next()
            if sign == "!" and node[0] in ("!", "^"):
                raise UnreadableError  # 5!! is no factorial of a factorial
            node = {"!": ("!", node), "°": ("*", node, ("constant", "°")), "%": ("/", node, ("number", Fraction(100)))}[
                sign
            ]
        return node

    def _exponent(self) -> Node:
        if self.text == "{":
            return self._group()
        negative = self._take("-")
        node = self._atom()
        return ("-", node) if negative else node

    def _group(self) -> Node:
        opening = self._next()
        bars, self._bars = self._bars, 0
        node = self.sum()
        self._bars = bars
        self._expect(_CLOSING[opening])
        return node

    def _atom(self) -> Node:
        kind, text = self.kind, self.text
        if kind in ("number", "repeating"):
            self._next()
            if self.text == "_":
                raise UnreadableError
            return ("number", _repeating(text) if kind == "repeating" else Fraction(text))
        if kind == "letters":
            self._next()
            if text in ("e", "i") and self.text not in ("_", "'"):
                return ("constant", text)
            # A product of lengths does not tell AB from BA.
            return self._symbol("".join(sorted(text)) if len(text) > 1 and self.text != "^" else text)
        if text in ("(", "[", "{"):
            return self._group()
        if text == "|" and kind:
            return self._bracketed("|", "|", "abs")
        if kind == "command":
            return self._command(self._next()[1:])
        raise UnreadableError

    def _bracketed(self, opening: str, closing: str, operation: str) -> Node:
        self._expect(opening)
        self._bars += 1
        node = self.sum()
        self._bars -= 1
        self._expect(closing)
        return (operation, node)

    def _command(self, name: str) -> Node:
        if name == "frac":
            top = self._argument(single_digit=True)
            return ("/", top, self._argument(single_digit=True))
        if name == "sqrt":
            index = self._group() if self.text == "[" else ("number", Fraction(2))
            if self.kind == "number" and len(self.text) > 1:
                raise UnreadableError  # \sqrt23 has two readings
            return ("root", self._argument(), index)
        if name == "binom":
            top = self._argument(single_digit=True)
            return ("binomial", top, self._argument(single_digit=True))
        if name in ("lfloor", "lceil"):
            node = self.sum()
            self._expect(f"\\r{name[1:]}")
            return (name[1:], node)
        if name == "pi":
            return ("constant", "pi")
        if name in FUNCTIONS:
            return self._function(name)
        if name in _DECORATIONS:
            inside = self._raw()
            if name in ("overline", "overleftrightarrow") and len(inside) == 2 and inside.isupper():
                inside = min(inside, inside[::-1])  # no direction
            return self._symbol(f"\\{name}{{{inside}}}")
        if name in ("angle", "triangle"):
            if self.kind != "letters":
                raise UnreadableError
            inside = self._next()
            while self.kind == "letters" and inside.isupper() and self.text.isupper():
                inside += self._next()
            inside = min(inside, inside[::-1]) if name == "angle" else inside
            return self._symbol(f"\\{name} {inside}")
        if name in _LETTERS:
            return self._symbol(f"\\{name}")
        raise UnreadableError

    def _function(self, name: str) -> Node:
        base, power = None, None
        while self.text in ("_", "^") and self.kind:
            if self._next() == "_":
                base = self._argument()
            else:
                power = self._exponent()
        if base is not None and name != "log":
            raise UnreadableError
        if self.text in ("(", "[", "{"):
            argument = self._group()
            if self.text in ("^", "!", "°"):
                raise UnreadableError  # \sin(x)^2 has two readings
        else:
            argument = self._unbracketed()
        if power == ("-", ("number", Fraction(1))):
            if name not in ("sin", "cos", "tan"):
                raise UnreadableError
            return (f"arc{name}", argument)
        node = ("log", argument, base or ("number", Fraction(10))) if name in ("log", "lg") else (name, argument)
        return node if power is None else ("^", node, power)

    def _unbracketed(self) -> Node:
        """What a function without brackets is of: the product up to the next function, bracket or sign: \\sin 2t."""
        node = self._factor()
        while self._starts_factor() and self.text not in ("(", "[", "|") and self.text[1:] not in FUNCTIONS:
            node = ("*", node, self._factor())
        return node

    def _argument(self, single_digit: bool = False) -> Node:
        """A group, or a single token; of \\frac12 a digit each."""
        if self.text == "{" or (self.text == "(" and not single_digit):
            return self._group()
        if single_digit and self.kind == "number" and len(self.text) > 1:
            if len(self.text) != 2 or self._tokens[self._at - 1][1] != "\\frac":
                raise UnreadableError
            self._tokens[self._at : self._at + 1] = [("number", digit) for digit in self.text]
            self.text = self._tokens[self._at][1]
        if self.text == "-":
            raise UnreadableError
        return self._atom()

    def _symbol(self, name: str) -> Node:
        """A variable with its subscript and primes."""
        while self.text in ("_", "'") and self.kind:
            name += "'" if self._next() == "'" else f"_{self._raw()}"
        return ("symbol", name)

    def _raw(self) -> str:
        """The text of a group, or of a single token."""
        if not self.kind:
            raise UnreadableError
        if not self._take("{"):
            return self._next()
        depth, raw = 1, ""
        while depth:
            if not self.kind:
                raise UnreadableError
            depth += {"{": 1, "}": -1}.get(self.text, 0)
            raw += self._next() if depth else ""
        self._next()
        return raw


def _tokens(text: str, split_names: bool) -> Iterator[tuple[str, str]]:
    """(kind, text) of each token: numbers, commands, single letters, names such as AB, signs."""
    for found in _TOKEN.finditer(text):
        kind, token = found.lastgroup, found.group()
        if kind == "letters":
            yield from _split_letters(token, split_names)
        elif kind == "other" and token.isalpha():  # Greek
            yield "letters", token
        elif token == "\\|":
            yield "other", "|"
        elif kind != "space":
            yield kind, token


def _split_letters(run: str, split_names: bool) -> Iterator[tuple[str, str]]:
    for length in (len(run), len(run) - 1):  # sin, and sinx
        if run[:length] in FUNCTIONS or run[:length] in ("sqrt", "pi"):
            yield "command", "\\" + run[:length]
            yield from (("letters", letter) for letter in run[length:])
            return
    if len(run) > 1 and run.isupper() and not split_names:
        yield "letters", run
    else:
        yield from (("letters", letter) for letter in run)


def _repeating(text: str) -> Fraction:
    r"""0.1\overline{6} as 1/6."""
    fixed, _, period = re.sub(r"\\(?:overline|dot|bar)\{(\d+)\}", r" \1", text).partition(" ")
    whole, _, places = fixed.partition(".")
    start = Fraction(f"{whole or 0}.{places or 0}")
    return start + Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(places))
