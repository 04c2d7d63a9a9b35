"""GLM-4.5V and GLM-4.6V: GLM-4.1V's tower and positions, and a mixture of experts behind the first, dense layers."""

from __future__ import annotations

from typing import Any

import torch

from rethinker.families import HIDDEN
from rethinker.families.glm4v import GLM4V


class GLM4VMoe(GLM4V):
    """See Family."""

    TINY = ("",)  # the processors are GLM-4.1V's

    def tiny(self, tokenizer: Any, hidden: int = HIDDEN, kind: str = "") -> tuple[type, Any, Any]:
        """See Family. A token takes 2 experts of one of 2 groups; a head is as wide as the model."""
        from transformers import Glm4vMoeConfig, Glm4vMoeForConditionalGeneration

        _, dense, processor = super().tiny(tokenizer, hidden, kind)
        settings = dense.to_dict()
        for part in (settings, settings["text_config"], settings["vision_config"]):
            del part["model_type"]
        settings["text_config"] |= {
            "num_attention_heads": 2,
            "head_dim": hidden,
            "use_qk_norm": False,  # as published; only vLLM asks
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 3 * hidden // 2,  # a multiple of 32, as vLLM's CPU kernel pads it
            "n_group": 2,
            "topk_group": 1,
            "routed_scaling_factor": 1.5,
            "norm_topk_prob": True,
            "first_k_dense_replace": 1,
        }
        return Glm4vMoeForConditionalGeneration, Glm4vMoeConfig(**settings), processor

    def draw(self, name: str, values: torch.Tensor) -> None:
        """See Family. Corrections are as far apart as the scores that they correct."""
        if name.endswith(".e_score_correction_bias"):
            torch.nn.init.normal_(values, std=0.2)


FAMILY = GLM4VMoe()
