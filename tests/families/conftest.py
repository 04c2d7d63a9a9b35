from __future__ import annotations

import os
from functools import partial

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from rethinker.config import DataConfig
from rethinker.data.prompts import PromptEncoder
from rethinker.families import configure
from rethinker.policy.loading import load_model, load_processor
from tests.families.tiny_models import FAMILIES, create
from tests.policy.switches import make


@pytest.fixture(scope="session", params=FAMILIES)
def folder(request, tmp_path_factory):
    """A tiny model of every family."""
    return create(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def encoder(folder):
    return PromptEncoder(load_processor(folder), DataConfig(min_pixels=1024, max_pixels=8192))


@pytest.fixture
def make_policy(folder):
    """Makes policies with biases and scales that are not those of an initialisation, equal ones."""
    return partial(make, folder)


@pytest.fixture
def model(folder, make_policy, encoder):
    """The plain transformers model with the policies' weights and the encoder's limits."""
    model = load_model(folder, torch.float32)
    configure(model.config, encoder.family, encoder.processor)
    model.load_state_dict(make_policy().hf.state_dict())
    return model
