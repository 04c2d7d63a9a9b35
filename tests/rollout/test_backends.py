"""Every backend that the settings offer has an engine, and every engine is offered."""

from __future__ import annotations

from pkgutil import resolve_name
from typing import get_args, get_type_hints

import pytest

from rethinker.config import RolloutConfig
from rethinker.rollout.engine import ENGINES, RolloutEngine


def test_settings_and_engines_have_the_same_names():
    """`rollout.backend` takes the names of ENGINES and no others."""
    assert set(get_args(get_type_hints(RolloutConfig)["backend"])) == set(ENGINES)


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_samples_and_takes_weights(name):
    """A class that inherits the protocol defines itself what the protocol leaves open."""
    engine = resolve_name(ENGINES[name])
    assert RolloutEngine in engine.__mro__
    for open_method in ("generate", "sync"):
        assert getattr(engine, open_method) is not getattr(RolloutEngine, open_method)
