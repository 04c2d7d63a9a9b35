"""`verify` makes every response go on once."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rethinker.config import ConfigError, EnvironmentConfig, RethinkConfig
from rethinker.environments import Observation
from rethinker.environments.runner import Runner
from tests.environments.helpers import QUERY, open_image, shown_size

CONFIG = EnvironmentConfig(use=["verify"])


def runner(triggers=None) -> Runner:
    return Runner(CONFIG, open_image, shown_size, triggers)


def test_one_trigger_then_the_end():
    """In the policy's own turn, once, whatever it wrote; at once and without a process."""
    of = runner()
    assert of.inline
    state, first = of.step(of.reset(QUERY).result(), "so \\boxed{4}").result()
    assert first.text in RethinkConfig().triggers.values() and first == Observation(first.text, role="assistant")
    state, second = of.step(state, "Wait, <tool_call> it is 5").result()
    assert second == Observation(done=True)
    assert of.step(state, "and on").result()[1] == second


def test_the_trigger_depends_on_the_query_alone():
    """Equal in every run and in any order of the settings; over many queries each trigger comes about equally often."""
    queries = [replace(QUERY, id=f"q{i}") for i in range(300)]
    triggers = RethinkConfig().triggers
    drawn = [runner().reset(query).result() for query in queries]
    turned = runner(dict(reversed(triggers.items())))
    assert [turned.reset(replace(query, question="other")).result() for query in queries] == drawn
    names = "correction questioning verification questioning verification correction"
    assert drawn[:6] == [triggers[f"self_{name}"] for name in names.split()]
    assert all(70 < drawn.count(trigger) < 130 for trigger in triggers.values())


def test_its_triggers_are_the_settings():
    assert runner({"mine": "Hm."}).reset(QUERY).result() == "Hm."
    with pytest.raises(ConfigError, match="rethink.triggers"):
        runner({})
