"""What a second look is worth is read off the right tokens: neither a wrong answer's nor a trigger's."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoProcessor

from benchmarks import second_looks
from rethinker.embedded.sums import answer_text, sums
from rethinker.embedded.tiny import create_tiny
from rethinker.policy.model import Policy

QUERIES = [query for query in sums("validation") if query.metadata["category"] in ("2 terms", "6 terms")][::150]


class EveryToken(torch.nn.Module):
    """A policy to which every token is as likely."""

    def __init__(self, model, config):
        super().__init__()
        self.known = Policy(model, config)

    def positions(self, *inputs):
        return self.known.positions(*inputs)

    def forward(self, batch):
        return torch.full((len(batch.target_ids),), math.log(0.9)), None


def test_a_probability_is_of_all_steps_of_its_own_answer(tmp_path, monkeypatch):
    """0.9 to the power of the answer's tokens; of first answers, of those that do not begin with the box."""
    folder = create_tiny(tmp_path, texts=[query.question for query in QUERIES])
    monkeypatch.setattr(second_looks, "Policy", EveryToken)
    monkeypatch.setattr(second_looks, "BATCH", 3)
    found = second_looks.probabilities(folder, QUERIES)
    tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
    for number, query in enumerate(QUERIES):
        right = "\n".join([*query.metadata["steps"], answer_text(query.answer)])
        first, second = (len(tokenizer(text, add_special_tokens=False).input_ids) + 1 for text in (right, "\n" + right))
        expected = [0.9**first / 0.1, 0.9**second, 0.9**second]
        assert [found[look][number] for look in second_looks.LOOKS] == pytest.approx(expected, rel=1e-4)
    assert len(found[second_looks.LOOKS[0]]) == len(QUERIES) == 4
