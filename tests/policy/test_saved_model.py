"""A saved policy is what transformers itself would save; what cannot be saved is said before anything is trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import GenerationConfig

from rethinker.config import ConfigError, DataConfig, LoraConfig
from rethinker.data.prompts import PromptEncoder
from rethinker.embedded.tiny import create_tiny
from rethinker.policy import lora
from rethinker.policy.loading import load_model, load_processor
from rethinker.policy.lora import FullWeights
from rethinker.policy.saved_model import files_beside_weights, save_files, save_weights
from tests.families.tiny_models import FAMILIES, create

PLAIN = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.05}


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A model that may be changed."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def write_json(file: Path, remove: tuple[str, ...] = (), **values) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in content.items() if k not in remove} | values))


def saved(folder: Path, output: Path, rank: int = 0) -> torch.nn.Module:
    """Load a model and save it as a run does; with adapters of this rank, if it is not 0."""
    model = load_model(folder, torch.float32)
    processor = PromptEncoder(load_processor(folder), DataConfig()).processor
    adapters = lora.add_adapters(model, LoraConfig(rank=rank), seed=0) if rank else {}
    weights = dict(FullWeights(lora.base_weights(model), adapters))
    save_weights(output, model, weights, dict(FullWeights(lora.adapter_parameters(adapters))))
    save_files(output, files_beside_weights(model, processor, folder))
    return model


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("family", ["untied", *FAMILIES])
def test_it_is_what_transformers_saves(family, tmp_path):
    """Every file of a model of every family, to the byte, weights under the names that they have on the hub."""
    source = tmp_path / "model"
    if family in FAMILIES:
        create(family, source)
    else:
        create_tiny(source, seed=0, tie_word_embeddings=False)
    model = saved(source, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    PromptEncoder(load_processor(source), DataConfig()).processor.save_pretrained(tmp_path / "theirs")
    ours, theirs = files(tmp_path / "ours"), files(tmp_path / "theirs")
    assert ours.keys() == theirs.keys() and [name for name in ours if ours[name] != theirs[name]] == []


def test_adapters_are_saved_beside_the_merged_weights(tiny_folder, tmp_path):
    """peft puts them onto the model that they were trained beside."""
    saved(tiny_folder, tmp_path / "ours", rank=4)
    adapter = tmp_path / "ours" / "adapter"
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tiny_folder)
    weights, given = (load_file(folder / "model.safetensors") for folder in (tmp_path / "ours", tiny_folder))
    assert weights.keys() == given.keys() and all(torch.equal(weights[name], given[name]) for name in given)
    peft.PeftModel.from_pretrained(load_model(tiny_folder, torch.float32), adapter)


@pytest.mark.parametrize(
    "values",
    [PLAIN, {"top_k": 1, "pad_token_id": -1}, {"do_sample": True, "temperature": -1.0}, {"of_another": {"tool": [1]}}],
    ids=["sampling without do_sample", "a pad token that is none", "a temperature that is none", "an unknown key"],
)
def test_generation_settings_are_saved_as_they_were(folder, tmp_path, values):
    """Whatever transformers says of them when it saves: who samples from the trained model gets what the first one's
    file says, and the folder is one that training starts from."""
    write_json(folder / "generation_config.json", ("do_sample",), **values)
    given = json.loads((folder / "generation_config.json").read_text())
    saved(folder, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "generation_config.json").read_text()) == given
    again = GenerationConfig.from_pretrained(tmp_path / "ours")
    assert again.to_dict() == GenerationConfig.from_pretrained(folder).to_dict()
    saved(tmp_path / "ours", tmp_path / "again")
    assert files(tmp_path / "again").keys() == files(tmp_path / "ours").keys()


def test_a_model_without_generation_settings(folder, tmp_path):
    """No such file: transformers' defaults for the model, which it can read."""
    (folder / "generation_config.json").unlink(missing_ok=True)
    saved(folder, tmp_path / "ours")
    assert GenerationConfig.from_pretrained(tmp_path / "ours").eos_token_id is not None


def test_damaged_generation_settings_are_refused(folder):
    """A file that cannot be read is not taken for none: its end tokens would be lost."""
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"its generation_config\.json is refused \("):
        load_model(folder, torch.float32)


@pytest.mark.parametrize(
    "values",
    [{"max_new_tokens": 0}, {"num_return_sequences": 4}, {"compile_config": {"a": 1}}, {"eos_token_id": ["x"]}],
)
def test_generation_settings_that_transformers_refuses_are_named(folder, values):
    """In one line with the file, before the weights are read."""
    write_json(folder / "generation_config.json", ("do_sample",), **values)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"^policy\.model=.*: its generation_config\.json is refused \(") as error:
        load_model(folder, torch.float32)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("part", ["config.json", "generation_config.json", "processor", "weights", "adapter"])
@pytest.mark.parametrize("kind", [ValueError, OSError])
def test_what_cannot_be_saved_is_named(tiny_folder, part, kind, monkeypatch):
    """Whichever library fails in whichever part: one line that names it, before training."""

    def fails(*_, **__):
        raise kind("no\nway")

    model, processor = load_model(tiny_folder, torch.float32), load_processor(tiny_folder)
    lora.add_adapters(model, LoraConfig(rank=4), seed=0)
    owner, name = {
        "config.json": (type(model.config), "save_pretrained"),
        "generation_config.json": (GenerationConfig, "to_json_file"),
        "processor": (type(processor.tokenizer), "save_pretrained"),
        "weights": ("rethinker.policy.saved_model", "revert_weight_conversion"),
        "adapter": (peft.LoraConfig, "save_pretrained"),
    }[part]
    monkeypatch.setattr(*((f"{owner}.{name}",) if isinstance(owner, str) else (owner, name)), fails)
    with pytest.raises(ConfigError, match=f"{part} cannot be (saved|written)") as error:
        files_beside_weights(model, processor, tiny_folder)
    assert "\n" not in str(error.value)


def test_a_processor_that_cannot_be_read_again_is_named(tiny_folder, monkeypatch):
    """A run could not be resumed from it: here a template under a name that its folder does not take."""
    model, processor = load_model(tiny_folder, torch.float32), load_processor(tiny_folder)
    processor.chat_template = {"default": processor.chat_template, "../other": "x"}
    with pytest.raises(ConfigError, match=r"its processor cannot be saved.*Invalid chat template name: '\.\./other'"):
        files_beside_weights(model, processor, tiny_folder)
    processor = load_processor(tiny_folder)
    monkeypatch.setattr(type(processor), "to_json_file", lambda self, file: Path(file).write_text("{"))
    with pytest.raises(ConfigError, match=r"its processor cannot be saved, and so no checkpoint: .* has no processor"):
        files_beside_weights(model, processor, tiny_folder)
