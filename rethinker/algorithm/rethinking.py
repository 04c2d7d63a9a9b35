"""Forced Rethinking: a trigger after the first answer lets the model go on, y = y1 + trigger + y2 (METHOD).

Everything is done on token ids: y1 loses its end token, the trigger's ids follow, and the engine goes on from there.
Nothing is decoded and encoded again, so positions, log-probs and masks line up to the token.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rethinker.config import RethinkConfig
from rethinker.rollout.engine import RolloutEngine
from rethinker.samples import Completion, Group, Prompt, Rethinking, Rethought

Judge = Callable[[list[Group]], None]
"""Fills the rewards of groups (of one completion each here) from their own texts."""

_WAIT = re.compile(r"\bwait\b", re.IGNORECASE)
# Where the released code cuts y1 back, each at its last occurrence.
_CUTS = (r"\bWait\b", r"\\boxed\{", r"\banswer\b", r"\n\n")


@dataclass(frozen=True)
class Trigger:
    """A forced phrase: its name in `rethink.triggers`, and its token ids."""

    name: str
    token_ids: tuple[int, ...]


def make_triggers(tokenizer, texts: dict[str, str]) -> list[Trigger]:
    """The triggers of `rethink.triggers`, tokenised once. What spells a special token stays ordinary text."""
    options = {"add_special_tokens": False, "split_special_tokens": True}
    return [Trigger(name, tuple(tokenizer(text, **options)["input_ids"])) for name, text in texts.items()]


def continue_after_trigger(
    rollout: RolloutEngine,
    prompts: Sequence[Prompt],
    first: Sequence[Completion],
    triggers: Sequence[Trigger],
    decode: Callable[[list[int]], str],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> list[Completion | None]:
    """y1 + trigger + y2 for every first answer; its `rethought` says where the parts lie.

    The log-probs of y1 and y2 are the behaviour policy's as they were sampled; those of the trigger are NaN. vLLM's
    prefix cache spares it the prompt and y1, as far as they fill whole blocks.

    Args:
        prompts, first, triggers: one of each per second pass; the same prompt may come several times.
        decode: token ids to the text that is judged.
        max_new_tokens: longest y, all parts together.
        temperature: of y2; 0 is greedy.
        seed: as in RolloutEngine.generate.

    Returns:
        None where y1 and the trigger leave no room for y2, in the order of the arguments.
    """
    bodies = [answer_tokens(y1) for y1 in first]
    rooms = [max_new_tokens - len(body) - len(t.token_ids) for body, t in zip(bodies, triggers, strict=True)]
    fits = [i for i, room in enumerate(rooms) if room > 0]
    extended = []
    for i in fits:
        forced = [*bodies[i].tolist(), *triggers[i].token_ids]
        prompt = prompts[i]
        extended.append(replace(prompt, token_ids=prompt.token_ids + forced, compact_ids=prompt.compact_ids + forced))
    passes = rollout.generate(
        extended, n=1, max_new_tokens=[rooms[i] for i in fits], temperature=temperature, seed=seed
    )
    results: list[Completion | None] = [None] * len(first)
    for i, (y2,) in zip(fits, passes, strict=True):
        body, trigger = bodies[i], triggers[i]
        token_ids = np.concatenate([body, trigger.token_ids, y2.token_ids])
        start, end = len(body), len(body) + len(trigger.token_ids)
        results[i] = Completion(
            token_ids=token_ids,
            logprobs=np.concatenate([first[i].logprobs[:start], np.full(end - start, np.nan), y2.logprobs]),
            text=decode(token_ids.tolist()),
            finish_reason=y2.finish_reason,
            rethought=Rethought(start, end, trigger.name, start, end),
        )
    return results


def answer_tokens(completion: Completion) -> np.ndarray:
    """The response [L] without its end token."""
    return completion.token_ids[:-1] if completion.finish_reason == "stop" else completion.token_ids


class Rethinker:
    """Forces a share of an episode's responses to rethink and keeps what came out right.

    Args:
        config: the `rethink` settings.
        triggers: from `make_triggers`.
        decode: token ids to text.
        max_new_tokens, temperature: the rollout's.
    """

    def __init__(
        self,
        config: RethinkConfig,
        triggers: list[Trigger],
        decode: Callable[[list[int]], str],
        *,
        max_new_tokens: int,
        temperature: float,
    ) -> None:
        self._config, self._triggers, self._decode = config, triggers, decode
        self._max_new_tokens = max_new_tokens
        default = 0.9 if config.preset == "released_code" else temperature
        self._temperature = default if config.temperature is None else config.temperature
        self.needs_scores = not config.mask_trigger_tokens or self._temperature != temperature
        """Whether kept responses need behaviour log-probs from a forward over the whole sequence: forced tokens have
        none of their own, and a second pass at another temperature has those of another distribution."""

    def force(
        self, groups: list[Group], prompts: list[Prompt], rollout: RolloutEngine, judge: Judge, seed: int
    ) -> None:
        """Second passes over a share of the responses; those that end right take the place of their y1.

        Sets `group.rethinking` to what happened and adds to `group.sampled_tokens`. A response is eligible if it ended
        by itself, says something, and leaves room for the trigger and an answer. At most `rethink.max_kept` per query
        are kept, in the order of the group; one that equals another response of its group, token for token, is not.

        Args:
            groups: this rank's, with the rewards of their first answers.
            prompts: of the groups.
            judge: fills the rewards of groups.
            seed: of the choice and of the second pass.
        """
        rng = np.random.default_rng(seed)
        chosen = [(g, i) for g, group in enumerate(groups) for i in self._eligible(group)]
        count = round(self._config.fraction * len(chosen))
        chosen = sorted(chosen[k] for k in rng.permutation(len(chosen))[:count])
        first = [self._shortened(groups[g].completions[i], rng) for g, i in chosen]
        triggers = [self._trigger(groups[g].rewards[i] >= 1.0, rng) for g, i in chosen]
        second = continue_after_trigger(
            rollout,
            [prompts[g] for g, _ in chosen],
            first,
            triggers,
            self._decode,
            max_new_tokens=self._max_new_tokens,
            temperature=self._temperature,
            seed=seed,
        )
        attempts = [(g, i, y) for (g, i), y in zip(chosen, second, strict=True) if y is not None and self._legal(y)]
        # Groups of one: a reward is that of the very text it is asked for.
        trials = [Group(groups[g].query, [y], groups[g].policy_version) for g, _, y in attempts]
        judge(trials)
        for group in groups:
            group.rethinking = Rethinking()
        for (g, _), y in zip(chosen, second, strict=True):
            if y is not None:  # a longer trigger than the shortest may have left no room
                groups[g].rethinking.forced += 1
                groups[g].sampled_tokens += len(y.token_ids) - y.rethought.trigger_end
        for (g, i, y), trial in zip(attempts, trials, strict=True):
            self._settle(groups[g], i, y, trial.rewards[0])

    def _settle(self, group: Group, i: int, y: Completion, reward: float) -> None:
        was_right, is_right = group.rewards[i] >= 1.0, reward >= 1.0
        group.rethinking.fixed += is_right and not was_right
        group.rethinking.broken += was_right and not is_right
        known = any(np.array_equal(y.token_ids, other.token_ids) for other in group.completions)
        if is_right and not known and group.rethinking.kept < self._config.max_kept:
            group.completions[i], group.rewards[i] = self._masked(y), reward
            group.rethinking.kept += 1

    def _masked(self, y: Completion) -> Completion:
        """With the span that carries no policy gradient, as the settings say."""
        config, spans = self._config, y.rethought
        start, end = (spans.trigger_start, spans.trigger_end) if config.mask_trigger_tokens else (0, 0)
        if config.mask_first_answer:
            start, end = 0, spans.trigger_end if config.mask_trigger_tokens else spans.trigger_start
        return replace(y, rethought=replace(spans, masked_start=start, masked_end=end))

    def _eligible(self, group: Group) -> list[int]:
        shortest = min(len(trigger.token_ids) for trigger in self._triggers)
        right = [reward >= 1.0 for reward in group.rewards]
        released = self._config.preset == "released_code"
        nearly_solved = released and sum(right) > 0.7 * len(right)
        return [
            i
            for i, y1 in enumerate(group.completions)
            if y1.finish_reason == "stop"
            and 0 < len(answer_tokens(y1)) < self._max_new_tokens - shortest
            and not (nearly_solved and not right[i])
        ]

    def _shortened(self, y1: Completion, rng: np.random.Generator) -> Completion:
        """The released code cuts every other y1 back before its last "Wait", boxed answer, "answer" or paragraph."""
        if self._config.preset != "released_code" or rng.random() >= 0.5:
            return y1
        body = answer_tokens(y1).tolist()
        text = self._decode(body)
        places = [m[-1].start() for cut in _CUTS if (m := list(re.finditer(cut, text))) and m[-1].start() > 0]
        if not places:
            return y1
        place = places[rng.integers(len(places))]
        # The most tokens whose text ends before that place: decoded lengths grow with the number of tokens.
        low, high = 0, len(body)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if len(self._decode(body[:middle])) <= place else (low, middle - 1)
        if low == 0:
            return y1
        return replace(y1, token_ids=body[:low], logprobs=y1.logprobs[:low], finish_reason="cut")

    def _trigger(self, right: bool, rng: np.random.Generator) -> Trigger:
        by_name = {trigger.name: trigger for trigger in self._triggers}
        fitting = by_name.get("self_verification" if right else "self_correction")
        if self._config.preset == "released_code" and fitting is not None and rng.random() < 0.5:
            return fitting
        return self._triggers[rng.integers(len(self._triggers))]

    def _legal(self, y: Completion) -> bool:
        """Whether a second pass may be kept at all; the released code bounds its length and its waits."""
        if y.finish_reason != "stop":
            return False
        if self._config.preset != "released_code":
            return True
        return 30 < len(y.token_ids) - y.rethought.trigger_end < 1024 and len(_WAIT.findall(y.text)) <= 4


def released_reward(reward: float, completion: Completion) -> float:
    """The released code's: -0.1 for an unfinished response or more than 5 waits, 1.1 for a right one with 1 or 2
    waits that were not forced."""
    waits = len(_WAIT.findall(completion.text))
    if completion.finish_reason != "stop" or waits > 5:
        return -0.1
    return 1.1 if reward >= 1.0 and 1 <= waits - (completion.rethought is not None) <= 2 else reward
