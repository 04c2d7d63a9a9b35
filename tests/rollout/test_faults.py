"""The rollout engine dies, hangs, or has other weights than the policy: the run stops and says why."""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time
import traceback

import pytest
import torch
from PIL import Image
from vllm.v1.engine.exceptions import EngineDeadError

from rethinker.algorithm.corrections import weigh
from rethinker.config import AlgorithmConfig
from rethinker.data.prompts import PromptEncoder
from rethinker.episode import MismatchError, check_mismatch
from rethinker.policy.loading import load_processor
from rethinker.rollout import deadline, vllm_weights
from rethinker.runtime.distributed import ALONE
from rethinker.samples import Query
from tests.data.image_kinds import noise, oriented, tagged
from tests.rollout.helpers import TOLERANCE, rollout_config, tied_only

SAMPLED = {"n": 2, "max_new_tokens": 12, "temperature": 1.0, "seed": 0}
RAISED = 77  # exit code of a child whose work raised


def mismatch(policy, prompts, completions) -> float:
    """What the trainer measures: k3 of the policy from the behaviour log-probs, nats per token."""
    pairs = [(prompt, one) for prompt, group in zip(prompts, completions, strict=True) for one in group]
    rollout = torch.tensor([logp for _, one in pairs for logp in one.logprobs], dtype=torch.float64)
    gap = rollout - torch.cat([policy.logprobs(prompt, one) for prompt, one in pairs]).double()
    return float((gap.expm1() - gap).mean())


@tied_only
@pytest.mark.parametrize(
    ("kind", "high", "part"),
    [
        ("token_mask", 2.0, "layers.1.mlp.down_proj.weight"),
        ("sequence_mask", 2.0, "layers.2.self_attn.v_proj.weight"),
        ("geometric_mask", 1.2, "layers.1.mlp.down_proj.weight"),
    ],
)
def test_a_wrong_weight_in_the_engine_is_masked(engine, policy, prompts, kind, high, part):
    """The engine samples with one weight tensor that is not the policy's: a correction drops tokens, more of them the
    more it differs, and the largest ratio shows it. With the same weights it drops none."""
    original = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    found = []
    for version, scale in enumerate((0.0, 0.1, 0.8), start=1):
        policy.perturb(seed=5, part=part, scale=scale)
        engine.sync(policy, version)
        sampled = engine.generate(prompts, **SAMPLED | {"n": 8})
        policy.model.load_state_dict(original)
        for prompt, group in zip(prompts, sampled, strict=True):
            for one in group:
                one.trainer_logprobs = policy.logprobs(prompt, one).numpy()
        completions = [one for group in sampled for one in group]
        config = AlgorithmConfig(rollout_correction=kind, correction_high=high)
        found.append(weigh(completions, [], config, ALONE))
    masked, ratios = ([of[f"correction_{name}"] for of in found] for name in ("masked", "ratio_max"))
    assert masked[0] == 0 < masked[1] < masked[2] <= 1 and ratios[0] == pytest.approx(1, abs=1e-4)
    assert ratios[0] < min(ratios[1:])


def lose(monkeypatch, lost) -> None:
    """The engine throws away the tensors whose name `lost` accepts, after they were announced and sent."""
    load = vllm_weights.load

    def without(model, vllm_config, names, weights):
        whole = model.load_weights
        with monkeypatch.context() as planted:
            kept = lambda arriving: whole([(name, tensor) for name, tensor in arriving if not lost(name)])  # noqa: E731
            planted.setattr(model, "load_weights", kept)
            load(model, vllm_config, names, weights)

    monkeypatch.setattr(vllm_weights, "load", without)


SEEDS = itertools.count(100)


@pytest.mark.parametrize(
    "part",
    ["layers.1.mlp.down_proj", "layers.2.self_attn.v_proj.weight", "embed_tokens", "visual.blocks.1.mlp.up_proj"],
)
def test_a_tensor_that_does_not_arrive_is_named(engine, policy, prompts, monkeypatch, part):
    """One tensor of a sync is lost on the engine's side: rollout.check_sync names it.

    What stands in its place is whatever the memory held before: so never a value that another test has sent.
    """
    engine.sync(policy, 1)
    policy.perturb(seed=next(SEEDS))
    with monkeypatch.context() as planted:
        lose(planted, lambda name: part in name)
        planted.setattr(engine.config.rollout, "check_sync", True)
        with pytest.raises(RuntimeError, match=part):
            engine.sync(policy, 2)
    engine.sync(policy, 3)
    check_mismatch(mismatch(policy, prompts, engine.generate(prompts, **SAMPLED)), rollout_config())


@tied_only
@pytest.mark.parametrize("scale", [0.02, 0.05])
def test_a_stale_engine_trips_the_ceiling(engine, policy, prompts, scale):
    """The policy has moved and no sync was made: mismatch_kl exceeds the default ceiling; after a sync it does not."""
    engine.sync(policy, 1)
    policy.perturb(seed=1, scale=scale)
    start = time.perf_counter()
    stale = mismatch(policy, prompts, engine.generate(prompts, **SAMPLED))
    with pytest.raises(MismatchError, match=r"rollout\.max_mismatch_kl=0\.001.*rollout\.check_sync=true"):
        check_mismatch(stale, rollout_config())
    print(f"stale weights, {stale:.2g} nats: rollout to the stop {time.perf_counter() - start:.2f} s")
    engine.sync(policy, 2)
    fresh = mismatch(policy, prompts, engine.generate(prompts, **SAMPLED))
    assert 0 <= fresh < 1e-9
    check_mismatch(fresh, rollout_config())


@tied_only
def test_a_photo_that_is_turned_twice_trips_the_ceiling(engine, policy, folder):
    """Log-probs agree (law 1) for a photo that EXIF turns; if the engine gets its tag, too, and so turns it once more,
    mismatch_kl exceeds the default ceilings of both types."""
    encoder = PromptEncoder(load_processor(folder), rollout_config().data)
    photos = [oriented(6, "JPEG", Image.fromarray(noise(64, 64, seed=seed))) for seed in range(4)]
    prompts = [encoder.encode(Query("q", "What shape?", "", ({"bytes": photo},))) for photo in photos]
    engine.sync(policy, 1)
    assert policy.error(prompts, engine.generate(prompts, **SAMPLED)) < TOLERANCE
    turned = mismatch(policy, prompts, engine.generate(list(map(tagged, prompts)), **SAMPLED))
    for dtype in ("float32", "bfloat16"):
        config = rollout_config()
        config.policy.dtype = dtype
        with pytest.raises(MismatchError, match="sees other images"):
            check_mismatch(turned, config)


@pytest.mark.parametrize(
    ("dtype", "settings", "ceiling"),
    [
        ("float32", {}, 1e-3),
        ("bfloat16", {}, 1e-2),
        ("float32", {"max_staleness": 1}, 0.1),
        ("bfloat16", {"max_staleness": 1}, 0.1),
        ("bfloat16", {"max_mismatch_kl": 3.0}, 3.0),
    ],
)
def test_the_ceiling_follows_the_settings(caplog, dtype, settings, ceiling):
    """By default that of the type, with room for the steps of an episode where rollouts lag behind; from a tenth of it
    a warning in one line names what may be the matter."""
    config = rollout_config(**settings)
    config.policy.dtype = dtype
    check_mismatch(0.09 * ceiling, config)
    assert not caplog.records
    check_mismatch(0.99 * ceiling, config)
    (record,) = caplog.records
    told = record.getMessage()
    assert record.levelname == "WARNING" and f"rollout.max_mismatch_kl={ceiling:g}" in told and "\n" not in told
    assert all(cause in told for cause in ("images", "weights", "precision"))
    assert ("max_staleness" in told) == ("max_staleness" in settings)
    with pytest.raises(MismatchError, match=f"rollout.max_mismatch_kl={ceiling:g}"):
        check_mismatch(1.01 * ceiling, config)


def test_the_ceiling_can_be_moved_and_switched_off():
    """Recorded rollouts have a policy of their own; NaN is the skipped step's business."""
    check_mismatch(0.5, rollout_config(max_mismatch_kl=1.0))
    check_mismatch(1e9, rollout_config(max_mismatch_kl=None))
    check_mismatch(1e9, rollout_config(backend="recorded"))
    check_mismatch(float("nan"), rollout_config())
    with pytest.raises(MismatchError):
        check_mismatch(float("inf"), rollout_config())


@tied_only
@pytest.mark.parametrize("abort_fails", [False, True], ids=["", "abort fails too"])
def test_vllm_dies_in_a_rollout(engine, prompts, monkeypatch, abort_fails):
    """The error says in which rollout and names the cause, whether or not the dead engine still answers."""
    step, calls = engine._engine.step, []

    def dies():
        calls.append(time.perf_counter())
        if len(calls) == 4:
            raise EngineDeadError()
        return step()

    with monkeypatch.context() as planted:
        planted.setattr(engine._engine, "step", dies)
        if abort_fails:
            planted.setattr(engine._engine, "abort_request", lambda ids: raise_(EngineDeadError()))
        with pytest.raises(EngineDeadError) as caught:
            engine.generate(prompts, **SAMPLED)
    print(f"vLLM's death in a rollout to the error: {time.perf_counter() - calls[-1]:.3f} s")
    assert "the rollout of 4 requests" in caught.value.__notes__[0]
    engine._engine.abort_request([f"rollout-{number}" for number in range(engine._asked)])
    assert not engine._engine.has_unfinished_requests()


def raise_(error: Exception):
    raise error


def in_child(work, stderr) -> tuple[int, float]:
    """Exit code of a copy of this process that does `work`, and the seconds that it took; its stderr goes to a file."""
    start = time.perf_counter()
    pid = os.fork()
    if pid == 0:
        try:
            os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT), 2)
            sys.stderr = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
            deadline.GRACE_S = 0.2
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(RAISED)
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), time.perf_counter() - start


@tied_only
def test_vllm_dies_in_a_sync(engine, policy, monkeypatch, tmp_path):
    """The error says in which sync and names the cause."""

    monkeypatch.setattr(vllm_weights, "load", lambda *_: raise_(EngineDeadError()))
    # In a copy of this process: what is left of the engine is half of two sets of weights.
    code, seconds = in_child(lambda: engine.sync(policy, 2), tmp_path / "stderr")
    told = (tmp_path / "stderr").read_text()
    assert code == RAISED
    assert "EngineDeadError" in told and "This happened in the weight sync to version 2; the run can go on" in told
    print(f"vLLM's death in a sync to the error: {seconds:.2f} s, the start of the sync included")


def hangs_for_ever(*_):
    threading.Event().wait(60)


@tied_only
@pytest.mark.parametrize("what", ["rollout", "sync"])
def test_vllm_hangs(engine, policy, prompts, monkeypatch, tmp_path, what):
    """A call that never returns: after rollout.timeout_s and the grace the process ends with exit code 1, the message
    names work and setting, and the stack shows the place."""
    monkeypatch.setattr(engine.config.rollout, "timeout_s", 0.5)
    if what == "rollout":
        monkeypatch.setattr(engine._engine, "step", hangs_for_ever)
        code, seconds = in_child(lambda: engine.generate(prompts, **SAMPLED), tmp_path / "stderr")
    else:
        monkeypatch.setattr(vllm_weights, "load", hangs_for_ever)
        code, seconds = in_child(lambda: engine.sync(policy, 1), tmp_path / "stderr")
    told = (tmp_path / "stderr").read_text()
    assert code == 1
    name = {"rollout": "the rollout of 4 requests", "sync": "the weight sync"}[what]
    assert f"{name} did not end within rollout.timeout_s=0.5 seconds" in told
    assert "in hangs_for_ever" in told
    print(f"vLLM hangs in a {what}: {seconds:.2f} s to the end (rollout.timeout_s 0.5, grace 0.2)")
    assert seconds < 20
