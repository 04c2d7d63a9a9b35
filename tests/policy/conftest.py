from __future__ import annotations

import pytest
import torch

from rethinker.config import DataConfig, PolicyConfig
from rethinker.data.prompts import PromptEncoder
from rethinker.embedded.tiny import create_tiny
from rethinker.policy.loading import load_model, load_processor
from rethinker.policy.model import Policy


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    return create_tiny(tmp_path_factory.mktemp("tiny"), seed=0)


@pytest.fixture(scope="session")
def untied_folder(tmp_path_factory):
    return create_tiny(tmp_path_factory.mktemp("untied"), seed=1, tie_word_embeddings=False)


@pytest.fixture(scope="session")
def encoder(tiny_folder):
    return PromptEncoder(load_processor(tiny_folder), DataConfig(min_pixels=1024, max_pixels=8192))


@pytest.fixture
def model(tiny_folder):
    """The plain transformers model."""
    return load_model(tiny_folder, torch.float32)


@pytest.fixture
def policy(tiny_folder):
    return Policy(load_model(tiny_folder, torch.float32), PolicyConfig(dtype="float32"))
