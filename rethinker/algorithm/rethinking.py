"""Forced Rethinking: a trigger after the first answer lets the model go on, y = y1 + trigger + y2.

y1 loses its end token, the trigger's ids follow, and the model goes on from there (`Trajectory`).
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rethinker.config import RethinkConfig
from rethinker.rewards.answers import boxed_span
from rethinker.samples import Completion, Group, Prompt, Rethinking, Rethought
from rethinker.trajectory import Trajectory

Generate = Callable[..., list[list[Completion]]]
"""RolloutEngine.generate: (prompts, n, max_new_tokens, temperature, seed) to completions [prompt][n]."""
Judge = Callable[[list[Group]], None]
"""Fills the rewards of groups (of one completion each here) from their own texts."""

_WAIT = re.compile(r"\bwait\b", re.IGNORECASE)
# Where the released code cuts y1 back, each at its last occurrence.
_CUTS = (r"\bWait\b", r"\\boxed\{", r"\banswer\b", r"\n\n")
_CUES = re.compile(
    r"\bwait\b|\bdouble[- ]check|\bre-?(check|examine|think|consider)|\bon second thought|\blet me verify",
    re.IGNORECASE,
)
_WORD = re.compile(r"\w\S*")
_FEW_WORDS = 3  # beside the boxed answer: "The answer is"


def rethinks(text: str, forced: str = "") -> bool:
    """Whether a response rethinks of its own accord: a cue in its text, outside the phrase that was forced upon it."""
    return _CUES.search(text.replace(forced, "", 1) if forced else text) is not None


def answers_at_once(text: str) -> bool:
    r"""Whether a response is nothing but its answer: beside its last `\boxed{...}` it has at most 3 words, no equation
    (one step of a calculation is a single word), and no cue."""
    start, end = boxed_span(text) or (0, 0)
    rest = f"{text[:start]} {text[end:]}"
    return len(_WORD.findall(rest)) <= _FEW_WORDS and "=" not in rest and not rethinks(text)


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
    generate: Generate,
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

    Prompts, first answers and triggers are one of each per second pass, and so is what is returned: None where y1 and
    the trigger leave no room for y2 within `max_new_tokens`, which is for all parts together.
    """
    responses = []
    for prompt, y1, trigger in zip(prompts, first, triggers, strict=True):
        response = Trajectory(prompt, max_new_tokens)
        response.say(y1, kept=len(answer_tokens(y1)))
        response.hear(trigger.token_ids, trigger.token_ids)
        responses.append(response)
    fits = [i for i, response in enumerate(responses) if response.room > 0]
    longer, rooms = [responses[i].prompt for i in fits], [responses[i].room for i in fits]
    passes = generate(longer, n=1, max_new_tokens=rooms, temperature=temperature, seed=seed)
    results: list[Completion | None] = [None] * len(first)
    for i, (y2,) in zip(fits, passes, strict=True):
        end = responses[i].tokens
        start = end - len(triggers[i].token_ids)
        responses[i].say(y2)
        y = responses[i].completion("", rethought=Rethought(start, end, triggers[i].name, start, end))
        y.text = decode(y.token_ids.tolist())
        results[i] = y
    return results


def answer_tokens(completion: Completion) -> np.ndarray:
    """The response [L] without its end token."""
    return completion.token_ids[:-1] if completion.finish_reason == "stop" else completion.token_ids


@dataclass
class Rethinker:
    """Forces a share of an episode's responses to rethink and keeps what came out right."""

    config: RethinkConfig
    triggers: list[Trigger]
    decode: Callable[[list[int]], str]  # token ids to text
    max_new_tokens: int  # the rollout's
    temperature: float  # the rollout's

    def __post_init__(self) -> None:
        self._released = self.config.preset == "released_code"
        self._second_temperature = self.config.second_temperature(self.temperature)
        self.needs_scores = not self.config.mask_trigger_tokens or self._second_temperature != self.temperature
        """Whether kept responses need behaviour log-probs from a forward over the whole sequence: forced tokens have
        none of their own, and a second pass at another temperature has those of another distribution."""

    def force(self, groups: list[Group], prompts: list[Prompt], generate: Generate, judge: Judge, seed: int) -> None:
        """Second passes over a share of the responses; those that end right take the place of their y1.

        Sets `group.rethinking` to what happened and adds to `group.sampled_tokens`. A response is eligible if it ended
        by itself, says something, and leaves room for the trigger and an answer. At most `rethink.max_kept` per query
        are kept, in the order of the group; one that equals another response of its group, token for token, is not.
        """
        rng = np.random.default_rng(seed)
        chosen = [(g, i) for g, group in enumerate(groups) for i in self._eligible(group)]
        count = round(self.config.fraction * len(chosen))
        chosen = sorted(chosen[k] for k in rng.permutation(len(chosen))[:count])
        first = [self._shortened(groups[g].completions[i], rng) for g, i in chosen]
        triggers = [self._trigger(groups[g].right[i], rng) for g, i in chosen]
        second = continue_after_trigger(
            generate,
            [prompts[g] for g, _ in chosen],
            first,
            triggers,
            self.decode,
            max_new_tokens=self.max_new_tokens,
            temperature=self._second_temperature,
            seed=seed,
        )
        for group in groups:
            group.rethinking = Rethinking()
        # A longer trigger than the shortest may have left no room.
        passes = [(groups[g], i, y) for (g, i), y in zip(chosen, second, strict=True) if y is not None]
        for group, _, y in passes:
            group.rethinking.forced += 1
            group.sampled_tokens += y.tokens - y.rethought.trigger_end
        legal = [(group, i, y) for group, i, y in passes if self._legal(y)]
        # Groups of one: a reward is that of the very text it is asked for.
        trials = [Group(group.query, [y], group.policy_version) for group, _, y in legal]
        judge(trials)
        for (group, i, y), trial in zip(legal, trials, strict=True):
            self._settle(group, i, y, trial)

    def _settle(self, group: Group, i: int, y: Completion, trial: Group) -> None:
        was_right, (is_right,) = group.right[i], trial.right
        group.rethinking.fixed += is_right and not was_right
        group.rethinking.broken += was_right and not is_right
        known = any(np.array_equal(y.token_ids, other.token_ids) for other in group.completions)
        if is_right and not known and group.rethinking.kept < self.config.max_kept:
            spans = y.rethought
            start = 0 if self.config.mask_first_answer else spans.trigger_start
            end = spans.trigger_end if self.config.mask_trigger_tokens else spans.trigger_start
            group.completions[i] = replace(y, rethought=replace(spans, masked_start=start, masked_end=end))
            (group.rewards[i],) = trial.rewards
            for name, (value,) in trial.scores.items():
                group.scores[name][i] = value
            group.rethinking.kept += 1

    def _eligible(self, group: Group) -> list[int]:
        shortest = min(len(trigger.token_ids) for trigger in self.triggers)
        right = group.right
        nearly_solved = self._released and sum(right) > 0.7 * len(right)
        return [
            i
            for i, y1 in enumerate(group.completions)
            if y1.finish_reason == "stop"
            and 0 < len(answer_tokens(y1)) < self.max_new_tokens - shortest
            and not (nearly_solved and not right[i])
            and not (right[i] and self.config.first_answers == "wrong")
        ]

    def _shortened(self, y1: Completion, rng: np.random.Generator) -> Completion:
        """The released code cuts every other y1 back before its last "Wait", boxed answer, "answer" or paragraph."""
        if not self._released or rng.random() >= 0.5:
            return y1
        body = answer_tokens(y1).tolist()
        text = self.decode(body)
        places = [m[-1].start() for cut in _CUTS if (m := list(re.finditer(cut, text))) and m[-1].start() > 0]
        if not places:
            return y1
        place = places[rng.integers(len(places))]
        # The most tokens whose text ends before that place: decoded lengths grow with the number of tokens.
        lengths = range(1, len(body) + 1)
        kept = bisect_right(lengths, place, key=lambda length: len(self.decode(body[:length])))
        if kept == 0:
            return y1
        return replace(y1, token_ids=body[:kept], logprobs=y1.logprobs[:kept], finish_reason="cut")

    def _trigger(self, right: bool, rng: np.random.Generator) -> Trigger:
        """One of the triggers at random; half the time the released code takes the one that fits the first answer."""
        name = "self_verification" if right else "self_correction"
        fitting = [trigger for trigger in self.triggers if trigger.name == name]
        if self._released and fitting and rng.random() < 0.5:
            return fitting[0]
        return self.triggers[rng.integers(len(self.triggers))]

    def _legal(self, y: Completion) -> bool:
        """Whether a second pass may be kept at all; the released code bounds its length and its waits."""
        if y.finish_reason != "stop" or not self._released:
            return y.finish_reason == "stop"
        return 30 < len(y.token_ids) - y.rethought.trigger_end < 1024 and len(_WAIT.findall(y.text)) <= 4


def released_reward(reward: float, completion: Completion) -> float:
    """The released code's: -0.1 for an unfinished response or more than 5 waits, 1.1 for a right one with 1 or 2
    waits that were not forced."""
    waits = len(_WAIT.findall(completion.text))
    if completion.finish_reason != "stop" or waits > 5:
        return -0.1
    return 1.1 if reward >= 1.0 and 1 <= waits - (completion.rethought is not None) <= 2 else reward
