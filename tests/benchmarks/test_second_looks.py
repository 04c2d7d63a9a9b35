"""What a second look is worth is read off the tokens of the right answer, after the first answer that the row names."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch
from transformers import AutoProcessor

from benchmarks import second_looks
from rethinker.embedded.sums import answer_text, sums
from rethinker.embedded.tiny import create_tiny
from rethinker.policy.model import Policy

QUERIES = [query for query in sums("validation") if query.metadata["category"] in ("2 terms", "6 terms")][::150]


class Constant(torch.nn.Module):
    """A policy that gives every token the probability 0.9."""

    def __init__(self, model, config):
        super().__init__()
        self.positions = Policy(model, config).positions

    def forward(self, batch):
        return torch.full((len(batch.target_ids),), math.log(0.9)), None


def right_steps(query):
    return "\n".join([*query.metadata["steps"], answer_text(query.answer)])


def test_a_probability_is_of_all_steps_of_its_own_answer(tmp_path, monkeypatch):
    """0.9 to the power of the answer's tokens, among the answers that do not begin with the box; neither the tokens
    before them nor the end count."""
    folder = create_tiny(tmp_path, texts=[query.question for query in QUERIES])
    monkeypatch.setattr(second_looks, "Policy", Constant)
    monkeypatch.setattr(second_looks, "BATCH", 3)
    found = second_looks.probabilities(folder, QUERIES)
    tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
    for number, query in enumerate(QUERIES):
        tokens = len(tokenizer(right_steps(query), add_special_tokens=False).input_ids)
        assert [found[look][number] for look in second_looks.LOOKS] == pytest.approx([0.9**tokens / 0.1] * 3, rel=1e-4)
    assert len(found[second_looks.LOOKS[0]]) == len(QUERIES) == 4


def test_the_looks_follow_what_they_say():
    """Nothing, a wrong answer and a trigger, the right answer and a trigger."""
    for query in QUERIES:
        right, fast = right_steps(query), answer_text(query.answer)
        *first, after_wrong, _, after_right, _ = second_looks.responses(query, random.Random(0))
        assert first == [[(right, True)], [(fast, True)]]
        assert after_wrong[0][0].count("\n") == right.count("\n") and after_wrong[0][0] != right
        assert after_right == [(right, False), after_wrong[1], ("\n" + right, True)]


def test_the_table_has_means_and_intervals_over_checkpoints():
    """Differences are paired by checkpoint: the second look of each is 0.1 worse here, wherever the first one is."""
    measured = [
        {look: {"2 terms": one, "all": one - 0.1 * number} for number, look in enumerate(second_looks.LOOKS)}
        for one in (0.5, 0.7)
    ]
    head, _, first, after_wrong, _ = second_looks.table(measured).splitlines()
    assert head == "| right steps | 2 terms | all | minus first |"
    assert first == "| first answer | 0.60 | 0.60 ± 1.27 |  |"
    assert after_wrong == "| after a wrong one | 0.60 | 0.50 ± 1.27 | -0.100 ± 0.000 |"
    assert second_looks.table(measured[:1]).splitlines()[3].endswith("| 0.40 | -0.100 |")


def test_what_is_measured_is_written(tmp_path, monkeypatch, capsys):
    """The mean of each category and of all; a checkpoint that is named twice counts once."""
    folder, file = create_tiny(tmp_path / "model"), tmp_path / "looks" / "looks.json"
    marks = {"2 terms": 0.5, "6 terms": 0.25}

    def probabilities(folder, queries):
        return {look: [marks.get(query.metadata["category"], 0.0) for query in queries] for look in second_looks.LOOKS}

    monkeypatch.setattr(second_looks, "probabilities", probabilities)
    (tmp_path / "best").symlink_to(folder)  # as a run's best and last can be
    second_looks.main([str(folder), str(tmp_path / "best"), "--json", str(file)])
    assert "| first answer | 0.50 | 0.00 | 0.00 | 0.00 | 0.25 | 0.15 |" in capsys.readouterr().out
    (found,) = json.loads(file.read_text())["checkpoints"]
    expected = dict.fromkeys(["3 terms", "4 terms", "5 terms"], 0.0) | marks | {"all": 0.15}
    assert found["after a wrong one"] == pytest.approx(expected)


def test_a_checkpoint_that_is_not_there(tmp_path, capsys):
    """One line, before anything is measured: a run's folder is none."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(SystemExit):
        second_looks.main([str(tmp_path / "run")])
    assert "run (a run's model is RUN/checkpoints/best) has no config.json" in capsys.readouterr().err
