"""What a resumed run compares before it goes on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest

from rethinker.algorithm.replay import ReplayBuffer
from rethinker.checkpoint.resume import (
    MAY_CHANGE,
    OF_A_SOURCE_MAY_CHANGE,
    Progress,
    RunState,
    frozen,
    read_state,
    saved_state,
    versions,
)
from rethinker.config import Config, ConfigError, ReplayConfig
from rethinker.data.mixture import OF_A_SOURCE
from rethinker.data.query_stream import QueryStream, fingerprint
from rethinker.embedded.easy_vqa import easy_vqa
from rethinker.runtime.completions import read_completions
from rethinker.runtime.distributed import ALONE, Ranks
from rethinker.samples import Query
from rethinker.settings import flat, resolve_config, settings

# trainer/ of a run of release 0.1.0 on two ranks, stopped within its first episode; the optimizer's files left out.
OLD = Path(__file__).parent / "old_checkpoint"
QUERIES = [Query("a", "what?", "red", ("a.png",)), Query("b", "and?", "blue")]


def test_other_questions_are_refused(tmp_path):
    """Any changed id, question, answer or number of images changes the fingerprint, and with it nothing is resumed."""
    for change in ({"id": "c"}, {"question": "what"}, {"answer": "Red"}, {"images": ()}):
        assert fingerprint([dataclasses.replace(QUERIES[0], **change), QUERIES[1]]) != fingerprint(QUERIES)
    episodes = SimpleNamespace(stream=QueryStream(QUERIES[::-1], seed=0))
    state = RunState(Config(), ALONE, Progress(), None, episodes, None, None)
    with pytest.raises(ConfigError, match=r"data.train=easy_vqa: its questions are not those of"):
        state.load(tmp_path, {"data": fingerprint(QUERIES)})


def test_settings_are_compared_by_name(tmp_path):
    """Where, how fast and how long may change; everything else is refused with both values."""
    config = resolve_config("easy_vqa_cpu", {"run.name": "x"})
    (tmp_path / "trainer").mkdir()
    frozen({"settings": flat(config)})(tmp_path / "trainer" / "run")
    free = {"run.trackers": [], "checkpoint.keep": 7, "train.max_steps": 999, "train.micro_batch_tokens": 77}
    free |= {f"policy.{how}": True for how in ("gradient_checkpointing", "compile")} | {"policy.attention": "flash"}
    assert saved_state(tmp_path, resolve_config("easy_vqa_cpu", {"run.name": "y", "resume": "auto"} | free))
    assert saved_state(None, config) == {}
    other = resolve_config("easy_vqa_cpu", {"run.name": "x", "seed": 5, "train.betas": [0.5, 0.6]} | free)
    with pytest.raises(ConfigError) as refused:
        saved_state(tmp_path, other)
    assert str(refused.value) == (
        f"resume: run x cannot go on with seed=5 (was 0), train.betas=[0.5, 0.6] (was {list(config.train.betas)}); "
        "set them back, or start a new run with another run.name"
    )


def test_what_an_older_release_did_not_have_was_off(tmp_path):
    """A setting that its checkpoint does not name goes on as it is by default, and no other way."""
    plain = resolve_config("easy_vqa_cpu", {"run.name": "x"})
    (tmp_path / "trainer").mkdir()
    settings = flat(plain)
    del settings["algorithm.entropy_coef"]
    frozen({"settings": settings})(tmp_path / "trainer" / "run")
    assert saved_state(tmp_path, plain)
    with pytest.raises(ConfigError, match=r"algorithm\.entropy_coef=0\.1 \(was 0\.0\)"):
        saved_state(tmp_path, resolve_config("easy_vqa_cpu", {"run.name": "x", "algorithm.entropy_coef": 0.1}))


def test_a_cap_of_an_older_release_goes_on_as_truncation_of_tokens(tmp_path):
    """It wrote rollout_correction: 3.0 for what is now token_truncate with that upper bound; another one is refused."""

    def config(high):
        given = {"algorithm.rollout_correction": "token_truncate", "algorithm.correction_high": high}
        return resolve_config("easy_vqa_cpu", {"run.name": "x"} | given)

    (tmp_path / "trainer").mkdir()
    old = flat(config(3.0)) | {"algorithm.rollout_correction": 3.0}
    old.pop("algorithm.correction_high")
    frozen({"settings": old})(tmp_path / "trainer" / "run")
    assert saved_state(tmp_path, config(3.0))
    with pytest.raises(ConfigError, match=r"correction_high=2\.0 \(was 3\.0\)"):
        saved_state(tmp_path, config(2.0))


def test_settings_of_sources_are_compared_as_those_above_them(tmp_path):
    """Where a source's images lie and how many of its rows may be bad may change; what is drawn of it may not."""
    entry = {"train": "a.jsonl", "weight": 1}

    def config(**changed):
        return resolve_config(
            "easy_vqa_cpu", {"run.name": "x", "data.train": "sources", "data.sources": {"a": entry | changed}}
        )

    (tmp_path / "trainer").mkdir()
    frozen({"settings": flat(config(image_root="images"))})(tmp_path / "trainer" / "run")
    assert saved_state(tmp_path, config(image_root="elsewhere", max_bad_rows=0.5)) and saved_state(tmp_path, config())
    for changed in ({"weight": 2}, {"train": "b.jsonl"}, {"category_weights": {"c": 1}}, {"pass_rate": "p"}):
        with pytest.raises(ConfigError, match=r"cannot go on with data\.sources="):
            saved_state(tmp_path, config(**changed))


def test_the_free_settings_exist():
    """Every name in the list of settings that may change is one, so that none is misspelt."""
    keys = [setting.key for setting in settings()]
    assert all(any(key.startswith(name) for key in keys) for name in MAY_CHANGE)
    assert set(OF_A_SOURCE) >= OF_A_SOURCE_MAY_CHANGE


def test_versions_name_what_numbers_depend_on():
    """torch and the rest of the numerics are recorded."""
    assert {"python", "torch", "transformers", "deepspeed"} <= set(versions())


def resumed(rank: int, world_size: int) -> tuple[RunState, dict]:
    """A run that goes on from the old checkpoint, with stand-ins for what holds no samples; and the data's position."""
    saved, position = read_state(OLD / "trainer" / "run"), {}
    policy = SimpleNamespace(state_dict=lambda: saved["policy"], load_state_dict=lambda state: None)
    policy.moving = None
    policy.load_optimizer, policy.optimizer_snapshot = lambda folder, steps: None, lambda: lambda folder: None
    stream = QueryStream(easy_vqa("train")[:32], seed=0)
    episodes = SimpleNamespace(stream=stream, state_dict=lambda: position, load_state_dict=position.update)
    replay, run = ReplayBuffer(ReplayConfig(capacity=60), seed=0), SimpleNamespace(state_dict=lambda: saved["log"])
    state = RunState(Config(), Ranks(rank, world_size, rank), Progress(), policy, episodes, replay, run)
    state.load(OLD, saved | {"progress": dict(saved["progress"]), "replay": dict(saved["replay"])})
    return state, position


@pytest.mark.parametrize("rank", [0, 1])
def test_an_old_checkpoint_is_read_and_written_back_to_the_bit(tmp_path, rank):
    """The state of release 0.1.0: what a resumed run would save at once is what it was resumed from."""
    state, _ = resumed(rank, world_size=2)
    state.snapshot()(tmp_path)
    for name in [f"rank_{rank:05d}"] + ["run"] * (rank == 0):
        old, new = (read_state(folder / name) for folder in (OLD / "trainer", tmp_path))
        for clock in ("settings", "versions"):
            old.pop(clock, None), new.pop(clock, None)
        for setting in ("capacity", "alpha", "unit"):  # are compared as settings
            old.get("replay", {}).pop(setting, None)
        for group in new.get("progress", {}).get("groups", []):
            # That release did not note what a response is like, nor the values of each reward function,
            assert group.pop("fast") == group.pop("nlls") == group.pop("truncated") == [] and group.pop("scores") == {}
            assert (
                group.pop("turns") == group.pop("calls") == group.pop("lengths") == [] and group.pop("failures") == {}
            )
        for _, unit, _ in new.get("replay", {}).get("entries", []):  # nor what its own rule does not draw by.
            assert [(s.pop("right"), s.pop("correctness"), s.pop("nll")) for s in unit] == [(False, 0.0, 0.0)]
        for count in ("sampled_queries", "sampled_effective", "refill_rounds"):  # nor what was sampled for an episode
            assert new.get("progress", {}).pop(count, 0) == 0
        assert set(new.get("progress", {}).pop("weighed", {}).values()) <= {None}  # nor what a correction did
        assert not new.get("progress", {}).pop("unvalidated", False)  # nor whether a validation was broken off
        for accuracy in ("before", "after", "best") if "progress" in new else ():  # nor which questions were right
            assert new["progress"][accuracy].pop("right") == new["progress"][accuracy].pop("asked") == ""
        if "samples" in new:  # nor did it mask tokens, or have experts or environments
            assert not any(new["samples"].pop("observed") + new["samples"].pop("observed_images"))
            assert not any(new["samples"].pop("ranked")) and not len(new["samples"].pop("kept"))
            assert set(new["samples"].pop("experts")) == {None}
        assert repr(new) == repr(old)


def test_an_old_checkpoint_holds_what_was_sampled():
    """On one rank its last two groups and all of replay are whole: the completions that the run had recorded."""
    state, position = resumed(rank=0, world_size=1)
    recorded = read_completions(OLD, 0)
    assert [group.number for group in state.progress.groups] == [6, 7]
    for group in state.progress.groups:
        assert group.completions == recorded[group.number].completions
        assert (group.rewards, group.advantages) == (recorded[group.number].rewards, recorded[group.number].advantages)
    replayed = [sample for _, samples, _ in state.replay.state_dict()["entries"] for sample in samples]
    assert len(replayed) == len(state.replay) == 20
    assert all(s.completion == recorded[s.group].completions[s.index] for s in replayed)
    assert all(s.query.id == recorded[s.group].query.id for s in replayed)
    assert state.progress.before.questions == 4 and position["stream"]["drawn"] == {"": 8}
