"""The whole loop as a user starts it: real vLLM, real ZeRO-3, easy-VQA, on one rank and on two."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import rethinker
from rethinker.algorithm.corrections import METRICS as WEIGHTS
from rethinker.embedded.tiny import create_tiny
from rethinker.policy.experts import load_statistics
from rethinker.policy.loading import load_model, load_processor
from rethinker.runtime.completions import read_completions
from tests import forked

ROOT = Path(__file__).parents[2]
G, N = 4, 32

# A random model never answers right; this reward makes its groups differ.
REWARD = """
def parity(response, answer, query):
    return float(len(response) % 2)
"""

# The names in the first column of the page's table.
EXPLAINED = (ROOT / "docs" / "how_it_works.md").read_text().partition("## What a step logs")[2].partition("\n## ")[0]
METRICS = {name for row in re.findall(r"^\| (`.+?) \|", EXPLAINED, flags=re.M) for name in re.findall(r"`(\w+)`", row)}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    (folder / "reward.py").write_text(REWARD)
    create_tiny(folder / "model", seed=0)
    return folder


def train(scratch: Path, name: str, *options: str, ranks: int = 1, fork: bool = True) -> list[dict]:
    """Run the recipe small; returns the rows of metrics.jsonl. Not forked, it is a command with its own imports."""
    arguments = ["easy_vqa_cpu", "--run.dir", str(scratch), "--run.name", name]
    arguments += ["--policy.model", str(scratch / "model")]
    arguments += ["--reward.function", f"{scratch / 'reward.py'}:parity", "--rollout.group_size", str(G)]
    arguments += ["--train.batch_pairs", str(N), "--train.episode_queries", "16", "--train.max_steps", "4"]
    arguments += ["--rollout.max_new_tokens", "24", "--rollout.kv_cache_gb", "0.1", "--train.learning_rate", "1e-3"]
    arguments += ["--validation.size", "16", "--validation.every", "1", *options]
    log = scratch / f"{name}.log"
    if fork:
        forked.run(forked.training(arguments), log, ranks)
    else:
        command = [sys.executable, "-m", "rethinker", "train", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
        log.write_text(done.stdout)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return [json.loads(line) for line in (scratch / name / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def ssr(scratch):
    """The run that the others are compared with, as a user starts it."""
    return train(scratch, "ssr", "--algorithm.name", "ssr", "--rollout.check_sync", "true", fork=False)


def recorded(scratch: Path, name: str, *options: str, ranks: int = 1) -> list[dict]:
    """A run on the ssr run's rollouts."""
    replayed = ["--rollout.backend", "recorded", "--rollout.recording", str(scratch / "ssr" / "completions")]
    return train(scratch, name, *replayed, "--data.validation", "null", *options, ranks=ranks)


def test_metrics_have_the_documented_names(ssr):
    """One row per optimizer step with exactly the names that docs/how_it_works.md explains; numbers are finite."""
    assert [row["step"] for row in ssr] == [1, 2, 3, 4] and [row["episode"] for row in ssr] == [0, 0, 1, 1]
    for row in ssr:
        assert set(row) == METRICS
        # Neither correction is on, and there are no experts and no environment.
        nothing = [*WEIGHTS, *load_statistics(torch.zeros(0, 0)), "turns_mean", "tool_calls_mean", "tool_use_ratio"]
        assert all(row[name] is None for name in nothing)
        numbers = [v for k, v in row.items() if k not in ("val_accuracy", "mfu", "advantage_histogram", *nothing)]
        numbers = [n for v in numbers for n in (v.values() if isinstance(v, dict) else [v])]
        assert all(isinstance(n, int | float) and math.isfinite(n) for n in numbers)
        assert row["queries_by_category"] and sum(row["queries_by_category"].values()) == pytest.approx(1)
    assert [row["val_accuracy"] is not None for row in ssr] == [False, True, False, True]
    assert ssr[0]["time_rollout_s"] > 0 and ssr[1]["time_sync_s"] > 0


def test_trainer_and_rollout_agree_after_every_sync(ssr):
    """Law 1 in the loop: mismatch_kl stays at rounding although the weights have moved between the episodes."""
    assert ssr[0]["grad_norm"] > 0
    assert all(0 <= row["mismatch_kl"] < 1e-10 for row in ssr)


def test_ssr_refills_the_batch(ssr):
    """With ssr every step trains exactly N pairs (the buffer can fill them here); replay_fraction says how many."""
    for row in ssr:
        assert row["trained_pairs"] == N
        fresh = round(row["effective_query_ratio"] * N)
        assert row["replay_fraction"] == pytest.approx(1 - fresh / N)
    assert any(row["replay_fraction"] > 0 for row in ssr)


def test_completions_are_kept_exactly(ssr, scratch):
    """completions/*.parquet hold every response with its tokens, log-probs, reward and advantage."""
    for episode in (0, 1):
        groups = read_completions(scratch / "ssr" / "completions", episode)
        assert len(groups) == 16 and all(len(g.completions) == len(g.rewards) == len(g.advantages) == G for g in groups)
        for group in groups:
            for completion, reward in zip(group.completions, group.rewards, strict=True):
                # Law 7: the reward is that of this very text.
                assert reward == float(len(completion.text) % 2)
                assert len(completion.token_ids) == len(completion.logprobs) <= 24


def test_two_ranks_equal_one_on_the_same_rollouts(ssr, scratch):
    """Law 3 in the loop: two ranks with small micro-batches have the losses and gradient norms of one, to 1e-4."""
    two = recorded(scratch, "two", "--train.micro_batch_tokens", "300", ranks=2)
    for a, b in zip(ssr, two, strict=True):
        for key in ("reward_mean", "effective_query_ratio", "trained_pairs", "replay_fraction"):
            assert a[key] == b[key]
        for key in ("loss", "grad_norm", "entropy"):
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-6), key
    assert len({row["loss"] for row in ssr}) == 4


def test_replay_lives_for_one_episode(ssr):
    """An episode's first step finds an empty buffer: it holds that step's effective samples only, drawn at age 0."""
    for first, second in ((ssr[0], ssr[1]), (ssr[2], ssr[3])):
        fresh, more = (round(row["effective_query_ratio"] * N) for row in (first, second))
        assert (first["replay_size"], first["replay_age_mean"]) == (fresh, 0)
        assert second["replay_size"] == fresh + more and 0 <= second["replay_age_mean"] <= 1
    assert ssr[2]["replay_size"] < ssr[1]["replay_size"]


def test_a_budget_of_tokens_ends_the_run_and_its_schedule(ssr, scratch):
    """An episode's learning rates are those of the share of the budget that was sampled before it, where the steps are
    behind; the episode that reaches the budget is the last."""
    tokens = ssr[-1]["generated_tokens"]
    schedule = ["--train.schedule", "linear", "--train.warmup_ratio", "0", "--train.max_steps", "1000"]
    rows = recorded(scratch, "budget", *schedule, "--train.max_generated_tokens", str(tokens))
    assert [row["generated_tokens"] for row in rows] == [row["generated_tokens"] for row in ssr]
    spent = [0, 1 / 1000] + 2 * [ssr[0]["generated_tokens"] / tokens]
    assert [row["learning_rate"] for row in rows] == pytest.approx([1e-3 * (1 - share) for share in spent])


def test_filter_shrinks_the_batch_and_grpo_keeps_it(ssr, scratch):
    """With filter the trained pairs are those of the effective queries alone; grpo trains all; neither replays.

    On the same rollouts the trained advantages move away from 0: grpo < filter <= ssr, in the mean of |A| over all
    pairs of the batch, and grpo alone trains pairs without any.
    """
    filtered = recorded(scratch, "filter", "--algorithm.name", "filter")
    for row in filtered:
        assert row["trained_pairs"] == round(row["effective_query_ratio"] * N)
        assert row["replay_fraction"] == 0
    assert any(row["trained_pairs"] < N for row in filtered)
    everything = recorded(scratch, "grpo", "--algorithm.name", "grpo", "--run.save_completions", "false")
    for row in everything:
        assert row["trained_pairs"] == N and row["replay_fraction"] == 0
    assert not list((scratch / "grpo" / "completions").glob("*"))

    def zeros(rows):
        return [row["advantage_histogram"][0] for row in rows]

    assert sum(zeros(everything)) > 0 and set(zeros(filtered)) == set(zeros(ssr)) == {0}
    for a, b, c in zip(everything, filtered, ssr, strict=True):
        assert sum(a["advantage_histogram"]) == sum(c["advantage_histogram"]) == N
        # Over a batch of N pairs: those that filter leaves out carry nothing.
        share = b["trained_pairs"] / N
        assert a["advantage_abs_mean"] == pytest.approx(share * b["advantage_abs_mean"])
        assert c["advantage_abs_mean"] >= share * b["advantage_abs_mean"]
    assert sum(row["replay_fraction"] for row in ssr) > 0


def test_all_equal_rewards_train_nothing_and_harm_nothing(ssr, scratch):
    """Law 5: when every reward is the same, ssr and filter take an empty step: weights stay, the run goes on."""
    (scratch / "constant.py").write_text("def one(response, answer, query):\n    return 1.0\n")
    rows = recorded(scratch, "equal", "--reward.function", f"{scratch / 'constant.py'}:one")
    assert all(row["trained_pairs"] == 0 and row["loss"] == 0 and row["effective_query_ratio"] == 0 for row in rows)
    # Measured all the same: the second episode was recorded by a policy that had moved.
    assert 0 < rows[0]["mismatch_kl"] < 1e-10 < 1e-6 < rows[-1]["mismatch_kl"]
    before = load_model(scratch / "model", torch.float32).state_dict()
    after = load_model(scratch / "equal" / "checkpoints" / "last", torch.float32).state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_options_of_the_objective_train(ssr, scratch):
    """GSPO, clip-higher, dual clip, a KL to the reference, Dr. GRPO's aggregation and rollout correction: one run."""
    options = ["--algorithm.importance", "sequence", "--algorithm.clip_high", "0.3", "--algorithm.dual_clip", "3"]
    options += ["--algorithm.kl_coef", "0.01", "--algorithm.aggregation", "constant", "--algorithm.advantage_scale"]
    options += ["batch", "--algorithm.rollout_correction", "token_truncate", "--policy.freeze_vision", "true"]
    options += ["--policy.gradient_checkpointing", "true", "--replay.importance_exponent", "0.5"]
    options += ["--algorithm.top_entropy", "0.8"]
    rows = recorded(scratch, "options", *options)
    # The first episode is the policy's own: what it was recorded with differs by rounding.
    assert rows[0]["correction_masked"] == rows[0]["correction_truncated"] == 0
    assert rows[0]["correction_ratio_max"] == pytest.approx(1, abs=1e-4) and rows[-1]["correction_ratio_max"] > 1.0001
    assert all(row["top_entropy_threshold"] > 0 for row in rows)
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-8) and rows[-1]["kl"] > 1e-6
    assert all(row["grad_norm"] > 0 and row["skipped"] == 0 for row in rows)
    before = load_model(scratch / "model", torch.float32).state_dict()
    after = load_model(scratch / "options" / "checkpoints" / "last", torch.float32).state_dict()
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert moved and not any("visual" in name for name in moved)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("gmpo", ["--algorithm.advantage_baseline", "leave_one_out", "--algorithm.kl_coef", "0.01"]),
        ("cispo", ["--algorithm.advantage_baseline", "batch", "--algorithm.advantage_scale", "batch"]),
    ],
)
def test_losses_and_advantages_of_other_methods_train(ssr, scratch, method, options):
    """A loss of whole responses with a KL term and RLOO's baseline, and one of tokens with REINFORCE++'s advantages:
    the policy moves, and who has an advantage follows from the baseline."""
    rows = recorded(scratch, method, "--algorithm.loss", method, *options, "--train.max_steps", "2")
    assert all(row["grad_norm"] > 0 and row["skipped"] == 0 for row in rows)
    assert (rows[-1]["kl"] > 0) == (method == "gmpo")
    for row, first in zip(rows, ssr, strict=False):
        assert row["reward_mean"] == first["reward_mean"] and row["trained_pairs"] == N
        if method == "cispo":  # every response but one at the episode's mean has an advantage: replay has nothing to do
            assert row["effective_query_ratio"] == 1 and row["replay_fraction"] == 0
        else:
            assert row["effective_query_ratio"] == first["effective_query_ratio"]


def test_forced_rethinking_trains_on_two_ranks_from_a_checkpoint(ssr, scratch):
    """A saved checkpoint is a model folder: vLLM and ZeRO-3 on two ranks start from it as from any other.

    Law 6 in the loop: with rethought responses in the batch the policy's log-probs are still the rollout's, nothing
    is skipped (a forced token's NaN would), and the supervised term is part of the loss wherever a response is held.
    """
    last = scratch / "ssr" / "checkpoints" / "last"
    assert load_processor(last).tokenizer.eos_token_id is not None
    options = ["--policy.model", str(last), "--rethink.fraction", "0.8"]
    options += ["--rollout.max_new_tokens", "96", "--data.validation", "null"]
    rows = train(scratch, "rethink", *options, "--algorithm.name", "grpo", "--train.max_steps", "2", ranks=2)
    assert all(row["skipped"] == 0 and 0 <= row["mismatch_kl"] < 1e-10 for row in rows)
    assert sum(row["rethink_kept"] for row in rows) > 0 and sum(row["supervised_loss"] for row in rows) > 0
    assert all(row["rethink_forced"] >= row["rethink_kept"] > 0 or row["supervised_loss"] == 0 for row in rows)
    groups = read_completions(scratch / "rethink" / "completions", 0)
    kept = [(g, c, r) for g in groups for c, r in zip(g.completions, g.rewards, strict=True) if c.rethought is not None]
    tokenizer = load_processor(scratch / "model").tokenizer
    assert len(kept) == round(sum(row["rethink_kept"] for row in rows) * N)
    for group, completion, reward in kept:
        assert reward == 1.0 == float(len(completion.text) % 2)  # law 7: of the final text
        assert completion.text == tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        spans = completion.rethought
        forced = tokenizer.decode(completion.token_ids[spans.trigger_start : spans.trigger_end])
        assert forced.startswith("\n\nWait") and len(group.completions) == G
        for i, logprob in enumerate(completion.logprobs):
            assert math.isnan(logprob) == (spans.trigger_start <= i < spans.trigger_end)


def test_forced_tokens_may_be_trained(scratch):
    """As the released code does: with mask_trigger_tokens off every token has a log-prob, the trainer's own."""
    options = ["--rethink.fraction", "1", "--rethink.mask_trigger_tokens", "false", "--rollout.max_new_tokens", "96"]
    options += ["--data.validation", "null", "--train.max_steps", "1", "--algorithm.name", "grpo"]
    options += ["--train.episode_queries", "8"]
    rows = train(scratch, "unmasked", *options)
    assert all(row["skipped"] == 0 and row["mismatch_kl"] < 1e-10 for row in rows)
    groups = read_completions(scratch / "unmasked" / "completions", 0)
    kept = [c for g in groups for c in g.completions if c.rethought is not None]
    assert kept and all(math.isfinite(x) for c in kept for x in c.logprobs)


def test_hf_rollouts_train_too(scratch):
    """Without vLLM, transformers' generate samples: its log-probs are the trainer's too, before and after a sync."""
    rows = train(scratch, "hf", "--rollout.backend", "hf", "--validation.size", "8")
    assert all(0 <= row["mismatch_kl"] < 1e-10 for row in rows)
    assert rows[0]["grad_norm"] > 0


def test_summary_says_what_was_learned(ssr, scratch):
    """The last lines name the sampled reward, the greedy accuracy and the run's folder."""
    log = (scratch / "ssr.log").read_text()
    assert "sampled reward" in log and "greedy accuracy" in log and str(scratch / "ssr") in log


def test_one_run_after_another_in_one_process(scratch):
    """`rethinker.train` may be called again: the same settings give the same run, even after one with vLLM, whose end
    destroys the process group."""
    forked.run(partial(_train_again, str(scratch)), scratch / "again.log")


def _train_again(folder: str) -> None:
    losses = []
    for number, backend in enumerate(("hf", "vllm", "hf")):
        settings = {"run.dir": folder, "run.name": f"call_{number}", "policy.model": f"{folder}/model"}
        settings |= {"reward.function": f"{folder}/reward.py:parity", "train.max_steps": 1, "train.episode_queries": 4}
        settings |= {"train.batch_pairs": 8, "rollout.group_size": 2, "rollout.max_new_tokens": 8}
        settings |= {"rollout.backend": backend, "rollout.kv_cache_gb": 0.1, "data.validation": None}
        run = rethinker.train("easy_vqa_cpu", settings)
        losses.append((run.metrics[0]["loss"], run.metrics[0]["grad_norm"]))
    assert losses[0] == losses[2] and losses[0][1] > 0, losses
