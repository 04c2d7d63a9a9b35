"""The end-to-end benchmark runs both trainers on the same questions, and sums up honestly."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import replace

import pytest

from benchmarks.end_to_end import benchmark_config, main, measure, summarize, table, training_flop
from benchmarks.sides import Step, of_all_ranks
from rethinker.embedded.tiny import create_tiny
from tests import forked


def step(total: float, response_tokens: int = 100, memory: float = 1.0) -> Step:
    return Step(total / 2, 0.0, total / 4, total / 4, total, total, 500, response_tokens, 0.5, memory)


@pytest.mark.parametrize(("recipe", "ranks"), [("sums_cpu", 2), ("easy_vqa_cpu", 1)])
def test_all_sides_take_the_same_steps(recipe, ranks, tmp_path, monkeypatch):
    """This trainer, TRL's and transformers' generate read the same prompts, token for token, and sample as many
    responses; generate in batches of which the last one is not full."""
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: forked.FORKS)
    config = benchmark_config(recipe, queries=3 * ranks, group_size=2, scratch=str(tmp_path))
    taken = measure(config, create_tiny(tmp_path / "tiny"), 2, ranks, trl_micro_batch=6, generate_batch=4)
    ours, trl, generate = taken["rethinker"], taken["trl"], taken["generate"]
    assert len(ours) == len(trl) == len(generate) == 2
    assert [s.prompt_tokens for s in ours] == [s.prompt_tokens for s in trl] == [s.prompt_tokens for s in generate]
    for one in (*ours, *trl, *generate):
        assert 6 * ranks <= one.response_tokens <= 6 * ranks * config.rollout.max_new_tokens
        phases = one.rollout_s + one.reward_s + one.train_s + one.sync_s
        assert 0.5 * one.total_s < phases <= one.total_s
        assert 0.2 < one.peak_memory_gb < 20
    assert all(s.sync_s > 0 for s in ours)
    for one in ours:  # groups of two; a model with random weights is hardly ever right
        assert 0 < one.idle_tokens <= one.prompt_tokens + one.response_tokens
        assert one.reward_mean > 0 or one.idle_tokens == one.prompt_tokens + one.response_tokens
    assert not any(s.idle_tokens for s in (*trl, *generate))


def test_ranks_are_as_slow_as_the_one_that_samples_longest():
    """Phases are those of the rank that samples longest, the total is the longest; the rest is of all."""
    slow, late = replace(step(2.0), reward_mean=0.0, train_s=0.1), replace(step(1.0), total_s=2.5)
    slow, late = replace(slow, idle_tokens=40), replace(late, idle_tokens=2)
    sums = {"cpu_s": 3.0, "prompt_tokens": 1000, "response_tokens": 200, "peak_memory_gb": 2.0, "idle_tokens": 42}
    assert of_all_ranks([late, slow]) == replace(slow, total_s=2.5, reward_mean=0.25, **sums)
    assert of_all_ranks([slow]) == slow


def test_the_ratio_is_of_the_median_steps():
    """One slow step of either side moves the range, not the ratio."""
    ours = [step(1.0), step(1.0), step(9.0, memory=3.0)]
    trl = [step(4.0), step(4.0, response_tokens=200), step(4.0)]
    summary = summarize({"rethinker": ours, "trl": trl})
    assert summary["ratio"]["median"] == pytest.approx(4.0)
    assert summary["ratio"]["min"] == pytest.approx(4 / 9)
    assert summary["rethinker"]["total_s"] == {"median": 1.0, "min": 1.0, "max": 9.0}
    assert summary["rethinker"]["peak_memory_gb"] == 3.0
    assert summary["trl"]["tokens_per_s"] == {"median": 25.0, "min": 25.0, "max": 50.0}
    assert "4.00 times as long" in table(summary) and "\n0% of the tokens are of pairs without" in table(summary)


def test_the_rollout_is_compared_in_tokens_per_second():
    """Twice the tokens in half the rollout's time are four times as many a second, whatever else a step does."""
    ours, generate = step(1.0, response_tokens=200), Step(1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 500, 100, None, 1.0)
    summary = summarize({"rethinker": [ours], "trl": [step(4.0)], "generate": [generate]})
    assert summary["rethinker"]["rollout_tokens_per_s"]["median"] == pytest.approx(400)
    assert summary["rollout_ratio"] == pytest.approx({"median": 4.0, "min": 4.0, "max": 4.0})
    assert "400 tokens/s, transformers' generate 100: 4.00 times as many" in table(summary)
    assert "rollout_ratio" not in summarize({"rethinker": [ours], "trl": [step(4.0)]})


def test_mfu_counts_every_computed_response_with_its_prompt():
    """Arithmetic: the FLOP of both kinds of tokens that were computed over the training seconds, as a share of the
    peak."""
    one = Step(0.5, 0.0, 0.25, 0.0, 1.0, 1.0, 500, 100, 0.5, 1.0)
    ours = replace(one, idle_tokens=150)
    summary = summarize({"rethinker": [ours], "trl": [one]}, flop=10.0, peak=1e5)
    assert summary["trl"]["mfu"]["median"] == pytest.approx(600 * 10 / 0.25 / 1e5)
    assert summary["rethinker"]["mfu"]["median"] == pytest.approx(450 * 10 / 0.25 / 1e5)
    assert "25% of the tokens are of pairs without a gradient" in table(summary)
    assert "mfu" not in summarize({"rethinker": [one], "trl": [one]})["trl"]
    assert training_flop("7B", None) == pytest.approx(6 * 7.07e9, rel=0.01)  # its text model without the LM head


@pytest.mark.parametrize(
    "sizes, said",
    [
        ("--queries 16 --ranks 2", "set --trl-micro-batch to 64"),
        ("--queries 9 --trl-micro-batch 5", "set --trl-micro-batch to 4"),
        ("--queries 64 --ranks 3", "--queries 64 do not divide into --ranks 3; set --queries to 63"),
        ("--group-size 1", "set --group-size to 2"),
        ("--steps 0", "--steps: '0' is not a whole number"),
        ("--recipe sums_cp", "no recipe named 'sums_cp'"),
        ("--model nowhere", "--model nowhere has no config.json"),
        ("--vllm", "--layers and --vllm go with --size"),
        ("--size 3B --model nowhere", "--model goes without --size"),
    ],
)
def test_options_that_cannot_be_are_refused(sizes, said, capsys):
    """A line says so before any side starts; of pairs that do not divide, TRL would leave out some and look faster."""
    with pytest.raises(SystemExit):
        main(sizes.split())
    assert said in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.soak
def test_random_weights_of_a_real_size_train_on_both_sides(tmp_path):
    """What runs on a GPU with --size 3B, here with a tiny one: the same prompts, and rewards to learn from."""
    arguments = "--size tiny --queries 4 --group-size 4 --steps 1 --trl-micro-batch 8 --image-tokens 16".split()
    file = tmp_path / "result.json"
    assert main([*arguments, "--max-new-tokens", "16", "--threads", "1", "--json", str(file)]) == 0
    steps = json.loads(file.read_text())["steps"]
    assert steps["rethinker"][0]["prompt_tokens"] == steps["trl"][0]["prompt_tokens"] > 16 * 16
    for one in (steps["rethinker"][0], steps["trl"][0]):
        assert 0 < one["reward_mean"] < 1 and 200 < one["response_tokens"] <= 16 * 16
