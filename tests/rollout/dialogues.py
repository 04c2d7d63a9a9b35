"""Dialogues for tests: a scripted environment, and a tiny model whose turns end soon."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image

from rethinker.config import Config, EnvironmentConfig, PolicyConfig
from rethinker.data.prompts import PromptEncoder
from rethinker.embedded.tiny import create_tiny
from rethinker.environments import Observation
from rethinker.families.qwen2_vl import FAMILY
from rethinker.policy.loading import load_model, load_processor
from rethinker.policy.model import Policy
from rethinker.policy.packing import pack
from rethinker.rollout.dialogue import Conversation
from rethinker.samples import Bundle, Completion, Query, Sample
from tests.data.image_kinds import noise, saved
from tests.rollout.helpers import rollout_config

QUESTIONS = (("what shape is it?", 1), ("say hello.", 0), ("<image> or <image>?", 2))


@torch.no_grad()
def model_whose_turns_end(folder: Path, logit: float = 3.5) -> Path:
    """A tiny random model that ends a turn after about ten tokens, written to `folder`."""
    create_tiny(folder, seed=0, tie_word_embeddings=False)
    model, processor = load_model(folder, torch.float32), load_processor(folder)
    model.get_input_embeddings().weight[:, 0] = 4.0  # what every token has in common, of which the head makes a logit
    states: list[torch.Tensor] = []
    hook = model.lm_head.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0][0]))
    model(input_ids=torch.randint(300, (1, 200), generator=torch.Generator().manual_seed(0)))
    hook.remove()
    head, tokenizer = model.lm_head.weight, processor.tokenizer
    head[:, 0] = 0.0
    head[tokenizer.eos_token_id] = 0.0
    for token, wanted in {"<|im_end|>": logit, **dict.fromkeys((*FAMILY.PLACEHOLDERS, "<|endoftext|>"), -20.0)}.items():
        head[tokenizer.convert_tokens_to_ids(token), 0] = wanted / states[0][:, 0].mean()
    model.save_pretrained(folder)
    return folder


def config_of_dialogues(**rollout: Any) -> Config:
    """Room for five turns, four images and prompts with two."""
    config = rollout_config(max_new_tokens=512, **rollout)
    config.data.min_pixels, config.data.max_pixels = 1024, 8192
    config.environment = EnvironmentConfig(use=["crop"], max_turns=3, max_images=2)
    return config


class Side:
    """The trainer's side: encoder, policy and questions."""

    def __init__(self, folder: Path, config: Config) -> None:
        self.folder, self.config = folder, config
        self.encoder = PromptEncoder(load_processor(folder), config.data)
        self.policy = Policy(load_model(folder, torch.float32), PolicyConfig(dtype="float32"))
        self.queries = [
            Query(
                f"q{n}",
                question,
                "",
                tuple({"bytes": saved(Image.fromarray(noise(64, 48, seed=n + i)))} for i in range(shown)),
            )
            for n, (question, shown) in enumerate(QUESTIONS)
        ]

    def begin(self, runner: Any, each: int = 2, longest: int | None = None) -> list[Conversation]:
        """Conversations with an environment, so many about every question."""
        dialogue = SimpleNamespace(runner=runner, encoder=self.encoder, config=self.config.environment)
        longest = longest or self.config.rollout.max_new_tokens
        return [
            Conversation(dialogue, query, self.encoder.encode(query), longest)
            for query in self.queries
            for _ in range(each)
        ]

    @torch.no_grad()
    def gaps(self, responses: list[Completion]) -> torch.Tensor:
        """Behaviour log-probs of what was sampled, less the policy's."""
        each = len(responses) // len(self.queries)
        bundles = []
        for n, query in enumerate(self.queries):
            prompt_tokens = len(self.encoder.encode(query).token_ids)
            group = responses[n * each : (n + 1) * each]
            bundles.append(Bundle(query, tuple(Sample(query, c, 1.0, 0, prompt_tokens=prompt_tokens) for c in group)))
        batch = pack(bundles, self.encoder.encode, self.encoder.pixels, self.policy.positions)
        assert batch.loss_mask.equal(batch.old_logps.isfinite())
        return (batch.old_logps.double() - self.policy(batch)[0].double())[batch.loss_mask]


class Scripted:
    """An environment, as Runner: answers every turn by text and an image of its own, when `answer_at` lets it.

    Attributes:
        heard: what the policy said, by conversation.
    """

    def __init__(
        self,
        make: Callable[[int, int], Observation] | None = None,
        answer_at: Callable[[int, int, Callable[[], None]], None] | None = None,
    ) -> None:
        """
        Args:
            make: (conversation, turn) to the answer.
            answer_at: (conversation, turn, what to call for the answer to be there); by default it is there at once.
        """
        self.heard: list[list[str]] = []
        self._make = make or self.look_again
        self._answer_at = answer_at or (lambda number, turn, answer: answer())

    @staticmethod
    def look_again(number: int, turn: int) -> Observation:
        image = saved(Image.fromarray(noise(48 + 16 * (number % 3), 32 + 16 * turn, seed=10 * number + turn)))
        return Observation(f"part {turn}: <image>", (image,), calls=1)

    def reset(self, query: Query) -> Future:
        self.heard.append([])
        return _there(len(self.heard) - 1)

    def step(self, state: int, text: str) -> Future:
        self.heard[state].append(text)
        future: Future = Future()
        turn = len(self.heard[state])
        self._answer_at(state, turn, lambda: future.set_result((state, self._make(state, turn))))
        return future


def late(seconds: Callable[[int, int], float]) -> Callable[[int, int, Callable[[], None]], None]:
    """For Scripted: an answer after so many seconds."""
    return lambda number, turn, answer: threading.Timer(seconds(number, turn), answer).start()


def _there(value: Any) -> Future:
    future: Future = Future()
    future.set_result(value)
    return future
