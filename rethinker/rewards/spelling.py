r"""One spelling for what people write in many ways: LaTeX and Markdown dressing, Unicode signs, full-width letters.

`clean` frees an answer of what carries no meaning; `same_words` compares two texts, folding the case of words only:
Red is red, but R is not r and CO is not Co.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from itertools import pairwise

_WRAPPERS = re.compile(
    r"\\(?:text|textbf|textit|textrm|texttt|textsf|textnormal|mathrm|mathbf|mathit|mathsf|mathtt|mbox|hbox|operatorname|bm"
    r"|boldsymbol|emph|underline|displaylines)\s*\{([^{}]*)\}"
)
# Stands before a letter that was set as text after a space, as units are: \text{ m} is a metre, m a variable.
UNIT_MARK = "\1"
_SET_AS_UNIT = re.compile(
    r"(?:(?:\\[ ,;:]|~)\s*\\(?:text|textrm|mathrm|mbox)\s*\{\s*|\\(?:text|textrm|mbox)\s*\{(?:\s|\\[ ,])+"
    r"|(?:(?<=[\d)}])(?<!circ\})|(?<=\\pi))\\text\s*\{)"
    r"([A-Za-z])(\s*\^\s*(?:[23]|\{[23]\}))?\s*\}"
)
# An escape in a string that was no raw one: \frac with a form feed, \boxed with a backspace, \text with a tab.
_ESCAPES = {"\a": "\\a", "\b": "\\b", "\f": "\\f", "\v": "\\v"}
_LOST_TAB = re.compile(r"\t(?=(?:ext|frac|imes|heta|riangle|an|au|o)(?![a-z]))|\t(?=ext[a-z]*\{)")
FULL_WIDTH = {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)} | {
    0x3000: " ",
    0x3001: ",",
    0x3002: ".",
    0x2044: "/",
}
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_PART = r"(?:[^{}]|\{[^{}]*\}){1,40}?"  # of {a \over b}
_SPELLINGS = [
    (re.compile(r"\\\\(?=[a-z]{2})"), r"\\"),  # escaped twice, where no line can end
    (re.compile(r"\*\*(?=\S)"), "^"),
    (re.compile(r"\.\.\.+|…|\\(?:ldots|cdots|dotsc?)(?![A-Za-z])"), r"\\dots "),
    (re.compile(r"(?<!\d)(\d{0,9}\.\d{0,9}?)(\d{1,3}?)\2{2,}\\dots "), r"\1\\overline{\2}"),  # 0.333...
    (re.compile(rf"\{{({_PART})\\over(?![A-Za-z])({_PART})\}}"), r"\\frac{\1}{\2}"),
    (re.compile(rf"^({_PART})\\over(?![A-Za-z])({_PART})$"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\[lr]brace(?![A-Za-z])"), lambda found: "\\{" if found[0] == "\\lbrace" else "\\}"),
    (re.compile(r"\\[lr]angle(?![A-Za-z])"), lambda found: "(" if found[0] == "\\langle" else ")"),
    (re.compile(r"\{([^{}]+)\\choose(?![A-Za-z])([^{}]+)\}"), r"\\binom{\1}{\2}"),
    (re.compile(r"\^\s*(?:\{\s*\\prime\s*\}|\\prime(?![A-Za-z]))|[’′]"), "'"),
    (re.compile(r"\b([ap])\.m\b\.?", re.IGNORECASE), r"\1m"),
    (re.compile(r"\\(?:left|right|[bB]igg?[lrm]?|middle|displaystyle|textstyle|limits|nolimits)(?![A-Za-z])"), ""),
    (re.compile(r"\{\s*\\(?:bf|rm|it|sf|tt|sl|bfseries|itshape|rmfamily)(?![A-Za-z])\s*([^{}]*)\}"), r"\\text{\1}"),
    (re.compile(r"\\(?:bf|rm|it|sf|tt|sl|mathstrut|strut)(?![A-Za-z])"), ""),
    (re.compile(r"\\(?:h|v)?phantom\s*\{[^{}]*\}"), ""),
    (re.compile(r"\\[dtc]frac(?![A-Za-z])|(?<![\\A-Za-z])[dt]?frac(?=\s*\{)"), r"\\frac"),
    (re.compile(r"\\[dt]binom(?![A-Za-z])"), r"\\binom"),
    (re.compile(r"\\(?:lvert|rvert|vert)(?![A-Za-z])"), "|"),
    (re.compile(r"(?<=\d)(?:\s*\{\s*,\s*\}|,\\!)\s*(?=\d)"), ","),
    (re.compile(r"(?<=\d)\\[,!;](?=\d{3}(?!\d))"), ""),
    (re.compile(r"(?<!\\)\\[,;:! ]|(?<=\S)~|\\q?quad(?![A-Za-z])|\\(?:hspace|hskip)\s*\{[^{}]*\}"), " "),
    (re.compile(r"(?<!\\)\\[()\[\]]"), ""),
    (re.compile(r"\\%"), "%"),
    (
        re.compile(
            r"(?:\s*(?:\*|\\cdot))?\s*(?:\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z])|\{\s*\\degree\s*\})"
            r"|\\degrees?(?![A-Za-z])|(?<=\d)\s*\{?\\circ(?![A-Za-z])\}?"
            r"|\^\s*\{?\s*(?:\\text\s*\{\s*o\s*\}|circ(?![a-z]))\s*\}?|(?<=\d)\^\s*(?:\{\s*o\s*\}|o(?![A-Za-z])))"
        ),
        "°",
    ),
    (re.compile(r"º|˚"), "°"),
    (re.compile(r"℃"), "°C"),
    (re.compile(r"(?<=\d)\s*\\mu(?![A-Za-z])\s*(?=[A-Za-z])"), " μ"),
    (re.compile(r"(?<=\d)\s*(?:\\[,; ]\s*)?\\Omega(?![A-Za-z])$"), " Ω"),
    (re.compile(r"(?<!frac\d)(?<!frac \d)(?<=\d)\s*\{\s*([A-Za-z][A-Za-z ]+)\}"), r" \1"),  # 69{degrees}
    (re.compile(r"\\leqslant(?![A-Za-z])|\\le(?![A-Za-z])|≤|⩽|<="), r"\\leq "),
    (re.compile(r"\\geqslant(?![A-Za-z])|\\ge(?![A-Za-z])|≥|⩾|>="), r"\\geq "),
    (re.compile(r"\\lt(?![A-Za-z])"), "<"),
    (re.compile(r"\\gt(?![A-Za-z])"), ">"),
    (re.compile(r"\\ne(?![A-Za-z])|≠|!="), r"\\neq "),
    (re.compile(r"[−–—]"), "-"),
    (re.compile(r"×"), r"\\times "),
    (re.compile(r"[·⋅∙]"), r"\\cdot "),
    (re.compile(r"÷|\\div(?![A-Za-z])"), "/"),
    (re.compile(r"π"), r"\\pi "),
    (re.compile(r"∞|(?<![A-Za-z\\])infinity(?![A-Za-z])"), r"\\infty "),
    (re.compile(r"±|\+/-"), r"\\pm "),
    (re.compile(r"∠"), r"\\angle "),
    (re.compile(r"△"), r"\\triangle "),
    (re.compile(r"∪"), r"\\cup "),
    (re.compile(r"∈"), r"\\in "),
    (re.compile(r"∅|\\varnothing(?![A-Za-z])"), r"\\emptyset "),
    (re.compile(r"ℝ|\\(?:mathbb|Bbb|mathbf)\s*(?:\{\s*R\s*\}|R(?![A-Za-z]))"), r"\\reals "),
    (re.compile(r"≈|\\(?:thickapprox|approxeq|simeq)(?![A-Za-z])"), r"\\approx "),
    (re.compile(r"√\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"√\s*(\d+(?:\.\d+)?|[A-Za-z])(?![A-Za-z])"), r"\\sqrt{\1}"),
    (re.compile(r"√\s*(?=\{)"), r"\\sqrt"),
    (re.compile(r"∛\s*(\d+|[A-Za-z])"), r"\\sqrt[3]{\1}"),
    (re.compile(r"([⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+)"), lambda found: f"^{{{found[1].translate(_SUPERSCRIPTS)}}}"),
    (re.compile(r"([₀₁₂₃₄₅₆₇₈₉]+)"), lambda found: f"_{{{found[1].translate(_SUBSCRIPTS)}}}"),
    (re.compile(r"(\d?)([¼½¾⅐-⅞])"), lambda found: f"{found[1]} {_vulgar(found[2])}"),
]
_ROWS = re.compile(r"\\begin\{((?:cases|aligned|align|gathered)\*?)\}(.*?)\\end\{\1\}", re.DOTALL)
_OPTION_MARK = re.compile(r"^([A-ZＡ-Ｚ])、")
_ANSWER_IS = re.compile(
    r"^答案\s*(?:是|为|:)?\s*|^答\s*(?:是|为|:)\s*|^(?:the\s+)?(?:final\s+|correct\s+)?answer\s*(?:is|:)\s*:?\s*",
    re.IGNORECASE,
)
_IDLE_SPACES = re.compile(r"\s*([=+\-*/^:;<>|_])\s*|([(\[{])\s+|\s+([)\]}])|\s+(\{)")
_COMMA_SPACES = re.compile(r"\s+,\s*|(?<!\d),\s+|,\s+(?!\d)")  # but "1, 234" are two numbers and "1,234" is one
_SPACED_THOUSANDS = re.compile(r"(?<![\d.,] )(?<![\d.,)}])\b([1-9]\d{0,2})((?: \d{3})+)(?![\d ]*\d)(?![/,]\d)")

THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
FUNCTIONS = frozenset("sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log lg exp".split())
# Words that mathematics is written with; any other word of three letters or more is prose.
_MATH_WORDS = FUNCTIONS | frozenset("lim max min sqrt gcd lcm det mod inf".split())
_SHORT_WORDS = frozenset("no on in up to of or at it is us we he me my by if so as an do go am pm ok".split())
_NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
_SAME_WORDS = {word: str(number) for number, word in enumerate(_NUMBERS)}
_SAME_WORDS |= {
    "true": "yes",
    "false": "no",
    "对": "yes",
    "正确": "yes",
    "错": "no",
    "错误": "no",
    "是": "yes",
    "否": "no",
}
_ARTICLE = re.compile(r"^(?:an?|the) (?=[a-z]{3})", re.IGNORECASE)
_CAMEL = re.compile(r"[a-z][A-Z]|[A-Z]{2}[a-z]")  # NaCl, AABb
_FORMULA = re.compile(r"(?=[A-Z]*[a-z])(?:[A-Z][a-z]?){2,}")  # of chemistry, as NaCl
_RUNS = re.compile(r"(\\?[A-Za-z]+)")
_ENVIRONMENTS = re.compile(r"\\(?:begin|end)\{[a-z]+\*?\}")
_LINKED = re.compile(r"(?:(?<=[A-Z)])|(?<=[A-Z][a-z]))_(?:\{(\w+)\}|(\w))")  # H_2O is H2O


@lru_cache(maxsize=65536)
def clean(text: str) -> str:
    """Free an answer of LaTeX and Markdown dressing, of spaces that mean nothing and of the final period."""
    text = text.strip(" \n\r")
    for escape, meant in _ESCAPES.items():
        text = text.replace(escape, meant)
    text = _OPTION_MARK.sub(r"\1.", _LOST_TAB.sub(r"\\t", text).strip()).translate(FULL_WIDTH)
    text = " ".join(text.split())
    if len(text) > 4 and text.startswith("**") and text.endswith("**"):
        text = text[2:-2]
    text = text.replace("\\$", "\0")
    if text.count("$") % 2 == 0:  # a single one is a currency sign
        text = text.replace("$", "")
    text = text.replace("\0", "$")
    text = _SET_AS_UNIT.sub(rf" {UNIT_MARK}\1\2", text)
    text = _ROWS.sub(lambda found: re.sub(r"\s*\\\\\s*", ", ", found[2].replace("&", " ")).strip(", "), text)
    for pattern, spelling in _SPELLINGS if "\\begin" not in text else _SPELLINGS[1:]:
        text = pattern.sub(spelling, text)
    for _ in range(3):  # wrappers nest, as in \textbf{\text{B}}
        text, found = _WRAPPERS.subn(_unwrapped, text)
        if not found:
            break
    text = _COMMA_SPACES.sub(",", _IDLE_SPACES.sub(r"\1\2\3\4", " ".join(text.split()))).strip().rstrip(".,; \\")
    text = _SPACED_THOUSANDS.sub(lambda found: found[1] + found[2].replace(" ", ""), text)
    while len(text) > 1 and text[0] == "{" and closing(text) == len(text) - 1:
        text = text[1:-1].strip().rstrip(". ")
    if len(text) > 2 and text[0] == text[-1] and text[0] in "\"'`":
        text = text[1:-1].strip().rstrip(". ")
    bare = _ANSWER_IS.sub("", text)
    return bare or text


def _unwrapped(found: re.Match[str]) -> str:
    r"""What \text{} holds; after a digit it is apart, since 3\text{mg} is a mass and 3mg may be a product."""
    before = found.string[: found.start()]
    apart = before[-1:].isdigit() and found[1][:1].isalpha()
    return f" {found[1]}" if apart else found[1]


def _vulgar(char: str) -> str:
    return unicodedata.normalize("NFKC", char).replace("\u2044", "/")


def closing(text: str) -> int:
    """Where the bracket that opens a text is closed (by any bracket: intervals are half open); -1 if nowhere."""
    depth = 0
    for i, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if depth == 0 and char in ")]}":
            return i
    return -1


def split_outside(text: str, separators: re.Pattern[str]) -> tuple[list[str], list[str]]:
    """The parts of a text between separators that stand in no bracket, and these separators."""
    parts, found, depth, start, i = [], [], 0, 0, 0
    while i < len(text):
        if text[i] in "([{":
            depth += 1
        elif text[i] in ")]}":
            depth -= 1
        elif depth == 0 and (separator := separators.match(text, i)):
            parts.append(text[start:i].strip())
            found.append(separator.group())
            start = i = separator.end()
            continue
        i += 1
    return [*parts, text[start:].strip()], found


def same_words(left: str, right: str) -> bool:
    """Whether two cleaned texts say the same: the case of words does not count, that of symbols does."""
    left, right = (_ARTICLE.sub("", _LINKED.sub(r"\1\2", side)) for side in (left, right))
    if left == right:
        return True
    meant = [_SAME_WORDS.get(side.casefold()) for side in (left, right)]
    if (meant[0] or left.casefold()) == (meant[1] or right.casefold()) and any(meant):
        return True
    if left.casefold() != right.casefold():
        return False
    ours, theirs = _RUNS.split(left), _RUNS.split(right)
    if len(ours) != len(theirs):
        return False
    words = any(map(_is_word, (*ours, *theirs)))
    return all(
        mine == yours
        or ((_is_word(mine) or _is_word(yours)) and not (_CAMEL.search(mine) or _CAMEL.search(yours)))
        or (words and mine.casefold() == "a")
        for mine, yours in zip(ours, theirs, strict=True)
    )


def _is_word(run: str) -> bool:
    """Whether a run of letters is a word, rather than a command, a product such as abc, or a name such as ABC."""
    low = run.casefold()
    if _CAMEL.search(run):
        return False
    if not run.isalpha() or low in _MATH_WORDS:
        return not run.isascii() and run.isalpha()
    if len(run) < 3:
        return low in _SHORT_WORDS
    alphabetical = all(ord(b) == ord(a) + 1 for a, b in pairwise(low))
    return not alphabetical and not set(low).isdisjoint("aeiouy") and not (run.isupper() and len(run) < 5)


def is_prose(text: str) -> bool:
    """Whether a text has words that are no mathematics; as mathematics their letters would be multiplied."""
    if any(c.isalpha() and not c.isascii() and not "\u0370" <= c <= "\u03ff" for c in text):  # Greek is mathematics
        return True
    words = re.findall(r"(?<![\\A-Za-z])[A-Za-z]+", _ENVIRONMENTS.sub("", text))
    if any(len(word) > 2 and (_is_word(word) or _FORMULA.fullmatch(word)) for word in words):
        return True
    return bool(words) and all(word.casefold() in _SHORT_WORDS for word in words) and not re.search(r"[\d\\=^+]", text)
