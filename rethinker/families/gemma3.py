"""Gemma 3: images of one size whose tokens see each other, and layers that see a window of tokens only.

Every image has the same number of tokens: `data.min_pixels` and `data.max_pixels` change nothing.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from rethinker.config import ConfigError
from rethinker.families import ATTENTION, HIDDEN, PATCH, SIDE, Family, tiny_text, tiny_tower


class Gemma3(Family):
    """See Family. pixel_values are [images, channels, side, side].

    In a prompt stands `<start_of_image>`, which the processor replaces by a text of placeholders between line breaks.
    """

    PROCESSOR = "Gemma3Processor"
    PLACEHOLDERS = ("<image_soft_token>", "<start_of_image>", "<end_of_image>", "<start_of_turn>")
    TOKEN_TYPES = "token_type_ids"
    SERVED = (("model.vision_tower.", "model.vision_tower.vision_model."),)
    ENLARGES = False

    def image_settings(self, image_processor: Any, min_pixels: int, max_pixels: int) -> dict[str, Any]:
        """See Family. Crops of a strip are left out, as they are by default: there would be more images than asked."""
        return {"do_pan_and_scan": False}

    def image_ids(self, processor: Any, height: int, width: int) -> list[int]:
        return processor.tokenizer(processor.full_image_sequence, add_special_tokens=False)["input_ids"]

    def joined(self, processor: Any, ids: list[int]) -> list[int]:
        """See Family. Of line breaks in a row the tokenizer makes one token; vLLM does so for two, three and four."""
        breaks = [processor.tokenizer.convert_tokens_to_ids("\n" * count) for count in range(1, 5)]
        for pair in ((0, 1), (1, 0), (1, 1)):
            first, second, both = breaks[pair[0]], breaks[pair[1]], breaks[sum(pair) + 1]
            made: list[int] = []
            for token in ids:
                if token == second and made and made[-1] == first:
                    made[-1] = both
                else:
                    made.append(token)
            ids = made
        return ids

    def image_blocks(self, text_config: Any) -> tuple[str, ...]:
        return ATTENTION

    def prepare(self, model: torch.nn.Module) -> None:
        """See Family. What transformers and vLLM treat differently is refused; published models have neither."""
        text = model.config.text_config
        # vLLM caps the logits; transformers does so in its class for texts alone.
        if text.final_logit_softcapping is not None:
            raise ConfigError(f"policy.model: its final_logit_softcapping is {text.final_logit_softcapping}, not null")
        if model.config.mm_tokens_per_image > text.sliding_window:
            raise ConfigError(
                f"policy.model: its images have {model.config.mm_tokens_per_image} tokens, more than its sliding "
                f"windows ({text.sliding_window})"
            )

    def features(self, model: torch.nn.Module, image_inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        return [model.model.get_image_features(image_inputs["pixel_values"]).pooler_output.flatten(0, 1)]

    def image_tokens(self, config: Any, pixels: int) -> int:
        return config.mm_tokens_per_image

    def tiny(self, tokenizer: Any, hidden: int = HIDDEN) -> tuple[type, Any, Any]:
        """See Family. Its tokenizer is one of Gemma's kind, which learns from what the other has learned."""
        from transformers import (
            Gemma3Config,
            Gemma3ForConditionalGeneration,
            Gemma3ImageProcessor,
            Gemma3Processor,
        )

        names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
        tokenizer = tiny_gemma_tokenizer(tokenizer, names, ("<start_of_turn>", "<end_of_turn>"))
        to_id, side = tokenizer.convert_tokens_to_ids, SIDE // 2
        windows = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"] * 2}
        config = Gemma3Config(
            text_config=tiny_text(
                tokenizer, hidden, num_hidden_layers=4, head_dim=32, query_pre_attn_scalar=32, **windows
            ),
            vision_config=tiny_tower(image_size=side, vision_use_head=False),
            mm_tokens_per_image=(side // PATCH) ** 2 // 4,
            boi_token_index=to_id("<start_of_image>"),
            eoi_token_index=to_id("<end_of_image>"),
            image_token_index=to_id("<image_soft_token>"),
        )
        processor = Gemma3Processor(
            image_processor=Gemma3ImageProcessor(size={"height": side, "width": side}, do_pan_and_scan=False),
            tokenizer=tokenizer,
            image_seq_length=config.mm_tokens_per_image,
            chat_template=TINY_TEMPLATE,
        )
        return Gemma3ForConditionalGeneration, config, processor


def tiny_gemma_tokenizer(tokenizer: Any, names: dict[str, str], others: tuple[str, ...]) -> Any:
    """A Gemma tokenizer: words with the space before them, bytes for what it has not learned, line breaks in a row.

    Args:
        tokenizer: another's, from whose tokens this one learns.
        names: further special tokens, by the names that a processor asks for.
        others: further special tokens.
    """
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import GemmaTokenizer

    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Replace(" ", "▁")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "removed"), pre_tokenizers.Split("▁", "merged_with_next")]
    )
    texts = [tokenizer.decode(i) for i in range(tokenizer.vocab_size)]
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=512, show_progress=False))
    learned = json.loads(bpe.to_str())["model"]
    # The last two are those by which every tiny model ends a response.
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *names.values(), *others, "<|im_end|>", "<|endoftext|>"]
    added = dict.fromkeys(special, True) | {"\n" * count: False for count in range(1, 5)}
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(["<pad>", *bytes_, *learned["vocab"], *added]))}
    return GemmaTokenizer(
        vocab=vocab,
        merges=[tuple(pair) for pair in learned["merges"]],
        extra_special_tokens=names,
        added_tokens_decoder={
            vocab[token]: AddedToken(token, special=special, normalized=False) for token, special in added.items()
        },
        model_max_length=131072,
    )


# Gemma's own, for texts and images.
TINY_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>{{ message['role'] }}\n"
    "{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}<start_of_image>{% elif item['type'] == 'text' %}{{ item['text'] | trim }}"
    "{% endif %}{% endfor %}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)

FAMILY = Gemma3()
