"""Model folders from anywhere: whole or refused in one line, and nothing that lies in them is ever run."""

from __future__ import annotations

import ast
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import rethinker
from rethinker.config import ConfigError
from rethinker.embedded.tiny import create_tiny
from rethinker.families import SUPPORTED
from rethinker.model_folder import check_model_folder
from rethinker.policy.loading import load_model, load_processor
from rethinker.settings import load_config
from tests.families.tiny_models import create

WEIGHTS = "model.safetensors"


class Bomb:
    """Pickled, it writes a file when it is read."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return create_tiny(tmp_path_factory.mktemp("whole"), seed=0)


@pytest.fixture
def folder(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "model"))


def refused(folder: Path) -> str:
    """The message with which training refuses the folder before anything is loaded."""
    with pytest.raises(ConfigError) as caught:
        load_config("easy_vqa_cpu", {"policy.model": str(folder), "run.dir": str(folder.parent / "runs")})
    message = str(caught.value)
    assert message.startswith(f"policy.model={folder}") and "\n" not in message
    assert not (folder.parent / "runs").exists()
    return message


def change_config(folder: Path, part: str | None = None, **values) -> None:
    content = json.loads((folder / "config.json").read_text())
    (content if part is None else content[part]).update(values)
    (folder / "config.json").write_text(json.dumps(content))


def test_a_whole_model_is_accepted(folder):
    """The size of its weights is what its files have."""
    assert check_model_folder(folder, "x") == (folder / WEIGHTS).stat().st_size
    model, processor = load_model(folder, torch.float32), load_processor(folder)
    assert sum(p.numel() for p in model.parameters()) > 0 and processor.image_token_id


def test_pickled_weights_are_never_read(folder):
    """pytorch_model.bin is refused by name, by the check and by the loader itself."""
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(folder / "ran")))
    assert "pytorch_model.bin is a pickle, which may run code" in refused(folder)
    with pytest.raises(ConfigError, match="could not be loaded"):
        load_model(folder, torch.float32)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("name", ["tekken.json", "consolidated.safetensors"])
def test_files_of_mistrals_own_format_are_refused(folder, name):
    """With them vLLM and transformers would load another tokenizer and model than config.json says."""
    (folder / name).write_bytes(b"{}")
    assert f"has {name}, of Mistral's own format" in refused(folder)


@pytest.mark.parametrize("kind", ["config", "processor", "tokenizer", "image processor", "video processor"])
def test_code_that_comes_along_is_never_run(folder, kind):
    """auto_map and its Python files: a model of another kind is refused; ours is loaded without them."""
    (folder / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Own: pass\n")
    files = {
        "config": ("config.json", {"AutoConfig": "own.Own", "AutoModelForImageTextToText": "own.Own"}),
        "processor": ("processor_config.json", {"AutoProcessor": "own.Own"}),
        "tokenizer": ("tokenizer_config.json", {"AutoTokenizer": ["own.Own", "own.Own"]}),
        "image processor": ("preprocessor_config.json", {"AutoImageProcessor": "own.Own"}),
        "video processor": ("video_preprocessor_config.json", {"AutoVideoProcessor": "own.Own"}),
    }
    name, classes = files[kind]
    content = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
    (folder / name).write_text(json.dumps({**content, "auto_map": classes}))
    for load in (lambda: load_model(folder, torch.float32), lambda: load_processor(folder)):
        try:
            load()
        except ConfigError as error:
            assert "\n" not in str(error)
    assert not (folder / "ran").exists()
    change_config(folder, model_type="own", auto_map=files["config"][1])
    assert "is a 'own' model, with code of its own (auto_map), which is never run" in refused(folder)
    with pytest.raises(ConfigError):
        load_model(folder, torch.float32)
    assert not (folder / "ran").exists()


def test_every_loader_is_told_so():
    """No call of from_pretrained leaves the decision to a default, and weights are safetensors."""
    calls = 0
    for file in Path(rethinker.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            given = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
            owner = ast.unparse(node.func.value)
            if node.func.attr == "from_pretrained" and owner != "GenerationConfig":  # plain JSON
                calls += 1
                assert given.get("trust_remote_code") is False, f"{file}:{node.lineno}"
                if "Model" in owner:
                    assert given.get("use_safetensors") is True, f"{file}:{node.lineno}"
            # In a process of the user's own environment, of what that environment has pickled.
            own = file.match("environments/process.py") and ast.unparse(node) == "pickle.loads(pickled)"
            loads = ast.unparse(node.func) in ("pickle.load", "pickle.loads", "torch.load")
            assert own or not loads, f"{file}:{node.lineno}"
            assert ast.unparse(node.func) not in ("yaml.unsafe_load", "yaml.full_load"), f"{file}:{node.lineno}"
    assert calls > 6


def with_header(folder: Path, **changes) -> None:
    """Rewrite the header of the weights: `{tensor: changes of its entry, or None to leave it out}`."""
    content = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    for name, entry in changes.items():
        header[name] = {**header.get(name, {}), **entry}
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data)


def truncate(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def garbage(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"\x80\x04" + bytes(range(256)) * 40)


def endless_header(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((2**62).to_bytes(8, "little") + b"{}")


def embedding_name(folder: Path) -> str:
    return next(name for name in load_file(folder / WEIGHTS) if name.endswith("embed_tokens.weight"))


def lying_shape(folder: Path) -> None:
    with_header(folder, **{embedding_name(folder): {"shape": [2**40, 2**20]}})


def lying_offsets(folder: Path) -> None:
    with_header(folder, **{embedding_name(folder): {"data_offsets": [0, 2**50]}})


def unknown_type(folder: Path) -> None:
    with_header(folder, **{embedding_name(folder): {"dtype": "PICKLE"}})


def index_elsewhere(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))


def index_of_numbers(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": [1]}}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "model.safetensors are damaged"),
        (garbage, "model.safetensors are damaged"),
        (endless_header, "model.safetensors are damaged"),
        (lying_shape, "model.safetensors are damaged"),
        (lying_offsets, "model.safetensors are damaged"),
        (unknown_type, "model.safetensors are damaged"),
        (index_elsewhere, "weights passwd are missing or empty"),
        (index_of_numbers, "weights [1] are missing or empty"),
        (lambda folder: (folder / "config.json").write_bytes(b"\xff{}"), "config.json is damaged"),
        (lambda folder: (folder / "config.json").write_text("[" * 100_000), "config.json is damaged"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json is damaged"),
        (lambda folder: change_config(folder, model_type="llama"), "is a 'llama' model; supported: " + SUPPORTED),
        (lambda folder: change_config(folder, model_type=["a"]), "supported: " + SUPPORTED),
    ],
)
def test_damaged_folders_are_refused_before_anything_is_loaded(folder, damage, message):
    """Cut, lying or insane files: one line, before a process group, a run folder or gigabytes exist."""
    damage(folder)
    assert message in refused(folder)


def tensors(folder: Path, change) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop(next(n for n in weights if "down_proj" in n)), "missing_keys, the first"),
        (lambda weights: weights.update(value_head=torch.zeros(3)), "1 unexpected_keys, the first .*value_head"),
        (
            lambda weights: weights.update({"model.own": torch.zeros(3)}),
            "1 unexpected_keys, the first model.language_model.own",
        ),
        (
            lambda weights: weights.update({next(n for n in weights if "q_proj.weight" in n): torch.zeros(3, 5)}),
            "q_proj",
        ),
    ],
)
def test_other_tensors_than_the_models(folder, change, message):
    """A tensor that is missing, too many, or of another shape: no training from random numbers in its place."""
    tensors(folder, change)
    with pytest.raises(ConfigError, match=message) as caught:
        load_model(folder, torch.float32)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [-3, 0, "x", None, 2**40, [1]])
@pytest.mark.parametrize("key", ["num_attention_heads", "intermediate_size", "num_key_value_heads", "rope_parameters"])
def test_insane_configurations(folder, key, value):
    """Whatever else config.json says, loading ends in a model or in one line."""
    change_config(folder, "text_config", **{key: value})
    try:
        check_model_folder(folder, "policy.model=x")
        load_model(folder, torch.float32)
    except ConfigError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"3", b"[" * 50_000, b'{"a": 1}'])
def test_damaged_processors(folder, name, content):
    """Any content of any processor file: a processor or one line."""
    if not (folder / name).is_file():
        name = "processor_config.json"
    (folder / name).write_bytes(content)
    try:
        load_processor(folder)
    except ConfigError as error:
        assert "\n" not in str(error) and str(error).startswith("policy.model=")


def test_layers_that_predict_a_second_token_are_left_out(tmp_path):
    """Qwen3.5 is published with them, and transformers has none: the model loads with the rest."""
    folder = create("qwen3_5", tmp_path / "model")
    weights = load_file(folder / WEIGHTS)
    further = {"mtp.fc.weight": torch.zeros(4, 8), "mtp.layers.0.mlp.up_proj.weight": torch.zeros(8, 4)}
    save_file(weights | further, folder / WEIGHTS, metadata={"format": "pt"})
    change_config(folder, "text_config", mtp_num_hidden_layers=1)
    loaded = load_model(folder, torch.float32).state_dict()
    assert not any("mtp" in name for name in loaded) and loaded.keys() - weights.keys() <= {"lm_head.weight"}
    save_file(weights | {"mtq.fc.weight": torch.zeros(4, 8)}, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="1 unexpected_keys, the first mtq.fc.weight"):
        load_model(folder, torch.float32)
