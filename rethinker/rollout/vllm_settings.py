"""What every vLLM engine of a run is built with and asked for, in the trainer's process or behind HTTP."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, GenerationConfig

from rethinker.config import Config, ConfigError
from rethinker.families import family_of
from rethinker.rollout.sampling import stop_token_ids
from rethinker.samples import Completion, Prompt

# What two models must share for one's weights to fit the other, and for both to read the same tokens.
_SHAPES = """
    architectures tie_word_embeddings image_token_id video_token_id vision_start_token_id vocab_size hidden_size
    intermediate_size num_hidden_layers num_attention_heads num_key_value_heads depth num_heads patch_size
    spatial_merge_size out_hidden_size
""".split()
WORKER = "rethinker.rollout.server.worker.ServerWorker"  # worker extension of a server


def engine_arguments(config: Config, asking: Asking, *, gpu: bool) -> dict[str, Any]:
    """vLLM's engine arguments, all but the model and the weight transfer; `gpu`: whether it runs on CUDA."""
    settings = config.rollout
    if gpu:
        device: dict[str, Any] = {"gpu_memory_utilization": settings.gpu_memory_utilization}
    else:
        device = {
            "kv_cache_memory_bytes": int(settings.kv_cache_gb * 2**30),
            "enforce_eager": True,
            "block_size": 32,  # the least here: the G samples share whole blocks of their prompt only
            "max_num_seqs": 512,
        }
    return {
        "dtype": config.policy.dtype,
        "load_format": "safetensors",  # never a pickle, and no code of the model's own
        "trust_remote_code": False,
        "seed": config.seed,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "max_model_len": asking.max_length,
        "limit_mm_per_prompt": {"image": config.data.max_images, "video": 0},
        "mm_processor_kwargs": asking.image_settings,
        # Every image is seen once per episode, so a cache of pixels only fills the host's memory.
        "mm_processor_cache_gb": 0,
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",
        "disable_log_stats": True,
        **device,
    }


def outline(model_config: Any) -> dict[str, Any]:
    """The numbers of a transformers model config that shape its weights, of its text and its vision part."""
    found: dict[str, Any] = {}
    parts = {"": model_config, "text_": model_config.get_text_config()}
    parts["vision_"] = getattr(model_config, "vision_config", None)
    for prefix, part in parts.items():
        for name in _SHAPES:
            if part is not None and (value := getattr(part, name, None)) is not None:
                found[prefix + name] = value
    return found


class Asking:
    """How a run asks its vLLM engines: sampling parameters, lengths, and what their answers mean.

    Attributes:
        tokenizer: of the model.
        model_config: transformers' config of the model.
        stop_ids: tokens that end a response, sorted.
        max_length: tokens of the longest prompt and response.
        image_settings: of the image processor, for the limits on pixels.
    """

    def __init__(self, config: Config, model_dir: str):
        self.config = config
        self.model_config = AutoConfig.from_pretrained(model_dir, trust_remote_code=False)
        self.tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)
        self.stop_ids = stop_token_ids(self.tokenizer, self.model_config, _generation_config(model_dir))
        self.max_length = min(
            config.data.max_prompt_tokens + config.rollout.max_new_tokens,
            self.model_config.get_text_config().max_position_embeddings,
        )
        processor = AutoImageProcessor.from_pretrained(model_dir, trust_remote_code=False)
        family = family_of(self.model_config.model_type)
        self.image_settings = family.image_settings(processor, config.data.min_pixels, config.data.max_pixels)

    def sampling(self, n: int, temperature: float, longest: int) -> dict[str, Any]:
        """Arguments of vLLM's SamplingParams for n samples of at most `longest` tokens."""
        return {
            "n": n,
            "temperature": temperature,
            "max_tokens": longest,
            "logprobs": 0,  # the sampled token's only
            "stop_token_ids": self.stop_ids,
            "detokenize": False,
        }

    def scoring(self, last: int) -> dict[str, Any]:
        """Arguments of vLLM's SamplingParams that score a prompt's tokens and `last` as the one after them.

        Raises:
            ConfigError: `rollout.temperature` is not 1: vLLM scores prompt tokens at temperature 1.
        """
        if self.config.rollout.temperature != 1.0:
            raise ConfigError(
                f"rollout.temperature={self.config.rollout.temperature:g}: vLLM scores given tokens at temperature 1 "
                "only; use rollout.backend=hf"
            )
        return {
            "max_tokens": 1,
            "prompt_logprobs": 0,
            "logprobs": 2,
            "logprob_token_ids": [last, last],  # over HTTP as many are told as asked for, the sampled token first
            "temperature": 1.0,
            "detokenize": False,
        }

    def check_length(self, prompt: Prompt, max_new_tokens: int) -> None:
        """Refuse a prompt that leaves no room for its response: vLLM would cut that short without a word."""
        if len(prompt.token_ids) + max_new_tokens > self.max_length:
            raise ConfigError(
                f"query {prompt.query_id!r}: {len(prompt.token_ids)} prompt tokens and rollout.max_new_tokens="
                f"{max_new_tokens} exceed vLLM's {self.max_length}; data.max_prompt_tokens="
                f"{self.config.data.max_prompt_tokens} should leave such queries out"
            )

    def check_prompt(self, prompt: Prompt, expanded: list[int], continuation: list[int]) -> None:
        """Refuse a prompt in which vLLM and the policy see different tokens."""
        if list(expanded) != prompt.token_ids + continuation:
            raise ConfigError(
                f"query {prompt.query_id!r}: the policy reads {len(prompt.token_ids)} prompt tokens and vLLM "
                f"{len(expanded) - len(continuation)}, so image features would not match image tokens; both must use "
                f"data.min_pixels={self.config.data.min_pixels} and data.max_pixels={self.config.data.max_pixels}"
            )

    def completion(self, token_ids: list[int], logprobs: list[float], finish_reason: str) -> Completion:
        """One answer as the trainer knows it."""
        text = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        return Completion(token_ids, logprobs, text, finish_reason)


def _generation_config(model_dir: str) -> GenerationConfig | None:
    try:
        return GenerationConfig.from_pretrained(model_dir)
    except OSError:  # optional in a model's folder
        return None
