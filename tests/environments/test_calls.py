"""Tool calls are read as they are meant, or the model reads why not; nothing that it writes hangs or raises."""

from __future__ import annotations

import json
import time

import pytest

from rethinker.environments.calls import calls_of

ONE = '{"name": "crop", "arguments": {"bbox_2d": [1, 2, 3, 4]}}'
MEANT = ("crop", {"bbox_2d": [1, 2, 3, 4]})


def read(text: str, most: int = 4) -> list:
    """(name, arguments) of each call, or the reason why it has none."""
    return [call.error.reason if call.error else (call.name, call.arguments) for call in calls_of(text, most)]


def block(inside: str) -> str:
    return f"<tool_call>\n{inside}\n</tool_call>"


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("The answer is \\boxed{4}.", []),
        (f"Let me look.\n{block(ONE)}", [MEANT]),
        (f"<tool_call>{ONE}</tool_call>", [MEANT]),
        (f"{block(ONE)}{block(ONE)} and {block(ONE)} so", [MEANT] * 3),
        (block(json.dumps({"name": "crop", "arguments": json.dumps(MEANT[1])})), [MEANT]),
        (block('{"arguments": {"code": "1"}, "name": "python", "id": 3}'), [("python", {"code": "1"})]),
        (block('{"name": "python"}'), [("python", {})]),
        (
            block('{"name": "python", "arguments": {"code": "a = 1\nprint(a)"}}'),
            [("python", {"code": "a = 1\nprint(a)"})],
        ),
        (
            block('{"name": "python", "arguments": {"code": "print(\'</tool_call><tool_call>\')"}}'),
            [("python", {"code": "print('</tool_call><tool_call>')"})],
        ),
        (
            block("<function=python>\n<parameter=code>\nif 1 < 2:\n    print(3)\n</parameter>\n</function>"),
            [("python", {"code": "if 1 < 2:\n    print(3)"})],
        ),
        (
            block(
                "<function=crop>\n<parameter=bbox_2d>\n[1, 2, 3, 4]\n</parameter>"
                "<parameter=image>2</parameter></function>"
            ),
            [("crop", {"bbox_2d": "[1, 2, 3, 4]", "image": "2"})],
        ),
        (f"<tool_call>\n{ONE}", ["malformed"]),
        ("<tool_call>", ["malformed"]),
        (block(""), ["malformed"]),
        (block("{"), ["malformed"]),
        (block("[]"), ["malformed"]),
        (block("NaN"), ["malformed"]),
        (block('{"name": 3, "arguments": {}}'), ["malformed"]),
        (block('{"name": "crop", "arguments": [1, 2]}'), ["malformed"]),
        (block('{"name": "crop", "arguments": "{} {}"}'), ["malformed"]),
        (block('{"name": "crop", "arguments": null}'), ["malformed"]),
        (block(ONE + ONE), ["malformed"]),
        (block(ONE + " please"), ["malformed"]),
        (block("{'name': 'crop'}"), ["malformed"]),
        (block("<function=crop>"), ["malformed"]),
        (block("<function=crop><parameter=a>1</function>"), ["malformed"]),
        (block('{"name": "crop", "arguments": {"image": ' + "9" * 5000 + "}}"), ["malformed"]),
        (f"<tool_call>{ONE}\n{block(ONE)}", ["malformed", MEANT]),
        (f"{block('{')}{block(ONE)}", ["malformed", MEANT]),
        (f"</tool_call>{block(ONE)}", [MEANT]),
        (block(ONE) * 7, [MEANT] * 4 + ["calls"] * 3),
        ("<tool_call>" * 6, ["malformed"] * 4 + ["calls"] * 2),
    ],
)
def test_what_a_turn_calls(text, calls):
    """What can be meant in one way only is taken as that; a call that cannot be read spoils none of the others."""
    assert read(text) == calls


@pytest.mark.parametrize(
    "inside",
    [
        "[" * 100_000,
        '{"name":' * 100_000,
        '{"name": "python", "arguments": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"name": "python", "arguments": ' + json.dumps("[" * 100_000) + "}",
        '{"name": "python", "arguments": {"code": "' + "\\" * 1_000_001,
        '{"name": "python", "arguments": "' * 30_000,
        "<function=python>" + "<parameter=code>" * 60_000,
        "<function=" * 100_000,
        "<tool_call>" * 90_000,
        '<tool_call>"' * 80_000,
        " " * 1_000_000,
    ],
    ids=range(11),
)
def test_a_megabyte_of_anything_is_malformed_at_once(inside):
    """No input takes time beyond what reading it takes, or recursion beyond what there is."""
    start = time.process_time()
    assert read(block(inside), most=100)[0] == "malformed"
    assert time.process_time() - start < 2.0


def test_a_megabyte_of_arguments_is_a_call():
    code = "x" * 1_000_000
    assert read(block(json.dumps({"name": "python", "arguments": {"code": code}}))) == [("python", {"code": code})]
