"""Qwen3.5, 3.6 and 3.8 with a mixture of experts, and one expert that every token goes through."""

from __future__ import annotations

from typing import Any

from rethinker.families import HIDDEN, tiny_text
from rethinker.families.qwen2_vl import tiny_ids
from rethinker.families.qwen3_5 import Qwen3_5, tiny_linear
from rethinker.families.qwen3_vl import tiny_qwen3_processor, tiny_vision
from rethinker.families.qwen3_vl_moe import tiny_experts


class Qwen3_5Moe(Qwen3_5):
    """See Family."""

    def tiny(self, tokenizer: Any, hidden: int = HIDDEN) -> tuple[type, Any, Any]:
        """See Family. Its layers are those of the dense model's tiny one, each with experts."""
        from transformers import Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration

        experts = tiny_experts(hidden) | {"shared_expert_intermediate_size": hidden}
        config = Qwen3_5MoeConfig(
            text_config=tiny_text(tokenizer, hidden, **tiny_linear(), **experts, tie_word_embeddings=False),
            vision_config=tiny_vision(hidden),
            tie_word_embeddings=False,
            **tiny_ids(tokenizer),
        )
        return Qwen3_5MoeForConditionalGeneration, config, tiny_qwen3_processor(tokenizer)


FAMILY = Qwen3_5Moe()
