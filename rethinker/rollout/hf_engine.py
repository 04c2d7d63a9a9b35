"""The hf backend: transformers' generate on a model copy of its own, for machines without vLLM and as test oracle."""

from __future__ import annotations

from typing import Any

import torch

from rethinker.config import Config
from rethinker.families import configure, family_of, limit_pixels
from rethinker.policy.lora import base_weights
from rethinker.rollout.deadline import Deadline
from rethinker.rollout.engine import RolloutEngine, WeightStream
from rethinker.rollout.sampling import limits, preserved_random_state, seeded, stop_token_ids
from rethinker.runtime.distributed import Ranks
from rethinker.samples import Completion, Prompt

# Sequences that one call of generate advances together.
BATCH = 64


class HFEngine(RolloutEngine):
    """RolloutEngine over a transformers image-text-to-text model."""

    def __init__(self, config: Config, model_dir: str, ranks: Ranks):
        """Load the model onto this rank's device."""
        from rethinker.policy.loading import load_model, load_processor

        self.config = config
        self._rank, self._device = ranks.rank, ranks.device
        self._dtype = getattr(torch, config.policy.dtype)
        with preserved_random_state():
            model = load_model(model_dir, self._dtype)
        self._model = model.to(self._device).eval()
        self._family = family_of(model.config.model_type)
        self._processor = load_processor(model_dir)
        limit_pixels(self._processor, self._family, config.data.min_pixels, config.data.max_pixels)
        configure(model.config, self._family, self._processor)
        self._tokenizer = self._processor.tokenizer
        self._stop_ids = stop_token_ids(self._tokenizer, model.config, model.generation_config)
        pad_id = self._tokenizer.pad_token_id
        self._pad_id = self._stop_ids[0] if pad_id is None else pad_id

    @torch.no_grad()
    def generate(
        self, prompts: list[Prompt], *, n: int, max_new_tokens: int | list[int], temperature: float, seed: int
    ) -> list[list[Completion]]:
        """Sample n completions of every prompt; see RolloutEngine."""
        self._model.to(self._device)  # it may be asleep
        completions: list[list[Completion]] = []
        batch, longest = max(1, BATCH // n), limits(max_new_tokens, len(prompts))
        what = f"the rollout of {len(prompts)} prompts"
        with Deadline(what, self.config.rollout.timeout_s) as deadline, seeded(seed, self._rank):
            for part in (slice(start, start + batch) for start in range(0, len(prompts), batch)):
                completions += self._generate(prompts[part], n, longest[part], temperature, deadline)
        return completions

    def _generate(
        self, prompts: list[Prompt], n: int, longest: list[int], temperature: float, deadline: Deadline
    ) -> list[list[Completion]]:
        from transformers import GenerationConfig

        rows = [prompt for prompt in prompts for _ in range(n)]
        inputs = self._inputs(rows, [prompt.token_ids for prompt in rows])
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        settings = GenerationConfig(
            max_new_tokens=max(longest),
            eos_token_id=self._stop_ids,
            pad_token_id=self._pad_id,
            output_scores=True,  # [B, V] per step, as sampled from
            return_dict_in_generate=True,
            **(sampling if temperature > 0 else {"do_sample": False}),
        )
        # Only explicit settings: generate would fill the gaps from the model's own top-k, top-p and penalties.
        self._model.generation_config = settings

        def watch(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            deadline.check(f"{input_ids.shape[1] - inputs['input_ids'].shape[1]} tokens sampled")
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

        output = self._model.generate(**inputs, generation_config=settings, stopping_criteria=[watch])
        sampled = output.sequences[:, inputs["input_ids"].shape[1] :]  # [B, L]
        logps = (scores.float().log_softmax(-1) for scores in output.scores)  # [B, V] per step
        logprobs = torch.cat([step.gather(-1, sampled[:, i, None]) for i, step in enumerate(logps)], 1)  # [B, L]
        completions = [
            self._completion(tokens[: longest[row // n]], values)
            for row, (tokens, values) in enumerate(zip(sampled.tolist(), logprobs.tolist(), strict=True))
        ]
        return [completions[i : i + n] for i in range(0, len(completions), n)]

    def _completion(self, tokens: list[int], logprobs: list[float]) -> Completion:
        end = next((i for i, token in enumerate(tokens) if token in self._stop_ids), None)
        length = len(tokens) if end is None else end + 1
        return Completion(
            token_ids=tokens[:length],
            logprobs=logprobs[:length],
            text=self._tokenizer.decode(tokens[:length], skip_special_tokens=True),
            finish_reason="length" if end is None else "stop",
        )

    def _inputs(self, prompts: list[Prompt], rows: list[list[int]]) -> dict[str, torch.Tensor]:
        """Left-padded model inputs: rows of token ids, and the images of their prompts in the same order."""
        width = max(len(row) for row in rows)
        ids = torch.tensor([[self._pad_id] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        inputs = {"input_ids": ids, "attention_mask": mask}
        if any(prompt.images for prompt in prompts):
            if self._family.TOKEN_TYPES:
                inputs[self._family.TOKEN_TYPES] = (ids == self._model.config.image_token_id).int()
            images = [image for prompt in prompts for image in prompt.images]
            arguments = self._family.image_arguments(self._processor)
            features = self._processor.image_processor(images, return_tensors="pt", **arguments)
            inputs |= {name: features[name] for name in self._family.IMAGE_INPUTS}
            inputs["pixel_values"] = inputs["pixel_values"].to(self._dtype)
        return {name: tensor.to(self._device) for name, tensor in inputs.items()}

    @torch.no_grad()
    def sync(self, weights: WeightStream, version: int) -> None:
        """Copy the policy's weights; see RolloutEngine."""
        self._model.to(self._device)
        own = dict(base_weights(self._model))
        if strange := own.keys() ^ {name for name, *_ in weights.metadata()}:
            raise RuntimeError(f"weight sync: only one of policy and hf engine has the parameter {min(strange)}")
        with Deadline("the weight sync", self.config.rollout.timeout_s) as deadline:
            for name, tensor in weights:
                deadline.check(f"at {name}")
                own[name].copy_(tensor)

    def sleep(self) -> None:
        """Move the weights to the host."""
        self._model.to("cpu")
