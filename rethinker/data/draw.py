"""Which questions come more often: by the rewards of their latest responses (`data.draw: variance` or `difficulty`).

Legend: n questions, m of them with a label.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from rethinker.config import DataConfig
from rethinker.data.mixture import pass_rates
from rethinker.samples import Group, Query


def weight_by_variance(group: Group) -> float:
    """The population variance of the group's rewards, exactly 0 where they are equal.

    It is the outcome variance score of variance-aware sampling (MMR1, arXiv 2509.21268): p (1 - p) of rewards 0 and 1.
    The paper adds a score for how much the responses differ as texts, which is left out here.
    """
    return float(np.var(group.rewards)) if group.effective else 0.0


def weight_by_difficulty(group: Group) -> float:
    """1 - the mean reward, clipped to 0..1."""
    return 1.0 - float(np.clip(np.mean(group.rewards), 0.0, 1.0))


class Draw:
    """Weights of the questions, and draws in proportion to them, none twice within an episode.

    A question never seen has the largest weight of all that are known, or 1 while no known one is above 0: it is tried
    before those known to teach less.

    Args:
        weigh: a group's weight for its question's next draws.
        uniform: share of the draws that follow the questions' order instead.
        seed: of the draws.
        ids: of the questions.
        first: [n] fp64, the weights before anything was sampled; NaN where nothing is known.
    """

    def __init__(
        self, weigh: Callable[[Group], float], uniform: float, seed: int, ids: Iterable[str], first: np.ndarray
    ) -> None:
        self._weigh, self._uniform, self._seed = weigh, uniform, seed
        self._places: Mapping[str, int] = {name: place for place, name in enumerate(ids)}
        self.weights = first  # [n]
        self._taken: dict[str, set[int]] = {}  # of each label, in this episode
        self._left: dict[str, np.ndarray] = {}  # [m] of each label: the weights, 0 of what is taken

    def next(self, label: str, members: Sequence[int], number: int, turn: int, in_order: Callable[[], int]) -> int:
        """Which of a label's `members` comes next, as its place among them.

        The label's draws that follow the order are spread evenly, so that their share is exact in every stretch. The
        others take a member with probability weight / sum of the weights, over those not taken in this episode; where
        all these are 0, they follow the order, too.

        Args:
            members: [m] places among all questions.
            number: draws of the label before this one.
            turn: draws of all labels up to this one, which seeds it.
            in_order: the next place in the label's order.
        """
        taken = self._taken.setdefault(label, set())
        if len(taken) == len(members):  # the episode is larger than the label: its questions come again
            taken.clear()
            del self._left[label]
        if label not in self._left:
            self._left[label] = self._known_or_largest()[np.asarray(members)]
        sums = self._left[label].cumsum()
        if int((number + 1) * self._uniform) > int(number * self._uniform) or not sums[-1] > 0:
            place = next(place for place in iter(in_order, None) if place not in taken)
        else:
            # Four words, where a permutation's seed has three.
            point = np.random.default_rng([self._seed, turn, 0, 1]).random() * sums[-1]
            place = int(sums.searchsorted(point, side="right"))
        taken.add(place)
        self._left[label][place] = 0.0
        return place

    def leave_out(self, query: Query) -> None:
        """Draw a question no more, but in the order."""
        self.weights[self._places[query.id]] = 0.0

    def end_episode(self, groups: Iterable[Group]) -> None:
        """Weigh the questions of an episode's groups, whose rewards are known; all of them may come again."""
        for group in groups:
            self.weights[self._places[group.query.id]] = self._weigh(group)
        self.restart(self.weights)

    def restart(self, weights: np.ndarray) -> None:
        """Go on from these weights, [n] fp64, with no question taken."""
        self.weights, self._taken, self._left = weights, {}, {}

    def _known_or_largest(self) -> np.ndarray:
        known = self.weights[~np.isnan(self.weights)]
        largest = known.max(initial=0.0)
        return np.where(np.isnan(self.weights), largest if largest > 0 else 1.0, self.weights)


def open_draw(queries: list[Query], config: DataConfig, seed: int) -> Draw | None:
    """What `data.draw` says; None of `uniform`. Pass rates p, where the data has them, give the first weights:
    p (1 - p), or 1 - p."""
    if config.draw == "uniform":
        return None
    rates = np.array(pass_rates(queries, config), dtype=np.float64)
    weigh, first = {
        "variance": (weight_by_variance, rates * (1 - rates)),
        "difficulty": (weight_by_difficulty, 1 - rates),
    }[config.draw]
    return Draw(weigh, config.draw_uniform, seed, (query.id for query in queries), first)
