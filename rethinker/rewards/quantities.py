r"""Numbers as people write them in answers: thousands, decimals, fractions, powers of ten, percent, currency, units.

Values are exact fractions, so nothing is lost to rounding and 1,000,001 never equals 1,000,000. Units are compared by
name (cm = centimeters), never converted: 5 cm is not 0.05 m, as the question asked for one of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from typing import Any

from rethinker.rewards.questions import asks_for
from rethinker.rewards.rules import Rules
from rethinker.rewards.spelling import UNIT_MARK

# What a float holds for certain; digits beyond are the noise of its arithmetic.
FLOAT_DIGITS = 15
# A decimal may be cut off instead of rounded (0.666666) within this relative distance.
TRUNCATED = Fraction(2, 10**6)

# Beyond this power of ten an exact value is a memory bomb, not an answer.
LARGEST_EXPONENT = 400

# Units by the name that all their spellings share, which comes first.
_UNITS = """
mm millimeter millimetre 毫米; cm centimeter centimetre 厘米 公分; dm decimeter decimetre 分米; m meter metre 米;
km kilometer kilometre 千米 公里; in inch inches; ft foot feet; yd yard; mi mile; mph;
ml mL milliliter millilitre 毫升; L l liter litre 升; mg milligram 毫克; g gram 克;
kg kilogram 千克 公斤; t ton tonne 吨;
lb lbs pound; oz ounce; mol mole; ms millisecond; s sec second 秒; min minute 分钟; h hr hour 小时; day 天; week 周;
month 个月; year yr 年; Hz hertz; kHz; MHz; GHz; N newton; J joule; kJ; W watt; mW; kW; MW; V volt; A amp ampere; mA;
Ω ohm; Pa pascal; kPa; MPa; μm um micrometer micrometre micron; nm nanometer nanometre; μs; μF; eV;
kWh; dB; rpm; atm; K kelvin; °C celsius 摄氏度; °F fahrenheit; ° deg degree 度; rad radian;
$ dollar USD 美元; ¢ cent; € euro EUR 欧元; £ GBP 英镑; ¥ yen yuan RMB 元; % percent pct percentage; unit
"""
_EXACT = {name: names.split()[0] for names in _UNITS.split(";") for name in names.split()}
# Words in any case, but of symbols only those whose case is no prefix: mg is not Mg.
_CASELESS = frozenset(
    "cm dm km kg in ft yd mi mph hr min sec lb lbs oz mol deg rad pct usd eur rmb gbp amp ohm yen ton".split()
)
_FOLDED = {name.casefold(): unit for name, unit in _EXACT.items() if len(name) > 3 or name.casefold() in _CASELESS}
# Glued to a number these may as well be a product, as in 3mg for a weight.
_PRODUCTS = frozenset("nm um mg ml mL ms mA ft in mi at".split())
_SQUARED = re.compile(r"[A-Za-ln-z]\^?\{?[23]\}?")  # s^2 is a square of side s; m^2 is an area
_INVERSE = re.compile(r"\s*(?<![a-z])([a-zA-Z]+)\^\{?-(\d)\}?$")  # m s^{-1} is m/s
# After a fraction or a root, a letter that is rather a variable than hours, tons or litres.
_RATHER_VARIABLES = frozenset("htl")
# Even after a number alone.
_ALWAYS_VARIABLES = frozenset("tl")
_TEMPERATURES = dict.fromkeys(("degrees c", "degree celsius", "degrees celsius", "° c", "°celsius"), "°C")
_TEMPERATURES |= dict.fromkeys(("degrees f", "degree fahrenheit", "degrees fahrenheit", "° f"), "°F")
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_CURRENCIES = "$€£¥"
_NO_UNIT = frozenset(
    "pi sqrt sin cos tan log ln exp and or to by not times plus minus over per from is dozen dozens tens hundreds "
    "thousands millions billions trillions quadrillion lakh crore mil score mod fold double root half halves third "
    "thirds quarter quarters squared cubed factorial below above north south east west left right up down base "
    "remainder modulo choose short more less than at about".split()
)
_COUNTERS = frozenset("个只人名本条张块件次种支枝棵辆台家间套组页题岁层颗枚盒箱袋瓶杯朵头匹户")

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
_UNIT_TEXT = re.compile(r"[A-Za-zµμΩ°%$€£¥¢\u4e00-\u9fff][A-Za-zµμΩ°%$€£¥¢\u4e00-\u9fff /^0-9{}.\-]*")
_TRAILING_UNIT = re.compile(
    r"^(?P<body>.*(?:[\d)}]|\\pi|\\infty|(?<![A-Za-z])pi))(?P<gap>\s*\x01?)"  # see UNIT_MARK
    r"(?P<unit>[A-Za-z°%Ω\u4e00-\u9fff][A-Za-z°%Ω\u4e00-\u9fff/^0-9{} ]*)$",
    re.DOTALL,
)
# A sum, a variable or a function: what has these and a letter behind it is rather their product.
_NO_FACTOR = re.compile(r"(?<=[\w)}])[+\-]|(?<![A-Za-z\\])[A-Za-z]|\\(?!frac|sqrt|pi|cdot|times)[A-Za-z]")


@dataclass(frozen=True)
class Quantity:
    """A number with its unit.

    `ratio` marks a written fraction (1/3). `step` is the value of the last digit of a decimal, which may be a rounding;
    0 of all other numbers. `unit` is a canonical name, "" without one; `product` marks one that may as well be
    variables (5m), `noun` one that is no unit (5 apples).
    """

    value: Fraction
    ratio: bool
    step: Fraction
    unit: str
    product: bool = False
    noun: bool = False


@lru_cache(maxsize=16384)
def parse_quantity(text: str) -> Quantity | None:
    """The quantity that the whole of a cleaned text stands for, or None."""
    found = _VALUE.match(text)
    if found is None or len(text) > LARGEST_EXPONENT:
        return None
    part = found.groupdict()
    value, step = _value(part)
    if value is None or (part["sign"] and part["sign2"]):
        return None
    value = -value if "-" in (part["sign"], part["sign2"]) else value
    gap, rest = text[found.end() :], text[found.end() :].strip()
    while (scale := _SCALES.get(rest.partition(" ")[0].casefold())) is not None:
        value, step, gap, rest = value * scale, step * scale, " ", rest.partition(" ")[2].strip()
    ratio, currency = part["number"] is None, part["currency"]
    marked, rest = rest.startswith(UNIT_MARK), rest.removeprefix(UNIT_MARK)
    if currency or not rest:
        other = currency and rest and canonical_unit(rest)[0] != currency
        return None if other else Quantity(value, ratio, step, currency)
    if not _UNIT_TEXT.fullmatch(rest):
        return None
    unit, known = canonical_unit(rest)
    glued = not gap.startswith(" ") and rest.isascii()
    if not known and (glued or not _is_noun(rest)):
        return None  # 5x and 5 sin are expressions, 5 and 6 are two numbers
    variables = _RATHER_VARIABLES if ratio else _ALWAYS_VARIABLES
    product = (
        (glued and _may_be_product(rest))
        or rest in variables
        or (ratio and rest in _PRODUCTS)
        or bool(_SQUARED.fullmatch(rest))
    )
    return Quantity(value, ratio, step, unit, product and not marked, noun=not known)


def _may_be_product(unit: str) -> bool:
    """Whether a unit that is glued to its number may be variables: a letter, a power of one, or letters such as mg."""
    return unit in _PRODUCTS or bool(re.fullmatch("[A-Za-z]", unit) or _SQUARED.fullmatch(unit))


def _is_noun(text: str) -> bool:
    """Whether a text may be what is counted: words, none of them mathematics or a product of variables."""
    words = text.casefold().split()
    if any(_single_unit(word) for word in words) or any(re.fullmatch(r"\w{2,}ths?", word) for word in words):
        return False  # 5 hours thirty minutes, 3 twelfths
    return _NO_UNIT.isdisjoint(words) and all(
        word in _COUNTERS
        or (word.isascii() and word.isalpha() and len(word) > 2 and not set(word).isdisjoint("aeiouy"))
        for word in words
    )


def quantities_match(predicted: Quantity, answer: Quantity, question: str, rules: Rules) -> bool:
    """Whether a predicted quantity is the expected one; the percent and unit rules are those of `answers`."""
    percent = answer.unit == "%"
    if percent and predicted.unit in ("", "%"):
        if _same(predicted, answer, rules):
            return True
        return not predicted.unit and _same(predicted, _hundredth(answer), rules)
    if predicted.unit == "%" and not answer.unit:
        if asks_for("percent", question):
            return _same(predicted, answer, rules)
        return rules.percent and _same(_hundredth(predicted), answer, rules)
    if predicted.unit and answer.unit:
        agree = predicted.unit == answer.unit
    elif answer.unit:  # the prediction leaves it out: fine, unless 5m may be an expression
        agree = not answer.product
    elif predicted.noun:  # the prediction adds the noun that the question counts
        counted = question.casefold().rpartition("how many")[2]
        agree = re.search(rf"(?<![a-z]){re.escape(predicted.unit)}", counted) is not None
    else:
        agree = not predicted.product
    return agree and _same(predicted, answer, rules)


def split_unit(text: str) -> tuple[str, str] | None:
    r"""Split an expression from its known unit: `10\sqrt{2} cm` to (`10\sqrt{2}`, `cm`); None without one.

    A unit is apart from its expression, or longer than a letter and after a single term: 1+4t and 5-3 t have none.
    """
    found = _TRAILING_UNIT.match(text)
    if found is None:
        return None
    unit, known = canonical_unit(found["unit"])
    named, marked = found["unit"], UNIT_MARK in found["gap"]
    if not known:
        return None
    if not marked and named.isascii():
        body, letter = found["body"], _may_be_product(named) and named not in _PRODUCTS
        glued = not found["gap"] or body.endswith(("\\pi", "\\infty"))  # a command's name ends with a space
        product = (glued and _may_be_product(named)) or named in _RATHER_VARIABLES or bool(_SQUARED.fullmatch(named))
        if product or ((letter or glued) and _NO_FACTOR.search(body)):
            return None
    return found["body"], unit


@lru_cache(maxsize=4096)
def canonical_unit(text: str) -> tuple[str, bool]:
    """The name that all spellings of a unit share, and whether it is a unit known here (rather than a counted noun)."""
    text = re.sub(r"\^?\{(\d)\}", r"^\1", text.strip()).rstrip(".")
    text = _INVERSE.sub(lambda found: f"/{found[1]}^{found[2]}".removesuffix("^1"), text)
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
    text = text.replace("平方", "square ").replace("立方", "cubic ")
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


def _value(part: dict[str, str | None]) -> tuple[Fraction | None, Fraction]:
    """The value, None for what has none, and the step of its last digit."""
    exact = Fraction(0)
    if part["whole"]:
        top, bottom = int(part["mixed_top"] or part["mixed_top2"]), int(part["mixed_bottom"] or part["mixed_bottom2"])
        # 1 3/2 is no mixed number, and may as well be a product.
        return Fraction(part["whole"]) + Fraction(top, bottom) if top < bottom else None, exact
    for top, bottom in (("latex_top", "latex_bottom"), ("digit_top", "digit_bottom"), ("top", "bottom")):
        if part[top] is not None:
            over, under = _decimal(part[top]), _decimal(part[bottom])
            return over / under if under else None, exact
    exponent = int(part["exponent"] or part["power"] or part["power2"] or 0)
    if abs(exponent) > LARGEST_EXPONENT:
        return None, exact
    places = len(part["number"].partition(".")[2])
    noise = max(0, len(re.sub("[.,]", "", part["number"]).lstrip("0")) - FLOAT_DIGITS)
    step = Fraction(10) ** (exponent - places + noise) if places else exact
    return _decimal(part["number"]) * Fraction(10) ** exponent, step


def _decimal(text: str) -> Fraction:
    """A number as written, but for the noise of binary arithmetic: 0.30000000000000004 is 0.3."""
    text = text.replace(",", "")
    value = Fraction(text)
    whole, _, places = text.partition(".")
    if places.strip("0") and len(whole) <= FLOAT_DIGITS < len((whole + places).lstrip("0")):
        return Fraction(f"{float(value):.{FLOAT_DIGITS}g}")
    return value


def _hundredth(quantity: Quantity) -> Quantity:
    return replace(quantity, value=quantity.value / 100, step=quantity.step / 100, unit="")


def _same(predicted: Quantity, answer: Quantity, rules: Rules) -> bool:
    """Equal values; or a fraction on one side, and on the other a decimal that it rounds to."""
    if predicted.value == answer.value:
        return True
    fraction, decimal = (predicted, answer) if predicted.ratio else (answer, predicted)
    return fraction.ratio and not decimal.ratio and rounds_to(fraction.value, decimal, rules)


def rounds_to(exact: Any, decimal: Quantity, rules: Rules) -> bool:
    """Whether a decimal is what a number rounds to, and near enough to it for the rules.

    Args:
        exact: the number, of any type that fractions can be compared with.
        decimal: the decimal.
    """
    distance, size = abs(exact - decimal.value), abs(exact)
    cut_off = distance < decimal.step and distance < TRUNCATED * size
    return (2 * distance <= decimal.step or cut_off) and distance < Fraction(str(rules.rounding)) * size
