"""Every family's prompts and pixels are its own processor's."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, GenerationConfig

from rethinker.config import ConfigError, DataConfig
from rethinker.data.prompts import PromptEncoder
from rethinker.families import FAMILIES, SUPPORTED, family_of, family_of_processor
from rethinker.model_folder import check_model_folder
from rethinker.policy.loading import load_model, load_processor
from rethinker.policy.packing import joined
from rethinker.policy.saved_model import files_beside_weights
from rethinker.rollout.engine import make_engine
from rethinker.rollout.sampling import stop_token_ids
from rethinker.samples import Query
from tests.families.tiny_models import create
from tests.rollout.helpers import rollout_config

SIZES = [(64, 64), (97, 41), (20, 120), (300, 200), (33, 33)]


def picture(size: tuple[int, int], seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("pixels", [(1024, 8192), (4096, 4096), (256 * 28 * 28, 1280 * 28 * 28)])
def test_token_ids_and_pixels_are_the_processors(folder, pixels):
    """For images of many shapes, alone and in twos, and for texts: what the family's processor makes of the message,
    and of each image what it makes of it alone."""
    encoder = PromptEncoder(
        load_processor(folder), DataConfig(prompt="{question}", min_pixels=pixels[0], max_pixels=pixels[1])
    )
    cases = [("what?\n", 0), *(("what? ", 1) for _ in SIZES), ("<image> and\n<image>: same?", 2)]
    for number, (question, count) in enumerate(cases):
        images = tuple(picture(SIZES[(number + i) % len(SIZES)], 10 * number + i) for i in range(count))
        query = Query(f"{number}", question, "", tuple({"bytes": png(image)} for image in images))
        content = [{"type": "image"}] * (count == 1)
        for i, text in enumerate(question.split("<image>")):
            content += [{"type": "image"}] * (i > 0) + [{"type": "text", "text": text}] * bool(text)
        message = [{"role": "user", "content": content}]
        text = encoder.processor.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        expected = encoder.processor(
            text=[text], images=list(images) or None, return_tensors="pt", add_special_tokens=False
        )
        made = encoder.encode(query)
        assert made.token_ids == expected["input_ids"][0].tolist()
        assert made.compact_ids.count(encoder.processor.image_token_id) == count
        inputs = encoder.pixels(query)
        assert bool(inputs) == bool(count)
        theirs = encoder.family.image_inputs(expected) if count else {}
        assert inputs.keys() == theirs.keys() and all(torch.equal(inputs[name], theirs[name]) for name in theirs)
        arguments = encoder.family.image_arguments(encoder.processor)
        each = [encoder.processor.image_processor([i], return_tensors="pt", **arguments) for i in images]
        alone = joined(list(map(encoder.family.image_inputs, each)))
        assert all(torch.equal(inputs[name], alone[name]) for name in inputs)


def test_pixel_limits_bound_the_image_tokens_and_are_saved(folder, tmp_path):
    """An image has no more tokens than are planned for data.max_pixels, and no fewer than data.min_pixels call for, if
    the family enlarges images; a saved processor keeps the limits."""
    config, tokens = AutoConfig.from_pretrained(folder), {}
    for low, high in ((1024, 2048), (4096, 8192)):
        processor = load_processor(folder)
        encoder = PromptEncoder(processor, DataConfig(min_pixels=low, max_pixels=high))
        for size in SIZES:
            ids = encoder.family.image_ids(processor, size[1], size[0])
            tokens[low, size] = ids.count(config.image_token_id)
            assert 1 <= tokens[low, size] <= encoder.family.image_tokens(config, high)
            assert not encoder.family.ENLARGES or tokens[low, size] >= low / 256 * 0.75  # one token for 256 pixels
    fixed = encoder.family.image_tokens(config, 2048) == encoder.family.image_tokens(config, 8192)
    assert all(tokens[1024, size] == tokens[4096, size] for size in SIZES) == fixed
    processor.save_pretrained(tmp_path)
    loaded = load_processor(tmp_path)
    images = [picture(size, 0) for size in SIZES]
    ours = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    assert torch.equal(loaded.image_processor(images, return_tensors="pt")["pixel_values"], ours)


@pytest.mark.parametrize("family", [name for name in FAMILIES if family_of(name).CONFIGURED])
def test_configs_have_the_limits_too(family, tmp_path):
    """Where the model's config says what its processor says, vLLM and transformers' model read it there: a checkpoint's
    has the limits, and that of rollout.backend=hf."""
    folder, settings = create(family, tmp_path), family_of(family).CONFIGURED
    model, processor, config = load_model(folder, torch.float32), load_processor(folder), rollout_config(backend="hf")
    PromptEncoder(processor, config.data)
    limits = [getattr(processor.image_processor, name) for name in settings]
    assert limits != [getattr(model.config, name) for name in settings]
    saved = json.loads(files_beside_weights(model, processor, folder)["config.json"])
    engine = make_engine(config, str(folder), rank=0, world_size=1, local_rank=0)
    own = engine._model.config.to_dict()
    assert [saved[name] for name in settings] == [own[name] for name in settings] == limits


def test_placeholders_end_a_response(folder):
    """Law 4: what stands for an image in a prompt ends a response, as every placeholder and the end tokens do."""
    config, processor = AutoConfig.from_pretrained(folder), load_processor(folder)
    to_id = processor.tokenizer.convert_tokens_to_ids
    stops = stop_token_ids(processor.tokenizer, config, GenerationConfig.from_pretrained(folder))
    family = family_of(config.model_type)
    shown, named = family.image_ids(processor, 64, 64), [*family.PLACEHOLDERS, "<|im_end|>", "<|endoftext|>"]
    tokens = processor.tokenizer.added_tokens_decoder
    assert config.image_token_id in shown and {i for i in shown if i in tokens and tokens[i].special} <= set(stops)
    assert {to_id(token) for token in named} <= set(stops) and to_id("a") not in stops


def test_the_folder_is_accepted_and_another_kind_is_not(folder, tmp_path):
    """A folder is judged by its config in one line that names the supported families, before anything is loaded."""
    assert check_model_folder(folder, "policy.model=x") > 0
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    for load in (lambda: check_model_folder(tmp_path, "policy.model='x'"), lambda: load_model(tmp_path, torch.float32)):
        with pytest.raises(ConfigError, match=f"is a 'llava' model; supported: {SUPPORTED}$") as refused:
            load()
        assert "\n" not in str(refused.value)


def test_a_processor_of_another_kind_is_refused():
    """Its class is named, and the families that are supported."""
    with pytest.raises(ConfigError, match=f"processor is a object, of no supported family .{SUPPORTED}"):
        family_of_processor(object())
