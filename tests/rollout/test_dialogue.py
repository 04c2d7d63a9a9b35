"""Responses of several turns: law 1 and law 6 through every engine, and the ends that a response may come to."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
from PIL import Image

from rethinker.data import prompts
from rethinker.data.prompts import PromptEncoder
from rethinker.environments import Observation
from rethinker.rollout.dialogue import Conversation
from rethinker.rollout.engine import make_engine
from rethinker.rollout.server.sync import FolderWeights
from rethinker.rollout.vllm_settings import cpu_block_size
from rethinker.runtime.distributed import Ranks
from rethinker.samples import Completion
from tests.data.image_kinds import noise, saved
from tests.rollout.dialogues import Scripted, Side, config_of_dialogues, late, model_whose_turns_end
from tests.rollout.helpers import TOLERANCE
from tests.rollout.served import Relay, Served

SAMPLING = {"temperature": 1.0, "seed": 0}


@pytest.fixture(scope="module")
def ending(tmp_path_factory):
    """The folder of a model whose turns end."""
    return model_whose_turns_end(tmp_path_factory.mktemp("ending"))


@pytest.fixture(scope="module", params=["vllm", "hf", "server"])
def side(request, ending, tmp_path_factory):
    """The trainer's side, and its engine."""
    side = Side(ending, config_of_dialogues(backend=request.param))
    if request.param == "server":
        side.served = Served(ending, tmp_path_factory.mktemp("served") / "log", side.config)
        request.addfinalizer(side.served.close)
        side.config.rollout.servers = [side.served.address()]
    side.engine = make_engine(side.config, str(ending), rank=0, world_size=1, local_rank=0)
    yield side
    side.engine.close()


def three_turns(responses: list[Completion]) -> list[Completion]:
    return [one for one in responses if len(one.images) == 2 and one.observed[-1].end == one.tokens]


def test_every_sampled_token_has_the_policys_log_prob_and_nothing_else_is_trained(side, monkeypatch):
    """Laws 1 and 6: three turns with two images that the environment returned. What the engine sampled in its turns is
    what counts in the loss, token for token; what it did not sample does not."""
    said = []
    requests = side.engine._requests if hasattr(side.engine, "_requests") else None
    owner, name = (requests, "completion") if requests else (side.engine, "_completion")
    plain = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: said.append(plain(*args, **kwargs)) or said[-1])
    responses = side.engine.converse(side.begin(Scripted(), each=6), **SAMPLING)
    assert side.gaps(responses).abs().max() < TOLERANCE
    full = three_turns(responses)
    assert len(full) >= 4
    sampled = [token for one in responses for token in one.token_ids[one.sampled].tolist()]
    assert sorted(sampled) == sorted(token for turn in said for token in turn.token_ids.tolist())
    for one in responses:
        assert (one.sampled == np.isfinite(one.logprobs)).all() and (one.trainable == one.sampled).all()
        assert (
            one.trainable_tokens
            == one.sampled_tokens
            == one.tokens - sum(part.end - part.start for part in one.observed)
        )


def test_a_rollout_is_repeated_to_the_bit(side):
    """Where answers are there at once; another seed samples others."""
    first, again = (side.engine.converse(side.begin(Scripted()), **SAMPLING) for _ in range(2))
    other = side.engine.converse(side.begin(Scripted()), temperature=1.0, seed=1)
    assert first == again != other
    assert len({tuple(one.token_ids.tolist()) for one in first}) == len(first)


def test_answers_that_come_late_change_no_token(side):
    """Every turn has a seed of its own: the order in which environments answer has no say."""
    at_once = side.engine.converse(side.begin(Scripted()), **SAMPLING)
    delayed = side.engine.converse(
        side.begin(Scripted(answer_at=late(lambda n, turn: 0.3 * (n * turn % 3)))), **SAMPLING
    )
    for one, other in zip(at_once, delayed, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist() and one.images == other.images
        assert np.allclose(one.logprobs, other.logprobs, atol=TOLERANCE, equal_nan=True)


@pytest.mark.parametrize("side", ["vllm", "server"], indirect=True)
def test_a_slow_environment_delays_no_other_conversation(side):
    """The first conversation is answered only when all others have ended; in lock step it would wait for ever."""
    held: list[Callable[[], None]] = []
    released: list[None] = []
    begun = side.begin(Scripted(answer_at=lambda n, turn, answer: held.append(answer) if n + turn == 1 else answer()))
    going = set(begun[1:])

    def watched(one: Conversation, goes_on: Callable[[], bool]) -> bool:
        goes = goes_on()
        if not goes:
            going.discard(one)
        if not going and len(released) < len(held):
            released.append(held[0]())
        return goes

    for one in begun:
        one.goes_on = partial(watched, one, one.goes_on)
    responses = side.engine.converse(begun, **SAMPLING)
    assert len(held) == len(released) == 1 and responses[0].observed


@pytest.mark.parametrize("side", ["vllm"], indirect=True)
def test_few_conversations_are_open_at_a_time(side, monkeypatch):
    """Each open one holds its images and its state; what is sampled does not depend on it."""
    whole = side.engine.converse(side.begin(Scripted(), each=4), **SAMPLING)
    monkeypatch.setattr(side.engine._engine.vllm_config.scheduler_config, "max_num_seqs", 2)  # vLLM's own has it by now
    begun, open_ones = side.begin(Scripted(), each=4), set()
    most = []

    def opened(one: Conversation, plain: Callable[[], None]) -> None:
        open_ones.add(one)
        most.append(len(open_ones))
        plain()

    def goes(one: Conversation, plain: Callable[[], bool]) -> bool:
        goes_on = plain()
        if not goes_on:
            open_ones.remove(one)
        return goes_on

    for one in begun:
        one.open, one.goes_on = partial(opened, one, one.open), partial(goes, one, one.goes_on)
    responses = side.engine.converse(begun, **SAMPLING)
    assert len(most) == 12 and max(most) == 4
    assert [one.token_ids.tolist() for one in responses] == [one.token_ids.tolist() for one in whole]


@pytest.mark.parametrize("side", ["vllm"], indirect=True)
def test_a_later_turn_finds_in_vllms_caches_what_went_before_it(side, monkeypatch):
    """vLLM computes what is new in a turn's prompt, and a block that was not full; and it looks at no image twice."""
    side.engine.sync(FolderWeights(str(side.folder)), 1)  # which clears the caches of other tests
    outputs, seen = [], []
    monkeypatch.setattr(
        side.engine, "_read", lambda output, plain=side.engine._read: outputs.append(output) or plain(output)
    )

    def look(module, args, kwargs):
        seen.extend(map(tuple, kwargs.get("grid_thw", args[-1])))

    (hook,) = side.engine._engine.apply_model(
        lambda model: model.visual.register_forward_pre_hook(look, with_kwargs=True)
    )
    begun = side.begin(Scripted())
    firsts = {len(one.prompt.token_ids) for one in begun}
    responses = side.engine.converse(begun, **SAMPLING)
    later = [output for output in outputs if len(output.prompt_token_ids) not in firsts]
    assert len(later) > 8
    block = cpu_block_size("float32")
    for output in later:
        new = len(output.prompt_token_ids) - output.num_cached_tokens
        # The answer to the last turn, and of what was computed before the last tokens of a block.
        assert 0 < new < 60 + block
    hook.remove()
    assert len(seen) == 3 + sum(len(one.images) for one in responses)  # the questions' images, and the answers'


@pytest.mark.parametrize("side", ["server"], indirect=True)
def test_conversations_of_a_lost_server_go_on_at_another(side):
    """From the turn that each had come to: nothing is asked of an environment twice, and the tokens are the same."""
    whole = side.engine.converse(side.begin(Scripted(), each=4), **SAMPLING)
    relay = Relay(side.served.address())
    try:
        side.engine._replicas.alive.append(relay.address)
        relay.last = 9  # of about 18
        runner = Scripted()
        responses = side.engine.converse(side.begin(runner, each=4), **SAMPLING)
    finally:
        relay.close()
    assert relay.requests >= relay.last and side.engine._replicas.alive == [side.served.address()]
    assert [one.token_ids.tolist() for one in responses] == [one.token_ids.tolist() for one in whole]
    assert all(len(heard) <= one.text.count("") for heard, one in zip(runner.heard, responses, strict=True))
    assert sum(map(len, runner.heard)) == sum(len(one.observed) for one in responses)


class Once(Scripted):
    """Answers every turn by the same observation."""

    def __init__(self, answer: Observation) -> None:
        super().__init__(lambda number, turn: answer)


@pytest.fixture(scope="module")
def trainer(ending):
    """The trainer's side alone: turns are written by hand."""
    return Side(ending, config_of_dialogues())


def turn(side: Side, text: str, end: str = "<|im_end|>", finish_reason: str = "stop") -> Completion:
    """A turn as an engine samples it."""
    tokenizer = side.encoder.tokenizer
    ids = tokenizer(text)["input_ids"] + ([tokenizer.convert_tokens_to_ids(end)] if end else [])
    return Completion(ids, [-1.0] * len(ids), text, finish_reason)


def talk(side: Side, answer: Observation, *turns: Completion, longest: int = 512) -> tuple[Completion, Scripted]:
    """The response of these turns at most, each answered so."""
    runner = Once(answer)
    (one, *_) = side.begin(runner, longest=longest)
    one.open()
    for said in turns:
        assert one.goes_on()
        one.say(said)
    assert not one.goes_on()
    return one.completion(), runner


IMAGE = saved(Image.fromarray(noise(64, 48)))


@pytest.mark.parametrize(
    ("answer", "turns", "failures", "finish_reason"),
    [
        (Observation("ok", done=True, reward=0.5), 1, (), "stop"),
        (Observation("ok", calls=1, failures=("box",)), 3, ("box", "turns"), "stop"),  # max_turns is 3
        (Observation("<image>" * 3, [IMAGE] * 3), 1, ("images",), "stop"),  # max_images is 2
        (Observation("<image>" * 2, [IMAGE] * 2), 2, ("images",), "stop"),
        (Observation("<image>", [b"no image"]), 1, ("image",), "stop"),
        (Observation("<image>", [saved(Image.fromarray(noise(900, 2)))]), 1, ("image",), "stop"),  # 450 times as long
    ],
)
def test_a_response_ends_where_a_limit_says_so(trainer, answer, turns, failures, finish_reason):
    """What was said last stays in the response and is trained; the answer that could not be heard is not in it."""
    said = [turn(trainer, f"call {n}") for n in range(turns)]
    response, runner = talk(trainer, answer, *said)
    last = response.observed[-1]
    assert (last.failures, last.start, last.end) == (failures, response.tokens, response.tokens)
    assert last.reward == answer.reward and last.calls == answer.calls and not last.images
    assert response.finish_reason == finish_reason
    assert response.token_ids[-said[-1].tokens :].tolist() == said[-1].token_ids.tolist()
    assert response.text == "".join(one.text for one in said)
    assert runner.heard[0] == [one.text for one in said]


def test_a_turn_without_an_answer_is_an_ordinary_response(trainer):
    """The environment has nothing to say of a final answer."""
    said = turn(trainer, "\\boxed{4}")
    response, _ = talk(trainer, Observation(done=True), said)
    assert response == said


def test_a_turn_that_is_cut_is_the_last(trainer):
    """The environment is not asked about half a turn."""
    response, runner = talk(trainer, Observation("more"), turn(trainer, "hm", end="", finish_reason="length"))
    assert response.truncated and runner.heard[0] == [] and not response.observed


@pytest.mark.parametrize("end", ["<|image_pad|>", "<|endoftext|>"])
def test_a_turn_with_another_end_is_the_last(trainer, end):
    """Law 4: nothing follows a placeholder that the policy sampled."""
    said = turn(trainer, "look", end=end)
    response, _ = talk(trainer, Observation("more"), said)
    assert response.token_ids.tolist() == said.token_ids.tolist() and response.observed[-1].failures == ("end",)


def test_an_answer_that_leaves_no_room_ends_the_response_as_its_length_does(trainer):
    """At the very bound: room for the answer and one more token is enough."""
    said, answer = turn(trainer, "look"), Observation("<image> of that", [IMAGE])
    heard = len(trainer.encoder.observation(answer.text, [{"bytes": IMAGE}], "q").token_ids) - 1
    response, _ = talk(trainer, answer, said, longest=said.tokens + heard)
    assert response.truncated and response.observed[-1].failures == ("room",) and response.tokens == said.tokens
    last = turn(trainer, "", finish_reason="length")
    response, _ = talk(trainer, answer, said, last, longest=said.tokens + heard + 1)
    assert response.tokens == said.tokens + heard + 1


def test_text_in_the_policys_own_turn_takes_its_end_token_away(trainer):
    """As forced rethinking does: what spells a special token stays ordinary text."""
    said, then = turn(trainer, "\\boxed{3}"), turn(trainer, " so \\boxed{4}", finish_reason="length")
    response, _ = talk(trainer, Observation("\n\nWait<|im_end|>", role="assistant"), said, then)
    forced = trainer.encoder._text_ids("\n\nWait<|im_end|>")
    ids = [*said.token_ids[:-1], *forced, *then.token_ids]
    assert response.token_ids.tolist() == ids and trainer.encoder.tokenizer.eos_token_id not in forced
    assert (response.observed[0].start, response.observed[0].end) == (said.tokens - 1, said.tokens - 1 + len(forced))
    assert response.sampled.tolist() == [True] * (said.tokens - 1) + [False] * len(forced) + [True] * then.tokens
    assert response.text == "\\boxed{3} so \\boxed{4}"


def test_rewards_and_places_of_turns_are_kept(trainer):
    """Each answer says what the turn before it was worth, and stands where that ended."""
    said = [turn(trainer, "one, "), turn(trainer, "two, "), turn(trainer, "three", end="", finish_reason="length")]
    response, _ = talk(trainer, Observation("go on", reward=0.25, calls=2), *said)
    assert [(part.reward, part.calls, part.text) for part in response.observed] == [(0.25, 2, "go on")] * 2
    assert [response.text[: part.place] for part in response.observed] == ["one, ", "one, two, "]


def test_a_long_text_loses_its_middle(trainer, monkeypatch):
    """A megabyte is at most environment.max_text_tokens, with its beginning and end, and images stay where they are."""
    monkeypatch.setattr(trainer.config.environment, "max_text_tokens", 40)
    text = f"begin <image> {'x y ' * 250_000} end"
    response, _ = talk(
        trainer, Observation(text, [IMAGE]), turn(trainer, "?"), turn(trainer, "!", finish_reason="length")
    )
    (part,) = response.observed
    words = trainer.encoder.decode(response.token_ids[part.start : part.end])
    assert "begin" in words and words.strip().split("user")[1].count("x") < 40 and "end" in words
    shown = len(trainer.encoder.observation("<image>", [{"bytes": IMAGE}], "q").token_ids)
    assert 20 < part.end - part.start - shown < 60
    assert len(part.text) < 1000


def test_an_environment_reads_special_tokens_and_rewards_do_not(trainer):
    """Qwen's grounding writes boxes between such tokens."""
    tokenizer = trainer.encoder.tokenizer
    ids = tokenizer("<|box_start|>(1,2),(3,4)<|box_end|> there")["input_ids"]
    said = Completion([*ids, tokenizer.eos_token_id], [-1.0] * (len(ids) + 1), "(1,2),(3,4) there", "stop")
    response, runner = talk(trainer, Observation(done=True), said)
    assert runner.heard[0] == ["<|box_start|>(1,2),(3,4)<|box_end|> there"] and response.text == "(1,2),(3,4) there"


def test_turns_are_counted(trainer):
    """Each answer but the last stands between two turns; the last may, or may end the response."""
    said = [turn(trainer, text) for text in ("a", "b", "c")]
    cut = turn(trainer, "d", end="", finish_reason="length")
    assert [talk(trainer, Observation("on", calls=1), *turns)[0].turns for turns in ([cut], [said[0], cut], said)] == [
        1,
        2,
        3,
    ]
    assert talk(trainer, Observation(done=True, reward=1.0), said[0])[0].turns == 1


def test_every_turn_of_every_conversation_draws_other_samples(side, monkeypatch):
    """No seed is used twice; another rank's and another rollout's are others."""
    seeds: list[int] = []
    if side.config.rollout.backend == "vllm":
        add = side.engine._add
        monkeypatch.setattr(side.engine, "_add", lambda prompt, s: seeds.append(s["seed"]) or add(prompt, s))
    elif side.config.rollout.backend == "server":
        call = side.engine._replicas.call

        async def noted(address, path, body=None):
            seeds.append(body["sampling_params"]["seed"])
            return await call(address, path, body)

        monkeypatch.setattr(side.engine._replicas, "call", noted)
    else:
        generate = side.engine.generate
        monkeypatch.setattr(
            side.engine, "generate", lambda *a, seed, **kw: seeds.append(seed) or generate(*a, seed=seed, **kw)
        )
    side.engine.converse(side.begin(Scripted()), **SAMPLING)
    once = len(seeds)
    assert once >= 3
    for name, value in {"_replica": 1, "_ranks": Ranks(1, 2, 1)}.items():
        if hasattr(side.engine, name):
            monkeypatch.setattr(side.engine, name, value)
            side.engine.converse(side.begin(Scripted()), **SAMPLING)
    side.engine.converse(side.begin(Scripted()), temperature=1.0, seed=1)
    assert len(set(seeds)) == len(seeds) > once


def test_an_error_or_a_deadline_leaves_the_engine_as_it_was(side, monkeypatch):
    """Turns under way are taken back; the next rollout is what it would have been."""
    whole = side.engine.converse(side.begin(Scripted()), **SAMPLING)

    def fail(number: int, turn: int) -> Observation:
        raise ValueError("of the environment")

    broken = Scripted(answer_at=lambda n, turn, answer: answer() if n else None)  # the first is never answered
    monkeypatch.setattr(side.config.rollout, "timeout_s", 2.0)
    with pytest.raises(TimeoutError, match="rollout.timeout_s=2"):
        side.engine.converse(side.begin(broken), **SAMPLING)
    monkeypatch.setattr(side.config.rollout, "timeout_s", 120.0)
    begun = side.begin(Scripted())
    begun[2].goes_on = partial(fail, 2, 1)
    with pytest.raises(ValueError, match="of the environment"):
        side.engine.converse(begun, **SAMPLING)
    if side.config.rollout.backend == "vllm":
        assert not side.engine._engine.has_unfinished_requests()
    again = side.engine.converse(side.begin(Scripted()), **SAMPLING)
    assert [one.token_ids.tolist() for one in again] == [one.token_ids.tolist() for one in whole]


def test_a_closed_environment_ends_a_rollout(side):
    """A future that was cancelled is an error with words, in every engine."""
    begun = side.begin(Scripted(answer_at=lambda n, turn, answer: answer() if n else None))
    say = begun[0].say

    def cancelled(said: Completion) -> None:
        say(said)
        begun[0].waits.cancel()

    begun[0].say = cancelled
    with pytest.raises(RuntimeError, match="the environment was closed"):
        side.engine.converse(begun, **SAMPLING)


def test_many_threads_may_ask_for_images(trainer, monkeypatch):
    """Conversations over servers do: a cache that is full drops images while others are looked up."""
    monkeypatch.setattr(prompts, "IMAGE_CACHE_BYTES", 40_000)
    encoder = PromptEncoder(trainer.encoder.processor, trainer.config.data)
    files = [{"bytes": saved(Image.fromarray(noise(64, 48, seed=n)))} for n in range(12)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda n: encoder.observation("<image>", [files[n % 12]], "q"), range(2000)))
    finally:
        sys.setswitchinterval(interval)
