"""METHOD's rules of forced rethinking, on a scripted engine; law 6 on a real one is in rollout/test_vllm_engine.py."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from rethinker.algorithm.rethinking import (
    Rethinker,
    Trigger,
    answers_at_once,
    continue_after_trigger,
    make_triggers,
    released_reward,
)
from rethinker.config import RethinkConfig
from rethinker.embedded.tokenizer import train_tokenizer
from rethinker.samples import Completion, Group, Prompt, Query, Rethinking, Rethought

END = 99
TRIGGERS = [Trigger("self_questioning", (70, 71)), Trigger("self_correction", (80,))]


def decode(token_ids: list[int]) -> str:
    """Text in which every token can be seen; the end token is not text."""
    return " ".join(str(token) for token in token_ids if token != END)


def spoken(*token_ids: int, ended: bool = True) -> Completion:
    """A first answer of these tokens, log-prob -token / 100 each."""
    tokens = [*token_ids, END] if ended else list(token_ids)
    return Completion(tokens, [-t / 100 for t in tokens], decode(tokens), "stop" if ended else "length")


class Script:
    """A rollout engine that goes on with `second`, or with what a function of the tokens so far says."""

    def __init__(self, second=lambda tokens: [42, END]) -> None:
        self.second, self.calls = second, []

    def generate(self, prompts, *, n, max_new_tokens, temperature, seed):
        self.calls.append((prompts, max_new_tokens, temperature, seed))
        answers = []
        for prompt, longest in zip(prompts, max_new_tokens, strict=True):
            tokens = self.second(prompt.token_ids)
            ended = len(tokens) <= longest
            tokens = tokens[:longest]
            answers.append([Completion(tokens, [-t / 100 for t in tokens], "", "stop" if ended else "length")])
        return answers


def judge(groups: list[Group]) -> None:
    """Right is what says 42 last."""
    for group in groups:
        group.rewards = [float(one.text.split(" ")[-1] == "42") for one in group.completions]


def run(groups: list[Group], engine: Script | None = None, *, longest: int = 12, seed: int = 0, **settings) -> Script:
    engine = engine or Script()
    judge(groups)
    config = RethinkConfig(**{"fraction": 1.0} | settings)
    rethinker = Rethinker(config, TRIGGERS, decode, max_new_tokens=longest, temperature=1.0)
    rethinker.force(groups, [Prompt(g.query.id, [1, 2], [1], []) for g in groups], engine.generate, judge, seed)
    return engine


def group(*completions: Completion, name: str = "q") -> Group:
    return Group(Query(name, "?", "42"), list(completions), policy_version=3)


# METHOD's rules


def test_a_kept_response_takes_the_place_of_its_first_answer():
    """G stays, the reward is that of the final text, and spans, log-probs and masks are of the spliced sequence."""
    one = group(spoken(7, 8), spoken(42), spoken(5, ended=False))
    engine = run([one], Script(lambda tokens: [42, END]), triggers={})
    assert len(one.completions) == 3 and one.rewards == [1.0, 1.0, 0.0]
    y = one.completions[0]
    size = y.rethought.trigger_end - 2
    assert y.token_ids.tolist()[:2] == [7, 8] and y.token_ids.tolist()[-2:] == [42, END]
    assert y.rethought.trigger_start == 2
    assert y.logprobs.tolist()[:2] == spoken(7, 8).logprobs.tolist()[:2]
    assert y.logprobs.tolist()[-2:] == spoken(42).logprobs.tolist()
    assert all(map(math.isnan, y.logprobs[2 : 2 + size])) and y.text.endswith("42")
    assert (y.rethought.masked_start, y.rethought.masked_end) == (2, 2 + size)
    (prompts, longest, temperature, _), *_ = engine.calls
    assert prompts[0].token_ids[:4] == [1, 2, 7, 8] and prompts[0].compact_ids[:3] == [1, 7, 8]
    assert all(limit == 12 - (len(p.token_ids) - 2) for limit, p in zip(longest, prompts, strict=True))
    assert temperature == 1.0


def test_experts_of_a_first_answer_stay():
    """With rollout.router_replay those of prompt and y1 are the first pass's, of trigger and y2 the second's."""
    first = spoken(7, 8)  # behind a prompt of two tokens
    first.experts = np.full((4, 1, 1), 5, np.uint8)

    class Engine(Script):
        def generate(self, prompts, **settings):
            answers = super().generate(prompts, **settings)
            for prompt, (answer,) in zip(prompts, answers, strict=True):
                answer.experts = np.full((len(prompt.token_ids) + answer.tokens - 1, 1, 1), 6, np.uint8)
            return answers

    one = group(first)
    run([one], Engine())
    (y,) = one.completions
    assert y.rethought and y.experts.flatten().tolist() == [5] * 4 + [6] * (2 + y.tokens - 1 - 4)


def test_only_right_ones_are_kept_and_two_at_most():
    """Of three that end right two are kept, in the order of the group; a wrong second pass leaves its y1."""
    one = group(spoken(1), spoken(2), spoken(3), spoken(4))
    run([one], Script(lambda tokens: [13, END] if 2 in tokens[2:3] else [42, END]))
    assert [c.rethought is not None for c in one.completions] == [True, False, True, False]
    assert one.rethinking == Rethinking(forced=4, kept=2, fixed=3, broken=0)
    limited = group(spoken(1), spoken(2), spoken(3))
    run([limited], max_kept=1)
    assert limited.rethinking.kept == 1


def test_rewards_are_the_responses_own():
    """Law 7: each second pass is judged by its own text, whatever the order; reading them shifted would differ."""
    groups = [group(*(spoken(10 * g + i + 1) for i in range(4)), name=f"q{g}") for g in range(3)]
    right = {1, 4, 12, 23}  # the y1 tokens after which the model gets it right
    run(groups, Script(lambda tokens: [42 if tokens[2] in right else 13, END]))
    kept = {c.token_ids[0] for g in groups for c in g.completions if c.rethought is not None}
    assert kept == right
    for g in groups:
        assert g.rewards == [float(c.rethought is not None) for c in g.completions]


def test_right_is_what_the_first_function_says():
    """Of several reward functions: the weighted sum decides neither which first answers are eligible nor what is kept;
    a kept response brings all its values along."""

    def judge_by_two(groups: list[Group]) -> None:
        judge(groups)
        for each in groups:
            each.scores = {"box": each.rewards, "length": [3.0 + len(c.token_ids) for c in each.completions]}
            each.rewards = [box - long for box, long in zip(*each.scores.values(), strict=True)]

    one = group(spoken(1), spoken(42), spoken(3))
    judge_by_two([one])
    rethinker = Rethinker(RethinkConfig(fraction=1.0, first_answers="wrong"), TRIGGERS[1:], decode, 12, 1.0)
    engine = Script(lambda tokens: [42, END] if 3 in tokens else [7, END])
    rethinker.force([one], [Prompt("q", [1, 2], [1], [])], engine.generate, judge_by_two, 0)
    assert one.rethinking == Rethinking(forced=2, kept=1, fixed=1) and one.right == [False, True, True]
    assert one.scores == {"box": [0.0, 1.0, 1.0], "length": [5.0, 5.0, 7.0]} and one.rewards == [-5.0, -4.0, -6.0]


def test_fixed_and_broken_are_counted():
    """fixed: wrong before and right after; broken: right before and wrong after."""
    one = group(spoken(42), spoken(6), spoken(1, 42), spoken(8))
    run([one], Script(lambda tokens: [13, END] if 42 in tokens else [42, END]))
    assert one.rethinking == Rethinking(forced=4, kept=2, fixed=2, broken=2)
    assert one.rewards == [1.0, 1.0, 1.0, 1.0] and one.completions[0].rethought is None


def test_first_answers_that_never_end_are_left_alone():
    """Nothing is forced upon them, and no second pass is run on nothing."""
    one = group(spoken(1, 2, ended=False), spoken(3, 4, ended=False))
    before = list(one.completions)
    run([one])
    assert one.completions == before and one.rethinking == Rethinking()


def test_an_empty_first_answer_is_left_alone():
    """There is nothing to rethink in a response that is only an end token."""
    one = group(spoken(), spoken(3))
    run([one])
    assert one.rethinking.forced == 1 and one.completions[0].rethought is None


def test_no_room_left():
    """A trigger longer than the room left is not forced; with exactly one token of room it is, and y2 is cut."""
    body = list(range(1, 10))
    one = group(spoken(*body))
    run([one], longest=10)  # shorter trigger of 1 leaves nothing for y2
    assert one.rethinking.forced == 0
    several = group(*(spoken(*body) for _ in range(40)))
    engine = run([several], longest=11)  # room for the trigger of 1 and a token, none for that of 2
    assert (
        0 < several.rethinking.forced == len(engine.calls[0][0]) < 40
        and several.sampled_tokens == several.rethinking.forced
    )
    triggers = [Trigger("long", (70,) * 3)]
    first = [spoken(*body)]
    options = {"temperature": 1.0, "seed": 0}
    prompt = [Prompt("q", [1], [1], [])]
    assert continue_after_trigger(Script().generate, prompt, first, triggers, decode, max_new_tokens=12, **options) == [
        None
    ]
    (y,) = continue_after_trigger(Script().generate, prompt, first, triggers, decode, max_new_tokens=13, **options)
    assert len(y.token_ids) == 13 and y.finish_reason == "length"


def test_a_second_pass_that_never_ends_is_not_kept():
    """However right its text looks, it did not end by itself."""
    one = group(spoken(1), spoken(2))
    run([one], Script(lambda tokens: [42] * 100))
    assert one.rethinking == Rethinking(forced=2) and all(c.rethought is None for c in one.completions)


def test_all_right_stays_all_right():
    """A query whose answers are all right keeps its rewards, and so its zero advantages."""
    one = group(spoken(42), spoken(1, 42), spoken(2, 42))
    run([one])
    assert one.rewards == [1.0] * 3 and not one.effective and one.rethinking.kept == 2


def test_an_identical_response_is_kept_once():
    """Two forced responses that come out token for token alike count as one; the other keeps its y1."""
    one = group(spoken(7), spoken(7), spoken(9))
    rethinker = Rethinker(RethinkConfig(fraction=1.0), TRIGGERS[:1], decode, max_new_tokens=12, temperature=1.0)
    judge([one])
    rethinker.force([one], [Prompt("q", [1], [1], [])], Script().generate, judge, 0)
    assert [c.rethought is not None for c in one.completions] == [True, False, True]


@pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
def test_the_fraction_is_of_the_eligible(fraction):
    """q of the eligible responses are forced, another choice with another seed, the same with the same."""
    groups = [group(*(spoken(i + 1) for i in range(8)), spoken(3, ended=False), name=str(g)) for g in range(10)]
    forced = []
    for seed in (0, 0, 1):
        trial = [dataclasses.replace(g, completions=list(g.completions)) for g in groups]
        engine = run(trial, Script(lambda tokens: [13, END]), fraction=fraction, seed=seed)
        assert sum(g.rethinking.forced for g in trial) == round(80 * fraction)
        forced.append([tuple(p.token_ids) for p in engine.calls[0][0]])
    assert forced[0] == forced[1] and (forced[0] != forced[2])


def test_only_wrong_first_answers_are_forced_where_the_settings_say_so():
    """`first_answers: wrong` leaves the right ones alone; by default both are forced."""
    forced = {}
    for which in ("all", "wrong"):
        g = group(spoken(1, 42), spoken(2, 42), spoken(5))
        judge([g])
        config = RethinkConfig(fraction=1.0, first_answers=which)
        engine = Script()
        Rethinker(config, TRIGGERS, decode, max_new_tokens=12, temperature=1.0).force(
            [g], [Prompt("q", [1], [1], [])], engine.generate, judge, 0
        )
        forced[which] = g.rethinking.forced
    assert forced == {"all": 3, "wrong": 1}


def test_what_is_masked():
    """By default the trigger; y1 too, or nothing, if the settings say so; unmasked triggers ask for log-probs."""
    for settings, spans in (
        ({}, (1, 2)),
        ({"mask_first_answer": True}, (0, 2)),
        ({"mask_trigger_tokens": False}, (1, 1)),
        ({"mask_trigger_tokens": False, "mask_first_answer": True}, (0, 1)),
    ):
        one = group(spoken(7))
        judge([one])
        rethinker = Rethinker(
            RethinkConfig(fraction=1.0, **settings), TRIGGERS[1:], decode, max_new_tokens=9, temperature=1
        )
        rethinker.force([one], [Prompt("q", [1], [1], [])], Script().generate, judge, 0)
        (y,) = one.completions
        assert (y.rethought.masked_start, y.rethought.masked_end) == spans
        assert y.trainable_tokens == len(y.token_ids) - (spans[1] - spans[0])
        assert rethinker.needs_scores == ("mask_trigger_tokens" in settings)


# The released code's rules


def released(**settings) -> RethinkConfig:
    return RethinkConfig(**{"fraction": 1.0, "preset": "released_code"} | settings)


def test_released_code_temperature_and_lengths():
    """The second pass runs at 0.9 and is kept only if 30 < |y2| < 1024 and it has at most 4 waits."""
    for length, waits, kept in ((29, 1, 0), (31, 1, 1), (1030, 1, 0), (40, 5, 0)):
        one = group(spoken(7))
        judge([one])
        tokens = [*[3] * (length - 1), 42, END]
        text = {"waits": waits}
        rethinker = Rethinker(
            released(),
            TRIGGERS[:1],
            lambda ids, text=text: "wait " * text["waits"] * (len(ids) > 5) + decode(ids),
            max_new_tokens=2000,
            temperature=1.0,
        )
        engine = Script(lambda _, tokens=tokens: tokens)
        rethinker.force([one], [Prompt("q", [1], [1], [])], engine.generate, judge, 0)
        assert one.rethinking.kept == kept and engine.calls[0][2] == 0.9 and rethinker.needs_scores


def test_released_code_skips_wrong_answers_of_solved_queries():
    """With more than 0.7 of a query's answers right, its wrong ones are not forced; with fewer they are."""
    solved = group(*(spoken(i, 42) for i in range(1, 4)), spoken(5), name="solved")
    open_query = group(*(spoken(i, 42) for i in range(1, 3)), spoken(5), spoken(6), name="open")
    for g in (solved, open_query):
        judge([g])
        rethinker = Rethinker(released(), TRIGGERS, decode, max_new_tokens=12, temperature=1.0)
        rethinker.force([g], [Prompt("q", [1], [1], [])], Script().generate, judge, 0)
    assert (solved.rethinking.forced, open_query.rethinking.forced) == (3, 4)


def test_released_code_cuts_back_to_whole_tokens():
    """About half of the first answers lose what begins at the last "Wait", box, "answer" or paragraph; the rest are
    whole tokens of y1, with their log-probs."""
    tokenizer = train_tokenizer((), merges=768)
    text = "It is red.\n\nWait, no. The answer is \\boxed{blue}"
    ids = tokenizer(text)["input_ids"]
    starts = [text.rindex(cut) for cut in ("Wait", "\\boxed{", "answer", "\n\n")]
    engine = Script(lambda tokens: [tokenizer.eos_token_id])
    first = [Completion([*ids, tokenizer.eos_token_id], [-0.5] * (len(ids) + 1), text, "stop") for _ in range(200)]
    groups = [Group(Query(str(i), "?", "!"), [one], 0, rewards=[0.0]) for i, one in enumerate(first)]
    rethinker = Rethinker(
        released(), make_triggers(tokenizer, {"t": "X"}), tokenizer.decode, max_new_tokens=200, temperature=1
    )
    rethinker.force(groups, [Prompt("q", [], [], [])] * 200, engine.generate, lambda trials: None, seed=0)
    (trigger,) = make_triggers(tokenizer, {"t": "X"})
    kept = [p.token_ids[: -len(trigger.token_ids)] for p in engine.calls[0][0]]
    assert all(ids[: len(k)] == k for k in kept)
    whole = sum(len(k) == len(ids) for k in kept)
    assert 70 < whole < 130
    lengths = {len(tokenizer.decode(k)) for k in kept if len(k) < len(ids)}
    assert len(lengths) == 4 and all(any(s - 6 < n <= s for s in starts) for n in lengths)


def test_released_code_triggers_by_correctness():
    """Half of the triggers fit the first answer: verification if it was right, correction if not."""
    rethinker = Rethinker(
        released(),
        [Trigger(name, (i,)) for i, name in enumerate(("self_questioning", "self_correction", "self_verification"))],
        decode,
        max_new_tokens=9,
        temperature=1.0,
    )
    groups = [group(spoken(42 if i % 2 else 7), name=str(i)) for i in range(600)]
    judge(groups)
    engine = Script()
    rethinker.force(groups, [Prompt("q", [1], [1], [])] * 600, engine.generate, judge, 0)
    used = [p.token_ids[-1] for p in engine.calls[0][0]]
    for offset, fitting in ((0, 1), (1, 2)):
        share = used[offset::2].count(fitting) / 300
        assert 0.56 < share < 0.77  # 1/2 + 1/2 * 1/3


def test_released_reward():
    """-0.1 when unfinished or beyond 5 waits, 1.1 for a right answer with 1 or 2 waits of its own, else unchanged."""
    forced = Rethought(1, 2, "x", 1, 2)

    def reward(value: float, waits: int, ended: bool = True, rethought: Rethought | None = None) -> float:
        text = "Wait, " * waits + "so"
        return released_reward(value, Completion([], [], text, "stop" if ended else "length", rethought))

    assert [reward(1.0, n) for n in range(7)] == [1.0, 1.1, 1.1, 1.0, 1.0, 1.0, -0.1]
    assert [reward(1.0, n, rethought=forced) for n in range(1, 5)] == [1.0, 1.1, 1.1, 1.0]
    assert reward(1.0, 0, ended=False) == -0.1 and reward(0.0, 2) == 0.0


@pytest.mark.parametrize(
    ("text", "at_once"),
    [
        (r"\boxed{1}", True),
        (r"The answer is \boxed{\frac{1}{2}}.", True),
        (r"The answer is \boxed{\text{a {b} c d e f}}", True),  # a long answer is an answer
        ("6-0=6\n\\boxed{6}", False),
        ("6-0=6\n6+8=14\n14-6=8\n\\boxed{8}", False),
        (r"I think the answer is \boxed{2}", False),
        (r"It shows a red ball, so \boxed{red}", False),
        (r"\boxed{1} \boxed{2} \boxed{3} \boxed{4} \boxed{5}", False),
        (r"Wait, \boxed{1}", False),
        ("red", True),
        ("", True),
        (r"\boxed{1", True),  # cut at the limit
    ],
)
def test_fast_answers(text, at_once):
    """A response answers at once if it is nothing but its answer: few words beside it, no calculation, no cue."""
    assert answers_at_once(text) == at_once
