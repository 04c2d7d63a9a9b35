"""What `benchmarks.train_step` runs on: Qwen2.5-VL at its real sizes, queries with random images, and their responses.

Nothing is downloaded: weights, pixels and tokens are random, from seeds, and the same in every process.
Legend: P prompt tokens, L response tokens of a sample, T tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

import math
import random
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

import rethinker.policy  # noqa: F401  transformers cannot be imported before it where torchvision is a CUDA build
from rethinker.samples import Completion, Group, Prompt, Query, Sample
from rethinker_kernels import group_advantages

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLConfig


@dataclass(frozen=True)
class Size:
    """A Qwen2.5-VL: what its config.json says where the sizes differ."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool
    vision_intermediate: int
    vision_hidden: int = 1280
    vision_layers: int = 32
    vision_heads: int = 16
    patch: int = 14
    window: int = 112
    full_attention: tuple[int, ...] = (7, 15, 23, 31)


SIZES = {
    "3B": Size(2048, 11008, 36, 16, 2, 151_936, True, 3420),
    "7B": Size(3584, 18944, 28, 28, 4, 152_064, False, 3420),
    "32B": Size(5120, 27648, 64, 40, 8, 152_064, False, 3456),
    "72B": Size(8192, 29568, 80, 64, 8, 152_064, False, 3456),
    # For a CPU: the vocabulary of the real ones, or not even that.
    "small": Size(128, 384, 6, 4, 2, 151_936, True, 192, 64, 3, 2, 8, 64, (2,)),
    "tiny": Size(64, 128, 2, 2, 1, 512, True, 96, 64, 2, 2, 8, 64, (1,)),
}


@dataclass(frozen=True)
class Traffic:
    """How many queries and how long everything is; lengths are drawn per query and per response."""

    queries: int
    group_size: int
    image_side: tuple[int, int]  # of an image in image tokens, each side uniform
    text_tokens: tuple[int, int]  # uniform
    response_median: int  # log-normal, sigma 0.6
    response_max: int  # longer responses end here
    seed: int = 0

    def describe(self) -> str:
        (low, high), (least, most) = self.image_side, self.text_tokens
        return (
            f"{self.queries} queries x {self.group_size} responses; one image each, sides uniform in {low} to {high} "
            f"image tokens; text uniform in {least} to {most} tokens; responses log-normal, median "
            f"{self.response_median}, sigma 0.6, at most {self.response_max}"
        )


GPU_TRAFFIC = Traffic(8, 8, (16, 32), (32, 128), 400, 2048)
CPU_TRAFFIC = Traffic(3, 8, (8, 14), (16, 32), 16, 48)


@dataclass(frozen=True)
class Counts:
    """What a step works through; micro-batches add."""

    tokens: int = 0  # of the language model
    head_rows: int = 0  # hidden states that meet the LM head
    patches: int = 0  # of the vision tower
    pairs: int = 0  # (query, key) pairs of the language model's attention

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))


class Workload:
    """The samples of one step, and what packing asks of a prompt encoder: `encode` and `pixels`."""

    def __init__(self, size: Size, traffic: Traffic) -> None:
        self.seed, self.patch_width = traffic.seed, 3 * 2 * size.patch**2
        rng = random.Random(traffic.seed)
        special = special_tokens(size.vocabulary)
        text = range(min(special.values()))  # ids of ordinary tokens
        self._grids: list[tuple[int, int, int]] = []
        self._prompts: list[list[int]] = []
        self.samples: list[Sample] = []
        for number in range(traffic.queries):
            rows, columns = (rng.randint(*traffic.image_side) for _ in range(2))
            self._grids.append((1, 2 * rows, 2 * columns))
            prompt = [
                special["vision_start_token_id"],
                *[special["image_token_id"]] * (rows * columns),
                special["vision_end_token_id"],
                *rng.choices(text, k=rng.randint(*traffic.text_tokens)),
            ]
            self._prompts.append(prompt)
            completions = []
            for _ in range(traffic.group_size):
                drawn = round(traffic.response_median * math.exp(rng.gauss(0, 0.6)))
                length = max(1, min(traffic.response_max, drawn))
                completions.append(Completion(rng.choices(text, k=length), [0.0] * length, "", "stop"))
            # At least one right and one wrong answer: a group of equal rewards would not be trained on.
            rewards = [1.0, 0.0, *(float(rng.random() < 0.5) for _ in range(traffic.group_size - 2))]
            advantages, _ = group_advantages(torch.tensor(rewards), torch.tensor([0, len(rewards)]))
            query = Query(f"q{number}", "", "", images=(number,))
            group = Group(query, completions, 0, len(prompt), rewards, advantages=advantages.tolist())
            self.samples += group.samples()

    def encode(self, query: Query) -> Prompt:
        """A query's prompt; its image is a number."""
        return Prompt(query.id, self._prompts[query.images[0]], [], [])

    def pixels(self, query: Query) -> dict[str, torch.Tensor]:
        """Patches [patches, channels * patch area] and grid [1, 3]: noise of a processed image's scale."""
        grid = self._grids[query.images[0]]
        generator = torch.Generator().manual_seed(1000 * self.seed + query.images[0])
        patches = torch.randn(math.prod(grid), self.patch_width, generator=generator)
        return {"pixel_values": patches, "image_grid_thw": torch.tensor([grid])}

    def set_behaviour(self, logps: list[list[float]], drift: float) -> None:
        """Give every response its behaviour log-probs: the policy's own, moved by normal noise of size `drift`.

        So ratios are near 1 and a few tokens are clipped, as in training some steps after the rollout.
        """
        rng = random.Random(self.seed + 1)
        for sample, mine in zip(self.samples, logps, strict=True):
            sample.completion.logprobs = np.array([logp + rng.gauss(0, drift) for logp in mine], np.float32)

    @property
    def useful(self) -> Counts:
        """The work of the per-sample layout without padding: the same yardstick for every variant."""
        total = Counts()
        for sample in self.samples:
            L = len(sample.completion.token_ids)
            T = sample.prompt_tokens + L
            total += Counts(T, L, math.prod(self._grids[sample.query.images[0]]), T * (T + 1) // 2)
        return total


def special_tokens(vocabulary: int) -> dict[str, int]:
    """Ids of the vision tokens: Qwen2.5-VL's, or the last ones of a smaller vocabulary."""
    first = 151_652 if vocabulary > 151_656 else vocabulary - 5
    return {
        "vision_start_token_id": first,
        "vision_end_token_id": first + 1,
        "image_token_id": first + 3,
        "video_token_id": first + 4,
    }


def model_config(size: Size, layers: int | None = None) -> Qwen2_5_VLConfig:
    """The config of `size`, with only `layers` decoder layers if given."""
    from transformers import Qwen2_5_VLConfig

    head_dim = size.hidden // size.heads
    temporal, spatial = head_dim // 8, 3 * head_dim // 16  # 16, 24, 24 of 64
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": size.vocabulary,
            "hidden_size": size.hidden,
            "intermediate_size": size.intermediate,
            "num_hidden_layers": layers or size.layers,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.kv_heads,
            "max_position_embeddings": 128_000,
            "rms_norm_eps": 1e-6,
            "initializer_range": size.hidden**-0.5,  # logits of size 1 at any width, so that errors show
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [temporal, spatial, spatial],
            },
            "bos_token_id": None,
            "eos_token_id": None,
            "tie_word_embeddings": size.tied,
        },
        vision_config={
            "depth": size.vision_layers,
            "hidden_size": size.vision_hidden,
            "intermediate_size": size.vision_intermediate,
            "num_heads": size.vision_heads,
            "out_hidden_size": size.hidden,
            "patch_size": size.patch,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": size.window,
            "fullatt_block_indexes": list(size.full_attention),
            "tokens_per_second": 2,
            "initializer_range": size.vision_hidden**-0.5,
        },
        tie_word_embeddings=size.tied,
        **special_tokens(size.vocabulary),
    )


def build_model(config: Qwen2_5_VLConfig, device: str, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """A Qwen2.5-VL with random weights, made on `device` ("meta" for its shapes alone)."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(seed)
    with torch.device(device):
        return Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=dtype)


def flops(model: nn.Module, counts: Counts) -> float:
    """Floating-point operations of a forward and backward.

        6 (layers * tokens + head * head rows + vision * patches + merger * patches / 4) + 12 depth D pairs

    where names of modules stand for their parameters. The vision tower's attention scores, and what gradient
    checkpointing computes twice, are left out.
    """

    def parameters(*modules: nn.Module) -> int:
        return sum(p.numel() for module in modules for p in module.parameters())

    text, vision = model.model.language_model, model.model.visual
    linear = (
        parameters(text.layers) * counts.tokens
        + parameters(model.lm_head) * counts.head_rows
        + parameters(vision.patch_embed, vision.blocks) * counts.patches
        + parameters(vision.merger) * counts.patches / 4
    )
    return 6.0 * linear + 12.0 * len(text.layers) * text.config.hidden_size * counts.pairs


def described(size: str, traffic: Traffic, layers: int | None) -> dict[str, Any]:
    """For the result: sizes, distribution, and what was reduced."""
    whole = SIZES[size]
    return {
        "size": size,
        "layers": layers or whole.layers,
        "reduced": f"{layers} of {whole.layers} decoder layers" if layers and layers != whole.layers else None,
        "traffic": traffic.describe(),
        **asdict(traffic),
    }
