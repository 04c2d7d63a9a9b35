"""Test-time rethinking and judging. Which answers are right is scripted: no model gives them on demand."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from rethinker.algorithm.rethinking import make_triggers
from rethinker.config import Config, EnvironmentConfig, RewardConfig
from rethinker.data.prompts import PromptEncoder
from rethinker.environments import Observation
from rethinker.evaluation import answering
from rethinker.evaluation import evaluate as module
from rethinker.evaluation.answering import AnsweringModel, validate
from rethinker.evaluation.evaluate import evaluate
from rethinker.evaluation.results import summarize
from rethinker.rewards.checker import AnswerChecker
from rethinker.rollout.dialogue import Dialogue
from rethinker.rollout.engine import RolloutEngine
from rethinker.rollout.vllm_settings import most_images
from rethinker.runtime.distributed import ALONE, Ranks
from rethinker.samples import Completion, Query
from tests.evaluation.fixtures import png
from tests.rollout.dialogues import Scripted as EnvironmentScript

SCRIPT = {  # query id: its answer, first response, what follows the trigger
    "kept": ("1", "\\boxed{1}", " yes \\boxed{1}"),
    "fixed": ("2", "\\boxed{0}", " no, \\boxed{2}"),
    "broken": ("3", "\\boxed{3}", " no, \\boxed{0}"),
    "lost": ("4", "wait, \\boxed{0}", " yes"),
}


class Scripted:
    """A rollout engine that says what SCRIPT has; `limit` cuts first responses short."""

    def __init__(self, tokenizer, limit: int = 1000) -> None:
        self.tokenizer, self.limit = tokenizer, limit
        self.calls: list[list[str]] = []

    def generate(self, prompts, *, n, max_new_tokens, temperature, seed):
        assert n == 1 and temperature == 0.0
        self.calls.append([prompt.query_id for prompt in prompts])
        again = isinstance(max_new_tokens, list)
        return [[self._say(SCRIPT[prompt.query_id][2 if again else 1])] for prompt in prompts]

    def _say(self, text: str) -> Completion:
        ids = [*self.tokenizer(text)["input_ids"], self.tokenizer.eos_token_id]
        reason = "stop" if len(ids) <= self.limit else "length"
        ids = ids[: self.limit]
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return Completion(ids, [-1.0] * len(ids), text, reason)


@pytest.fixture(scope="module")
def encoder(checkpoint):
    from rethinker.policy.loading import load_processor

    config = Config().data
    config.min_pixels = config.max_pixels = 4096
    return PromptEncoder(load_processor(checkpoint), config)


@pytest.fixture(scope="module")
def checker():
    with AnswerChecker(RewardConfig(workers=1)) as checker:
        yield checker


def ask(encoder, checker, mode: str, queries: list[Query] | None = None, engine: Scripted | None = None, **options):
    queries = queries or [Query(name, f"Say {name}.", answer) for name, (answer, _, _) in SCRIPT.items()]
    engine = engine or Scripted(encoder.tokenizer)
    triggers = make_triggers(encoder.tokenizer, Config().rethink.triggers)
    settings = {"mode": mode, "max_new_tokens": 64, "triggers": triggers, **options}
    return queries, evaluate(queries, AnsweringModel(engine, encoder, checker), ALONE, **settings), engine


def rights(rows) -> list[bool]:
    return [row["reward"] >= 1.0 for row in rows]


def test_normal(encoder, checker):
    """One greedy pass: every response is judged by its own text, and rethinks only of its own accord."""
    _, rows, engine = ask(encoder, checker, "normal")
    assert rights(rows) == [True, False, True, False]
    assert [row["rethinks"] for row in rows] == [False, False, False, True]
    assert len(engine.calls) == 1 and summarize(rows)["accuracy"] == 0.5
    assert summarize(rows)["second_pass"] is None


def test_forced(encoder, checker):
    """Every first answer is followed by a trigger; what counts is the last box of the whole response."""
    _, rows, engine = ask(encoder, checker, "forced")
    assert engine.calls[1] == list(SCRIPT)
    assert rights(rows) == [True, True, False, False]
    for row in rows:
        _, first, rest = SCRIPT[row["query_id"]]
        phrase = Config().rethink.triggers[row["trigger"]]
        assert row["response"] == first + phrase + rest and row["first_response"] == first
        ids, start, end = row["token_ids"], row["trigger_start"], row["trigger_end"]
        assert (
            ids[:start].tolist() == encoder.tokenizer(first)["input_ids"] and encoder.decode(ids[start:end]) == phrase
        )
    second = summarize(rows)["second_pass"]
    assert second == {"answers": 4, "no_room": 0, "first_accuracy": 0.5, "wrong_to_right": 1, "right_to_wrong": 1}
    assert summarize(rows)["rethink_ratio"] == 0.25  # the forced ones do not count


def test_oracle(encoder, checker):
    """Only wrong answers are continued, so accuracy cannot fall: an upper bound."""
    _, rows, engine = ask(encoder, checker, "oracle")
    assert engine.calls[1] == ["fixed", "lost"]
    assert rights(rows) == [True, True, True, False]
    assert rows[0]["first_response"] is None and rows[1]["first_response"] == "\\boxed{0}"
    assert summarize(rows)["second_pass"]["right_to_wrong"] == 0


def test_an_answer_that_leaves_no_room_counts_as_it_is(encoder, checker):
    """A first answer that fills everything is not continued, and that is counted."""
    engine = Scripted(encoder.tokenizer)
    long = "a" * 30 + " \\boxed{1}"
    tokens = len(encoder.tokenizer(long)["input_ids"])
    script = dict(SCRIPT, kept=("1", long, "never"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{__name__}.SCRIPT", script)
        _, rows, _ = ask(encoder, checker, "forced", engine=engine, max_new_tokens=tokens // 3)
    assert rows[0]["no_room"] and rights(rows)[0] and rows[0]["first_response"] is None
    assert summarize(rows)["second_pass"]["no_room"] == 1


class Talking(Scripted, RolloutEngine):
    """Says what TURNS has of a question, turn by turn."""

    config = Config()

    def generate(self, prompts, *, n, max_new_tokens, temperature, seed):
        assert n == 1 and temperature == 0.0
        turn = len(self.calls)
        self.calls.append([prompt.query_id for prompt in prompts])
        return [[self._say(TURNS[prompt.query_id][turn])] for prompt in prompts]


TURNS = {
    "kept": ("a look <tool_call>", "one more <tool_call>", "\\boxed{1}"),
    "fixed": ("\\boxed{2}",),
    "broken": ("\\boxed{3} <tool_call>", "no, \\boxed{0}"),
}
ANSWERS = {  # by question and turn
    (0, 1): Observation("here: <image>", (png("red"),), calls=1),
    (0, 2): Observation("no such box", calls=2, failures=("box", "limit")),
    (2, 1): Observation("no such box", calls=1, failures=("box",)),
}


def test_an_environment_answers_as_in_training(encoder, checker):
    """Each question goes on until its environment has nothing to say; a response is judged by the policy's own words of
    all turns, and its turns, tool calls and failures are counted."""
    runner = EnvironmentScript(lambda number, turn: ANSWERS.get((number, turn), Observation(done=True)))
    dialogue = SimpleNamespace(runner=runner, encoder=encoder, config=Config().environment)
    queries = [Query(name, f"Say {name}.", SCRIPT[name][0]) for name in TURNS] + [Query("lost", "long " * 3000, "4")]
    engine = Talking(encoder.tokenizer)
    rows = evaluate(
        queries, AnsweringModel(engine, encoder, checker, dialogue), ALONE, mode="normal", max_new_tokens=256
    )
    assert engine.calls == [["kept", "fixed", "broken"], ["kept", "broken"], ["kept"]]
    assert rights(rows) == [True, True, False, False]
    assert [row["response"] for row in rows] == [*map("".join, TURNS.values()), None]
    assert [(row["turns"], row["calls"]) for row in rows] == [(3, 3), (1, 0), (2, 1), (None, None)]
    assert [row["failures"] for row in rows] == [["box", "limit"], [], ["box"], None]
    assert summarize(rows)["environment"] == {
        **{"turns_mean": 2.0, "tool_calls_mean": 4 / 3, "tool_use_ratio": 2 / 3},
        "failures": {"box": 2, "limit": 1},
    }
    _, plain, _ = ask(encoder, checker, "normal")
    assert summarize(plain)["environment"] is None and {row["turns"] for row in plain} == {None}


def test_tools_are_called_for_real(encoder, checker, monkeypatch):
    """A crop of the question's image, one that lies outside it, and an answer at once: the model hears an image and an
    error, and each counts where it belongs."""
    call = '<tool_call>\n{{"name": "crop", "arguments": {{"bbox_2d": {}}}}}\n</tool_call>'
    inside, outside = call.format([0, 0, 30, 30]), call.format([900, 900, 990, 990])
    turns = {"kept": (inside, "\\boxed{1}"), "fixed": ("\\boxed{2}",), "broken": (inside + outside, "\\boxed{0}")}
    monkeypatch.setattr(f"{__name__}.TURNS", turns)
    config = Config(environment=EnvironmentConfig(use=["crop"]))
    queries = [Query(name, f"Say {name}.", SCRIPT[name][0], ({"bytes": png("red")},)) for name in turns]
    dialogue = Dialogue(config, encoder)
    engine = Talking(encoder.tokenizer)
    model = AnsweringModel(engine, encoder, checker, dialogue)
    rows = evaluate(queries, model, ALONE, mode="normal", max_new_tokens=1024)
    dialogue.close()
    assert engine.calls == [["kept", "fixed", "broken"], ["kept", "broken"]] and rights(rows) == [True, True, False]
    assert [(row["turns"], row["calls"], len(row["failures"])) for row in rows] == [(2, 1, 0), (1, 0, 0), (2, 2, 1)]
    assert len(rows[0]["token_ids"]) > len(encoder.tokenizer(rows[0]["response"])["input_ids"]) + 4  # an image's


def test_the_engine_takes_the_images_of_answers(checkpoint):
    """An evaluation's engine lets a response be shown the question's images and those that the environment shows."""
    config = Config()
    assert most_images(answering.fit_model(config, str(checkpoint))) == config.data.max_images
    config.environment.use, config.environment.max_images = ["crop"], 7
    assert most_images(answering.fit_model(config, str(checkpoint))) == config.data.max_images + 7


def test_questions_that_do_not_fit_count_as_wrong(encoder, checker):
    """A benchmark's accuracy is over all its questions: those left out are wrong, and named by the limit."""
    queries = [Query("kept", "Say kept.", "1"), Query("lost", "long " * 3000, "4")]
    _, rows, engine = ask(encoder, checker, "forced", queries)
    summary = summarize(rows)
    assert summary["questions"] == 2 and summary["accuracy"] == 0.5 and engine.calls[0] == ["kept"]
    assert summary["left_out"] == {"data.max_prompt_tokens": 1}


def test_any_of_several_answers_counts(encoder, checker):
    """A question with several accepted answers is right if one of them is given; rewards stay with their request."""
    queries = [Query("kept", "?", "7", metadata={"answers": ["7", "1"]}), Query("fixed", "?", "2")]
    _, rows, _ = ask(encoder, checker, "normal", queries)
    assert rights(rows) == [True, False]


def test_a_query_keeps_its_trigger_and_its_place(encoder, checker, monkeypatch):
    """Neither chunks nor the other questions change a question's trigger or mix up answers."""
    queries, rows, _ = ask(encoder, checker, "forced")
    monkeypatch.setattr(module, "CHUNK", 3)
    _, chunked, engine = ask(encoder, checker, "forced", queries[::-1])
    assert [len(call) for call in engine.calls] == [3, 3, 1, 1]
    for row, before in zip(chunked[::-1], rows, strict=True):
        assert (row.pop("token_ids") == before.pop("token_ids")).all() and row == before


def test_ranks_share_the_questions(encoder, checker, monkeypatch):
    """Two ranks answer every question once, in order, and call the engine equally often (it may span ranks)."""
    monkeypatch.setattr(module, "CHUNK", 1)
    queries = [Query(name, f"Say {name}.", answer) for name, (answer, _, _) in list(SCRIPT.items())[:3]]
    shares, calls = [], []

    class Rank(Ranks):
        def gather_to_main(self, value):
            shares.insert(0, value)  # rank 0 comes last here
            return shares if self.rank == 0 else None

    triggers = make_triggers(encoder.tokenizer, Config().rethink.triggers)
    for rank in (1, 0):
        engine = Scripted(encoder.tokenizer)
        options = {"mode": "oracle", "max_new_tokens": 64, "triggers": triggers}
        rows = evaluate(queries, AnsweringModel(engine, encoder, checker), Rank(rank, 2, 0), **options)
        calls.append(len(engine.calls))
        assert (rows is None) == (rank == 1)
    assert [row["query_id"] for row in rows] == ["kept", "fixed", "broken"]
    assert rights(rows) == [True, True, True] and calls[0] == calls[1]


def test_categories_of_any_kind(encoder, checker):
    """A data set's column may hold numbers and lists, and nothing in some rows: each is a category by its text."""
    kinds = {"kept": None, "fixed": 3, "broken": "3", "lost": ["a"]}
    queries = [Query(name, f"Say {name}.", SCRIPT[name][0], metadata={"category": kinds[name]}) for name in kinds]
    queries.append(Query("kept", "Say kept.", "1"))
    accuracy, _ = validate(queries, AnsweringModel(Scripted(encoder.tokenizer), encoder, checker), ALONE, 64)
    assert accuracy.overall == 0.6 and accuracy.questions == 5
    assert accuracy.by_category == {"3": 0.5, "None": 1.0, "['a']": 0.0, "all": 1.0}


def test_the_first_answers_of_a_validation_are_kept(encoder, checker):
    """Rank 0 gets the judged groups of the first questions from all ranks, in order; the other rank gets none."""
    queries = [Query(name, f"Say {name}.", answer) for name, (answer, _, _) in list(SCRIPT.items())[:4]]
    gathered = {"gather": [], "gather_to_main": []}

    class Rank(Ranks):
        def gather(self, value):
            gathered["gather"].insert(0, value)  # rank 0 comes last here
            return gathered["gather"]

        def gather_to_main(self, value):
            gathered["gather_to_main"].insert(0, value)
            return gathered["gather_to_main"] if self.rank == 0 else None

    kept = {}
    for rank in (1, 0):
        model = AnsweringModel(Scripted(encoder.tokenizer), encoder, checker)
        accuracy, kept[rank] = validate(queries, model, Rank(rank, 2, 0), 64, keep=3)
    assert kept[1] == [] and [group.query for group in kept[0]] == queries[:3]
    alone, expected = validate(queries, model, ALONE, 64, keep=3)
    assert accuracy == alone and kept[0] == expected
    assert [group.completions[0].text for group in expected] == [SCRIPT[query.id][1] for query in queries[:3]]


def test_a_validation_says_which_questions_are_right(encoder, checker):
    """In the order asked; other questions, answers or orders have another name."""
    queries = [Query(name, f"Say {name}.", answer) for name, (answer, _, _) in list(SCRIPT.items())[:4]]

    def validated(queries):
        return validate(queries, AnsweringModel(Scripted(encoder.tokenizer), encoder, checker), ALONE, 64)[0]

    first = validated(queries)
    each = "".join(validated([query]).right for query in queries)
    assert first.right == each and set(each) == {"0", "1"} and first.right.count("1") == 4 * first.overall
    assert validated(queries).asked == first.asked
    backwards, other = queries[::-1], [*queries[:3], replace(queries[3], answer="another")]
    assert validated(backwards).right == first.right[::-1]
    assert len({first.asked, *(validated(another).asked for another in (backwards, other, queries[:3]))}) == 4


def test_the_checkers_processes_start_after_the_engine(monkeypatch):
    """So that they load while it samples, and take no memory that an engine counts as free."""
    made: list[AnswerChecker] = []
    monkeypatch.setattr(answering, "AnswerChecker", lambda *given: made.append(AnswerChecker(*given)) or made[0])

    def processes() -> list[object]:
        return [worker._process for worker in made[0]._workers]

    def make_engine(*_: object, **__: object) -> SimpleNamespace:
        assert processes() == [None, None]
        return SimpleNamespace(close=lambda: None)

    monkeypatch.setattr(answering, "make_engine", make_engine)
    encoder = SimpleNamespace(png_images=None)
    with answering.open_model(Config(reward=RewardConfig(workers=2)), "folder", ALONE, encoder):
        assert None not in processes()
    assert processes() == [None, None]
