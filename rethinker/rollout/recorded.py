"""The recorded backend: the completions of an earlier run, so that two runs can train on the same rollouts."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from pathlib import Path

from rethinker.config import Config, ConfigError
from rethinker.rollout.engine import RolloutEngine, WeightStream
from rethinker.runtime.completions import read_completions
from rethinker.samples import Completion, Prompt


class RecordedEngine(RolloutEngine):
    """RolloutEngine that returns, per query, its groups' completions in the order of the recording's episodes."""

    def __init__(self, config: Config, *_: object):
        """Find the recording's episodes; each is read when it is needed."""
        self.folder = Path(config.rollout.recording)
        episodes = sorted(int(path.stem.split("_")[1]) for path in self.folder.glob("episode_*.parquet"))
        self._unread = (group for episode in episodes for group in read_completions(self.folder, episode))
        self._completions: dict[str, deque[list[Completion]]] = defaultdict(deque)
        self._taken: Counter[str] = Counter()  # groups of each query that were asked for
        self._passed: Counter[str] = Counter()  # groups of each query to leave out: the resumed run had them

    def generate(
        self, prompts: list[Prompt], *, n: int, max_new_tokens: int | list[int], temperature: float, seed: int
    ) -> list[list[Completion]]:
        """The next recorded completions of every prompt's query; see RolloutEngine. The sampling settings have no say.

        Raises:
            ConfigError: a query is not in the recording (any more), or was recorded with another group size.
        """
        return [self._next(prompt.query_id, n) for prompt in prompts]

    def _next(self, query_id: str, n: int) -> list[Completion]:
        recorded = self._completions[query_id]
        while not recorded and (group := next(self._unread, None)):
            if self._passed[group.query.id] > 0:
                self._passed[group.query.id] -= 1
            else:
                self._completions[group.query.id].append(group.completions)
        if not recorded:
            raise ConfigError(
                f"rollout.recording={str(self.folder)!r} holds no (further) completions of query {query_id!r}; use the "
                "recorded run's data, seed, train.episode_queries and algorithm.refill_rounds, and data.validation=null"
            )
        if len(recorded[0]) != n:
            raise ConfigError(
                f"rollout.recording={str(self.folder)!r} holds {len(recorded[0])} completions of query {query_id!r}, "
                f"but {n} are asked for; set rollout.group_size={len(recorded[0])}"
            )
        self._taken[query_id] += 1
        return recorded.popleft()

    def state_dict(self) -> dict[str, int]:
        """How often each query was asked."""
        return dict(self._taken)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after what has been asked."""
        self._taken, self._passed = Counter(state), Counter(state)

    def sync(self, weights: WeightStream, version: int) -> None:
        """A recording has no weights; as every rank leaves the stream alone, none waits for another."""
