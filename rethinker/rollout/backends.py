"""Which rollout engine a run gets: the one that `rollout.backend` names."""

from __future__ import annotations

from importlib.util import find_spec

from rethinker.config import Config, ConfigError
from rethinker.rollout.engine import RolloutEngine
from rethinker.runtime.distributed import Ranks


def make_engine(config: Config, model_dir: str, *, rank: int, world_size: int, local_rank: int) -> RolloutEngine:
    """Build the engine of `rollout.backend` from the model in `model_dir` (Hugging Face format).

    Called on every rank, after the process group exists if there are several. Leaves the random state as it was.
    """
    ranks = Ranks(rank, world_size, local_rank)
    if config.rollout.backend == "recorded":
        from rethinker.rollout.recorded import RecordedEngine

        return RecordedEngine(config)
    if config.rollout.backend == "hf":
        from rethinker.rollout.hf_engine import HFEngine

        return HFEngine(config, model_dir, ranks)
    if config.rollout.backend == "server":
        from rethinker.rollout.server.engine import ServerEngine

        return ServerEngine(config, model_dir, ranks)
    if find_spec("vllm") is None:
        raise ConfigError("rollout.backend=vllm: vLLM is not installed; `rethinker doctor` says how, or set it to hf")
    from rethinker.rollout.vllm_engine import VLLMEngine

    return VLLMEngine(config, model_dir, ranks)
