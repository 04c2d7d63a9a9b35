"""What the rollout tests share: prompts with images, the policy as a plain model, and its weights as a stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rethinker.config import Config
from rethinker.families.qwen2_vl import FAMILY
from rethinker.rollout.hf_engine import HFEngine
from rethinker.runtime.torchvision_cpu import make_importable
from rethinker.samples import Completion, Prompt

make_importable()

from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration  # noqa: E402  (imports torchvision)

PIXELS = 64 * 64
LONG = "Look at the picture, then say in one word which shape you see, and of which colour it is. "
QUESTIONS = (("What shape is it?", 1), ("Say hello.", 0), ("Do these two differ, and if so, how?", 2), (LONG, 1))

TOLERANCE = 1e-5  # nats, law 1
# For what does not depend on whether the model's head has a matrix of its own.
tied_only = pytest.mark.parametrize("folder", ["tied"], indirect=True, scope="session")


def rollout_config(**rollout) -> Config:
    """Settings for the tiny model, with `rollout.*` overrides."""
    config = Config()
    config.policy.dtype = "float32"
    config.data.min_pixels = config.data.max_pixels = PIXELS
    config.data.max_prompt_tokens = 192
    config.data.max_images = 2
    config.rollout.max_new_tokens = 32
    config.rollout.kv_cache_gb = 0.25
    config.rollout.timeout_s = 120
    for name, value in rollout.items():
        setattr(config.rollout, name, value)
    return config


def make_prompts(folder: str | Path, seed: int = 0) -> list[Prompt]:
    """One prompt per entry of QUESTIONS: with one image, none, two and one, of random pixels."""
    rng = np.random.default_rng(seed)
    processor = AutoProcessor.from_pretrained(folder)
    prompts = []
    for i, (question, count) in enumerate(QUESTIONS):
        images = [Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(count)]
        content = [{"type": "image"}] * count + [{"type": "text", "text": question}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        size = {"shortest_edge": PIXELS, "longest_edge": PIXELS}
        full = processor(text=[text], images=images or None, images_kwargs={"size": size})
        prompts.append(Prompt(f"q{i}", list(full["input_ids"][0]), processor.tokenizer(text)["input_ids"], images))
    return prompts


class Policy:
    """The trainer's side of law 1: a plain Hugging Face forward, sample by sample, and the stream of its weights."""

    def __init__(self, folder: str | Path):
        self.model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        self.images = AutoProcessor.from_pretrained(folder).image_processor
        self.image_token = self.model.config.image_token_id

    @torch.no_grad()
    def perturb(self, seed: int, part: str = "", scale: float = 0.02) -> None:
        """Move every weight whose name contains `part`, by about as much as it is large."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.model.named_parameters():
            if part in name:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))

    @torch.no_grad()
    def logits(self, prompt: Prompt, continuation: Sequence[int]) -> torch.Tensor:
        """Logits [len(continuation) + 1, V] of the tokens after the prompt."""
        ids = torch.tensor([[*prompt.token_ids, *continuation]])
        inputs = {}
        if prompt.images:
            size = {"shortest_edge": PIXELS, "longest_edge": PIXELS}
            inputs = dict(self.images(prompt.images, size=size, return_tensors="pt"))
            inputs["mm_token_type_ids"] = (ids == self.image_token).int()
        return self.model(input_ids=ids, **inputs).logits[0, len(prompt.token_ids) - 1 :]

    def logprobs(self, prompt: Prompt, completion: Completion, temperature: float = 1.0) -> torch.Tensor:
        """Log-probabilities [L] of a completion's tokens."""
        logps = (self.logits(prompt, completion.token_ids[:-1]) / temperature).log_softmax(-1)
        return logps.gather(-1, torch.tensor(completion.token_ids)[:, None])[:, 0]

    def error(self, prompts: list[Prompt], completions: list[list[Completion]], temperature: float = 1.0) -> float:
        """Largest difference between behaviour log-probs and this policy's, in nats."""
        return max(
            (self.logprobs(prompt, one, temperature) - torch.tensor(one.logprobs)).abs().max().item()
            for prompt, group in zip(prompts, completions, strict=True)
            for one in group
        )

    @torch.no_grad()
    def like(self, tokens: list[int], prompts: list[Prompt]) -> None:
        """Give tokens that are no prompt's input a logit of 8 as each prompt's first response token."""
        states = []
        hook = self.model.lm_head.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0][0, -1]))
        for prompt in prompts:
            self.logits(prompt, [])
        hook.remove()
        wanted = torch.full((len(prompts),), 8.0)
        self.model.lm_head.weight[tokens] = torch.linalg.pinv(torch.stack(states)) @ wanted

    def metadata(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """The WeightStream protocol."""
        return [(name, p.dtype, tuple(p.shape)) for name, p in self.model.named_parameters()]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields one buffer whose memory is overwritten once the next tensor is asked for."""
        for name, parameter in self.model.named_parameters():
            buffer = parameter.detach().clone()
            yield name, buffer
            buffer.fill_(float("nan"))


@torch.no_grad()
def hf_logprobs(engine: HFEngine, prompt: Prompt, completion: Completion) -> torch.Tensor:
    """Log-probabilities [L] of a completion's tokens, by the model that an hf engine samples with, at temperature 1."""
    inputs = engine._inputs([prompt], [prompt.token_ids + completion.token_ids[:-1].tolist()])
    logps = engine._model(**inputs).logits[0, len(prompt.token_ids) - 1 :].float().log_softmax(-1)
    return logps.gather(-1, torch.tensor(completion.token_ids, dtype=torch.long)[:, None])[:, 0]


def ends_by_itself(completion: Completion, stop_ids: list[int]) -> bool:
    """Whether the completion's only stop token is its last token."""
    stops = [i for i, token in enumerate(completion.token_ids) if token in stop_ids]
    return stops == [len(completion.token_ids) - 1]


def check_sampled_placeholders(engine, policy: Policy, prompts: list[Prompt]) -> None:
    """Law 4: with a policy that likes placeholders, every response ends at its first one, with its log-prob."""
    ids = engine._requests.tokenizer.convert_tokens_to_ids(list(FAMILY.PLACEHOLDERS))
    liked = engine._requests.tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>", "<|vision_pad|>"])
    policy.like(liked, prompts)
    engine.sync(policy, 1)
    sampled = engine.generate(prompts, n=32, max_new_tokens=12, temperature=1.0, seed=0)
    ends = {one.token_ids[-1] for group in sampled for one in group}
    assert ends >= set(liked)
    for one in chain.from_iterable(sampled):
        assert not set(one.token_ids[:-1]) & set(ids)
        assert (one.finish_reason == "stop") == ends_by_itself(one, engine._requests.stop_ids)
    assert policy.error(prompts, sampled) < TOLERANCE
