"""The hf backend: transformers' generate on a model copy of its own, for machines without vLLM and as test oracle."""

from __future__ import annotations

from typing import Any

import torch

from rethinker.config import Config, ConfigError
from rethinker.families import family_of, limit_pixels
from rethinker.rollout.deadline import Deadline
from rethinker.rollout.engine import WeightStream
from rethinker.rollout.sampling import limits, preserved_random_state, seeded, stop_token_ids
from rethinker.samples import Completion, Prompt

# Sequences that one call of generate advances together.
BATCH = 64


class HFEngine:
    """RolloutEngine over a transformers image-text-to-text model (see rethinker.rollout.RolloutEngine)."""

    def __init__(self, config: Config, model_dir: str, *, rank: int, local_rank: int):
        """Load the model onto this rank's device."""
        from rethinker.policy.model import load_model, load_processor

        self.config = config
        self._rank = rank
        self._device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
        self._dtype = getattr(torch, config.policy.dtype)
        with preserved_random_state():
            model = load_model(model_dir, self._dtype)
        self._model = model.to(self._device).eval()
        self._family = family_of(model.config.model_type)
        self._processor = load_processor(model_dir)
        limit_pixels(self._processor, self._family, config.data.min_pixels, config.data.max_pixels)
        self._tokenizer = self._processor.tokenizer
        self._stop_ids = stop_token_ids(self._tokenizer, model.config, model.generation_config)

    @torch.no_grad()
    def generate(
        self, prompts: list[Prompt], *, n: int, max_new_tokens: int | list[int], temperature: float, seed: int
    ) -> list[list[Completion]]:
        """Sample n completions of every prompt; see RolloutEngine."""
        self.wake()
        completions: list[list[Completion]] = []
        batch, most = max(1, BATCH // n), limits(max_new_tokens, len(prompts))
        with (
            self._deadline(f"the rollout of {len(prompts)} prompts") as deadline,
            seeded(seed + 1_000_003 * self._rank),
        ):
            for start in range(0, len(prompts), batch):
                part, longest = prompts[start : start + batch], most[start : start + batch]
                completions += self._generate(part, n, longest, temperature, deadline)
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
        logprobs = torch.stack([_gather(step, sampled[:, i], 1.0) for i, step in enumerate(output.scores)], 1)
        flat = [
            self._completion(tokens[: longest[row // n]], values)
            for row, (tokens, values) in enumerate(zip(sampled.tolist(), logprobs.tolist(), strict=True))
        ]
        return [flat[i : i + n] for i in range(0, len(flat), n)]

    def _completion(self, tokens: list[int], logprobs: list[float]) -> Completion:
        end = next((i for i, token in enumerate(tokens) if token in self._stop_ids), None)
        length = len(tokens) if end is None else end + 1
        return Completion(
            token_ids=tokens[:length],
            logprobs=logprobs[:length],
            text=self._tokenizer.decode(tokens[:length], skip_special_tokens=True),
            finish_reason="length" if end is None else "stop",
        )

    @torch.no_grad()
    def logprobs(self, prompts: list[Prompt], completions: list[Completion]) -> list[list[float]]:
        """Score given tokens with one plain forward each; see RolloutEngine."""
        self.wake()
        temperature = self.config.rollout.temperature
        scores = []
        with self._deadline(f"the scoring of {len(prompts)} completions") as deadline:
            for prompt, completion in zip(prompts, completions, strict=True):
                deadline.check(f"{len(scores)} scored")
                # The last token is a label only, never an input.
                inputs = self._inputs([prompt], [prompt.token_ids + completion.token_ids[:-1].tolist()])
                length = len(completion.token_ids)
                logits = self._model(**inputs).logits[0, len(prompt.token_ids) - 1 :][:length]  # [L, V]
                labels = torch.tensor(completion.token_ids, dtype=torch.long, device=self._device)
                scores.append(_gather(logits, labels, temperature).tolist())
        return scores

    def _inputs(self, prompts: list[Prompt], rows: list[list[int]]) -> dict[str, torch.Tensor]:
        """Left-padded model inputs: rows of token ids, and the images of their prompts in the same order."""
        width = max(len(row) for row in rows)
        ids = torch.tensor([[self._pad_id] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        inputs = {"input_ids": ids, "attention_mask": mask}
        if any(prompt.images for prompt in prompts):
            if self._family.MROPE:
                inputs["mm_token_type_ids"] = (ids == self._model.config.image_token_id).int()
            parts = [self._image_inputs(prompt) for prompt in prompts if prompt.images]
            inputs |= {name: torch.cat([part[name] for part in parts]) for name in self._family.IMAGE_INPUTS}
            inputs["pixel_values"] = inputs["pixel_values"].to(self._dtype)
        return {name: tensor.to(self._device) for name, tensor in inputs.items()}

    def _image_inputs(self, prompt: Prompt) -> dict[str, torch.Tensor]:
        """The family's IMAGE_INPUTS of a prompt's images.

        Raises:
            ConfigError: they make another number of image tokens than the prompt has.
        """
        image_id, data = self._model.config.image_token_id, self.config.data
        shown = [self._family.image_ids(self._processor, image.height, image.width) for image in prompt.images]
        expected, present = sum(ids.count(image_id) for ids in shown), prompt.token_ids.count(image_id)
        if expected != present:
            raise ConfigError(
                f"query {prompt.query_id!r}: the prompt has {present} image tokens and its images make {expected}; "
                f"both must use data.min_pixels={data.min_pixels} and data.max_pixels={data.max_pixels}"
            )
        features = self._processor.image_processor(prompt.images, return_tensors="pt")
        return {name: features[name] for name in self._family.IMAGE_INPUTS}

    @torch.no_grad()
    def sync(self, weights: WeightStream, version: int) -> None:
        """Copy the policy's weights; see RolloutEngine."""
        self.wake()
        own = dict(self._model.named_parameters())
        seen = set()
        with self._deadline("the weight sync") as deadline:
            for name, tensor in weights:
                deadline.check(f"at {name}")
                if name not in own:
                    raise RuntimeError(f"weight sync: the policy's {name} is unknown to the hf engine's model")
                own[name].copy_(tensor)
                seen.add(name)
                if self.config.rollout.check_sync and not torch.equal(own[name], tensor.to(own[name])):
                    raise RuntimeError(f"rollout.check_sync: the hf engine's {name} differs from the policy's")
        if missing := sorted(own.keys() - seen):
            raise RuntimeError(
                f"weight sync: the policy sent no value for {len(missing)} of the hf engine's parameters, the first "
                f"{missing[0]}"
            )

    def sleep(self) -> None:
        """Move the weights to the host."""
        self._model.to("cpu")

    def wake(self) -> None:
        """Move the weights back to this rank's device."""
        self._model.to(self._device)

    def state_dict(self) -> dict[str, Any]:
        """See RolloutEngine."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See RolloutEngine."""

    def close(self) -> None:
        """Drop the model."""
        del self._model

    @property
    def _pad_id(self) -> int:
        return self._tokenizer.pad_token_id if self._tokenizer.pad_token_id is not None else self._stop_ids[0]

    def _deadline(self, what: str) -> Deadline:
        return Deadline(what, self.config.rollout.timeout_s, "rollout.timeout_s")


def _gather(logits: torch.Tensor, token_ids: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probabilities [R] of tokens [R] under tempered logits [R, V]; fp32."""
    logps = (logits.float() / temperature).log_softmax(-1)
    return logps.gather(-1, token_ids[:, None]).squeeze(-1)
