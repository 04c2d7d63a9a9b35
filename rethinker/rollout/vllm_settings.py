"""What every vLLM engine of a run is built with and asked for, in the trainer's process or behind HTTP."""

from __future__ import annotations

import platform
from typing import Any

import numpy as np
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

from rethinker.config import Config, ConfigError
from rethinker.families import family_of
from rethinker.rollout.sampling import limits, stop_token_ids
from rethinker.samples import Completion, Prompt

# What two models must share for one's weights to fit the other, and for both to read the same tokens.
_SHAPES = """
    architectures tie_word_embeddings image_token_id video_token_id vision_start_token_id vocab_size hidden_size
    intermediate_size num_hidden_layers num_attention_heads num_key_value_heads depth num_heads patch_size
    spatial_merge_size out_hidden_size
""".split()
SERVED = "RETHINKER_SERVED"  # environment variable of a server: its VLLMRequests.shared_settings and TRANSFER, as JSON
TRANSFER = "how weights arrive"  # "nccl" or "file"
# Of these a server may have more than a run needs.
MAX_IMAGES, MAX_LENGTH = "data.max_images + environment.max_images", "data.max_prompt_tokens + rollout.max_new_tokens"
PIXEL_CACHE_GB = 0.5
"""Of images as the model takes them, which all turns of a conversation show."""
Request = tuple[Prompt, dict[str, Any]]
"""A prompt and the arguments of vLLM's SamplingParams."""


def cpu_block_size(dtype: str) -> int:
    """Tokens of a key-value block on a CPU. The G responses to a prompt share whole blocks of it only, so small ones
    pay where prompts are short; attention over 500 tokens and more takes a tenth to a fifth longer with 16 than with 32
    (an Intel Xeon core). AMX's kernel for bfloat16 and ARM's take no fewer than 32; others are not measured.
    """
    return 16 if dtype == "float32" and platform.machine() == "x86_64" else 32


def most_images(config: Config) -> int:
    """That a prompt may have: the question's, and those that an environment shows."""
    return config.data.max_images + (config.environment.max_images if config.environment.use else 0)


def engine_arguments(config: Config, requests: VLLMRequests, *, gpu: bool) -> dict[str, Any]:
    """vLLM's engine arguments, all but the model; `gpu`: whether it runs on CUDA."""
    settings = config.rollout
    text = requests.model_config.get_text_config()
    blocks = requests.family.image_blocks(text)
    if blocks and not gpu and text.sliding_window:
        longest = requests.family.image_tokens(requests.model_config, config.data.max_pixels)
        if longest > text.sliding_window:
            raise ConfigError(
                f"data.max_pixels={config.data.max_pixels} allows images of {longest} tokens, and on a CPU vLLM takes "
                f"none longer than the model's windows of {text.sliding_window}; set it lower, or rollout.backend to hf"
            )
    if gpu:
        device: dict[str, Any] = {"gpu_memory_utilization": settings.gpu_memory_utilization}
    else:
        device = {
            "kv_cache_memory_bytes": int(settings.kv_cache_gb * 2**30),
            "enforce_eager": True,
            "block_size": cpu_block_size(config.policy.dtype),
            "max_num_seqs": 512,
            # An image's tokens that see each other must be computed at once, and so is every prompt that has some.
            **({"enable_chunked_prefill": False} if blocks else {}),
            **(requests.for_seeds() if config.environment.use else {}),  # of turns
        }
    return {
        "dtype": config.policy.dtype,
        "load_format": "safetensors",  # never a pickle, and no code of the model's own
        "trust_remote_code": False,
        "seed": config.seed,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "max_model_len": requests.max_length,
        "limit_mm_per_prompt": {"image": most_images(config), "video": 0, "audio": 0},
        **requests.family.vllm_settings(requests.image_settings, requests.max_length),
        # Where every image is seen once per episode, a cache of pixels only fills the host's memory.
        "mm_processor_cache_gb": PIXEL_CACHE_GB if config.environment.use else 0,
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",
        "disable_log_stats": True,
        "enable_return_routed_experts": settings.router_replay,
        **device,
    }


class VLLMRequests:
    """How a run asks vLLM: sampling parameters, lengths, and what the answers mean.

    Attributes:
        tokenizer: of the model.
        model_config: transformers' config of the model.
        family: of the model.
        stop_ids: tokens that end a response, sorted.
        max_length: tokens of the longest prompt and response.
        image_settings: of the image processor, for the limits on pixels.
    """

    def __init__(self, config: Config, model_dir: str):
        """Read the model's folder."""
        from rethinker.policy.loading import load_generation_config

        self.config = config
        self.model_config = AutoConfig.from_pretrained(model_dir, trust_remote_code=False)
        self.tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)
        self.stop_ids = stop_token_ids(self.tokenizer, self.model_config, load_generation_config(model_dir))
        self.max_length = min(
            config.data.max_prompt_tokens + config.rollout.max_new_tokens,
            self.model_config.get_text_config().max_position_embeddings,
        )
        processor = AutoImageProcessor.from_pretrained(model_dir, trust_remote_code=False)
        self.family = family_of(self.model_config.model_type)
        text = self.model_config.get_text_config()
        experts = any(getattr(text, name, None) for name in ("num_experts", "num_local_experts"))
        if config.rollout.router_replay and not experts:
            raise ConfigError(
                f"rollout.router_replay=true: a {self.model_config.model_type} model has no experts to choose from; "
                "set it to false"
            )
        self.image_settings = self.family.image_settings(processor, config.data.min_pixels, config.data.max_pixels)

    def for_seeds(self) -> dict[str, Any]:
        """What engines on a CPU need for requests with seeds: a prompt in two parts takes back a draw of the request's
        own generator, which CPU generators cannot."""
        settings = {"enable_chunked_prefill": False, "max_num_batched_tokens": max(8192, self.max_length)}
        if self.family.tail(self.model_config.get_text_config()) is not None:
            settings["enable_prefix_caching"] = False  # of states, vLLM needs parts of prompts for it
        return settings

    def sampling(
        self, prompts: list[Prompt], n: int, max_new_tokens: int | list[int], temperature: float
    ) -> list[Request]:
        """One request for every prompt; the arguments are those of RolloutEngine.generate.

        Raises:
            ConfigError: a prompt leaves no room for its response: vLLM would cut that short without a word.
        """
        requests = []
        for prompt, longest in zip(prompts, limits(max_new_tokens, len(prompts)), strict=True):
            if len(prompt.token_ids) + longest > self.max_length:
                raise ConfigError(
                    f"query {prompt.query_id!r}: {len(prompt.token_ids)} prompt tokens and rollout.max_new_tokens="
                    f"{longest} exceed vLLM's {self.max_length}; data.max_prompt_tokens="
                    f"{self.config.data.max_prompt_tokens} should leave such queries out"
                )
            settings = {
                "n": n,
                "temperature": temperature,
                "max_tokens": longest,
                "logprobs": 0,  # the sampled token's only
                "stop_token_ids": self.stop_ids,
                "detokenize": False,
            }
            requests.append((prompt, settings))
        return requests

    def check_prompt(self, prompt: Prompt, expanded: list[int]) -> None:
        """Check that vLLM and the policy see the same tokens in a prompt; ConfigError if not, as images may cause."""
        if list(expanded) != prompt.token_ids:
            data = self.config.data
            raise ConfigError(
                f"query {prompt.query_id!r}: the policy reads {len(prompt.token_ids)} tokens and the rollout engine "
                f"{len(expanded)}, so image features would not match image tokens; both must use "
                f"data.min_pixels={data.min_pixels} and data.max_pixels={data.max_pixels}"
            )

    def completion(
        self, token_ids: list[int], logprobs: list[float], finish_reason: str, experts: np.ndarray | None = None
    ) -> Completion:
        """One answer as the trainer knows it."""
        text = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        if experts is not None and experts.dtype == np.uint16:
            experts = experts.astype(np.int16)  # torch can do more with it
        return Completion(token_ids, logprobs, text, finish_reason, experts=experts)

    def shared_settings(self) -> dict[str, Any]:
        """What a server must have been started with to sample for this run, by the names of settings; JSON."""
        config, model = self.config, self.model_config
        parts = {"": model, "text_": model.get_text_config(), "vision_": getattr(model, "vision_config", None)}
        shape = {prefix + name: getattr(part, name, None) for prefix, part in parts.items() for name in _SHAPES}
        return {
            "policy.dtype": config.policy.dtype,
            "data.min_pixels, data.max_pixels": self.image_settings,
            MAX_IMAGES: most_images(config),
            MAX_LENGTH: self.max_length,
            **{f"policy.model's {name}": value for name, value in shape.items() if value is not None},
        }
