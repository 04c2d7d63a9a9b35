"""Several reward functions: what the settings say of them, and the shipped ones by themselves."""

from __future__ import annotations

import math
import time

import pytest

from rethinker.checkpoint.resume import _compared
from rethinker.config import Config, ConfigError, RewardConfig
from rethinker.rewards.entries import NEEDS, first_alone, reward_entries
from rethinker.rewards.functions import SHIPPED, format_reward, load_rewards, overlong_reward, reward_weights
from rethinker.samples import Group, Query
from rethinker.settings import load_config, resolve_config, to_yaml

FILE = """
import functools

def single(response, answer, query, *, words=3, tokens): return 1.0
def batch(responses, answers, queries, scale=1.0, *, images, truncated): return [0.0] * len(responses)
async def waits(response, answer, query, max_tokens, **further): return 1.0
def mixed(response, answers, queries): return 1.0
async def async_batch(responses, answers, queries): return []
def short(response, answer): return 1.0
def needs(response, answer, query, table): return 1.0
def images(response, answer, images): return 1.0
def swapped(queries, answers, responses): return [1.0] * len(responses)
def yields(response, answer, query): yield 1.0
async def streams(response, answer, query): yield 1.0
def weighs(response, answer, query, weight): return 1.0
def times(response, answer, query, timeout_s=3.0): return 1.0

class Judge:
    async def __call__(self, response, answer, query): return 1.0

judge = Judge()
bound = functools.partial(single, words=1)
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return path


def test_the_settings_know_what_ships():
    """The names that are known before any function's code is read are those of the functions."""
    assert NEEDS.keys() == SHIPPED.keys()


def refused(*functions: dict, **settings) -> str:
    """The one line that a mistake is reported in."""
    with pytest.raises(ConfigError) as error:
        load_rewards(RewardConfig(functions=[*functions], **settings), 2048)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_one_function_is_a_list_of_one():
    """reward.function means one function of weight 1, named after itself."""
    (entry,) = reward_entries(RewardConfig())
    assert (entry.function, entry.name, entry.weight, entry.options) == ("boxed", "boxed", 1.0, {})
    (entry,) = reward_entries(RewardConfig(function="a/b.py:grade", timeout_s=3.0))
    assert (entry.name, entry.timeout_s, entry.on_failure) == ("grade", 3.0, "zero")
    assert reward_weights(RewardConfig()) == {"boxed": 1.0}


def test_an_entry_says_all_of_its_function(file):
    """Its own keys, and all others as arguments of the function; names are in order, evaluations keep the first."""
    settings = RewardConfig(
        functions=[
            {"function": f"{file}:single", "weight": 2, "words": 5},
            {"function": "format", "weight": -0.5, "name": "shape", "pattern": "a+", "timeout_s": 1.5},
            {"function": f"{file}:waits", "concurrency": 3, "on_failure": "stop", "model": "m"},
        ]
    )
    assert list(reward_weights(settings).items()) == [("single", 2), ("shape", -0.5), ("waits", 1.0)]
    one, two, three = load_rewards(settings)
    assert (one.kind, one.facts, one.entry.options) == ("single", ("tokens",), {"words": 5})
    assert two.call("aaa", "", None) == 1.0 and (two.entry.timeout_s, two.entry.name) == (1.5, "shape")
    assert (three.kind, three.facts, three.entry.concurrency) == ("async", ("max_tokens",), 3)
    assert (three.entry.on_failure, three.entry.timeout_s) == ("stop", 10.0)
    assert reward_entries(first_alone(settings)) == [one.entry]


@pytest.mark.parametrize(
    ("name", "kind", "facts"),
    [
        ("single", "single", ("tokens",)),
        ("bound", "single", ("tokens",)),
        ("batch", "batch", ("images", "truncated")),
        ("waits", "async", ("max_tokens",)),
        ("judge", "async", ()),
    ],
)
def test_the_kind_of_a_function_is_its_signature(file, name, kind, facts):
    """async def; the plural names of a batch; else one response at a time. Facts are asked for by their names."""
    (function,) = load_rewards(RewardConfig(function=f"{file}:{name}"))
    assert (function.kind, function.facts) == (kind, facts)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"weight": 1.0}, "names no function"),
        ({"function": "boxed", "weight": 0}, r"reward.functions[0].weight=0 must not be 0"),
        ({"function": "boxed", "weight": math.inf}, r"reward.functions[0].weight=inf must be a finite number"),
        ({"function": "boxed", "weight": "1"}, r"reward.functions[0].weight='1' must be a valid number"),
        ({"function": "boxed", "weight": True}, r"reward.functions[0].weight=True must be a valid number"),
        ({"function": "boxed", "name": "a\nb"}, r"reward.functions[0].name='a\nb' must be a text on one line"),
        ({"function": "boxed", "concurrency": 0}, r"reward.functions[0].concurrency=0 must be greater than"),
        ({"function": "boxed", "timeout_s": 0}, r"reward.functions[0].timeout_s=0 must be greater than 0"),
        (
            {"function": "boxed", "on_failure": "raise"},
            r"reward.functions[0].on_failure='raise' must be 'zero' or 'stop'",
        ),
        ({"function": "boxed", 3: 4}, "its key 3 must be a text"),
        ({"function": "boxd"}, r"reward.functions[0].function=boxd: give boxed, format"),
        ({"function": "boxed", "rules": 1}, "boxed takes no such option"),
        (
            {"function": "format", "patern": "a"},
            "reward.functions[0].patern: format takes no such option: did you mean pattern",
        ),
        ({"function": "format", "wieght": 2}, "did you mean weight"),
        ({"function": "format", "pattern": "("}, "reward.functions[0].pattern='(' is no regular expression"),
        ({"function": "format", "pattern": 3}, "reward.functions[0].pattern=3 is no regular expression"),
        ({"function": "overlong", "tokens": 5}, "reward.functions[1].tokens is a fact"),
        ({"function": "overlong", "buffer": 0}, "buffer=0 must be a number of tokens"),
        ({"function": "overlong", "buffer": 2049}, "at most rollout.max_new_tokens (2048)"),
        ({"function": "{file}:single", "word": 5}, "did you mean words"),
        (
            {"function": "{file}:mixed"},
            "takes (responses, answers, queries) and is not async; it takes (response, answers",
        ),
        ({"function": "{file}:async_batch"}, "it takes async (responses, answers, queries)"),
        ({"function": "{file}:images"}, "put images behind them"),
        ({"function": "{file}:swapped"}, "it takes (queries, answers, responses)"),
        ({"function": "{file}:yields"}, "write return"),
        ({"function": "{file}:streams"}, "write return"),
        ({"function": "{file}:short"}, "it must take (response, answer, query)"),
        ({"function": "{file}:needs"}, "missing a required argument: 'table'"),
        ({"function": "{file}:weighs", "weight": 1}, "its parameter weight would never get a value"),
        ({"function": "{file}:times"}, "its parameter timeout_s would never get a value"),
    ],
)
def test_a_mistake_names_its_entry(file, entry, message):
    """Before anything slow: the entry, its key, the value, and what would work."""
    entry = {key: value.replace("{file}", str(file)) if key == "function" else value for key, value in entry.items()}
    before = [{"function": "boxed"}] * (entry.get("function") == "overlong")
    assert message in refused(*before, entry)


def test_mistakes_between_entries():
    """Two of one name, and two settings for one thing; the place of an entry counts from 0."""
    assert "reward.functions[1].name=format is another entry's" in refused(
        {"function": "format"}, {"function": "format"}
    )
    assert "reward.functions[1].weight=0" in refused({"function": "format"}, {"function": "boxed", "weight": 0})
    assert "leave reward.function out" in refused({"function": "format"}, function="mine.py:f")


def test_what_judges_nothing_comes_second():
    """By the punishment of a length alone no response would be right, in either form of the setting."""
    assert "reward.functions[0].function=overlong comes first" in refused(
        {"function": "overlong"}, {"function": "boxed"}
    )
    assert "reward.function=overlong comes first" in refused(function="overlong")
    reward_entries(RewardConfig(functions=[{"function": "boxed"}, {"function": "overlong"}]))


def test_a_shipped_function_that_needs_options():
    """reward.function has no place for them: the error names the one that has."""
    said = refused(function="judge")
    assert said.startswith("reward.function=judge: address is missing")
    assert said.endswith("options stand in an entry of reward.functions, as [{function: judge, ...}]")


def test_the_list_in_yaml_and_on_the_command_line(file, tmp_path, monkeypatch):
    """Both forms, the later replacing the earlier; what is written is read back, and is looked at with the settings."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "base: easy_vqa_cpu\nreward:\n  functions:\n    - {function: boxed}\n    - {function: format, weight: 1e-1}\n"
    )
    config = resolve_config(recipe)
    assert config.reward.functions == [{"function": "boxed"}, {"function": "format", "weight": 0.1}]
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert resolve_config(tmp_path / "again.yaml") == config
    given = resolve_config(
        recipe, ["--reward.functions", f"[{{function: boxed}}, {{function: {file}:single, words: 1}}]"]
    )
    assert reward_weights(given.reward) == {"boxed": 1.0, "single": 1.0}
    with pytest.raises(ConfigError, match=r"^reward\.functions\[1\]\.weight='none' must be a valid number"):
        resolve_config(recipe, ["--reward.functions=[{function: boxed}, {function: format, weight: none}]"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"^reward\.functions\[1\]\.function=gone\.py:f: there is no file gone\.py"):
        load_config(recipe, ["--reward.functions=[{function: boxed}, {function: gone.py:f}]"])


def test_what_may_change_when_a_run_is_resumed():
    """How a function is called, not what it says or weighs."""

    def compared(**entry):
        return _compared("reward.functions", [{"function": "boxed"}, {"function": "format", **entry}])

    assert compared(timeout_s=3, concurrency=2, on_failure="stop") == compared()
    assert (
        compared(weight=0.5) != compared() and compared(pattern="a") != compared() and compared(name="b") != compared()
    )


@pytest.mark.parametrize(
    ("response", "value"),
    [
        ("It is four, so \\boxed{4}.\n", 1.0),
        ("So\n\n\\boxed {\\frac{1}{2}}", 1.0),
        ("\\boxed{4}", 0.0),
        ("  \n\\boxed{4}", 0.0),
        ("Either \\boxed{4} or \\boxed{5}", 0.0),
        ("It is four", 0.0),
        ("It is \\boxed{4", 0.0),
        ("", 0.0),
    ],
)
def test_format_by_default(response, value):
    """Exactly one box, with text before it."""
    assert format_reward(response, "4", None) == value


def test_format_is_of_the_whole_response():
    """A pattern of one's own matches from the first character to the last, over lines."""
    pattern = r"<think>.*</think>\s*<answer>.*</answer>"
    assert format_reward("<think>a\nb</think>\n<answer>c</answer>", "", None, pattern=pattern) == 1.0
    assert format_reward("<think>a</think><answer>c</answer> d", "", None, pattern=pattern) == 0.0


@pytest.mark.parametrize(
    "text", ["{}" * 50_000, "a" * 100_000, " " * 100_000, "a\\boxed{" + "}" * 100_000, "\\boxed{}" * 9_000]
)
def test_the_default_format_is_found_in_linear_time(text):
    """Whatever degenerate thing a model writes."""
    start = time.process_time()
    format_reward(text, "", None)
    assert time.process_time() - start < 1.0


def test_overlong_is_equation_13_of_dapo():
    """0 up to max - buffer, (max - buffer - length) / buffer beyond, -1 from max on; the buffer is a quarter."""

    def dapo(length, longest, cache):
        if length <= longest - cache:
            return 0.0
        return (longest - cache - length) / cache if length <= longest else -1.0

    for buffer in (1, 7, 512, 2048):
        for tokens in (0, 1, 1535, 1536, 1537, 1900, 2041, 2047, 2048, 3000):
            got = overlong_reward("", "", None, tokens=tokens, max_tokens=2048, buffer=buffer)
            assert got == dapo(tokens, 2048, buffer)
    assert overlong_reward("", "", None, tokens=1792, max_tokens=2048) == dapo(1792, 2048, 512) == -0.5
    assert overlong_reward("", "", None, tokens=1, max_tokens=1) == -1.0


def test_right_is_what_the_first_function_says():
    """Never the weighted sum; of groups without scores it is the reward itself."""
    group = Group(Query("q", "?", "!"), [None] * 3, 0, rewards=[1.5, 0.9, 2.0])
    assert group.right == [True, False, True]
    group.scores = {"boxed": [0.0, 1.0, 0.99], "length": [3.0, -0.2, 2.0]}
    assert group.right == [False, True, False]


def test_settings_of_one_function_are_as_they_were():
    """The default has no list, and none is masked."""
    assert Config().reward.functions == [] and Config().train.mask_truncated is False
