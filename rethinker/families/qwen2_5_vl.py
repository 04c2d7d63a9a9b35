"""Qwen2.5-VL: most layers of its vision tower see windows of an image. embedded/tiny.py makes the tiny one."""

from __future__ import annotations

from typing import Any

import torch

from rethinker.families.qwen2_vl import Qwen2VL


class Qwen2_5VL(Qwen2VL):
    """See Family."""

    PROCESSOR = "Qwen2_5_VLProcessor"

    def arrangement(self, visual: torch.nn.Module, grid: torch.Tensor) -> dict[str, Any]:
        from transformers.vision_utils import get_vision_window_index

        side = visual.spatial_merge_size
        index, windows = get_vision_window_index(grid, side, visual.window_size, visual.patch_size)
        return super().arrangement(visual, grid) | {
            "window_index": index,
            "cu_window_seqlens": windows,
            "max_window_seqlen": int(windows.diff().max()),
        }


FAMILY = Qwen2_5VL()
