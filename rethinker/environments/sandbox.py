"""The first wall around code that the policy writes: what it may say, by an allow-list on its syntax tree.

Whatever is not known to be harmless is refused. No name begins with two underscores, and an attribute is only one of
the public methods of numbers, texts, containers and the functions below; so nothing leads from an object to its class's
relatives, to a frame, to a module or to the real builtins. What the code may import are namespaces made here. Bounds on
time and memory are the process's (python.py).
"""

from __future__ import annotations

import ast
import bisect
import builtins
import cmath
import collections
import decimal
import fractions
import functools
import heapq
import itertools
import math
import operator
import re
import statistics
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

from rethinker.environments.texts import cut_middle

FILE = "<code>"  # what tracebacks call the code


def _public(module: Any, names: str | Iterable[str] = ()) -> dict[str, Any]:
    names = names.split() if isinstance(names, str) else names
    return {name: getattr(module, name) for name in names or dir(module) if name[0] != "_"}


MODULES: dict[str, dict[str, Any]] = {
    "math": _public(math),
    "cmath": _public(cmath),
    "fractions": _public(fractions, "Fraction"),
    "decimal": _public(decimal, ["Decimal", "getcontext", *(name for name in dir(decimal) if name[:6] == "ROUND_")]),
    "statistics": _public(statistics, statistics.__all__),
    "itertools": _public(itertools),
    "functools": _public(functools, "reduce partial cache lru_cache cmp_to_key"),
    "collections": _public(collections, "Counter OrderedDict defaultdict deque"),
    # attrgetter and methodcaller take names of attributes as text
    "operator": _public(operator, [n for n in operator.__all__ if n not in ("attrgetter", "methodcaller")]),
    "heapq": _public(heapq, heapq.__all__),
    "bisect": _public(bisect, "bisect bisect_left bisect_right insort insort_left insort_right"),
    "re": _public(re, "compile search match fullmatch split findall finditer sub subn escape I IGNORECASE M S"),
}
"""What code may import: by module its public functions, and no module among them."""

BUILTINS = _public(
    builtins,
    """abs all any bin bool callable chr complex dict divmod enumerate filter float format frozenset hash hex int
    isinstance issubclass iter len list map max min next oct ord pow range repr reversed round set slice sorted str sum
    tuple zip ArithmeticError AssertionError AttributeError Exception IndexError KeyError LookupError NameError
    NotImplementedError OverflowError RecursionError RuntimeError StopIteration TypeError ValueError
    ZeroDivisionError""",
)

_TYPES = (str, int, float, complex, list, tuple, dict, set, frozenset, range, slice, fractions.Fraction)
_TYPES += (collections.Counter, collections.OrderedDict, collections.defaultdict, collections.deque)
_TYPES += (decimal.Decimal, re.Pattern, re.Match, statistics.NormalDist)
# A text's format looks up attributes that stand in the text.
ATTRIBUTES = {name for kind in _TYPES for name in _public(kind)} - {"format", "format_map", "encode"}
ATTRIBUTES |= {name for names in MODULES.values() for name in names} | {"prec"}
SETTABLE = {"prec"}  # of a decimal context

NODES = tuple(
    getattr(ast, name)
    for name in """Module Expression Expr Assign AugAssign AnnAssign NamedExpr For While If IfExp Break Continue Pass
    Delete FunctionDef Return Lambda arguments arg Call keyword Starred Yield YieldFrom Try ExceptHandler Raise Assert
    Global Nonlocal Import ImportFrom alias BinOp UnaryOp BoolOp Compare Constant Name Attribute Subscript Slice List
    Tuple Dict Set ListComp SetComp DictComp GeneratorExp comprehension JoinedStr FormattedValue expr_context operator
    unaryop boolop cmpop""".split()
)
_NAMED = ("id", "arg", "name", "asname", "attr")  # fields of nodes that hold a name


class ForbiddenError(Exception):
    """Code says what it may not; the text is for who wrote it."""


def check(tree: ast.AST) -> None:
    """
    Raises:
        ForbiddenError: the code says something that is not on the list.
    """
    for node in ast.walk(tree):
        line = f" (line {node.lineno})" if hasattr(node, "lineno") else ""
        if not isinstance(node, NODES):
            raise ForbiddenError(f"{type(node).__name__} cannot be used here{line}")
        names = [name for field in _NAMED if isinstance(name := getattr(node, field, None), str)]
        names += node.names if isinstance(node, ast.Global | ast.Nonlocal) else []
        for name in names:
            if name.startswith("__") or (isinstance(node, ast.alias) and name.startswith("_")):
                raise ForbiddenError(f"the name {name[:40]} cannot be used here{line}")
        if isinstance(node, ast.Attribute):
            known = ATTRIBUTES if isinstance(node.ctx, ast.Load) else SETTABLE
            if node.attr not in known:
                raise ForbiddenError(f"the attribute .{node.attr[:40]} cannot be used here{line}")
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
        for module in modules:
            if module not in MODULES:
                raise ForbiddenError(f"{module[:40]} cannot be imported{line}; there are {', '.join(MODULES)}")
        for name in (alias.name for alias in node.names) if isinstance(node, ast.ImportFrom) else ():
            if name != "*" and name not in MODULES[node.module]:
                raise ForbiddenError(f"{node.module} has no {name[:40]} here{line}")


def run(code: str, most: int) -> tuple[str, str]:
    """What a piece of code prints or, if it prints nothing, the value of its last expression.

    Args:
        most: characters of the text; a longer one loses its middle.

    Returns:
        (text, ""), or (what went wrong behind what was printed, `forbidden` or `error`).

    Raises:
        MemoryError: the process has no more, and is to end.
    """
    printed = _Printed(most)
    try:
        tree = ast.parse(code, FILE)
        check(tree)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        decimal.setcontext(decimal.Context())
        spaces = {name: SimpleNamespace(**names) for name, names in MODULES.items()}
        scope = {**spaces, "__builtins__": BUILTINS | {"print": printed.print, "__import__": _importer(spaces)}}
        exec(compile(tree, FILE, "exec"), scope)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), FILE, "eval"), scope)
            if value is not None and not printed.text:
                printed.print(repr(value))
    except MemoryError:
        raise
    except ForbiddenError as error:
        return str(error), "forbidden"
    except BaseException as error:
        said = printed.text.rstrip("\n") + "\n" if printed.text else ""
        return cut_middle(_anywhere(f"{said}{_told(error)}"), most), "error"
    return cut_middle(_anywhere(printed.text.rstrip("\n")) or "(it printed nothing)", most), ""


def _anywhere(text: str) -> str:
    """The text without addresses of objects, which differ from process to process."""
    return re.sub(r"\bat 0x[0-9a-f]+", "at 0x...", text)


class _Printed:
    """What code prints, without most of its middle where it is long."""

    def __init__(self, most: int) -> None:
        self.text, self._most = "", most

    def print(self, *values: Any, sep: str | None = None, end: str | None = None, flush: bool = False) -> None:
        sep, end = " " if sep is None else sep, "\n" if end is None else end
        self.text += sep.join(map(str, values)) + end
        if len(self.text) > 8 * self._most:
            self.text = cut_middle(self.text, 2 * self._most)


def _importer(spaces: dict[str, SimpleNamespace]) -> Any:
    """What an import statement calls; `check` has seen the names."""

    def importer(name: str, globals: Any = None, locals: Any = None, names: Any = (), level: int = 0) -> Any:
        if level or name not in spaces:
            raise ForbiddenError(f"{name} cannot be imported")
        return spaces[name]

    return importer


def _told(error: BaseException) -> str:
    """The error as the code's author reads it, with the line where it arose."""
    line, trace = getattr(error, "lineno", None) if isinstance(error, SyntaxError) else None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == FILE:
            line = trace.tb_lineno
        trace = trace.tb_next
    try:
        said = error.msg if isinstance(error, SyntaxError) else str(error)
    except Exception:  # of values that cannot be shown
        said = ""
    return f"{type(error).__name__}{f': {said}' if said else ''}{f' (line {line})' if line else ''}"[:1000]
