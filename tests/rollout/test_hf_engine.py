"""The hf backend against plain per-sample forwards: it is the oracle of others, so it is checked against less."""

from __future__ import annotations

import pytest
import torch

from rethinker.rollout.engine import make_engine
from tests.rollout.helpers import TOLERANCE, rollout_config, tied_only


@pytest.fixture
def hf(folder):
    """A fresh hf engine."""
    return make_engine(rollout_config(backend="hf"), str(folder), rank=0, world_size=1, local_rank=0)


def test_a_padded_batch_samples_with_the_policys_logprobs(hf, policy, prompts):
    """Law 1: text and images of several lengths in one left-padded batch, tempered and uncut, also after a sync."""
    for temperature in (1.0, 0.7):
        sampled = hf.generate(prompts, n=3, max_new_tokens=8, temperature=temperature, seed=0)
        assert [len(group) for group in sampled] == [3] * len(prompts)
        assert policy.error(prompts, sampled, temperature) < TOLERANCE
    policy.perturb(seed=1)
    hf.sync(policy, 1)
    assert policy.error(prompts, hf.generate(prompts, n=3, max_new_tokens=8, temperature=1.0, seed=0)) < TOLERANCE


@tied_only
def test_batches_do_not_mix_prompts(hf, policy, prompts, monkeypatch):
    """Prompts that do not fit into one batch come back in order."""
    monkeypatch.setattr("rethinker.rollout.hf_engine.BATCH", 4)
    sampled = hf.generate(prompts * 2, n=2, max_new_tokens=6, temperature=1.0, seed=0)
    assert policy.error(prompts * 2, sampled) < TOLERANCE


def test_responses_end_at_the_first_stop_token(hf, policy, prompts):
    """Law 4: end tokens and placeholders end a response, which then holds that token and its log-prob."""
    with torch.no_grad():
        head = policy.model.lm_head.weight
        logits = policy.logits(prompts[0], [])[-1]
        # The first two placeholders get the rows of the two likeliest tokens, slightly longer.
        for stop, likely in zip(hf._stop_ids[-3:], logits.topk(3).indices, strict=True):
            head[stop] = 1.5 * head[likely]
    hf.sync(policy, 1)
    sampled = hf.generate(prompts, n=16, max_new_tokens=12, temperature=1.0, seed=0)
    ended = [one for group in sampled for one in group if one.finish_reason == "stop"]
    assert ended
    for group in sampled:
        for one in group:
            assert not set(one.token_ids[:-1]) & set(hf._stop_ids)
            assert (one.finish_reason == "stop") == (one.token_ids[-1] in hf._stop_ids)
            assert len(one.logprobs) == len(one.token_ids)
    assert policy.error(prompts, sampled) < TOLERANCE


@tied_only
@pytest.mark.parametrize("work", ["generate", "sync"])
def test_whatever_needs_the_weights_wakes_them(hf, policy, prompts, work, monkeypatch):
    """After `sleep` the weights are on the host; sampling and syncing first move them to the device."""
    moves = []
    monkeypatch.setattr(hf._model, "to", moves.append)
    hf.sleep()
    if work == "generate":
        hf.generate(prompts[:1], n=1, max_new_tokens=2, temperature=1.0, seed=0)
    else:
        hf.sync(policy, 1)
    assert len(moves) == 2 and moves[-1] is hf._device


@tied_only
def test_deadline(hf, policy, prompts):
    """Sampling and syncing past rollout.timeout_s raise an error that names it."""
    hf.config.rollout.timeout_s = 0.0
    with pytest.raises(TimeoutError, match=r"rollout of 4 prompts .*rollout\.timeout_s=0"):
        hf.generate(prompts, n=1, max_new_tokens=8, temperature=1.0, seed=0)
    with pytest.raises(TimeoutError, match=r"weight sync .*rollout\.timeout_s=0 .*at model"):
        hf.sync(policy, 1)


@tied_only
def test_sync_refuses_other_models(hf, policy):
    """A tensor without a place and a parameter without a tensor are errors that name it, before a weight is copied."""
    entries = policy.metadata()
    for listed, named in ((entries[1:], entries[0][0]), ([*entries, ("a.b", *entries[0][1:])], "a.b")):
        policy.metadata = lambda listed=listed: listed
        with pytest.raises(RuntimeError, match=rf"only one of policy and hf engine has the parameter {named}"):
            hf.sync(policy, 1)
