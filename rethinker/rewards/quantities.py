r"""Numbers as people write them in answers: thousands, decimals, fractions, powers of ten, percent, currency, units.

Values are exact fractions, so nothing is lost to rounding and 1,000,001 never equals 1,000,000. Units are compared by
name (cm = centimeters), never converted: 5 cm is not 0.05 m, as the question asked for one of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

# A fraction such as 1/3 equals a decimal such as 0.333333 within this relative difference.
RATIO_TOLERANCE = Fraction(2, 10**6)
# Beyond this power of ten an exact value is a memory bomb, not an answer.
LARGEST_EXPONENT = 400

# Units by the name that all their spellings share, which comes first.
_UNITS = """
mm millimeter millimetre; cm centimeter centimetre; dm decimeter decimetre; m meter metre; km kilometer kilometre;
in inch inches; ft foot feet; yd yard; mi mile; mph; ml mL milliliter millilitre; L l liter litre;
mg milligram; g gram; kg kilogram; t ton tonne; lb lbs pound; oz ounce; mol mole;
ms millisecond; s sec second; min minute; h hr hour; day; week; month; year yr; Hz hertz; kHz; MHz; GHz;
N newton; J joule; kJ; W watt; mW; kW; MW; V volt; A amp ampere; mA; Ω ohm; Pa pascal; kPa; MPa;
K kelvin; °C celsius; °F fahrenheit; ° deg degree; rad radian;
$ dollar USD; ¢ cent; € euro EUR; £ GBP; ¥ yen yuan RMB; % percent pct percentage; unit
"""
_EXACT = {name: names.split()[0] for names in _UNITS.split(";") for name in names.split()}
# Without regard to case, but not where case is the prefix: mW and MW.
_FOLDED = {name.casefold(): unit for name, unit in _EXACT.items() if len(name) > 1 and unit not in ("mW", "MW")}
_TEMPERATURES = dict.fromkeys(("degrees c", "degree celsius", "degrees celsius", "° c", "°celsius"), "°C")
_TEMPERATURES |= dict.fromkeys(("degrees f", "degree fahrenheit", "degrees fahrenheit", "° f"), "°F")
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_CURRENCIES = "$€£¥"
_NO_UNIT = frozenset("pi sqrt sin cos tan log ln exp and or to by not times plus minus over per from is".split())

_NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
_VALUE = re.compile(
    rf"""(?P<sign>[+-]?)(?P<currency>[{_CURRENCIES}]?)(?P<sign2>[+-]?)(?:
        (?P<whole>\d{{1,9}})(?:\s+(?P<mixed_top>\d{{1,9}})/(?P<mixed_bottom>\d{{1,9}})
                            |\s*\\frac\{{(?P<mixed_top2>\d{{1,9}})\}}\{{(?P<mixed_bottom2>\d{{1,9}})\}})
      | \\frac(?:\{{(?P<latex_top>-?{_NUMBER})\}}\{{(?P<latex_bottom>{_NUMBER})\}}
               |\s*(?P<digit_top>\d)\s*(?P<digit_bottom>\d))
      | (?P<top>{_NUMBER})/(?P<bottom>{_NUMBER})
      | (?P<number>{_NUMBER})(?:[eE](?P<exponent>[+-]?\d{{1,4}})(?![\d.])
                             |\s*(?:\\times|\\cdot|x|\*)\s*10\^(?:\{{(?P<power>[+-]?\d{{1,4}})\}}|(?P<power2>[+-]?\d{{1,4}})))?
    )(?![\d.,/^])""",
    re.VERBOSE,
)
_UNIT_TEXT = re.compile(r"[A-Za-zµμΩ°%$€£¥¢][A-Za-zµμΩ°%$€£¥¢ /^0-9{}.\-]*")
_TRAILING_UNIT = re.compile(
    r"^(?P<body>.*(?:[\d)}]|\\pi|\\infty))(?P<gap>\s*)(?P<unit>[A-Za-z°%Ω][A-Za-z°%Ω/^0-9 ]*)$", re.DOTALL
)
_ASKS_FOR_PERCENT = re.compile(r"percent|%", re.IGNORECASE)


@dataclass(frozen=True)
class Quantity:
    """A number with its unit.

    `ratio` tells a written fraction (1/3) from a decimal. `unit` is a canonical name, "" without one. `loose` marks a
    unit that may as well be a variable (5m) or a noun (5 apples), so that it is not simply left out of a comparison.
    """

    value: Fraction
    ratio: bool
    unit: str
    loose: bool = False


@lru_cache(maxsize=16384)
def parse_quantity(text: str) -> Quantity | None:
    """The quantity that the whole of a cleaned text stands for, or None."""
    found = _VALUE.match(text)
    if found is None or len(text) > LARGEST_EXPONENT:
        return None
    part = found.groupdict()
    value = _value(part)
    if value is None:
        return None
    value = -value if "-" in (part["sign"], part["sign2"]) else value
    gap, rest = text[found.end() :], text[found.end() :].strip()
    first, _, others = rest.partition(" ")
    if first.casefold() in _SCALES:
        value, rest = value * _SCALES[first.casefold()], others.strip()
        gap = " "
    ratio, currency = part["number"] is None, part["currency"]
    if currency or not rest:
        return None if currency and rest and canonical_unit(rest)[0] != currency else Quantity(value, ratio, currency)
    if not _UNIT_TEXT.fullmatch(rest):
        return None
    unit, known = canonical_unit(rest)
    glued = not gap.startswith(" ")
    noun = re.fullmatch(r"[A-Za-z]+(?: [A-Za-z]+)*", rest) and _NO_UNIT.isdisjoint(rest.casefold().split())
    if not known and (glued or len(unit) < 2 or not noun):
        return None  # 5x and 5 sin are expressions, 5 and 6 are two numbers
    return Quantity(value, ratio, unit, loose=not known or (glued and len(rest) == 1 and rest.isalpha()))


def quantities_match(predicted: Quantity, answer: Quantity, question: str) -> bool:
    """Whether a predicted quantity is the expected one; the percent and unit rules are those of `answers`."""
    if answer.unit == "%" and predicted.unit in ("", "%"):
        if _same(predicted, answer.value, answer.ratio):
            return True
        return not predicted.unit and _same(predicted, answer.value / 100, answer.ratio)
    if predicted.unit == "%" and not (answer.unit == "" and _ASKS_FOR_PERCENT.search(question)):
        return False
    if predicted.unit and answer.unit:
        agree = predicted.unit == answer.unit
    elif answer.unit:  # the prediction leaves it out: fine, unless 5m may be an expression
        agree = not (answer.loose and len(answer.unit) == 1)
    else:  # the prediction adds one: a known unit, or the noun that the question counts
        agree = not predicted.loose or (len(predicted.unit) > 1 and predicted.unit in question.casefold())
    return agree and _same(predicted, answer.value, answer.ratio)


def split_unit(text: str) -> tuple[str, str] | None:
    r"""Split an expression from its known unit: `10\sqrt{2} cm` to (`10\sqrt{2}`, `cm`); None without one."""
    found = _TRAILING_UNIT.match(text)
    if found is None:
        return None
    unit, known = canonical_unit(found["unit"])
    if not known or (not found["gap"] and len(found["unit"]) == 1 and found["unit"].isalpha()):
        return None
    return found["body"], unit


@lru_cache(maxsize=4096)
def canonical_unit(text: str) -> tuple[str, bool]:
    """The name that all spellings of a unit share, and whether it is a unit known here (rather than a counted noun)."""
    text = re.sub(r"\^?\{(\d)\}", r"^\1", text.strip()).rstrip(".")
    parts = re.split(r"\s*/\s*|\s+per\s+", text)
    names = [_single_unit(part) for part in parts]
    if all(name is not None for name in names):
        return "/".join(names), True
    words = text.casefold().split()
    return " ".join(
        word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word for word in words
    ), False


def _single_unit(text: str) -> str | None:
    """cm, cm^2, cm2, square centimeters, centimeters squared; None if it is no unit known here."""
    power = ""
    words = text.replace("µ", "μ").split()
    for names, exponent in ((("square", "sq", "sq.", "squared"), "^2"), (("cubic", "cu", "cu.", "cubed"), "^3")):
        kept = [word for word in words if word.casefold() not in names]
        if len(kept) < len(words):
            words, power = kept, exponent
    name = " ".join(words)
    if name.casefold() in _TEMPERATURES:
        return _TEMPERATURES[name.casefold()]
    raised = re.fullmatch(r"([A-Za-z]+)\^?([23])", name)
    if raised and not power:
        name, power = raised[1], f"^{raised[2]}"
    for candidate in (name, name[:-1] if len(name) > 2 and name.endswith("s") else None):
        if candidate:
            unit = _EXACT.get(candidate) or _FOLDED.get(candidate.casefold())
            if unit:
                return unit + power
    return None


def _value(part: dict[str, str | None]) -> Fraction | None:
    if part["whole"]:
        top, bottom = part["mixed_top"] or part["mixed_top2"], part["mixed_bottom"] or part["mixed_bottom2"]
        return Fraction(part["whole"]) + Fraction(int(top), int(bottom)) if int(bottom) else None
    for top, bottom in (("latex_top", "latex_bottom"), ("digit_top", "digit_bottom"), ("top", "bottom")):
        if part[top] is not None:
            over, under = _decimal(part[top]), _decimal(part[bottom])
            return over / under if under else None
    exponent = int(part["exponent"] or part["power"] or part["power2"] or 0)
    if abs(exponent) > LARGEST_EXPONENT:
        return None
    return _decimal(part["number"]) * Fraction(10) ** exponent


def _decimal(text: str) -> Fraction:
    return Fraction(text.replace(",", ""))


def _same(predicted: Quantity, expected: Fraction, ratio: bool) -> bool:
    """Equal values, up to the rounding of a fraction that one side writes as a decimal."""
    if predicted.value == expected:
        return True
    if predicted.ratio == ratio:
        return False
    return abs(predicted.value - expected) <= RATIO_TOLERANCE * abs(expected)
