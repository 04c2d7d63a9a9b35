"""What only Gemma 4 has: windows that bound images, an audio tower that hears nothing, tokens that vLLM suppresses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rethinker.config import ConfigError, DataConfig, PolicyConfig
from rethinker.data.prompts import PromptEncoder
from rethinker.plan.model import shape_of
from rethinker.policy.loading import load_model, load_processor
from rethinker.policy.model import Policy
from tests.families.tiny_models import create
from tests.policy.helpers import late_image, queries_of_every_kind, samples_for
from tests.policy.switches import make
from tests.policy.test_packing import compare


def change(file: Path, **values) -> None:
    content = json.loads(file.read_text())
    content.get("text_config", content).update(values)
    file.write_text(json.dumps(content))


def test_a_window_bounds_an_image(tmp_path):
    """Law 2 where images are longer than the windows: a token sees all that follows it in its image, and before it no
    more than the window."""
    folder = create("gemma4", tmp_path / "model")
    change(folder / "config.json", sliding_window=24)
    encoder = PromptEncoder(load_processor(folder), DataConfig(min_pixels=1024, max_pixels=8192))
    policy, model = make(folder), load_model(folder, torch.float32)
    model.load_state_dict(policy.hf.state_dict())
    samples = samples_for([*queries_of_every_kind(tmp_path), late_image(tmp_path)], encoder, [5, 9])
    assert max(compare(samples, encoder, policy, model)) <= 1e-5


def test_an_audio_tower_stays(tmp_path):
    """None of its weights is trained, and all others are."""
    policy = make(create("gemma4-per_layer", tmp_path))
    left = {name.split(".")[1] for name, p in policy.hf.named_parameters() if not p.requires_grad}
    assert left == {"audio_tower", "embed_audio"}


def test_tokens_that_vllm_suppresses_are_refused(tmp_path):
    """Its log-probs would be of other distributions than the policy's."""
    folder = create("gemma4", tmp_path)
    change(folder / "generation_config.json", suppress_tokens=[7])
    with pytest.raises(ConfigError, match=r"generation_config.json has suppress_tokens=\[7\]"):
        Policy(load_model(folder, torch.float32), PolicyConfig(dtype="float32"))


def test_a_budget_that_is_met_exactly(tmp_path):
    """An image has the largest number of tokens that its pixels fill, to the last one."""
    shape = shape_of(PolicyConfig(model=str(create("gemma4", tmp_path))))
    area = 16 * 16  # pixels of a token
    assert [shape.image_tokens(pixels) for pixels in (140 * area - 1, 140 * area, 1)] == [70, 140, 70]
