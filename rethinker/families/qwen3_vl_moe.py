"""Qwen3-VL with a mixture of experts in place of most decoder layers' MLPs: each token goes through a few of them."""

from __future__ import annotations

from typing import Any

from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Transpose, WeightConverter

from rethinker.families import HIDDEN, tiny_text
from rethinker.families.qwen2_vl import tiny_ids
from rethinker.families.qwen3_vl import TINY_ROPE, Qwen3VL, tiny_qwen3_processor, tiny_vision


class Qwen3VLMoe(Qwen3VL):
    """See Family. Its processor is Qwen3-VL's."""

    def tiny(self, tokenizer: Any, hidden: int = HIDDEN) -> tuple[type, Any, Any]:
        """See Family. Its second layer is dense, and its experts' sizes differ from the hidden one: nothing is square
        that may be transposed."""
        from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

        text = tiny_text(tokenizer, hidden, head_dim=32, rope_parameters=TINY_ROPE, tie_word_embeddings=False)
        config = Qwen3VLMoeConfig(
            text_config=text | tiny_experts(hidden) | {"mlp_only_layers": [1]},
            vision_config={**tiny_vision(hidden), "deepstack_visual_indexes": [0, 1]},
            tie_word_embeddings=False,
            **tiny_ids(tokenizer),
        )
        return Qwen3VLMoeForConditionalGeneration, config, tiny_qwen3_processor(tokenizer)


def tiny_experts(hidden: int) -> dict[str, Any]:
    """What the text_config of a tiny model says of its experts: 8, of which a token takes 2."""
    return {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 3 * hidden // 2,  # a multiple of 32, as vLLM's CPU kernel pads it
        "norm_topk_prob": True,  # transformers always does; vLLM asks
    }


# Published files hold an expert's matrices transposed, and so vLLM reads them. transformers would read both kinds, told
# apart by their shape, and save the model's own, which vLLM cannot serve.
register_checkpoint_conversion_mapping(
    "qwen3_vl_moe",
    [
        WeightConverter(name, name, operations=[Transpose(1, 2)])
        for name in ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    ],
    overwrite=True,
)

FAMILY = Qwen3VLMoe()
