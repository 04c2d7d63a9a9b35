"""Trainer and rollout engine see the same pixels, whatever an image is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, LlavaOnevisionConfig, LlavaOnevisionImageProcessor
from vllm.config import ModelConfig
from vllm.model_executor.models import ModelRegistry
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.encoder_budget import get_mm_max_toks_per_item
from vllm.multimodal.media import ImageMediaIO

from rethinker.config import Config, DataConfig
from rethinker.data.images import open_image
from rethinker.data.prompts import PromptEncoder
from rethinker.embedded.tokenizer import train_tokenizer
from rethinker.families import family_of
from rethinker.policy.loading import load_processor
from rethinker.rollout.server.engine import _as_url
from rethinker.rollout.vllm_settings import VLLMRequests, engine_arguments
from rethinker.samples import Prompt, Query
from tests.data.image_kinds import KINDS, noise, oriented, saved, tagged
from tests.families.tiny_models import FAMILIES, create

LIMITS = DataConfig(min_pixels=1024, max_pixels=8192)


def vllm_processor(folder, arguments: dict):
    """vLLM's processor of a model, for an engine with such arguments."""
    for name in AutoConfig.from_pretrained(folder).architectures:  # vLLM would inspect it in a subprocess
        ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())
    config = ModelConfig(
        model=str(folder),
        dtype="float32",
        limit_mm_per_prompt={"image": 8, "video": 0},
        mm_device_do_normalize=False,  # of the numbers alone: by default vLLM's model does it, on its device
        **{name: value for name, value in arguments.items() if name != "max_num_batched_tokens"},  # the scheduler's
    )
    return MULTIMODAL_REGISTRY.create_processor(config)


class Sides:
    """One model's prompts and pixels as the trainer computes them, and as vLLM does from what it is handed."""

    def __init__(self, family: str, folder):
        folder = create(family, folder)
        self.encoder = PromptEncoder(load_processor(folder), LIMITS)
        settings = self.encoder.family.image_settings(self.encoder.processor.image_processor, 1024, 8192)
        self.vllm = vllm_processor(folder, self.encoder.family.vllm_settings(settings, 4096))

    def differences(self, query: Query, fault: Callable[[Prompt], Prompt] = lambda prompt: prompt) -> list[str]:
        """What of a query is not the same, its tokens or tensors by their name, once a `fault` has befallen it."""
        prompt, ours = fault(self.encoder.encode(query)), self.encoder.pixels(query)
        items = self.vllm.info.parse_mm_data({"image": prompt.images})
        seen = self.vllm(prompt.compact_ids, mm_items=items, hf_processor_mm_kwargs={})
        theirs = self.encoder.family.image_inputs(seen["mm_kwargs"].get_data())
        different = ["tokens"] * (seen["prompt_token_ids"] != prompt.token_ids)
        return different + [name for name, tensor in ours.items() if not torch.equal(theirs[name], tensor)]


@pytest.fixture(scope="module", params=FAMILIES)
def sides(request, tmp_path_factory):
    return Sides(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("kind", KINDS)
def test_both_sides_see_the_same_pixels(sides, kind):
    """Pixels, grids, tiles and image tokens are equal to the bit, or the query is left out with a reason before it is
    sampled: a strip may be, which the family's processor refuses."""
    one, another = KINDS[kind](), saved(Image.new("RGB", (9, 9)))
    query = Query(kind, "<image> or <image>?", "", ({"bytes": one}, {"bytes": another}))
    if misfit := sides.encoder.misfit(query):
        short, long = sorted(map(int, kind.split(" x ")))
        assert misfit == "image shape" and long > 16 * short
        with pytest.raises((ValueError, RuntimeError)):
            sides.encoder.pixels(query)
    else:
        assert sides.differences(query) == []


def test_the_largest_image_fits_a_step_of_vllm(tmp_path):
    """vLLM refuses an image of more tokens than a step has room for, or than the largest that it knows of, which is not
    that of a LLaVA-OneVision of published sizes whose grids are limited."""
    family, published, config = family_of("llava_onevision"), LlavaOnevisionConfig(), Config()
    model, small, processor = family.tiny(train_tokenizer(()))
    small.vision_config, small.image_grid_pinpoints = published.vision_config, published.image_grid_pinpoints
    small.architectures = [model.__name__]
    processor.image_processor = LlavaOnevisionImageProcessor()
    processor.num_image_tokens = 27**2
    for part in (small, processor):
        part.save_pretrained(tmp_path)
    requests = VLLMRequests(config, str(tmp_path))
    vllm = vllm_processor(tmp_path, family.vllm_settings(requests.image_settings, requests.max_length))
    known = get_mm_max_toks_per_item(vllm, {"image": 1}, None)["image"]
    encoder, strip = PromptEncoder(processor, config.data), saved(Image.new("RGB", (384, 2304)))
    tall = len(encoder._image_ids({"bytes": strip}, "tall"))
    assert known < tall == family.image_tokens(small, config.data.max_pixels)
    assert tall <= engine_arguments(config, requests, gpu=True).get("max_num_batched_tokens", 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_sees_the_same_pixels(kind):
    """What vLLM's own reader makes of an image that a rollout server is sent is that image, to the bit."""
    image = open_image({"bytes": KINDS[kind]()}, kind)
    seen = ImageMediaIO().load_base64("image/png", _as_url(image).partition(",")[2]).media
    assert (seen.mode, seen.size, seen.tobytes()) == ("RGB", image.size, image.tobytes())


@pytest.mark.parametrize("size", [(75, 30), (64, 64)])
def test_an_orientation_that_stays_is_seen(sides, size):
    """The comparison above is able to fail: vLLM turns the pixels once more if their tag is left."""
    query = Query("q", "?", "", ({"bytes": oriented(6, "PNG", Image.fromarray(noise(*size)))},))
    assert sides.differences(query) == []
    assert sides.differences(query, tagged)
