"""What a question says of its answer: an order, a rounding, a ratio, a percentage, a base, a place, a name."""

from __future__ import annotations

import re
from functools import lru_cache

_EXTREME = r"(?:least|most|\w{2,}est|first|left|top|bottom|small|low|short)"
_PATTERNS = {
    "arrangement": (
        r"\b(?:arrange|rank|sort|list the steps)\b(?! of)|\border (?:the|these|them)\b|\b(?:what|which) order\b"
        r"|\b(?:correct|right) order\b|\border of the\b|\bsequence of (?:steps|events|letters|moves)\b|排序"
    ),
    "order": (
        r"\border (?:from|by)\b|\bin (?:an? |the )?(?:(?:\w+ing|alphabetical|chronological|numerical|reverse) )?order\b"
        r"(?! to)"
        rf"|\bfrom (?:the )?{_EXTREME} to (?:the )?(?:\w+est|last|most"
        r"|right|top|bottom|large|high|long)\b"
        r"|按.{0,6}顺序|从.{1,2}到.{1,2}排|[从由](?:小到大|大到小)"
    ),
    # Each item has its own place, whatever the numbers are.
    "places": r"\brespectively\b|\bin that order\b|\bnext (?:two|three|four) (?:terms|numbers)\b|依次|分别",
    "place": r"\b(?:box|bbox|bounding|coordinates?|points?|positions?|pixels?|locat\w+|vector)\b",
    "interval": r"\b(?:intervals?|range|domain|(?:in|de)creasing|positive|negative|which values|inequalit\w+)\b",
    "rounding": (
        r"\bround(?:ed|ing)? (?:your|the|off|to|up|down|it|answers?|each|all)\b"
        r"|\bnearest (?:whole|integer|tenth|hundred|thousand|ten|degree|cent|percent|dollar|unit|number|\w*met"
        r"|inch|foot|mile|minute|second|year|day|\d)|\bdecimal places?\b"
        r"|\bsignificant (?:figures?|digits?)\b|\bapproximate (?:value|answer)|\bapproximately (?:how|what)\b|保留"
    ),
    "ratio": r"\bratios?\b|\bproportion|之比|比是|比值|的比",
    "percent": r"\bwhat (?:\w+ ){0,3}percent|\bpercentage\b|\b(?:how many|as a|in) percent|\bwhat %|百分",
    "segment": r"\bsegments?\b",
}
_COMPILED = {name: re.compile(pattern, re.IGNORECASE) for name, pattern in _PATTERNS.items()}
_BASES = {"2": "binary|base two", "3": "base three", "5": "base five", "8": "octal|base eight", "16": "hexadecimal"}
_ASKING = r"(?:\bfind|\bwhat(?:'s| is| are)|\bvalues? of|\bcompute|\bdetermine|\bcalculate|\bevaluate|求)"
# What may follow an unknown that is one letter; else it is an article.
_AFTER = r"(?=\s*(?:[?.!,;:]|$|，|。|\b(?:if|when|where|such|given|so|in|to|from|for|that|as)\b))(?!\s*,\s*[a-z]\b)"
_ASKED = re.compile(
    rf"(?i:{_ASKING}|\bsolve for)"
    r"(?:\s+(?:the|measures?|lengths?|values?|size|degree|of|side|segment|all|possible))*\s*"
    r"(\\angle ?[A-Z]{1,3}|[A-Z]{2,4}(?![A-Za-z])|[a-zA-Z]_(?:\w|\{\w+\})|[a-zA-Z]\(\w+\)"
    rf"|\\(?:alpha|beta|gamma|theta|phi)|[a-z](?!\w){_AFTER})"
)
_NO_CLAUSE = r"(?:(?!\b(?:when|if|given|where|and|such|with)\b)[^.?!;=])"
LONGEST_ASKED = 100


@lru_cache(maxsize=16384)
def asks_for(what: str, question: str) -> bool:
    """Whether a question asks for an arrangement, order, places, place, interval, rounding, ratio, percent, segment."""
    return _COMPILED[what].search(question) is not None


def asks_for_base(base: str, question: str) -> bool:
    """Whether a question names a number's base."""
    words = f"base[- ]?\\$?{base}(?!\\d)|{_BASES.get(base, 'base ' + base)}|{base}\\s*进制"
    return re.search(words, question, re.IGNORECASE) is not None


def asks_for_expression(expression: str, question: str) -> bool:
    """Whether what a question asks for is written as an expression, such as x+5 in `What is x + 5?`."""
    bare = re.sub(r"[\s\\]", "", expression)
    if not 1 < len(bare) <= LONGEST_ASKED:
        return False
    asked = r"\s*".join(map(re.escape, bare))
    behind = r"(?![\w(^_}\]|]|\s*[-+=<>*/·]|\s*(?:cdot|times)|\.\d)"
    found = rf"{_ASKING}{_NO_CLAUSE}{{0,25}}?(?<![\w.+\-*/^({{\[|]){asked}{behind}"
    return re.search(found, re.sub(r"[$\\]", "", question), re.IGNORECASE) is not None


@lru_cache(maxsize=16384)
def asked_name(question: str) -> str | None:
    r"""The name that a question asks for, without spaces: y in `What is y?`, \angleA in `Find angle A`, AB, x_1."""
    question = re.sub(r"∠\s*|(?<!\\)\bangle\s+(?=[A-Z])", r"\\angle ", question.replace("$", ""))
    found = _ASKED.search(question)
    return found and found[1].replace(" ", "")


def asks_for_word(word: str, question: str) -> bool:
    """Whether a question asks for what a word says, such as the radius."""
    return re.search(rf"{_ASKING}{_NO_CLAUSE}{{0,25}}\b{re.escape(word)}\b", question, re.IGNORECASE) is not None


def in_order_of(names: list[str], question: str) -> list[str]:
    """Names as the question lists them, where it has them all; else by the alphabet."""
    places = [re.search(rf"(?<![A-Za-z\\]){re.escape(name)}(?![A-Za-z])", question) for name in names]
    if None in places:
        return sorted(names)
    return [name for _, name in sorted(zip([place.start() for place in places], names, strict=True))]


def contains(text: str, question: str) -> bool:
    """Whether a text stands in a question, spaces and dollar signs aside."""
    return re.sub(r"[\s$]", "", text) in re.sub(r"[\s$]", "", question)
