"""Every model family can be planned: its parameters, its image tokens, and what its vision tower keeps."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from rethinker.config import ConfigError, DataConfig
from rethinker.data.prompts import PromptEncoder
from rethinker.plan.activations import Count, text_activations, vision_activations
from rethinker.plan.build import Machine, make_plan
from rethinker.plan.memory import GIB
from rethinker.plan.shapes import shape_of
from rethinker.policy.attention import lay_out
from rethinker.policy.model import load_model, load_processor
from rethinker.samples import Query
from rethinker.settings import resolve_config
from tests.families.tiny_models import FAMILIES, create
from tests.policy.helpers import picture
from tests.policy.switches import make


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    return create(request.param, tmp_path_factory.mktemp(request.param))


def test_parameters_are_those_of_the_model(folder):
    """All of them, and those that policy.freeze_vision freezes."""
    shape, policy = shape_of(str(folder)), make(folder, freeze_vision=True)
    assert shape.parameters == sum(p.numel() for p in load_model(folder, torch.float32).parameters())
    assert shape.vision_parameters == sum(p.numel() for p in policy.parameters() if not p.requires_grad)


@pytest.mark.parametrize("pixels", [1024, 4096])
def test_image_tokens_are_those_of_a_prompt(pixels, folder, tmp_path):
    """Of a square image as large as data.max_pixels; InternVL's tiles and its view of the whole too."""
    encoder = PromptEncoder(load_processor(folder), DataConfig(min_pixels=pixels, max_pixels=pixels))
    side = int(pixels**0.5)
    ids = encoder.encode(Query("one", "?", "!", (picture(tmp_path, 0, (side, side)),))).token_ids
    assert ids.count(encoder.processor.image_token_id) == shape_of(str(folder)).image_tokens(pixels)


@pytest.mark.parametrize("kernel", ["sdpa", "flash"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_vision_tower_keeps_what_is_planned(checkpointing, kernel, folder):
    """Bytes of real tensors between a forward and its backward are the planned ones to 10%.

    Without Qwen3-VL's DeepStack: its few mergers are not counted."""
    shape, policy = shape_of(str(folder)), make(folder, attention=kernel, gradient_checkpointing=checkpointing)
    if hasattr(policy.hf.model, "visual"):
        policy.hf.model.visual.deepstack_visual_indexes = []
    patches = 128
    planned = vision_activations(shape, dtype="float32", kernel=kernel, checkpointing=checkpointing)
    policy.train()
    with Count() as count:  # of the pixels too
        if shape.tile:
            inputs = {"pixel_values": torch.randn(patches // shape.tile_patches, 3, shape.tile, shape.tile)}
        else:
            grid = torch.tensor([[1, 8, patches // 8]])
            inputs = {"pixel_values": torch.randn(patches, shape.patch_values), "image_grid_thw": grid}
        output = policy.family.features(policy.hf, inputs)
        kept = count.bytes - sum(part.untyped_storage().nbytes() for part in output)
    assert kept / patches == pytest.approx(planned.kept, rel=0.1)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_decoder_layers_keep_what_is_planned(checkpointing, folder):
    """With flash attention, to 5%, of real tensors: a row is not copied, nothing is kept beside what the kernel
    returns."""
    shape = shape_of(str(folder))
    policy = make(folder, attention="flash", gradient_checkpointing=checkpointing).train()
    given = {"dtype": "float32", "kernel": "flash", "checkpointing": checkpointing}
    planned = text_activations(shape, **given, row=0)
    prompt, response = torch.zeros(512, dtype=torch.int64), torch.arange(4).repeat_interleave(128)
    batch = SimpleNamespace(prompt_id=prompt, response_id=response, tokens=512)
    layout = lay_out(batch, "flash")
    positions = torch.arange(512).expand(3 if policy.family.MROPE else 1, 1, -1).squeeze(0)
    with Count() as count:
        embeds = torch.randn(512, shape.hidden, requires_grad=True)
        output = policy.hf.model.language_model(
            inputs_embeds=embeds[None], position_ids=positions, use_cache=False, visible=layout.visible
        ).last_hidden_state
        kept = count.bytes - output.untyped_storage().nbytes()
    assert kept / 512 == pytest.approx(planned.kept, rel=0.05)


def test_a_run_is_planned(folder):
    """On GPUs and on a CPU, every phase."""
    config = resolve_config("easy_vqa_cpu", {"policy.model": str(folder), "data.max_pixels": 4096})
    for machine in (Machine(8, 80 * GIB, 8, None), Machine(0, 0, 1, 64 * GIB)):
        plan = make_plan(config, machine)
        assert plan.fits and plan.batches.largest.patches > 0
        assert all(term.bytes >= 0 for phase in plan.phases for term in phase.terms)


def test_a_model_of_no_family(tmp_path):
    """It is an error that names its kind."""
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(ConfigError, match="is a 'qwen2' model; supported: qwen2_5_vl"):
        shape_of(str(tmp_path))
