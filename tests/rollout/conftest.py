"""One tiny model and one vLLM engine for all rollout tests: an engine takes seconds to build."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from rethinker.embedded.tiny import create_tiny


@pytest.fixture(scope="session", params=["tied", "untied"])
def folder(request, tmp_path_factory):
    """A tiny model, once with one matrix for embedding and head and once with two.

    Its generation settings would cut the distribution; the engines must not follow them.
    """
    from transformers import GenerationConfig

    path = create_tiny(tmp_path_factory.mktemp(request.param), seed=0, tie_word_embeddings=request.param == "tied")
    settings = GenerationConfig.from_pretrained(path)
    settings.update(top_k=5, top_p=0.5, repetition_penalty=1.5, temperature=0.5)
    settings.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def prompts(folder):
    """With one image, none, two, one."""
    from tests.rollout.helpers import make_prompts

    return make_prompts(folder)


@pytest.fixture
def policy(folder):
    """The trainer's model, as saved."""
    from tests.rollout.helpers import Policy

    return Policy(folder)


@pytest.fixture(scope="session")
def engine(folder, prompts):
    """The vLLM engine; `engine.fresh` is what it sampled before any sync. Tests sync the weights they need."""
    from rethinker.rollout.engine import make_engine
    from tests.rollout.helpers import rollout_config

    engine = make_engine(rollout_config(), str(folder), rank=0, world_size=1, local_rank=0)
    engine.fresh = engine.generate(prompts, n=2, max_new_tokens=12, temperature=1.0, seed=0)
    yield engine
    engine.close()
