"""Random formulas, ways to write them, and what they are worth by Python's own arithmetic."""

from __future__ import annotations

import cmath
import random
from collections.abc import Iterator

Tree = tuple | int | str
"""(operation, operands...), an integer, or a variable."""


def tree(draw: random.Random, depth: int) -> Tree:
    if depth == 0:
        return draw.choice([draw.randint(2, 9), draw.choice("xyRrn")])
    operation = draw.choice(["+", "-", "*", "/", "^", "sqrt", "sin"])
    if operation in ("sqrt", "sin"):
        return operation, tree(draw, depth - 1)
    return operation, tree(draw, depth - 1), draw.randint(2, 4) if operation == "^" else tree(draw, depth - 1)


def written(node: Tree, draw: random.Random) -> str:
    """The tree in LaTeX, in one of several ways."""
    if not isinstance(node, tuple):
        return str(node)
    operation, *operands = node
    texts = [written(operand, draw) for operand in operands]
    grouped = [
        f"({text})" if isinstance(operand, tuple) else text for text, operand in zip(texts, operands, strict=True)
    ]
    if operation == "/":
        return draw.choice(
            [
                f"\\frac{{{texts[0]}}}{{{texts[1]}}}",
                f"{grouped[0]}/({texts[1]})",
                f"\\dfrac{{{texts[0]}}}{{{texts[1]}}}",
            ]
        )
    if operation == "sqrt":
        return draw.choice([f"\\sqrt{{{texts[0]}}}", f"({texts[0]})^{{\\frac{{1}}{{2}}}}", f"({texts[0]})^{{0.5}}"])
    if operation == "sin":
        return draw.choice([f"\\sin({texts[0]})", f"\\sin\\left({texts[0]}\\right)"])
    if operation == "^":
        return f"({texts[0]})^{{{texts[1]}}}"
    if operation == "*":
        return draw.choice(["\\cdot ", "\\times ", "*"]).join(draw.sample(grouped, 2))
    if operation == "+":
        return "+".join(draw.sample(grouped, 2))
    return "-".join(grouped)


def worth(node: Tree, point: dict[str, complex]) -> complex:
    if not isinstance(node, tuple):
        return complex(node) if isinstance(node, int) else point[node]
    operation, *operands = node
    values = [worth(operand, point) for operand in operands]
    return {
        "+": lambda a, b: a + b,
        "-": lambda a, b: a - b,
        "*": lambda a, b: a * b,
        "/": lambda a, b: a / b,
        "^": lambda a, b: a**b,
        "sqrt": cmath.sqrt,
        "sin": cmath.sin,
    }[operation](*values)


def mutants(node: Tree, draw: random.Random) -> Iterator[Tree]:
    """The tree with one leaf or operation changed."""
    if not isinstance(node, tuple):
        yield node + 1 if isinstance(node, int) else draw.choice([c for c in "xyRrn" if c != node])
        yield (node - 1 or 7) if isinstance(node, int) else node.swapcase()
        return
    operation, *operands = node
    if operation in "+-*/":
        yield draw.choice([o for o in "+-*/" if o != operation]), *operands
    for i, operand in enumerate(operands):
        for changed in mutants(operand, draw):
            yield operation, *operands[:i], changed, *operands[i + 1 :]
