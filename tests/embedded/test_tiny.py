"""The tiny model is an ordinary Qwen2.5-VL folder, and the same arguments write the same bytes."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from rethinker.embedded.tiny import TinySize, create_tiny
from rethinker.embedded.tokenizer import QWEN_TOKENS

SMALL = TinySize(hidden=64, intermediate=64, layers=1, heads=2, kv_heads=1, vision_hidden=32, vision_heads=1, merges=64)

# Qwen2.5-VL's tokenizer: ids 151643 to 151664. The first 14 are special: decoding can leave them out.
QWEN_ORDER = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|> "
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|>"
).split()


@pytest.fixture(scope="module")
def processor(tiny_folder):
    return AutoProcessor.from_pretrained(tiny_folder)


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def ask(processor, size=(64, 64)):
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what color is it?"}]}]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return processor(text=[text], images=[Image.new("RGB", size, "teal")], return_tensors="pt")


def test_transformers_loads_it_and_every_parameter_gets_a_gradient(tiny_folder, processor):
    """The auto classes find the right types, an image becomes 16 tokens, and no part of the network is idle."""
    model = AutoModelForImageTextToText.from_pretrained(tiny_folder)
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert type(processor).__name__ == "Qwen2_5_VLProcessor"
    assert sum(p.numel() for p in model.parameters()) < 3_000_000
    inputs = ask(processor)
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 16
    logits = model(**inputs).logits
    assert logits.shape[-1] == len(processor.tokenizer) == model.config.text_config.vocab_size
    logits[0, -1].logsumexp(-1).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()] == []


def test_images_of_other_sizes_reach_64_pixels_squared(processor):
    """By default every image is resized to about 64 x 64 pixels, whatever its size."""
    for size in ((20, 20), (640, 480), (64, 64)):
        assert ask(processor, size)["image_grid_thw"].prod() <= 64


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_tied_or_not_as_asked(tmp_path, tied):
    """Both kinds of head survive saving and loading."""
    folder = create_tiny(tmp_path, tie_word_embeddings=tied, size=SMALL)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    embedding, head = model.get_input_embeddings().weight, model.lm_head.weight
    assert (embedding.data_ptr() == head.data_ptr()) is tied
    assert model.config.tie_word_embeddings is model.config.text_config.tie_word_embeddings is tied
    assert torch.equal(embedding, head) is tied


def test_special_tokens_have_ids_of_their_own_in_qwens_order(tiny_folder, processor):
    """Each of Qwen2.5-VL's special tokens is one token, and the configuration names the right ids."""
    tokenizer = processor.tokenizer
    assert list(QWEN_TOKENS) == QWEN_ORDER
    ids = tokenizer.convert_tokens_to_ids(QWEN_ORDER)
    assert ids == list(range(len(tokenizer) - len(QWEN_TOKENS), len(tokenizer)))
    for token, i in zip(QWEN_ORDER, ids, strict=True):
        assert tokenizer(f"a{token}b")["input_ids"].count(i) == 1
    special = [token for token, i in zip(QWEN_ORDER, ids, strict=True) if not tokenizer.decode([i], True)]
    assert special == QWEN_ORDER[:14]
    model = AutoModelForImageTextToText.from_pretrained(tiny_folder)
    named = {
        "<|image_pad|>": model.config.image_token_id,
        "<|video_pad|>": model.config.video_token_id,
        "<|vision_start|>": model.config.vision_start_token_id,
        "<|vision_end|>": model.config.vision_end_token_id,
        "<|im_end|>": tokenizer.eos_token_id,
        "<|endoftext|>": tokenizer.pad_token_id,
    }
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in named} == named
    generation = GenerationConfig.from_pretrained(tiny_folder)
    assert generation.eos_token_id == [named["<|im_end|>"], named["<|endoftext|>"]]
    assert generation.top_k in (None, 0, 50) and not generation.repetition_penalty


@pytest.mark.parametrize(
    "text", ["is there not a teal circle?", "$\\frac{1}{2}$ 3.14", "ünï 汉字 😀 \x00\t\r\n", " a  b "]
)
def test_any_text_survives_the_tokenizer(processor, text):
    """Bytes are the fallback: whatever is encoded decodes to itself."""
    ids = processor.tokenizer(text)["input_ids"]
    assert processor.tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_a_described_answer_is_short(processor):
    """Few tokens per response are what makes the default fast."""
    assert len(processor.tokenizer("a teal circle. \\boxed{no}")["input_ids"]) <= 12


def test_chat_template_is_qwens(processor):
    """System message by default, images where they stand, several turns, and a prompt for the assistant."""
    messages = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "Look: "}, {"type": "image"}, {"type": "text", "text": "?"}],
        },
        {"role": "assistant", "content": "a teal circle."},
        {"role": "user", "content": "sure?"},
    ]
    assert processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nLook: <|vision_start|><|image_pad|><|vision_end|>?<|im_end|>\n"
        "<|im_start|>assistant\na teal circle.<|im_end|>\n"
        "<|im_start|>user\nsure?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_same_arguments_write_the_same_bytes(tmp_path):
    """Also in another process; another seed changes only the weights; the caller's generator is left alone."""
    before = torch.get_rng_state()
    one = digests(create_tiny(tmp_path / "one", 3, size=SMALL, texts=["a teal circle", "is it teal?"]))
    assert torch.equal(torch.get_rng_state(), before)
    code = (
        "import sys; from rethinker.embedded.tiny import *; "
        f"create_tiny(sys.argv[1], 3, size={SMALL!r}, texts=['a teal circle', 'is it teal?'])"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "two"], check=True, timeout=120)
    assert digests(tmp_path / "two") == one
    other = digests(create_tiny(tmp_path / "other", 4, size=SMALL, texts=["a teal circle", "is it teal?"]))
    assert {name for name in one if one[name] != other[name]} == {"model.safetensors"}


def test_merges_come_from_the_texts(tmp_path):
    """Words of the given texts become tokens; `merges` bounds how many."""
    folder = create_tiny(tmp_path, size=SMALL, texts=["zyxwv zyxwv"] * 500)
    tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
    assert len(tokenizer(" zyxwv")["input_ids"]) == 1
    assert len(tokenizer) == 256 + SMALL.merges + len(QWEN_TOKENS)
