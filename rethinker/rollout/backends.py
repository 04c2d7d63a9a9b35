"""Which rollout engine a run gets: the one that `rollout.backend` names."""

from __future__ import annotations

from importlib.util import find_spec
from pkgutil import resolve_name

from rethinker.config import Config, ConfigError
from rethinker.rollout.engine import RolloutEngine
from rethinker.runtime.distributed import Ranks

ENGINES = {
    "vllm": "rethinker.rollout.vllm_engine:VLLMEngine",
    "server": "rethinker.rollout.server.engine:ServerEngine",
    "hf": "rethinker.rollout.hf_engine:HFEngine",
    "recorded": "rethinker.rollout.recorded:RecordedEngine",
}
"""A class for each backend, made of (settings, model folder, ranks)."""


def make_engine(config: Config, model_dir: str, *, rank: int, world_size: int, local_rank: int) -> RolloutEngine:
    """Build the engine of `rollout.backend` from the model in `model_dir` (Hugging Face format).

    Called on every rank, after the process group exists if there are several. Leaves the random state as it was.
    """
    if config.rollout.backend == "vllm" and find_spec("vllm") is None:
        raise ConfigError("rollout.backend=vllm: vLLM is not installed; `rethinker doctor` says how, or set it to hf")
    return resolve_name(ENGINES[config.rollout.backend])(config, model_dir, Ranks(rank, world_size, local_rank))
