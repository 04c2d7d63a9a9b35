"""`verify`: after its first turn the policy is made to go on once, by one of `rethink.triggers`.

It is forced rethinking as an environment: for every response, right or wrong, and with no answer thrown away.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from rethinker.environments import Observation
from rethinker.samples import Query


class Verify:
    """The environment; its state is the trigger that is still to come, or "".

    Args:
        triggers: the text of each by its name.
    """

    def __init__(self, triggers: Mapping[str, str]) -> None:
        self._triggers = [triggers[name] for name in sorted(triggers)]

    def reset(self, query: Query) -> str:
        """A trigger drawn by the query's id alone: all its responses get the same one, in every run."""
        drawn = int.from_bytes(hashlib.sha256(query.id.encode("utf-8", "surrogatepass")).digest()[:8])
        return self._triggers[drawn % len(self._triggers)]

    def step(self, state: str, text: str) -> tuple[str, Observation]:
        return "", Observation(state, role="assistant") if state else Observation(done=True)
