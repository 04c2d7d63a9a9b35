"""A small byte-level BPE tokenizer with all of Qwen2.5-VL's special tokens and its chat template.

Any text encodes (every byte is a token); the merges are learned here, from the texts the tiny model will meet.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

# Qwen2.5-VL's added tokens in the order of their ids; True marks the ones that decoding with skip_special_tokens drops.
_SPECIAL = """
    endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end vision_start
    vision_end vision_pad image_pad video_pad
"""
_ORDINARY = """
    <tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|>
"""
QWEN_TOKENS = {f"<|{name}|>": True for name in _SPECIAL.split()} | dict.fromkeys(_ORDINARY.split(), False)

# Qwen2.5-VL's for texts and images.
CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja").read_text("utf-8")

# What the tiny model meets whatever its data: the template, prompts, simple LaTeX, rethinking, shapes and colours.
COMMON_TEXTS = json.loads(Path(__file__).with_name("common_texts.json").read_text("utf-8"))


def train_tokenizer(texts: Iterable[str], merges: int = 768) -> Qwen2Tokenizer:
    """Learn the merges on `texts` and return a Hugging Face Qwen2 tokenizer.

    Ids: 256 bytes, then the merges (at most `merges`; fewer when the texts hold no more), then QWEN_TOKENS in order.
    The same texts give the same tokenizer.
    """
    qwen, bpe = Qwen2Tokenizer().backend_tokenizer, Tokenizer(models.BPE())
    bpe.normalizer, bpe.pre_tokenizer = qwen.normalizer, qwen.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + merges, min_frequency=1, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([*COMMON_TEXTS, *texts], trainer=trainer)
    learned = json.loads(bpe.to_str())["model"]
    vocab = learned["vocab"]
    tokenizer = Qwen2Tokenizer(
        vocab=vocab,
        merges=[tuple(pair) for pair in learned["merges"]],
        eos_token="<|im_end|>",
        added_tokens_decoder={
            len(vocab) + i: AddedToken(token, special=special, normalized=False)
            for i, (token, special) in enumerate(QWEN_TOKENS.items())
        },
        model_max_length=131072,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
