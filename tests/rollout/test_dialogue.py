"""Responses of several turns: law 1 and law 6 through every engine, and the ends that a response may come to."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest

from rethinker.rollout.dialogue import Conversation
from rethinker.rollout.engine import make_engine
from rethinker.rollout.server.sync import FolderWeights
from rethinker.rollout.vllm_settings import cpu_block_size
from rethinker.samples import Completion
from tests.rollout.dialogues import Scripted, Side, config_of_dialogues, late, model_whose_turns_end
from tests.rollout.helpers import TOLERANCE

SAMPLING = {"temperature": 1.0, "seed": 0}


@pytest.fixture(scope="module")
def ending(tmp_path_factory):
    """The folder of a model whose turns end."""
    return model_whose_turns_end(tmp_path_factory.mktemp("ending"))


@pytest.fixture(scope="module", params=["vllm", "hf"])
def side(request, ending):
    """The trainer's side, and its engine."""
    side = Side(ending, config_of_dialogues(backend=request.param))
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


@pytest.mark.parametrize("side", ["vllm"], indirect=True)
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
