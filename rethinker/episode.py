"""The first half of an episode: queries become groups of rewarded responses, at once or one episode ahead of training.

With `rollout.max_staleness: 1` the next episode is sampled, judged and rethought in a thread while this one trains,
with the weights of the last sync; it has ended before the next sync, so that no response mixes two policies.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from rethinker.algorithm.corrections import METRICS, weigh
from rethinker.algorithm.refill import fill, next_round
from rethinker.algorithm.rethinking import Rethinker, answers_at_once, make_triggers, released_reward, rethinks
from rethinker.algorithm.selection import teaches
from rethinker.config import Config
from rethinker.data.prompts import PromptEncoder
from rethinker.data.query_stream import QueryStream
from rethinker.policy.engine import PolicyEngine
from rethinker.rewards.checker import AnswerChecker
from rethinker.rewards.functions import reward_weights
from rethinker.rollout.dialogue import Dialogue
from rethinker.rollout.engine import RolloutEngine, respond
from rethinker.runtime import signals
from rethinker.runtime.distributed import Ranks
from rethinker.runtime.ownership import share
from rethinker.runtime.profiling import phase
from rethinker.runtime.signals import StopRequested
from rethinker.samples import Completion, Group, Prompt, Query

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Episode:
    """What was sampled for an episode, rewarded: this rank's groups whole, those of others in outline."""

    groups: list[Group]
    """To be trained on, in the order of sampling."""
    dropped: list[Group] = field(default_factory=list)
    """Others were sampled in place of these, or filled the episode before them."""
    rounds: int = 0
    """In which the episode was refilled."""

    @property
    def sampled(self) -> list[Group]:
        """All groups, in the order of sampling."""
        return sorted([*self.groups, *self.dropped], key=lambda group: group.number)


@dataclass
class _Work:
    """The rollouts of an episode, or of one round of its refill, on this rank, under way or done."""

    number: int  # of the episode
    version: int  # of the policy that samples
    round: int  # of refill; 0: the episode's first
    queries: list[Query]  # of all ranks
    prompts: list[Prompt]  # of this rank's share: every world_size-th
    before: dict[str, Any]  # where the data stood when the episode began
    thread: threading.Thread | None = None
    abandoned: threading.Event = field(default_factory=threading.Event)
    groups: list[Group] | None = None  # of this rank; None: broken off because the run is to stop
    error: BaseException | None = None


class Episodes:
    """The run's episodes, one after the other. On every rank: each rolls out every world_size-th query."""

    def __init__(
        self,
        config: Config,
        stream: QueryStream,
        encoder: PromptEncoder,
        rollout: RolloutEngine,
        checker: AnswerChecker,
        ranks: Ranks,
        dialogue: Dialogue | None = None,
    ) -> None:
        self.config, self.stream, self.encoder, self.dialogue = config, stream, encoder, dialogue
        self.rollout, self.checker, self.ranks = rollout, checker, ranks
        self.rethinker = None
        if config.rethink.fraction:
            triggers = make_triggers(encoder.tokenizer, config.rethink.triggers)
            lengths = {"max_new_tokens": config.rollout.max_new_tokens, "temperature": config.rollout.temperature}
            self.rethinker = Rethinker(config.rethink, triggers, encoder.decode, **lengths)
        self._begun: _Work | None = None
        self._warned = False

    def take(self, number: int, version: int, times: dict[str, float], needed: int | None = None) -> Episode:
        """Episode `number` (collective), of train.episode_queries groups; refilled as algorithm.refill_rounds says, and
        then of no more than `needed`.

        The groups carry the `version` of the policy that sampled them: of an episode begun ahead, that of its `begin`,
        and then only the wait for it is added to `times`, as rollout.

        Raises:
            StopRequested: on every rank, if one broke its rollout off because the run is to stop, or a reward function
                failed whose on_failure is stop; the data then stands where it stood before the episode.
        """
        rounds, wanted = self.config.algorithm.refill_rounds, self.config.train.episode_queries
        masks = self.config.train.mask_truncated
        if rounds and needed:
            wanted = min(wanted, needed)
        work = self._begun or self._prepare(number, version, times, wanted)
        groups = self._rewarded(work, times)
        while (more := next_round(groups, wanted, masks)) and work.round < rounds:
            work = self._prepare(number, version, times, more, after=work)
            groups += self._rewarded(work, times)
        self.stream.end_episode(groups)
        if more and rounds and self.ranks.is_main and not self._warned:
            self._warned = True  # further ones show in effective_query_ratio
            log.warning(
                "algorithm.refill_rounds=%d: after the last round %d of %d queries of episode %d have no advantage; "
                "more rounds may fill it, or other questions (data.draw=variance, rethinker curate)",
                *(rounds, wanted - sum(teaches(group, masks) for group in groups), wanted, number),
            )
        return Episode(*fill(groups, wanted, masks), rounds=work.round)

    def begin(self, number: int, version: int, times: dict[str, float]) -> None:
        """Start on episode `number` in a thread; the next `take` returns it. Until `wait` the engine is busy."""
        work = self._prepare(number, version, times, self.config.train.episode_queries)

        def produce() -> None:
            try:
                # Collectives are the main thread's, so each rank sees alone that the run is to stop.
                with signals.interruptible(work.abandoned):
                    self._produce(work, {}, any_stopped=bool)
            except StopRequested:
                work.groups = None
            except BaseException as error:  # raised by `take`, where the loop can end for it
                work.error = error
            finally:
                work.prompts = []  # and their images

        # A daemon: one that hangs in C code must not keep a run that has ended.
        work.thread = threading.Thread(target=produce, name=f"episode {number}", daemon=True)
        self._begun = work
        work.thread.start()

    def wait(self, times: dict[str, float]) -> None:
        """Wait until the episode that was begun has ended, as a weight sync needs it; `take` raises its error."""
        if self._begun:
            with phase("rollout", times):
                self._begun.thread.join()

    def close(self) -> None:
        """Break off what was begun."""
        if self._begun:
            self._begun.abandoned.set()
            self._begun.thread.join(timeout=10)
            self._begun = None

    def state_dict(self) -> dict[str, Any]:
        """Where the data stands for a run that goes on from here: an episode that was begun ahead is sampled again."""
        return self._begun.before if self._begun else self._position()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back there; what was sampled since is forgotten."""
        self.stream.load_state_dict(state["stream"])
        self.encoder.load_state_dict(state["encoder"])
        self.checker.failures = Counter(state["failures"])
        self.rollout.load_state_dict(state["rollout"])

    def _position(self) -> dict[str, Any]:
        return {
            "stream": self.stream.state_dict(),
            "encoder": self.encoder.state_dict(),
            "failures": dict(self.checker.failures),
            "rollout": self.rollout.state_dict(),
        }

    def _prepare(
        self, number: int, version: int, times: dict[str, float], size: int, after: _Work | None = None
    ) -> _Work:
        """The next `size` queries for an episode; its refill's round `after` another."""
        round, before = (after.round + 1, after.before) if after else (0, self._position())
        with phase("rollout", times):
            queries = [self.encoder.fitting(self.stream) for _ in range(size)]
            prompts = [self.encoder.encode(query) for query in queries[self.ranks.rank :: self.ranks.world_size]]
        return _Work(number, version, round, queries, prompts, before)

    def _rewarded(self, work: _Work, times: dict[str, float]) -> list[Group]:
        """The groups of a round, of all ranks (collective); raises as `take`."""
        if work is self._begun:
            self.wait(times)
            self._begun = None
            if work.error:
                raise work.error
            stopped = self.ranks.any(work.groups is None)
        else:
            stopped = not self._produce(work, times, any_stopped=self.ranks.any)
        if stopped:
            self.load_state_dict(work.before)
            raise StopRequested
        most = self.config.train.episode_queries  # of a round
        first = (work.number * (1 + self.config.algorithm.refill_rounds) + work.round) * most
        return share(work.groups, work.queries, first_number=first, ranks=self.ranks)

    def _produce(self, work: _Work, times: dict[str, float], any_stopped: Callable[[bool], bool]) -> bool:
        """Queries to rewarded groups; False if a rank broke it off because the run is to stop, or a reward function
        failed that must not.

        `any_stopped` says whether any rank did, from whether this one did.
        """
        config, mine = self.config, work.queries[self.ranks.rank :: self.ranks.world_size]
        with phase("rollout", times):
            with suppress(StopRequested), signals.interruptible(work.abandoned):
                asked = mine, work.prompts, work.version, self.rollout, config, self._seed(work), self.dialogue
                work.groups = roll_out(*asked)
            if any_stopped(work.groups is None):
                return False
        with phase("reward", times):
            judged = False
            with suppress(StopRequested), signals.interruptible(work.abandoned):
                judge(work.groups, self.checker, config)
                judged = True
            if any_stopped(not judged or self.checker.stopping is not None):
                work.groups = None
                return False
        if self.rethinker:
            with phase("rethink", times):
                rejudge = partial(judge, checker=self.checker, config=config)
                seed = self._seed(work, stream=1)
                self.rethinker.force(work.groups, work.prompts, self.rollout.generate, rejudge, seed)
                if any_stopped(self.checker.stopping is not None):
                    work.groups = None
                    return False
        note_kinds(work.groups, config)
        return True

    def _seed(self, work: _Work, stream: int = 0) -> int:
        """A seed of its own for every episode, rank, stream of random numbers and round."""
        streams = [self.config.seed, work.number, self.ranks.rank, stream, work.round]
        while streams[-1] == 0 and len(streams) > 3:
            streams.pop()
        return int(np.random.SeedSequence(streams).generate_state(1)[0])


def roll_out(
    queries: list[Query],
    prompts: list[Prompt],
    version: int,
    rollout: RolloutEngine,
    config: Config,
    seed: int,
    dialogue: Dialogue | None = None,
) -> list[Group]:
    """One group of `rollout.group_size` responses to every query, not rewarded yet."""
    settings = config.rollout
    sampling = {"n": settings.group_size, "max_new_tokens": settings.max_new_tokens}
    sampling |= {"temperature": settings.temperature, "seed": seed}
    answers = respond(rollout, dialogue, queries, prompts, **sampling)
    return [
        Group(query, responses, version, len(prompt.token_ids), sampled_tokens=sum(c.sampled_tokens for c in responses))
        for query, prompt, responses in zip(queries, prompts, answers, strict=True)
    ]


def judge(groups: list[Group], checker: AnswerChecker, config: Config) -> None:
    """Set each group's scores, the values of all reward functions for each completion's own final text, and as rewards
    their weighted sums; requests carry ids, so order does not matter."""
    requests = {f"{g}/{i}": (c, group.query) for g, group in enumerate(groups) for i, c in enumerate(group.completions)}
    values = checker.score_all(
        [(request, completion.text, query) for request, (completion, query) in requests.items()],
        {request: (completion.tokens, completion.truncated) for request, (completion, _) in requests.items()},
    )
    weights = reward_weights(config.reward)
    first = next(iter(weights))
    for g, group in enumerate(groups):
        places = range(len(group.completions))
        group.scores = {name: [values[name][f"{g}/{i}"] for i in places] for name in weights}
        if config.rethink.fraction > 0 and config.rethink.preset == "released_code":
            group.scores[first] = list(map(released_reward, group.scores[first], group.completions))
        given = [sum(part.reward for part in completion.observed) for completion in group.completions]
        group.rewards = [
            sum(weight * group.scores[name][i] for name, weight in weights.items())
            + config.environment.reward_weight * given[i]
            for i in places
        ]


def note_kinds(groups: list[Group], config: Config) -> None:
    """Set what is known of each response beside its reward: `group.rethinks`, `fast`, `truncated`, `nlls`, `lengths`,
    `turns`, `calls` and `failures`."""
    for group in groups:
        forced = [c.rethought and config.rethink.triggers.get(c.rethought.name) for c in group.completions]
        group.rethinks = [rethinks(c.text, phrase or "") for c, phrase in zip(group.completions, forced, strict=True)]
        alone = [c.rethought is None and c.turns == 1 for c in group.completions]
        group.fast = [one and answers_at_once(c.text) for one, c in zip(alone, group.completions, strict=True)]
        group.nlls = [c.mean_nll for c in group.completions]
        group.truncated = [c.truncated for c in group.completions]
        group.lengths = [c.sampled_tokens for c in group.completions]
        group.turns = [c.turns for c in group.completions]
        group.calls = [c.calls for c in group.completions]
        group.failures = dict(Counter(reason for c in group.completions for reason in c.failures))


def score_again(
    groups: list[Group], first: list[Group], policy: PolicyEngine, rethinker: Rethinker | None, config: Config
) -> tuple[float | None, dict[str, float | None]]:
    """Give responses the log-probs of the policy's own forward, where the settings need them (collective).

    Rethought responses that were sampled at another temperature, or whose triggers are trained, get them as behaviour
    log-probs; with `algorithm.rollout_correction` all responses get them beside those of the rollout engine, and with
    `algorithm.top_entropy` the mask of the tokens that carry the policy gradient.

    Args:
        groups: of an episode, with rewards.
        first: those of its first step.

    Returns:
        mismatch_kl where it is known before the first step: with these two settings, and where none of that step's
        responses has an advantage, as when weights are lost and every answer is wrong; and `corrections.METRICS`.

    Raises:
        MismatchError: it exceeds `rollout.max_mismatch_kl`; or it is NaN, and no step would show that.
    """
    samples = [sample for group in groups for sample in group.samples()]
    if rethinker and rethinker.needs_scores:
        rethought = [sample for sample in samples if sample.completion.supervised]
        policy.score(rethought)
        for sample in rethought:
            if isinstance(sample.completion, Completion):
                sample.completion.logprobs = sample.completion.trainer_logprobs
    idle = not any(teaches(group, config.train.mask_truncated) for group in first)
    weighs = config.algorithm.rollout_correction is not None or config.algorithm.top_entropy is not None
    if not weighs:
        if not idle:
            return None, dict.fromkeys(METRICS)
        samples = [sample for group in first for sample in group.samples()]
    scores = policy.score(samples)
    # NaN passes where the step that computes it is skipped; here none does.
    check_mismatch(math.inf if idle and math.isnan(scores.mismatch) else scores.mismatch, config)
    if not weighs:
        return scores.mismatch, dict.fromkeys(METRICS)
    mine = [sample.completion for sample in samples if sample.owner == policy.ranks.rank]
    return scores.mismatch, weigh(mine, scores.entropies, config.algorithm, policy.ranks)


class MismatchError(RuntimeError):
    """The rollout engine does not sample from the policy that is trained."""


def check_mismatch(value: float, config: Config) -> None:
    """Check that the rollouts are those of the policy that is trained; warn from a tenth of the ceiling.

    Call it with the first step after a weight sync: until then the policy has not moved, so the k3 estimate shows
    rounding, or that the two computed different things; with rollout.max_staleness=1 also what the steps of one episode
    changed. Measured with tiny models of all families on a CPU, in nats: rounding 1e-13 to 6e-13 in fp32 and 2e-5 to
    1.5e-4 in bf16; photos that one side turns 0.02 to 0.8; all weights moved by 0.02 to 0.05 and not sent 0.4 to 7. A
    single small update that is lost shows in rollout.check_sync alone.

    Args:
        value: `mismatch_kl`, nats per token, the same on all ranks. NaN passes: its step is skipped and counted.

    Raises:
        MismatchError: above rollout.max_mismatch_kl.
    """
    ceiling = config.rollout.mismatch_ceiling(config.policy.dtype)
    if ceiling is None or config.rollout.backend == "recorded":  # recorded by a policy of its own
        return
    measured = f"mismatch_kl={value:.3g} nats per token in the first step after a weight sync"
    cause = (
        "the rollout engine sees other images than the trainer, weights did not arrive in it, or it computes in "
        "another precision"
    )
    if config.rollout.max_staleness:
        cause = f"the policy moves too far in an episode (rollout.max_staleness=0 waits for it), or {cause}"
    hint = "rollout.check_sync=true names the tensor that differs after a sync"
    if value > ceiling:
        raise MismatchError(
            f"{measured} exceeds rollout.max_mismatch_kl={ceiling:g}: {cause}; {hint}. Go on from the last checkpoint; "
            "null switches this check off"
        )
    if value > ceiling / 10:
        log.warning("%s is above a tenth of rollout.max_mismatch_kl=%g: %s; %s", measured, ceiling, cause, hint)
