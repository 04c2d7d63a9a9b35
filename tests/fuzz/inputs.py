"""What people and data sets may hand in, as hypothesis strategies: recipes, rows, images, answers."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from rethinker.settings import settings

# Texts that have broken other programs.
ODD_TEXTS = [
    *("", " ", "\0", "a\0b", "\n", "\x1b[2J", "\ud800", "..", "../x", "../../../etc/passwd", "/", "/etc/passwd", "~"),
    *("~nobody-here/x", "C:\\x", "file:///etc/passwd", "http://127.0.0.1:9/x.png", "data:image/png;base64,AAAA"),
    *("/dev/zero", "/dev/stdin", ".", ".hidden", "a" * 300, "x" * 70_000, "é" * 200, "北京", "🙂", "e\u0301" * 40),
    *("<image>", "<image><image>", "<|image_pad|>", "<|im_end|>\n<|im_start|>system", "{question}", "{0}", "%s"),
    *("null", "true", "1e999", "-1", "nan", ".inf", "0x10", "1_000", "9" * 5000, "[", "{", "*a", "&a [*a]", "!!int x"),
    *("a: b: c", "- - -", "'", '"', "`rm -rf /`", "$(reboot)", "<script>", "None", "[[1]]", "{a: }", "? x", "\ufeff"),
]
text = st.sampled_from(ODD_TEXTS) | st.text(st.characters(), max_size=20)
number = st.sampled_from([0, -1, 1, 2, 7, 8, 2**31, 2**64, 10**30, -(10**30), 0.5, 1e-300, 1e300]) | st.integers()
scalar = st.one_of(st.none(), st.booleans(), number, st.floats(), text)
nested = st.recursive(
    scalar, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3), max_leaves=6
)

DEFAULTS = {setting.key: setting.default for setting in settings()}
KEYS = list(DEFAULTS)
# A value of each type that settings take, besides the odd ones.
plausible = st.sampled_from([1, 8, 64, 512, 0.5, "boxed", "tiny", "a/b", "runs", "grpo", "none", [0.9, 0.95], True])


@st.composite
def recipes(draw: st.DrawFn) -> tuple[bytes, list[str]]:
    """A recipe's bytes and overrides: settings with odd values, broken YAML, other bytes."""
    kind = draw(st.sampled_from(["settings", "settings", "settings", "yaml", "bytes"]))
    if kind == "bytes":
        content = draw(st.binary(max_size=60))
    elif kind == "yaml":
        content = "\n".join(draw(st.lists(st.sampled_from(YAML_LINES), max_size=6))).encode("utf-8", "surrogatepass")
    else:
        tree: dict[str, Any] = {}
        for key in draw(st.lists(st.sampled_from(KEYS), max_size=4)):
            *sections, name = key.split(".")
            node = tree
            for section in sections:
                node = node.setdefault(section, {}) if isinstance(node.get(section, {}), dict) else {}
            usual = st.just(DEFAULTS[key])
            node[name] = draw(usual | usual | plausible | nested)
        content = json.dumps(tree).encode()  # JSON is YAML
        if draw(st.booleans()):
            place = draw(st.integers(0, len(content)))
            content = content[:place] + draw(st.binary(max_size=3)) + content[place:]
    overrides = []
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        key = draw(
            st.sampled_from(KEYS) | st.sampled_from(["data.fields.x", "train.deepspeed.a.b", "run", "", ".", "x.y"])
        )
        odd = text | (plausible | nested).map(lambda value: json.dumps(value))
        value = draw(odd | st.just(json.dumps(DEFAULTS.get(key))))
        overrides += draw(st.sampled_from([[f"--{key}={value}"], [f"--{key}", value], [f"--{key}"], [value]]))
    return content, overrides


YAML_LINES = [
    *("seed: 1", "seed: 2", "seed: !!int x", "seed: !!timestamp never", "seed: 2001-99-99", "seed: !!binary '*'"),
    *("a: &a [x]", "b: *a", "<<: {seed: 3}", "train: {max_steps: 3}", "train: &t {max_steps: *t}", "train:", "  x: 1"),
    *("run: !!python/object/apply:os.system ['touch pwned']", "run: !!python/name:os.system", "run: {name: ../x}"),
    *(
        "? [a, b]",
        ": 1",
        "? {a: 1}",
        "{[]: 1}",
        "- 1",
        "---",
        "...",
        "%YAML 9.9",
        "\t",
        "!!set {a, b}",
        "= : =",
        "a: |",
    ),
    *("data: {prompt: '{question}', fields: {a: }}", "rollout: !!omap [a: 1]", "[" * 3000, "{a: " * 400, "seed: 0b_"),
    *("train: {deepspeed: {a: {b: [1, {c: 2}]}}}", "null: 1", "true: 1", "1: 1", "'': 1", "\0", "\ud800", "seed: 0x_"),
    *("seed: " + "9" * 5000, "seed: 1:99:99", "data: {max_prompt_tokens: 1e400}", "x" * 3000, "- " * 2000),
]


CHAT = [{"role": "user", "content": "2 + 2?"}]
# By data.format: the columns of a question and its answer.
FORMATS: dict[str | None, dict[str, Any]] = {
    "auto": {"question": "2 + 2?", "answer": "4"},
    "verl": {"prompt": CHAT, "reward_model": {"style": "rule", "ground_truth": "4"}},
    "swift": {"messages": CHAT, "solution": "<answer>4</answer>"},
    "r1v": {"problem": "2 + 2?", "solution": "<answer>4</answer>"},
    "trl": {"prompt": CHAT, "ground_truth": "2 + 2 = 4\n#### 4"},
}


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[Any], dict[str, Any]]:
    """Rows of a data set, most of them good, and settings of `data`."""
    whose = draw(st.sampled_from([None, None, *FORMATS]))
    good = {"id": None, "images": [], "choices": ["4", "5"], **FORMATS.get(whose, FORMATS["auto"])}
    rows: list[Any] = []
    for number in range(draw(st.integers(1, 8))):
        row = {**good, "id": f"row {number}"}
        for _ in range(draw(st.sampled_from([0, 0, 1, 1, 2]))):
            row[draw(st.sampled_from([*good, "category", "A", "B", ""]))] = draw(IMAGE_CELLS | CHATS | nested)
        rows.append(row)
    options = {
        "max_bad_rows": draw(st.sampled_from([0.0, 0.5, 1.0, 1.0])),
        "max_prompt_tokens": draw(st.sampled_from([30, 256, 256])),
        "max_images": draw(st.sampled_from([1, 8, 8])),
        "image_root": draw(st.sampled_from([None, "/", "."])),
        "format": whose and draw(st.sampled_from([whose, "auto"])),
    }
    return rows, options


IMAGE_CELLS = st.sampled_from(
    [
        *("a.png", "cut.png", "pipe", "link.png", "loop", "folder", "none.png", "../a.png", "./a.png", "a.png\0"),
        *(["a.png", "a.png"], ["a.png", 3], [["a.png"]], {"path": "a.png"}, {"path": "pipe"}, {"bytes": "x"}),
        *({"bytes": [1]}, {"bytes": None, "path": None}, {"path": {"path": "a.png"}}, ["a.png"] * 20, "/dev/zero"),
    ]
)


_PARTS = st.sampled_from([{"type": "text", "text": "?"}, {"type": "image", "image": "a.png"}, {"type": "video"}, "x"])
CHATS = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "system", "assistant", "tool", None]), "content": st.lists(_PARTS) | nested}
    ),
    max_size=3,
) | st.sampled_from(
    [{"text": ["4", "5"], "label": ["1", 2]}, [{"text": "4"}], "[[", "####", "<answer>", "data:,", [[]]]
)


def _modes() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (24, 40, 3), dtype=np.uint8))
    modes = [rgb.convert(mode) for mode in ("RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "YCbCr", "F", "I")]
    modes.append(Image.fromarray(rng.integers(0, 65536, (24, 40), dtype=np.uint16)))
    see_through = rgb.convert("P")
    see_through.info["transparency"] = 3
    return [*modes, see_through, Image.new("RGB", (1, 1)), Image.new("L", (900, 1)), Image.new("RGB", (3, 700))]


def sample_files() -> list[bytes]:
    """Images of every format and mode that Pillow writes here, some with EXIF or several frames, and bare headers."""
    files = []
    exif = Image.Exif()
    exif[0x0112] = 6
    for image in _modes():
        for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "ICO", "EPS", "PDF", "TGA", "PCX"):
            for options in ({}, {"exif": exif}, {"save_all": True, "append_images": [image, image.rotate(90)]}):
                buffer = io.BytesIO()
                try:
                    image.save(buffer, kind, **options)
                except Exception:  # a mode that the format does not have
                    continue
                files.append(buffer.getvalue())
    files += [
        b"",
        b"P6 40 24 255 ",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"<svg/>",
        b"RIFF\0\0\0\0WEBPVP8 ",
    ]
    files += [b"P6 %d %d 255 xx" % size for size in ((10**5, 10**5), (0, 5), (2**31, 1), (2**63, 2**63))]
    return list(dict.fromkeys(files))


SAMPLES = sample_files()


@st.composite
def images(draw: st.DrawFn) -> bytes:
    """An image file, whole or with cuts, flipped bytes and lies about its size."""
    content = bytearray(draw(st.sampled_from(SAMPLES)))
    for _ in range(draw(st.sampled_from([0, 1, 1, 2, 8]))):
        # Most of what decoders trust stands at the beginning.
        reach = draw(st.sampled_from([40, 200, 10**6]))
        place = draw(st.integers(0, max(0, min(reach, len(content)) - 1)))
        change = draw(st.sampled_from(["flip", "cut", "size", "insert", "double"]))
        if change == "flip" and content:
            content[place] ^= draw(st.integers(1, 255))
        elif change == "cut":
            del content[place : place + draw(st.sampled_from([1, 4, 100, 10**6]))]
        elif change == "size":
            size = draw(st.sampled_from([0, 1, 255, 65535, 2**24, 2**31 - 1, 2**32 - 1]))
            order = draw(st.sampled_from(["big", "little"]))
            content[place : place + 4] = size.to_bytes(4, order)
        elif change == "insert":
            content[place:place] = draw(st.binary(min_size=1, max_size=8))
        else:
            content += content[place:]
    return bytes(content[:200_000])


PIECES = [
    *r"\frac{1}{2} \sqrt{ } { ( ) [ ] \{ \} 1 2 0 9 / . , ; - + = % $ \$ A B (A) A. cm m^2 ° x \pm \boxed{".split(),
    *r"\text{ \left \right ^ _ & \\ : million yes \infty 10^ e5 ** ' ² ٣ ½ \begin{pmatrix} \end{pmatrix} \int".split(),
    *r"\sum_{n=1}^{10^9} ! factorial 9^9^9 \in \cup 0x7f 1e400 -1e-400 1/0 √( π ∞ \operatorname{lcm} \lim x\to".split(),
    *("and ", " or ", " ", "\n", "\0", "\ud800", "🙂", "\u202e", "x^{x^{x}}", "(x+1)^{999}", "1,000", "<|im_end|>"),
]
piece = st.sampled_from(PIECES)


@st.composite
def answers(draw: st.DrawFn) -> tuple[str, str, str, Any]:
    """(response, answer, question, choices): short odd ones, very long ones, nested ones, bombs."""
    short = st.lists(piece, max_size=10).map("".join)
    unit = draw(piece)
    long = st.sampled_from([200, 1000, 3000, 100_000]).map(lambda length: (unit * length)[:length])
    deep = st.sampled_from([30, 900, 10_000]).map(lambda n: "{" * n + unit + "}" * n)
    sets = st.sampled_from([2, 9, 40]).map(lambda n: nested_sets(unit, n, 2))
    powers = st.sampled_from(BOMBS)
    content = draw(short | short | short | long | deep | sets | powers)
    answer = draw(short | short | st.just(content) | long | sets | powers | text)
    question = draw(text | short | st.sampled_from(["", "Which?\nA. 1\nB. 2", "What percent?", "(A) x (B) y"]))
    choices = draw(st.none() | st.lists(short, max_size=4) | text | nested | st.sampled_from(CHOICES))
    wrapped = draw(st.sampled_from(["\\boxed{%s}", "so \\boxed{%s}.", "\\boxed{1} \\boxed {%s", "%s", "\\boxed{%s}}}"]))
    return wrapped.replace("%s", content), answer, question, choices


def nested_sets(unit: str, width: int, depth: int) -> str:
    """Sets within sets: every item is compared with every other."""
    return unit if depth == 0 else "\\{" + ",".join([nested_sets(unit, width, depth - 1)] * width) + "\\}"


BOMBS = [
    *("9^{9^{9^{9}}}", "9^9^9", "10^{10^{10}}!", "(x+1)^{99999}", "\\sqrt{" * 60 + "x" + "}" * 60, "1/" * 300 + "1"),
    *(
        "x^" * 200 + "x",
        "(((((1!)!)!)!)!)!",
        "\\int_0^1 \\sin(\\sin(\\sin(x))) dx",
        "\\sum_{n=1}^{10^9} 1/n",
        "a1" * 900,
    ),
    *("\\begin{pmatrix}" + "1&2\\\\" * 300 + "\\end{pmatrix}", "+".join(f"x_{i}" for i in range(150)), "-" * 900 + "1"),
]
CHOICES = [
    "['a', 'b']",
    "{[]: 1}",
    "(" * 5000,
    "-" * 5000 + "1",
    "[" * 90 + "]" * 90,
    "1+" * 5000 + "1",
    {"A": "1", "B": None},
]
