"""What forked processes (tests/forked.py) find imported. It is out of reach of their garbage collections, which would
look through a million objects and copy the memory that they share: seconds of every short run.
"""

from __future__ import annotations

import contextlib
import gc
import importlib

gc.disable()
for name in """rethinker.cli rethinker.run pydantic deepspeed torch.utils.tensorboard matplotlib.pyplot
    vllm.entrypoints.llm rethinker.rollout.vllm_engine vllm.v1.worker.cpu_worker
    vllm.model_executor.models.qwen2_5_vl""".split():
    with contextlib.suppress(ImportError):  # a part that is not installed
        importlib.import_module(name)
gc.freeze()
gc.enable()
