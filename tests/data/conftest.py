from __future__ import annotations

import pytest

from rethinker.config import DataConfig
from rethinker.data.prompts import PromptEncoder
from rethinker.embedded.tiny import create_tiny
from rethinker.policy.loading import load_processor
from tests.data.encoders import LIMITS


@pytest.fixture(scope="package")
def folder(tmp_path_factory):
    return create_tiny(tmp_path_factory.mktemp("tiny"), seed=0)


@pytest.fixture
def make(folder):
    """Builds an encoder with the given settings, on a processor of its own."""

    def made(chat_template: str | None = None, **settings) -> PromptEncoder:
        processor = load_processor(folder)
        processor.chat_template = chat_template or processor.chat_template
        return PromptEncoder(processor, DataConfig(**{**LIMITS, **settings}))

    return made
