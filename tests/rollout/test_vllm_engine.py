"""vLLM as behaviour policy: laws 1, 4, 6 and 7, and that nothing of the caller's state is touched."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from rethinker.algorithm.rethinking import Trigger, answer_tokens, continue_after_trigger, make_triggers
from rethinker.config import ConfigError, LoraConfig, RethinkConfig
from rethinker.policy.loading import load_model
from rethinker.policy.lora import FullWeights, add_adapters, base_parameters
from rethinker.rollout.hf_engine import HFEngine
from rethinker.rollout.vllm_settings import cpu_block_size
from rethinker.runtime.distributed import ALONE
from rethinker.samples import Prompt
from tests.rollout.helpers import TOLERANCE, check_sampled_placeholders, rollout_config, tied_only

PLAIN = {"n": 2, "max_new_tokens": 12, "temperature": 1.0}


def test_logprobs_equal_the_policys_before_and_after_every_sync(engine, policy, prompts):
    """Law 1: with images and without, in vLLM as loaded and after two syncs, for images seen before each sync."""
    assert policy.error(prompts, engine.fresh) < TOLERANCE
    for version in (1, 2):
        policy.perturb(seed=version)
        engine.sync(policy, version)
        assert policy.error(prompts, engine.generate(prompts, seed=version, **PLAIN)) < TOLERANCE


def test_adapters_arrive_merged(engine, policy, prompts, folder):
    """Law 1 with policy.lora: vLLM samples from the merged weights as a model with adapters computes."""
    adapted = load_model(folder, torch.float32)
    adapters = add_adapters(adapted, LoraConfig(rank=4), seed=0)
    for number, adapter in enumerate(adapters.values()):
        adapter.b.data.normal_(0, 0.05, generator=torch.Generator().manual_seed(number))
    before = policy.model
    engine.sync(FullWeights(base_parameters(adapted), adapters), 1)
    sampled = engine.generate(prompts, seed=1, **PLAIN)
    policy.model = adapted.eval()
    assert policy.error(prompts, sampled) < TOLERANCE
    policy.model = before
    assert policy.error(prompts, sampled) > 1e-2


@pytest.mark.parametrize(("fault", "part"), [("reset_encoder_cache", "visual"), ("reset_prefix_cache", "")])
def test_a_cache_kept_over_a_sync_breaks_law_1(engine, policy, prompts, monkeypatch, fault, part):
    """Law 1 needs both resets: with one of them planted away, the old weights' results are used again."""
    engine.sync(policy, 1)
    engine.generate(prompts, seed=0, **PLAIN)
    policy.perturb(seed=3, part=part)
    with monkeypatch.context() as planted:
        planted.setattr(engine._engine, fault, lambda: True)
        engine.sync(policy, 2)
        if fault == "reset_encoder_cache":  # else a stale prefix would hide that the image was not looked at again
            engine._engine.reset_prefix_cache()
    assert policy.error(prompts, engine.generate(prompts, seed=0, **PLAIN)) > 1e-3
    engine.sync(policy, 3)
    assert policy.error(prompts, engine.generate(prompts, seed=0, **PLAIN)) < TOLERANCE


@tied_only
def test_temperature_scales_the_whole_distribution(engine, policy, prompts):
    """Log-probs are of the tempered, uncut distribution, whatever the model's generation settings say."""
    engine.sync(policy, 1)
    sampled = engine.generate(prompts, n=4, max_new_tokens=12, temperature=0.7, seed=0)
    assert policy.error(prompts, sampled, temperature=0.7) < TOLERANCE
    ranks = [
        (policy.logits(prompt, one.token_ids[:i])[-1] > policy.logits(prompt, one.token_ids[:i])[-1][token]).sum()
        for prompt, group in zip(prompts, sampled, strict=True)
        for one in group
        for i, token in enumerate(one.token_ids)
    ]
    assert max(ranks) > 50  # top-k 5 of the model's settings would forbid it


def test_greedy_equals_transformers(engine, policy, prompts, folder):
    """At temperature 0 both backends give the same tokens."""
    policy.perturb(seed=5)
    engine.sync(policy, 1)
    hf = HFEngine(rollout_config(), str(folder), ALONE)
    hf.sync(policy, 1)
    greedy = {"n": 1, "max_new_tokens": 24, "temperature": 0.0, "seed": 0}
    ours, theirs = engine.generate(prompts, **greedy), hf.generate(prompts, **greedy)
    for (one,), (other,) in zip(ours, theirs, strict=True):
        assert (one.text, one.finish_reason) == (other.text, other.finish_reason)
        assert one.token_ids.tolist() == other.token_ids.tolist()
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=TOLERANCE, rtol=0)


def test_a_sampled_placeholder_ends_the_response(engine, policy, prompts):
    """Law 4: with a policy that likes placeholders, every response ends at its first one, with its log-prob."""
    check_sampled_placeholders(engine, policy, prompts)


@tied_only
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU vLLM has kernels of its own")
def test_the_engines_layers_are_the_quick_ones(engine):
    """Without them it would be as right, and slower."""
    from rethinker.rollout import vllm_cpu_ops

    layers = list(engine._engine.apply_model(lambda model: model)[0].modules())
    for name in ("KernelRMSNorm", "InPlaceSiluAndMul", "KernelMRotaryEmbedding"):
        own = getattr(vllm_cpu_ops, name)
        found = [layer for layer in layers if isinstance(layer, own.__base__)]
        assert found and all(layer._forward_method.__func__ is own.forward_cpu for layer in found)


@tied_only
def test_a_prompts_blocks_are_computed_once_for_all_its_responses(engine, policy, prompts, monkeypatch):
    """Of each further response to a prompt only what follows the prompt's last whole block."""
    scheduler, computed = engine._engine.engine_core.engine_core.scheduler, []
    block = engine._engine.vllm_config.cache_config.block_size
    assert block == cpu_block_size("float32") or torch.cuda.is_available()
    schedule = scheduler.schedule

    def counted(*arguments):
        computed.append(scheduled := schedule(*arguments))
        return scheduled

    monkeypatch.setattr(scheduler, "schedule", counted)
    assert any(len(prompt.token_ids) > 2 * block for prompt in prompts)
    for version, prompt in enumerate(prompts, 1):
        engine.sync(policy, version)  # forgets blocks
        computed.clear()
        engine.generate([prompt], n=4, max_new_tokens=1, temperature=1.0, seed=0)
        tokens = len(prompt.token_ids)
        shared = (tokens - 1) // block * block
        assert sum(scheduled.total_num_scheduled_tokens for scheduled in computed) == tokens + 3 * (tokens - shared)


@tied_only
def test_completions_belong_to_their_prompt_whatever_order_they_end_in(engine, policy, prompts, monkeypatch):
    """Law 7: vLLM reports requests as they end; here in reverse order of submission."""
    policy.perturb(seed=6)
    engine.sync(policy, 1)
    step, held = engine._engine.step, []

    def reversed_step():
        held.extend(step())
        return [] if engine._engine.has_unfinished_requests() else held[::-1]

    monkeypatch.setattr(engine._engine, "step", reversed_step)
    sampled = engine.generate(prompts, seed=0, **PLAIN)
    assert len(held) == len(prompts)
    assert policy.error(prompts, sampled) < TOLERANCE
    rotated = [sampled[-1], *sampled[:-1]]
    assert policy.error(prompts, rotated) > 1e-2  # so the check above would have seen a swap


@tied_only
def test_a_prompt_and_its_images_are_sent_once_per_group(engine, prompts, monkeypatch):
    """n = G: pixels are processed once per prompt, and one request carries all G samples."""
    rendered, added = [], []
    render, add = engine._llm.renderer.render_cmpl, engine._engine.add_request
    monkeypatch.setattr(engine._llm.renderer, "render_cmpl", lambda inputs: rendered.append(inputs) or render(inputs))
    monkeypatch.setattr(engine._engine, "add_request", lambda i, p, params: added.append(params.n) or add(i, p, params))
    sampled = engine.generate(prompts, n=4, max_new_tokens=4, temperature=1.0, seed=0)
    assert len(rendered) == len(prompts) and added == [4] * len(prompts)
    assert [len(group) for group in sampled] == [4] * len(prompts)


@tied_only
def test_the_seed_decides_and_the_callers_random_state_stays(engine, prompts):
    """The same seed samples the same tokens, another seed others; torch's, numpy's and random's streams go on."""

    def draws():
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()

    def state(seed):
        torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)

    state(11)
    expected = draws()
    state(11)
    tokens = [
        [one.token_ids.tolist() for group in engine.generate(prompts, seed=seed, **PLAIN) for one in group]
        for seed in (1, 1, 2)
    ]
    assert draws() == expected
    assert tokens[0] == tokens[1] != tokens[2]


@tied_only
def test_deadline_names_the_setting_and_leaves_the_engine_usable(engine, policy, prompts, monkeypatch):
    """A rollout past rollout.timeout_s raises, its requests are aborted, and the next rollout is right."""
    engine.sync(policy, 1)
    monkeypatch.setattr(engine.config.rollout, "timeout_s", 0.05)
    with pytest.raises(TimeoutError, match=r"rollout of 4 requests .*rollout\.timeout_s=0\.05"):
        engine.generate(prompts, n=64, max_new_tokens=32, temperature=1.0, seed=0)
    assert not engine._engine.has_unfinished_requests()
    monkeypatch.setattr(engine.config.rollout, "timeout_s", 120)
    assert policy.error(prompts, engine.generate(prompts, seed=0, **PLAIN)) < TOLERANCE


@tied_only
def test_image_tokens_that_differ_are_refused(engine, prompts):
    """Other pixel limits on the policy's side: an error that names both settings, before anything is sampled."""
    prompt = prompts[0]
    at = prompt.token_ids.index(engine._llm.model_config.hf_config.image_token_id)
    wrong = Prompt(
        prompt.query_id, prompt.token_ids[:at] + prompt.token_ids[at + 1 :], prompt.compact_ids, prompt.images
    )
    with pytest.raises(ConfigError, match=r"'q0'.*data\.min_pixels=4096 and data\.max_pixels=4096"):
        engine.generate([prompts[1], wrong], seed=0, **PLAIN)
    assert not engine._engine.has_unfinished_requests()


@tied_only
def test_a_prompt_too_long_for_the_engine_is_refused(engine, prompts):
    """The error names the settings; vLLM would cut the response short without a word."""
    with pytest.raises(ConfigError, match=r"data\.max_prompt_tokens=192"):
        engine.generate(prompts, n=1, max_new_tokens=220, temperature=1.0, seed=0)


@tied_only
def test_tokens_positions_and_log_probs_line_up(engine, policy, prompts, folder):
    """Law 6 in vLLM and in the trainer: y1 and the trigger are the very ids, and the log-probs of y1 and y2 are those
    of one forward over the spliced sequence; the trigger has none. The same with an image, without, and with two."""
    engine.sync(policy, 1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    triggers = make_triggers(tokenizer, RethinkConfig().triggers)
    first = [one for (one,) in engine.generate(prompts, n=1, max_new_tokens=9, temperature=1.0, seed=1)]
    options = {"max_new_tokens": 32 * 2, "temperature": 1.0, "seed": 2}
    chosen = [triggers[i % 3] for i in range(len(prompts))]
    spliced = continue_after_trigger(
        engine.generate, prompts, first, chosen, tokenizer.decode, **options | {"max_new_tokens": 9 + 32}
    )
    for prompt, y1, trigger, y in zip(prompts, first, chosen, spliced, strict=True):
        spans, body = y.rethought, answer_tokens(y1)
        start, end = spans.trigger_start, spans.trigger_end
        assert y.token_ids[:start].tolist() == body.tolist() and tuple(y.token_ids[start:end]) == trigger.token_ids
        assert len(body) < end < len(y.token_ids) <= 9 + 32 and spans.name == trigger.name
        assert y.text == tokenizer.decode(y.token_ids)
        given = torch.tensor(y.logprobs)
        forced = torch.arange(len(given)).ge(start) & torch.arange(len(given)).lt(end)
        assert given[forced].isnan().all() and given[~forced].isfinite().all()
        whole = policy.logprobs(prompt, y)
        assert (whole - given)[~forced].abs().max() < 1e-5
        shifted = torch.cat([given[:start], given[end:], torch.zeros(end - start)])
        assert (whole - shifted)[start : len(given) - (end - start)].abs().max() > 1e-2  # what one shift would cost


@tied_only
def test_retokenising_would_be_noticed(engine, policy, prompts, folder):
    """The test above fails on decode and encode: a policy samples ids that its tokenizer would not choose."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    engine.sync(policy, 1)
    sampled = engine.generate(prompts, n=2, max_new_tokens=9, temperature=1.0, seed=1)
    bodies = [answer_tokens(one).tolist() for answers in sampled for one in answers]
    again = [tokenizer(tokenizer.decode(body), add_special_tokens=False)["input_ids"] for body in bodies]
    assert sum(a != b for a, b in zip(bodies, again, strict=True)) > len(bodies) / 2


@tied_only
def test_the_second_pass_reuses_the_first_ones_cache(engine, policy, prompts, folder):
    """vLLM computes no block of prompt and y1 again that it still has."""
    engine.sync(policy, 1)
    first = [one for (one,) in engine.generate(prompts, n=1, max_new_tokens=9, temperature=1.0, seed=1)]
    seen = []
    read = engine._read

    def watched(output):
        number = int(output.request_id.split("-")[1])
        seen.append((number, len(output.prompt_token_ids), output.num_cached_tokens))
        return read(output)

    engine._read = watched
    try:
        triggers = [Trigger("x", (5, 6))] * len(prompts)
        continue_after_trigger(
            engine.generate, prompts, first, triggers, str, max_new_tokens=20, temperature=1.0, seed=0
        )
    finally:
        engine._read = read
    block = engine._engine.vllm_config.cache_config.block_size
    # Of the first pass the last token sampled was never an input; of the second the last one gives the next token.
    for _, length, cached in seen:
        assert cached == (length - 2 - 1) // block * block
    assert sum(cached for *_, cached in seen) > 0
