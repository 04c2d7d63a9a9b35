"""The loop's own pieces: order over ranks, rewards by request, the schedule's length, the schedule's shape."""

from __future__ import annotations

import gc
import random
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest

import rethinker
from rethinker.algorithm.replay import ReplayBuffer
from rethinker.algorithm.selection import Batch
from rethinker.checkpoint.resume import Progress
from rethinker.checks import schedule_length
from rethinker.config import Config, ConfigError, DataConfig, ReplayConfig, RethinkConfig, RolloutConfig, TrainConfig
from rethinker.episode import Episode, judge, note_kinds
from rethinker.policy.engine import PolicyEngine, learning_rate
from rethinker.run import Run, load_held_out
from rethinker.runtime import garbage
from rethinker.runtime.distributed import ALONE
from rethinker.runtime.garbage import no_full_collections
from rethinker.samples import Accuracy, Completion, Group, Observed, Query, Rethought
from rethinker.settings import resolve_config


def group(name: str, *texts: str) -> Group:
    completions = [Completion([1], [-1.0], text, "stop") for text in texts]
    return Group(Query(name, "?", "a"), completions, policy_version=0)


def test_rewards_follow_requests_not_positions():
    """Law 7: a checker that answers in any order gives every completion the reward of its own text."""

    class ShuffledChecker:
        def score_all(self, requests, lengths):
            answers = [(key, float(text)) for key, text, _ in requests]
            random.Random(3).shuffle(answers)
            return {"boxed": dict(answers)}

    groups = [group("x", "0.5", "2"), group("y", "3"), group("z", "4", "5", "6")]
    judge(groups, ShuffledChecker(), Config())
    assert [g.rewards for g in groups] == [[0.5, 2.0], [3.0], [4.0, 5.0, 6.0]]


def test_a_forced_phrase_is_no_rethinking_of_its_own():
    """A trigger may hold two cues and counts for none; what the response adds itself does."""
    forced = Config().rethink.triggers["self_verification"]
    one = group("x", "It is red." + forced + " Red.", "It is red." + forced + " Wait, blue.", "Wait, red.", "red.")
    for completion in one.completions[:2]:
        completion.rethought = Rethought(1, 2, "self_verification", 1, 2)
    note_kinds([one], Config())
    assert one.rethinks == [False, True, True, False]


def test_a_forced_response_is_not_a_fast_one():
    """Two bare answers with a trigger between them were no answer at once, however short the trigger; one that rethinks
    is not fast either."""
    config = Config(rethink=RethinkConfig(triggers={"doubt": " Hm?"}))
    one = group("x", r"\boxed{4} Hm? \boxed{5}", r"\boxed{4} Hm? \boxed{5}", r"Wait, \boxed{5}", "\\boxed{5}")
    one.completions[0].rethought = Rethought(1, 2, "doubt", 1, 2)
    note_kinds([one], config)
    assert one.fast == [False, True, False, True] and one.rethinks == [False, False, True, False]


def test_an_answered_response_is_not_a_fast_one():
    """Two short turns with an answer between them were no answer at once, though a single turn that was judged so is;
    what the environment said is no rethinking of the policy's."""
    one = group("x", r"\boxed{4} \boxed{5}", r"\boxed{5}", r"\boxed{5}")
    answer, end = Observed(1, 3, 9, text="Wait, are you sure?"), Observed(1, 1, 9, reward=1.0)
    one.completions[0] = Completion([1] * 4, [-1.0] * 4, one.completions[0].text, "stop", observed=(answer,))
    one.completions[1].observed = (end,)
    note_kinds([one], Config())
    assert one.fast == [False, True, True] and one.rethinks == [False] * 3 and one.turns == [2, 1, 1]


def test_what_a_step_logs_of_an_environment():
    """Lengths are of what was sampled; turns, calls and the share that calls; failures per response by reason. Without
    an environment they are null."""
    config = Config()
    answers = (
        Observed(2, 4, 2, calls=2, failures=("box",)),
        Observed(5, 9, 3, calls=1),
        Observed(10, 10, 4, failures=("box", "turns")),
    )
    one = of_category("a", ("abcd", 1.0), ("ab", 0.0))
    one.completions = [
        Completion(range(10), [-1.0] * 10, "abcd", "stop", observed=answers),
        Completion([1, 2], [-1.0] * 2, "ab", "stop"),
    ]
    assert (one.completions[0].turns, one.completions[0].calls) == (3, 3)
    plain = trained_row([one], Batch([], 0, 1.0, 0.0))
    assert plain["response_length_mean"] == (4 + 2) / 2
    names = ("turns_mean", "tool_calls_mean", "tool_use_ratio")
    assert [plain[name] for name in names] == [None] * 3 and plain["environment_failures"] == {}
    config.environment.use = ["crop"]
    row = trained_row([one], Batch([], 0, 1.0, 0.0), config)
    assert [row[name] for name in names] == [2.0, 1.5, 0.5]
    assert row["environment_failures"] == {"box": 1.0, "turns": 0.5}


def test_how_probable_a_response_was_is_noted():
    """`nlls` are the mean -log p of the sampled tokens, as the rollout gave them: forced ones, which are NaN, do not
    count, an empty response has 0, and scoring a response again later changes nothing."""
    one = group("x", "a", "b", "c")
    one.completions[0] = Completion([1, 2, 3], [-1.0, float("nan"), -2.0], "a", "stop")
    one.completions[1] = Completion([], [], "b", "stop")
    note_kinds([one], Config())
    one.completions[0].logprobs = one.completions[2].logprobs  # as if scored by the trainer
    one.rewards, one.advantages = [1.0, 0.0, 1.1], [1.0, -1.0, 1.0]
    assert one.nlls == [1.5, 0.0, 1.0] == [sample.nll for sample in one.samples()]
    assert [sample.right for sample in one.samples()] == [True, False, True]
    assert {sample.correctness for sample in one.samples()} == {2 / 3}
    one.nlls = []  # of a group that an older release saved
    assert [sample.nll for sample in one.samples()] == [0.0] * 3


def test_how_far_a_run_is():
    """`done` is the share of its steps, or of its budget of tokens if that is further, and at most 1."""
    run = Run(Config())
    run.total_steps = 8
    for steps, spent, done in ((0, 0.0, 0.0), (2, 0.0, 0.25), (2, 0.5, 0.5), (6, 0.5, 0.75), (8, 1.2, 1.0)):
        run.policy = SimpleNamespace(steps=steps, budget_spent=spent)
        assert run.done == done


def begun(monkeypatch, episode: Episode, held: list[Group] = (), **replay) -> tuple[list, ReplayBuffer]:
    """What a run calls that begins an episode, and its buffer, which held the samples of these groups before."""
    config = Config(
        rollout=RolloutConfig(group_size=2), train=TrainConfig(batch_pairs=4), replay=ReplayConfig(**replay)
    )
    config.run.save_completions = False
    run, calls = Run(config), []
    run.policy, run.progress, run.ranks, run.total_steps = SimpleNamespace(steps=0), Progress(), ALONE, 1
    run.rollout = SimpleNamespace(sleep=lambda: calls.append("sleep"))
    run.episodes, run.checker = SimpleNamespace(rethinker=None), SimpleNamespace(failures=Counter())
    run.replay = ReplayBuffer(config.replay, 0)
    run.replay.add([sample for one in held for sample in one.samples()])
    monkeypatch.setattr("rethinker.run.score_again", lambda *given: calls.append(given[:2]) or (None, {}))
    run.begin_episode(episode)
    return calls, run.replay


def test_the_engine_sleeps_before_the_policy_scores(monkeypatch):
    """On a GPU scoring is sized for the memory that vLLM leaves while it sleeps, as a step is."""
    groups = [group(name, "a", "b") for name in "xyz"]
    calls, _ = begun(monkeypatch, Episode(groups))
    assert calls == ["sleep", (groups, groups[:2])]


def test_a_question_that_a_refill_drops_leaves_replay(monkeypatch):
    """By correctness, where its latest responses are all right or all wrong. One that was dropped because the episode
    was full stays what it was."""

    def judged(name: str, number: int, *rewards: float) -> Group:
        return replace(group(name, "a", "b"), rewards=list(rewards), advantages=[1.0, -1.0], number=number)

    held = [judged(name, number, 1.0, 0.0) for number, name in enumerate("xyzw")]
    dropped = [judged("x", 10, 1.0, 1.0), judged("y", 11, 0.0, 0.0), judged("z", 12, 0.0, 1.0)]
    _, replay = begun(monkeypatch, Episode([judged("v", 13, 1.0, 0.0)], dropped), held, priority="correctness")
    assert {sample.query.id for sample in replay.draw(100)} == {"z", "w"}


def trained_row(fresh: list[Group], batch: Batch, config: Config | None = None) -> dict:
    """What a step logs about groups whose rewards are known."""
    run = Run(config or Config())
    run.policy, run.progress = SimpleNamespace(steps=1), Progress(mismatch=0.0)
    run.replay = ReplayBuffer(Config().replay, 0)
    run.encoder, run.checkpoints = SimpleNamespace(dropped=Counter()), SimpleNamespace(failed=0)
    note_kinds(fresh, Config())
    run.trained(fresh, batch, {"skipped": 0.0})
    return run._row


def of_category(category: str, *answers: tuple[str, float]) -> Group:
    one = group(category, *(text for text, _ in answers))
    one = replace(one, query=replace(one.query, metadata={"category": category}))
    one.rewards, one.advantages = [reward for _, reward in answers], [reward - 0.5 for _, reward in answers]
    return one


def test_a_step_logs_kinds_of_answers_and_categories():
    """Shares of fast answers over all fresh responses; by category their mean reward, the queries, replay's draws."""
    slow = "2+3=5\n5+4=9\n9-1=8\n8+1=9\n\\boxed{9}"
    easy = of_category("2 terms", (r"\boxed{5}", 1.0), (r"\boxed{6}", 0.0))
    other = of_category("2 terms", (r"\boxed{7}", 1.0), (slow, 1.0))
    hard = of_category("6 terms", (slow, 0.0), (f"{slow} Wait, {slow}", 1.0))
    replayed = [*hard.samples(), *hard.samples()[:1], *easy.samples()[:1]]
    row = trained_row([easy, other, hard], Batch([*easy.samples(), *replayed], 4, 1.0))
    assert row["fast_ratio"] == 0.5 and row["rethink_ratio"] == 1 / 6
    assert row["reward_by_category"] == {"2 terms": 0.75, "6 terms": 0.5}
    assert row["queries_by_category"] == {"2 terms": 2 / 3, "6 terms": 1 / 3}
    assert row["replay_by_category"] == {"2 terms": 0.25, "6 terms": 0.75}
    nothing_drawn = trained_row([easy, hard], Batch(easy.samples(), 0, 1.0))
    assert nothing_drawn["replay_by_category"] == {} and nothing_drawn["reward_by_category"]
    alone = trained_row([easy, other], Batch(replayed, 4, 1.0))
    assert [alone[f"{what}_by_category"] for what in ("reward", "queries", "replay")] == [{}] * 3


def test_a_validation_is_told_the_steps_since_the_last_one():
    """Of all rows, a resumed run's earlier ones too, those after the last that has an accuracy, and the running one."""
    run = Run(Config())
    run.metrics = [{"step": step, "val_accuracy": 0.5 if step in (2, 4) else None} for step in range(1, 7)]
    run._row = {"step": 7, "val_accuracy": None}
    assert [row["step"] for row in run._since_validation()] == [5, 6, 7]
    run.metrics, run._row = [], {}
    assert run._since_validation() == []


def test_a_skipped_step_is_in_the_log(caplog):
    """Law 12: a step that is not applied is named in the log, by its number; an ordinary one is not."""
    run = Run(Config())
    run.policy, run.progress = SimpleNamespace(steps=3), Progress(mismatch=0.0)
    run.replay = ReplayBuffer(Config().replay, 0)
    run.encoder, run.checkpoints = SimpleNamespace(dropped=Counter()), SimpleNamespace(failed=0)
    one = group("x", "a")
    one.rewards, one.rethinks = [1.0], [False]
    for skipped in (0.0, 1.0):
        run.trained([one], Batch([], 0, 0.0), {"skipped": skipped})
    assert [r.getMessage() for r in caplog.records] == [
        "step 3 is not applied: a loss, gradient or log-prob is not finite"
    ]


def test_a_first_validation_in_a_resumed_run():
    """A run that began without held-out questions and goes on with some: the first accuracy is the best so far."""
    run, kept = Run(Config()), []
    run.policy = SimpleNamespace(steps=3, model_snapshot=lambda: "model", moving=None)
    run.progress, run.total_steps, run._row = Progress(), 3, {}
    run.checkpoints = SimpleNamespace(save_best=lambda step, model: kept.append((step, model)))
    for overall in (0.5, 0.25):
        run._validate = lambda step, overall=overall: Accuracy(overall, {}, 8)
        run.end_episode()
        assert run._row["val_accuracy"] == overall
    assert kept == [(3, "model")] and run.progress.best.overall == 0.5


def test_a_validation_that_fails_is_left_to_the_resumed_run():
    """A reward function that stops the run fails in it: no accuracy is logged or kept, and what is left is known."""
    run, kept = Run(Config()), []
    run.policy = SimpleNamespace(steps=3, model_snapshot=lambda: "model", moving=None)
    run.progress, run.total_steps, run._row, run.held_out = Progress(), 3, {}, ["question"]
    run.progress.best = Accuracy(0.5, {}, 8)
    run.checkpoints = SimpleNamespace(save_best=lambda step, model: kept.append((step, model)))
    run._validate = lambda step: None
    run.end_episode()
    assert run._row["val_accuracy"] is None and run.progress.unvalidated and run.progress.after is None and not kept
    run._validate = lambda step: Accuracy(0.75, {}, 8)
    run._keep_best()
    assert kept == [(3, "model")] and run.progress.after.overall == run.progress.best.overall == 0.75
    assert not run.progress.unvalidated
    run.held_out, run._validate = [], lambda step: None
    run.end_episode()
    assert not run.progress.unvalidated


def test_schedule_length():
    """max_steps rules; without it epochs x queries x group size / batch pairs, rounded down; less than 1 is refused."""
    config = Config(rollout=RolloutConfig(group_size=8), train=TrainConfig(batch_pairs=512, epochs=3.0))
    assert schedule_length(config, 1000) == 46
    config.train.max_steps = 7
    assert schedule_length(config, 1000) == 7
    config.train.max_steps = None
    with pytest.raises(ConfigError, match=r"train\.epochs=3\.0 over 20 queries.*train\.batch_pairs=512"):
        schedule_length(config, 20)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_learning_rate_rises_then_follows_its_schedule(schedule):
    """Linear warm-up to the peak, then constant, or down to the floor by the end."""
    train = TrainConfig(learning_rate=1.0, schedule=schedule, warmup_ratio=0.1, min_lr_ratio=0.1)
    rates = [learning_rate(step, 100, Config(train=train)) for step in range(100)]
    assert rates[:10] == sorted(rates[:10]) and 0 < rates[0] < rates[9] < rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == 1.0 if schedule == "constant" else 0.1 <= rates[-1] < 0.12
    ahead = [learning_rate(step, 100, Config(train=train), budget_spent=0.5) for step in range(100)]
    assert ahead[:10] == rates[:10] and ahead[10:55] == [rates[55]] * 45 and ahead[55:] == rates[55:]


def test_a_resumed_policy_is_as_far_in_its_budget():
    """The share of the budget is saved within an episode, too; a checkpoint of 0.1.0 has none."""
    saved = object.__new__(PolicyEngine)
    vars(saved).update(steps=3, version=1, budget_spent=0.25, _base=None)
    saved.optimizer = SimpleNamespace(optimizer=SimpleNamespace(state={}))
    resumed = object.__new__(PolicyEngine)
    vars(resumed).update(steps=0, version=0, budget_spent=0.0, _base=None)
    resumed.load_state_dict(saved.state_dict())
    assert (resumed.steps, resumed.version, resumed.budget_spent) == (3, 1, 0.25)
    resumed.load_state_dict({"steps": 3, "version": 1})
    assert resumed.budget_spent == 0.0


def test_the_callers_settings_are_not_changed(monkeypatch):
    """What a run makes of its settings, as its name, is not seen in the Config or the overrides it was given."""

    class Renamed:
        def __init__(self, config):
            config.run.name, config.train.deepspeed["x"]["y"] = "another", 2
            raise KeyboardInterrupt

    monkeypatch.setattr("rethinker.run.Run", Renamed)
    overrides = {"run.name": "mine", "train.deepspeed": {"x": {"y": 1}}}
    config = resolve_config("easy_vqa_cpu", overrides)
    for given in ((config,), ("easy_vqa_cpu", overrides)):
        with pytest.raises(KeyboardInterrupt):
            rethinker.train(*given)
    assert (config.run.name, config.train.deepspeed) == ("mine", {"x": {"y": 1}})
    assert overrides == {"run.name": "mine", "train.deepspeed": {"x": {"y": 1}}}


def test_the_reward_is_the_weighted_sum_and_right_what_the_first_says():
    """In the order of the list; the released code's rule changes the first function's value, as it did the reward."""

    class Checker:
        def score_all(self, requests, lengths):
            assert lengths == {key: (1, text == "cut") for key, text, _ in requests}
            first = {key: float(text != "wrong") for key, text, _ in requests}
            return {"boxed": first, "other": dict.fromkeys(first, 0.25)}

    config = Config()
    config.reward.functions = [{"function": "boxed", "weight": 0.1}, {"function": "a.py:other", "weight": -2}]
    one = group("x", "right", "wrong", "cut")
    one.completions[2].finish_reason = "length"
    judge([one], Checker(), config)
    assert one.scores == {"boxed": [1.0, 0.0, 1.0], "other": [0.25] * 3} and one.right == [True, False, True]
    assert one.rewards == [0.1 - 0.5, -0.5, 0.1 - 0.5]
    config.rethink = RethinkConfig(fraction=0.5, preset="released_code")
    judge([one], Checker(), config)
    assert one.scores["boxed"] == [1.0, 0.0, -0.1] and one.right == [True, False, False]
    assert one.rewards == [0.1 - 0.5, -0.5, 0.1 * -0.1 - 0.5]


@pytest.mark.parametrize("setting", ["algorithm.loss", "reward.function"])
def test_the_users_code_is_looked_at_first(setting, tmp_path, monkeypatch):
    """A mistake in the file of a loss or a reward is reported before data is read and a model is loaded."""
    (tmp_path / "mine.py").write_text("def another(): pass")
    monkeypatch.setattr("rethinker.run.open_stream", None)
    config = resolve_config("easy_vqa_cpu", {setting: f"{tmp_path}/mine.py:f"})
    with pytest.raises(ConfigError, match=rf"^{setting}=.* has no function 'f'; it has another"), Run(config):
        pass
    config = resolve_config(
        "easy_vqa_cpu", {"reward.functions": [{"function": "boxed"}, {"function": "format", "x": 1}]}
    )
    with pytest.raises(ConfigError, match=r"^reward\.functions\[1\]\.x: format takes no such option"), Run(config):
        pass


def test_the_package_is_callable_as_documented():
    """`rethinker.train(recipe, overrides)` checks its settings as the command does."""
    with pytest.raises(ConfigError, match=r"did you mean 'train\.max_steps'"):
        rethinker.train("easy_vqa_cpu", {"train.max_stps": 3})


def test_categories_that_are_not_trained_do_not_validate():
    """Held-out questions are of the categories with a weight; where there are none of those, of all."""

    def categories(**weights):
        data = DataConfig(train="sums", validation="sums", category_weights=weights)
        return {query.category for query in load_held_out(Config(data=data))}

    assert categories(**{"2 terms": 1, "3 terms": 0.5, "4 terms": 0}) == {"2 terms", "3 terms"}
    assert categories() == categories(other=1) == {f"{terms} terms" for terms in range(2, 8)}


def test_a_run_freezes_what_is_there_and_only_its_own(monkeypatch):
    """Within a run what was there is frozen; after it nothing is, unless the caller had frozen something."""
    frozen = 0
    monkeypatch.setattr(gc, "get_freeze_count", lambda: frozen)
    calls = []
    for name in ("collect", "freeze", "unfreeze"):
        monkeypatch.setattr(gc, name, lambda name=name: calls.append(name))
    with no_full_collections():
        assert calls == ["collect", "freeze"]
    assert calls.pop() == "unfreeze"
    frozen = 7
    with pytest.raises(KeyError), no_full_collections():
        raise KeyError
    assert calls == ["collect", "freeze"] * 2


def test_a_run_starts_with_few_full_collections():
    """Objects that stay are not looked through as they come; in a run, and after it, collections come as usual."""
    usual, full = gc.get_threshold(), gc.get_stats()[2]["collections"]
    with garbage.few_full_collections():
        kept = [[n] for n in range(10**6)]
        assert gc.get_stats()[2]["collections"] == full
        with no_full_collections():
            assert gc.get_threshold() == usual
    with garbage.few_full_collections():
        pass
    assert gc.get_threshold() == usual and len(kept) == 10**6


def test_what_is_frozen_stays_so_whatever_a_library_asks_for():
    """A library's unfreeze does nothing then, and is back afterwards, also after an error."""
    before = gc.unfreeze
    with pytest.raises(KeyError), garbage.frozen():
        gc.unfreeze()
        assert gc.get_freeze_count() > 10**5
        raise KeyError
    assert gc.unfreeze is before and gc.get_freeze_count() > 10**5
