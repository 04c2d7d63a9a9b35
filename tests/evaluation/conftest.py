"""One tiny model for all evaluation tests, as transformers' save_pretrained writes any model."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A Qwen2.5-VL folder that no run of this project made: no config.yaml above it."""
    from rethinker.embedded.tiny import create_tiny

    return create_tiny(tmp_path_factory.mktemp("models") / "qwen", seed=0)
