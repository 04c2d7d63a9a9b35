"""Settings: a recipe plus overrides becomes typed settings, or one error that names the key, the value and the fix."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import yaml

from rethinker import doctor, settings
from rethinker.config import Config, ConfigError, RunConfig, TrainConfig
from rethinker.settings import load_config, resolve_config, shipped_recipes, to_yaml


def refused(*overrides: str, recipe: str | Path = "easy_vqa_cpu") -> str:
    """The message with which these overrides are refused."""
    with pytest.raises(ConfigError) as error:
        load_config(recipe, overrides)
    return str(error.value)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_three_ways_to_override_agree():
    """Command line, dotted and nested mappings mean the same, and all of them win over the recipe."""
    line = resolve_config("easy_vqa_cpu", ["--train.max_steps", "7", "--train.learning_rate=3e-5", "--run.name", "a"])
    dotted = resolve_config("easy_vqa_cpu", {"train.max_steps": 7, "train.learning_rate": 3e-5, "run.name": "a"})
    nested = resolve_config("easy_vqa_cpu", {"train": {"max_steps": 7, "learning_rate": 3e-5}, "run": {"name": "a"}})
    assert line == dotted == nested
    assert (line.train.max_steps, line.train.learning_rate) == (7, 3e-5)
    assert line.rollout.max_new_tokens == 24  # the recipe's
    assert line.replay == Config().replay  # the default
    assert isinstance(line.train, TrainConfig)


TWO = [{"function": "boxed"}, {"function": "format"}]


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("null", "train.max_steps", None),
        ("null", "data.validation", None),
        ("123", "run.name", "123"),
        ("2e-4", "train.learning_rate", 2e-4),
        ("3", "train.learning_rate", 3.0),
        ("false", "rollout.sleep", False),
        ("[wandb, swanlab, mlflow]", "run.trackers", ["wandb", "swanlab", "mlflow"]),
        ("[]", "run.trackers", []),
        ("[0.8, 0.9]", "train.betas", (0.8, 0.9)),
        ("Answer: {question} -- now", "data.prompt", "Answer: {question} -- now"),
        ("{a: 1, b: 2}", "data.category_weights", {"a": 1, "b": 2}),
    ],
)
def test_text_is_read_as_its_settings_type(text, key, value):
    """An option's text becomes a value of the setting's type."""
    config = resolve_config("easy_vqa_cpu", [f"--{key}", text])
    assert settings._get(config, key) == value
    assert type(settings._get(config, key)) is type(value)


def test_entries_join_a_mapping():
    """An entry of a mapping-valued setting changes that entry alone; fields given in part keep the other columns."""
    config = resolve_config(
        "easy_vqa_cpu", ["--data.category_weights.color", "0.6", "--data.fields.question", "problem"]
    )
    assert config.data.category_weights == {"yes/no": 0.7, "color": 0.6, "shape": 0.2}
    assert config.data.fields == {"question": "problem", "answer": "answer", "images": "images", "id": "id"}
    whole = resolve_config("easy_vqa_cpu", {"data.category_weights": {"color": 1.0}, "data.fields": {"answer": "a"}})
    assert whole.data.category_weights == {"color": 1.0}
    assert whole.data.fields["answer"] == "a" and whole.data.fields["question"] == "question"
    nested = resolve_config("easy_vqa_cpu", ["--train.deepspeed.zero_optimization.overlap_comm", "false"])
    assert nested.train.deepspeed == {"zero_optimization": {"overlap_comm": False}}


def test_printed_settings_read_back_the_same(tmp_path):
    """--print_config loses nothing: its YAML gives the same settings, floats such as 1e-06 and line breaks included."""
    config = resolve_config("easy_vqa_cpu", ["--train.learning_rate", "1e-6", "--data.system", "a: 'b'\n# c\\n"])
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert resolve_config(tmp_path / "again.yaml") == config
    assert all(line.lstrip()[:1] in ("", "#") or ":" in line for line in to_yaml(config).splitlines())  # one line each
    plain = yaml.safe_load(to_yaml(config))  # any YAML reader sees numbers
    assert plain["train"]["learning_rate"] == 1e-6
    for section in dataclasses.fields(Config):
        assert section.name in plain


def test_every_setting_is_documented():
    """Each setting has a docstring, and --print_config shows it."""
    text = " ".join(to_yaml(Config(run=RunConfig(name="x"))).replace("# ", " ").split())
    for setting in settings.settings():
        assert setting.doc and f"{setting.doc} ({setting.type_in_words})" in text, setting.key


def test_shipped_recipes_load():
    """Every recipe in the package resolves, by name and by path."""
    assert "easy_vqa_cpu" in shipped_recipes()
    for name, path in shipped_recipes().items():
        by_name, by_path = resolve_config(name, {"run.name": "x"}), resolve_config(path, {"run.name": "x"})
        assert by_name == by_path


def test_the_default_name_tells_recipe_and_time():
    """A run without a name gets its recipe's name and the time."""
    assert resolve_config("easy_vqa_cpu").run.name.startswith("easy_vqa_cpu-20")


def test_unknown_keys_name_the_nearest_valid_one(tmp_path):
    """A key that is no setting is refused, on the command line and in a recipe, with what was probably meant."""
    assert refused("--train.max_step", "3") == "unknown setting 'train.max_step': did you mean 'train.max_steps'?"
    assert "'rollout.group_size'" in refused("--group_size", "4")
    assert "'policy.warmup.steps'" in refused("--policy.warmup.stepz", "4")
    assert "--print_config" in refused("--zzz.qqq", "4")
    (tmp_path / "r.yaml").write_text("train:\n  learning_rat: 1.0\n")
    assert "'train.learning_rate'" in refused(recipe=tmp_path / "r.yaml")
    assert "'seed'" in refused("--seeed", "4")
    assert refused("--run.name.first", "x").startswith("unknown setting 'run.name.first'")  # not a mapping


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--train.max_steps=many", "train.max_steps='many' must be a valid integer"),
        ("--rollout.group_size=8.5", "rollout.group_size=8.5 must be a valid integer"),
        ("--train.learning_rate=fast", "train.learning_rate='fast' must be a valid number"),
        ("--rollout.sleep=maybe", "rollout.sleep='maybe' must be a valid boolean"),
        ("--rollout.backend=sglang", "rollout.backend='sglang' must be 'vllm', 'server', 'hf' or 'recorded'"),
        ("--run.trackers=wandb", "run.trackers='wandb' must be a valid list"),
        ("--run.trackers=[x]", "run.trackers.0='x' must be 'tensorboard', 'wandb', 'trackio', 'swanlab' or 'mlflow'"),
        ("--train.betas=[0.9]", "train.betas.1=[0.9] Field required"),
        ("--data.category_weights.color=red", "data.category_weights.color='red' must be a valid number"),
        ("--train.deepspeed=3", "train.deepspeed=3 must be a valid dictionary"),
        ("--train.weight_decay=null", "train.weight_decay=None must be a valid number"),
        (
            "--rollout.servers=[http://h:1/x]",
            "rollout.servers.0='http://h:1/x' must be an address like http://127.0.0.1:8100",
        ),
        ("--policy=tiny", "policy='tiny' is a section; give the settings below it, as policy.model"),
    ],
)
def test_wrong_types_name_key_value_and_type(override, message):
    """A value of the wrong type is refused, naming the key, the value and the type expected."""
    assert message in refused(override)


def test_wrong_types_in_a_recipe(tmp_path):
    """What holds on the command line holds in a file; a boolean is no integer."""
    for line, message in {
        "train: {max_steps: true}": "train.max_steps=True must be a valid integer",
        "train: 3": "train=3 is a section",
        "reward: {function: null}": "reward.function=None must be a valid string",
        "rollout: {timeout_s: 30:00}": "rollout.timeout_s='30:00' must be a valid number",
        "train: {weight_decay: null}": "train.weight_decay=None must be a valid number",
        "seed: 1\nseed: 2": "the key 'seed' is given twice",
        "train: {max_steps: 1, max_steps: 2}": "the key 'max_steps' is given twice",
        "data: &d {prompt: x}\nrun: *d": "aliases (*name) are not read",
        "run: !!python/object/apply:os.system ['touch ran']": "could not determine a constructor",
        "seed: !!timestamp never": "is not readable YAML",
        "seed: 2001-99-99": "seed='2001-99-99' must be a valid integer",
        "run: {name: 007}": "run.name=7 must be a valid string (in quotes)",
        "data: {train_split: no}": "data.train_split=False must be a valid string (in quotes)",
        "data: {category_weights: {on: 1}}": "data.category_weights.1.[key]=True must be a valid string (in quotes)",
        "seed: " + "9" * 5000: "is not readable YAML",
        "train: {deepspeed: " + "[" * 5000: "is not readable YAML",
        "seed: 1\0": "is not readable YAML",
        "policy: {warmup: null}": "policy.warmup=None is a section",
        "- a\n- b": "must map sections to settings, not be a list",
        "train: {": "is not readable YAML",
    }.items():
        (tmp_path / "r.yaml").write_text(line)
        assert message in refused(recipe=tmp_path / "r.yaml")
    assert not (tmp_path / "ran").exists()


def test_what_a_file_says_without_quotes(tmp_path):
    """Steps and dates are what was typed, not a number to the base of 60 and a date; as are numbers without a dot."""
    lines = ["profile: {steps: 3:5}", "run: {name: 2026-01-31, dir: 1-2}", "train: {learning_rate: 1e-4}"]
    lines += ["data: {streaming: off}", "rollout: {sleep: no}", "rethink: {triggers: {a: 12:30:59 on 2026-01-31}}"]
    (tmp_path / "r.yaml").write_text("\n".join(lines))
    config = resolve_config(tmp_path / "r.yaml")
    assert (config.profile.steps, config.run.name, config.run.dir) == ("3:5", "2026-01-31", "1-2")
    assert config.train.learning_rate == 1e-4 and not config.data.streaming and not config.rollout.sleep
    assert config.rethink.triggers["a"] == "12:30:59 on 2026-01-31"
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert resolve_config(tmp_path / "again.yaml") == config
    assert yaml.safe_load(to_yaml(config))["profile"]["steps"] == "3:5"  # to any reader
    for name in ("1e-6", "3e5", "007", "2026-01-31", "1:2", "no"):
        config.run.name = name
        (tmp_path / "again.yaml").write_text(to_yaml(config))
        assert resolve_config(tmp_path / "again.yaml") == config


@pytest.mark.timeout(20)
def test_a_billion_values_in_nine_lines_are_refused(tmp_path):
    """Aliases of aliases, in a recipe and in an option: refused at once, not spelled out."""
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    (tmp_path / "r.yaml").write_text("\n".join(lines))
    assert "aliases (*name) are not read" in refused(recipe=tmp_path / "r.yaml")
    assert "is not readable YAML" in refused("--data.category_weights", "{" + ", ".join(lines) + "}")
    assert "is not readable YAML" in refused("--data.category_weights", "{a: ")
    assert "aliases" in refused("--train.betas", "&a [*a, *a]")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["~nobody-here/r.yaml", "x" * 300 + ".yaml", "a\0b.yaml", "pipe.yaml", "."])
def test_recipes_that_are_no_files(tmp_path, name):
    """Names that no file can have, and a pipe that would never end."""
    os.mkfifo(tmp_path / "pipe.yaml")
    assert "recipe" in refused(recipe=name)


def test_a_run_cannot_leave_its_folder(tmp_path):
    """Neither by its name nor by a link that lies in its place."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "linked").symlink_to(elsewhere)
    (tmp_path / "runs" / "dangling").symlink_to(tmp_path / "not yet")
    for name in ("linked", "dangling"):
        assert f"run.name={name}: runs/{name} is a link to elsewhere" in refused("--run.name", name)
    odd = ["../x", "..", ".", "/x", "a/b", "a\\b", ".x", "", "a\nb", "a\0", "a\x1b[2J", "\udcff", "x" * 201, "é" * 101]
    for name in odd:
        assert "must be a plain folder name" in refused(f"--run.name={name}"), name
    for name in ("x" * 200, "a b", "北京", "name-1.5_b"):
        assert load_config("easy_vqa_cpu", {"run.name": name}).run.name == name
    for folder in ("a\0b", "x" * 300, "~nobody-here/x", "a\nb", "\udcff", ""):
        assert "run.dir=" in refused(f"--run.dir={folder}")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["dangling", "elsewhere", "linked", "runs"]


def test_written_settings_have_no_aliases(tmp_path):
    """A value that a caller used twice is written twice, since aliases are not read."""
    shared = {"a": [1, 2]}
    config = resolve_config("easy_vqa_cpu", {"train.deepspeed": {"x": shared, "y": shared}})
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    again = resolve_config(tmp_path / "again.yaml")
    assert again == config
    # Of categories whose turn it is the first one comes: the order is part of the run.
    assert list(again.data.category_weights) == ["yes/no", "color", "shape"] == list(config.data.category_weights)


def test_malformed_arguments():
    """An option without its value, and a value without its option, are refused."""
    assert refused("--train.max_steps") == "--train.max_steps needs a value"
    assert refused("--train.max_steps", "--seed", "3") == "--train.max_steps needs a value"
    assert "unexpected argument '20'" in refused("20")


def test_unknown_recipes(tmp_path):
    """A recipe that is not there is refused, naming those that are."""
    shipped = ", ".join(shipped_recipes())
    assert refused(recipe="easy_vqa") == f"no recipe named 'easy_vqa': give a shipped one ({shipped}) or a .yaml file"
    assert refused(recipe=tmp_path / "none.yaml") == f"recipe {tmp_path / 'none.yaml'} does not exist"


def test_batches_must_hold_whole_groups_and_episodes_whole_batches():
    """Geometry that cannot work is refused, with the nearest that can."""
    assert refused("--train.batch_pairs", "500") == (
        "rollout.group_size=8 needs train.batch_pairs (500) divisible by 8; nearest: 496 or 504"
    )
    assert refused("--rollout.group_size", "1024").endswith("divisible by 1024; nearest: 1024")
    message = refused("--train.batch_pairs", "64", "--train.episode_queries", "12")
    assert message.startswith("train.batch_pairs=64 needs train.episode_queries x rollout.group_size (12 x 8 = 96)")
    assert message.endswith("nearest train.episode_queries: 8 or 16")
    assert resolve_config("easy_vqa_cpu", ["--train.batch_pairs", "64", "--train.episode_queries", "16"])


@pytest.mark.parametrize(
    ("key", "value", "needed"),
    [
        ("rollout.group_size", 0, "greater than or equal to 1"),
        ("train.max_steps", 0, "greater than or equal to 1"),
        ("train.learning_rate", 0.0, "greater than 0"),
        ("train.learning_rate", float("nan"), "a finite number"),
        ("train.learning_rate", float("inf"), "a finite number"),
        ("algorithm.clip_low", 1.0, "less than 1"),
        ("algorithm.clip_high", -0.1, "greater than 0"),
        ("algorithm.dual_clip", 1.0, "greater than 1"),
        ("algorithm.rollout_correction", "token", "must be 'token_truncate', 'token_mask'"),
        ("algorithm.rollout_correction", 2.0, "rollout_correction=token_truncate with algorithm.correction_high=2.0"),
        ("algorithm.rollout_correction", 0.5, "rollout_correction=token_truncate with algorithm.correction_high=2.0"),
        ("algorithm.rollout_correction", "2", "rollout_correction=token_truncate with algorithm.correction_high=2.0"),
        ("algorithm.correction_high", 1.0, "greater than 1"),
        ("algorithm.correction_high", float("inf"), "a finite number"),
        ("algorithm.correction_high", 2.0, "needs algorithm.rollout_correction, as token_truncate"),
        ("algorithm.correction_low", 1.0, "less than 1"),
        ("algorithm.correction_low", 0.0, "needs algorithm.rollout_correction, as token_truncate"),
        ("algorithm.top_entropy", 0.0, "greater than 0"),
        ("algorithm.advantages_per_reward", True, "list them in reward.functions, or set it to false"),
        ("algorithm.entropy_coef", -0.01, "greater than or equal to 0"),
        ("algorithm.reference_every", 0, "greater than or equal to 1"),
        ("algorithm.reference_every", 5, "set algorithm.kl_coef, as 0.001"),
        ("train.betas", [0.9, 1.0], "less than 1"),
        ("policy.warmup.data_fraction", 1.5, "less than or equal to 1"),
        ("data.category_weights", {"a": -0.1}, "greater than or equal to 0"),
        ("replay.capacity", 2**32, "less than or equal to 2147483648"),
        ("replay.alpha", float("nan"), "a finite number"),
        ("replay.importance_exponent", -1.0, "greater than or equal to 0"),
        ("replay.max_age", -1, "greater than or equal to 0"),
        ("replay.age_decay", 0.0, "greater than 0"),
        ("replay.importance_exponent_end", -0.1, "greater than or equal to 0"),
        ("algorithm.max_advantage", 0.0, "greater than 0"),
        ("rollout.max_mismatch_kl", 0.0, "greater than 0"),
        ("rollout.max_mismatch_kl", "automatic", "must be auto or a number"),
        ("rollout.max_staleness", 2, "less than or equal to 1"),
        ("data.min_pixels", 10**9, "must not exceed data.max_pixels"),
        ("data.prompt", "What?", "must hold {question} exactly once"),
        ("data.prompt", "{question}{question}", "must hold {question} exactly once"),
        ("run.name", "../elsewhere", "a plain folder name"),
        ("run.name", "..", "a plain folder name"),
        ("run.name", "/tmp/x", "a plain folder name"),
        ("run.name", "", "a plain folder name"),
        *(("profile.steps", bad, "first:end") for bad in ("3", "5:3", "3:3", "a:b", "0:2", "1:2:3", ":", "")),
        ("run.stall_s", 0.0, "greater than 0"),
        ("rollout.backend", "recorded", "rollout.recording"),
    ],
)
def test_values_out_of_range(key, value, needed):
    """A number or name that cannot work is refused with what it must be."""
    with pytest.raises(ConfigError, match=key) as error:
        resolve_config("easy_vqa_cpu", {key: value})
    assert needed in str(error.value)


def test_a_group_of_one_has_no_advantage(tmp_path):
    """It is refused where nothing else is learned from: a baseline of other queries, a loss that may need no advantage
    and the supervised term of rethinking can do with one response."""
    one, loss = {"rollout.group_size": 1, "train.batch_pairs": 128}, tmp_path / "mine.py"
    loss.touch()
    for baseline in ("group", "leave_one_out"):
        with pytest.raises(ConfigError, match=f"rollout.group_size=1 .*={baseline} .* the one to 2 or more"):
            resolve_config("easy_vqa_cpu", one | {"algorithm.advantage_baseline": baseline})
    for further in (
        {"algorithm.advantage_baseline": "batch"},
        {"algorithm.loss": f"{loss}:mine"},
        {"rethink.fraction": 0.5},
    ):
        resolve_config("easy_vqa_cpu", one | further)


@pytest.mark.parametrize(
    ("given", "needed"),
    [
        ({"algorithm.max_advantage": 2.0, "algorithm.name": "grpo"}, "algorithm.name to filter or ssr"),
        ({"replay.priority": "correctness", "replay.alpha": 0.5}, "leave it at 1.0"),
    ],
)
def test_replay_rules_that_exclude_each_other(given, needed):
    """A threshold that would drop what grpo keeps, and an exponent of advantages where they do not count, are refused,
    each named with its value; what would work is taken."""
    key, value = next(item for item in given.items() if isinstance(item[1], float))
    with pytest.raises(ConfigError, match=f"{key}={value}.*{needed}"):
        resolve_config("easy_vqa_cpu", given)
    assert resolve_config("easy_vqa_cpu", {"algorithm.max_advantage": 2.0, "replay.priority": "correctness"})


@pytest.mark.parametrize(
    ("given", "needed"),
    [
        ({"algorithm.advantage_baseline": "batch"}, "set one to 0, or the other to group"),
        ({"algorithm.advantages_per_reward": True, "reward.functions": TWO}, "set one to 0, or the other to false"),
    ],
)
def test_refill_goes_by_rewards(given, needed):
    """Rules under which queries of equal rewards have advantages are refused beside it."""
    assert resolve_config("easy_vqa_cpu", given)
    with pytest.raises(ConfigError, match=f"^algorithm.refill_rounds=2 drops queries .*{needed}"):
        resolve_config("easy_vqa_cpu", given | {"algorithm.refill_rounds": 2})


def test_a_reference_that_moves_is_in_memory():
    """Weights that ZeRO-3 keeps on a disk cannot be copied; on the host they can."""
    given = {"algorithm.kl_coef": 0.1, "algorithm.reference_every": 5}
    for device, fits in (("cpu", True), ("nvme", False)):
        given["train.deepspeed"] = {"zero_optimization": {"offload_param": {"device": device}}}
        if fits:
            assert resolve_config("easy_vqa_cpu", given)
            continue
        with pytest.raises(ConfigError, match=r"^algorithm.reference_every=5 .*offload_param.device=nvme.*cpu or none"):
            resolve_config("easy_vqa_cpu", given)
    for odd in ({"zero_optimization": 3}, {"zero_optimization": {"offload_param": "nvme"}}):  # DeepSpeed's to refuse
        assert resolve_config("easy_vqa_cpu", given | {"train.deepspeed": odd})
    given["train.deepspeed"] = {"zero_optimization": {"zero_hpz_partition_size": 8}}
    assert resolve_config("easy_vqa_cpu", given)
    with pytest.raises(ConfigError, match=r"^algorithm.reference_every=5 with policy.lora .*zero_hpz_partition_size=8"):
        resolve_config("easy_vqa_cpu", given | {"policy.lora.rank": 4})


def test_defaults_are_in_range():
    """Every default passes the check of its own type."""
    given = {setting.key: setting.default for setting in settings.settings()}
    assert settings._convert(given) == Config()


def test_a_setting_that_is_gone_names_what_took_its_place(monkeypatch, tmp_path):
    """An old recipe's setting that was renamed is refused with its new name, in a file and on the command line."""
    monkeypatch.setitem(settings.GONE, "train.steps", (100, "it is now train.max_steps"))
    assert refused("--train.steps", "3") == "the setting 'train.steps' is gone: it is now train.max_steps"
    (tmp_path / "r.yaml").write_text("train: {steps: 3}\n")
    assert "it is now train.max_steps" in refused(recipe=tmp_path / "r.yaml")


def test_an_entry_replaces_what_is_no_mapping():
    """Entries join a mapping; where a recipe has something else, they take its place."""
    values = {"a": {"b": 1}, "c": 2, "d": {"e": 3}}
    assert settings.joined(values, {"a": {"f": 4}, "c": {"g": 5}, "d": 6}) == {
        "a": {"b": 1, "f": 4}, "c": {"g": 5}, "d": 6,
    }  # fmt: skip


def test_a_caller_keeps_its_overrides():
    """The settings share nothing with the overrides they came from, nor with the defaults."""
    overrides = {"train.deepspeed": {"a": {"b": 1}}, "data.sources": {"x": {"train": "digits", "fields": {}}}}
    copy = json.loads(json.dumps(overrides))
    config = resolve_config("easy_vqa_cpu", overrides)
    assert overrides == copy
    config.train.deepspeed["a"]["b"] = 2
    config.data.sources["x"]["fields"]["answer"] = "y"
    config.data.fields["answer"] = "z"
    config.rethink.triggers.clear()
    assert overrides == copy
    assert resolve_config("easy_vqa_cpu").data.fields["answer"] == "answer" and Config().rethink.triggers
    assert resolve_config("easy_vqa_cpu").rethink.triggers


def model_folder(folder: Path, **files: bytes | str) -> Path:
    folder.mkdir()
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


MODEL = json.dumps({"model_type": "qwen2_5_vl", "vision_config": {}})


def weights(size: int = 8) -> bytes:
    """A .safetensors file with an embedding of `size` bytes; without its data it can be made sparse."""
    tensors = {
        "model.embed_tokens.weight": {"dtype": "U8", "shape": [size, 1], "data_offsets": [0, size]},
        "model.layers.0.mlp.down_proj.weight": {"dtype": "U8", "shape": [0, 1], "data_offsets": [size, size]},
    }
    header = json.dumps(tensors).encode()
    return len(header).to_bytes(8, "little") + header


def test_model_folders_without_weights(tmp_path):
    """A model folder that is missing, has no config or lacks (some of) its weights is refused by name."""
    assert "is not a folder" in refused("--policy.model", "./nowhere")
    assert "is not a folder" in refused("--policy.model", "runs/old/checkpoints/best")
    empty = model_folder(tmp_path / "empty")
    assert refused("--policy.model", str(empty)).startswith(f"policy.model={empty} has no config.json")
    bare = model_folder(tmp_path / "bare", config__json=MODEL)
    assert "has no weights (*.safetensors)" in refused("--policy.model", str(bare))
    truncated = model_folder(tmp_path / "truncated", config__json=MODEL, model__safetensors=b"")
    assert "model.safetensors are missing or empty" in refused("--policy.model", str(truncated))
    sharded = model_folder(tmp_path / "sharded", config__json=MODEL, a__safetensors=weights() + bytes(8))
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "b.safetensors are missing or empty" in refused("--policy.model", str(sharded))
    (sharded / "b.safetensors").write_bytes(weights() + bytes(8))
    assert load_config("easy_vqa_cpu", {"policy.model": str(sharded)}).policy.model == str(sharded)


def test_full_disks(tmp_path, monkeypatch):
    """A run that will not fit on run.dir's disk is refused before it starts; a larger model needs more."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 0, 100 * 2**20))
    message = refused("--run.dir", "big/runs")
    assert message.startswith("run.dir=big/runs has 0.10 GB of disk free and the run needs about 0.20 GB")
    checkpoint = tmp_path / "runs" / "x" / "checkpoints" / "step_000001"
    checkpoint.mkdir(parents=True)
    (tmp_path / "runs" / "x" / "config.yaml").write_text("")
    with (checkpoint / "model.safetensors").open("wb") as file:
        file.truncate(120 * 2**20)  # sparse
    assert load_config("easy_vqa_cpu", {"run.name": "x", "resume": "auto"})  # it makes room for the next ones
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 0, 400 * 2**20))
    assert load_config("easy_vqa_cpu")
    model = model_folder(tmp_path / "model", config__json=MODEL)
    with (model / "model.safetensors").open("wb") as file:
        file.write(header := weights(200 * 2**20))
        file.truncate(len(header) + 200 * 2**20)  # sparse
    assert "needs about 4.49 GB" in refused("--policy.model", str(model))  # three of 7 x 0.2, and two models
    moving = ("--algorithm.kl_coef", "0.1", "--algorithm.reference_every", "9")
    assert "needs about 5.08 GB" in refused("--policy.model", str(model), *moving)  # of 8 x 0.2
    assert "needs about 3.13 GB" in refused("--policy.model", str(model), "--checkpoint.keep", "1")


def test_run_folders_that_cannot_be_made(tmp_path):
    """A run neither overwrites another nor starts where it cannot write."""
    (tmp_path / "runs" / "old").mkdir(parents=True)
    assert load_config("easy_vqa_cpu", {"run.name": "old"})  # empty: nobody's
    (tmp_path / "runs" / "old" / "metrics.jsonl").write_text("")
    assert refused("--run.name", "old") == (
        "run.name=old: runs/old already holds a run; choose another run.name, or continue it with --resume auto"
    )
    (tmp_path / "file").write_text("")
    for below in ("file", "file/below"):
        assert (
            refused("--run.dir", below)
            == f"run.dir={below}: {tmp_path}/file is no folder that can be written to; choose another"
        )


def test_rewards_and_recordings_must_exist(tmp_path):
    """A reward function's file and a recording are looked for before anything starts."""
    assert "give boxed, format, judge, overlong, or path/to/file.py:function" in refused("--reward.function", "exact")
    assert "there is no file mine.py" in refused("--reward.function", "mine.py:score")
    (tmp_path / "mine.py").write_text("def score(response, answer, query): return 1.0")
    assert load_config("easy_vqa_cpu", {"reward.function": "mine.py:score"})
    assert "holds no episode_*.parquet" in refused(
        "--rollout.backend", "recorded", "--rollout.recording", str(tmp_path)
    )


def test_missing_packages_name_the_extra(monkeypatch):
    """An optional part that is not installed is named with the command that adds it."""
    found = doctor.find_spec
    missing = ("wandb", "swanlab", "mlflow", "vllm")
    monkeypatch.setattr(doctor, "find_spec", lambda name: None if name in missing else found(name))
    assert "rollout.backend=vllm needs the package vllm, which is missing: pip install" in refused()
    for tracker in ("wandb", "swanlab", "mlflow"):
        message = refused("--rollout.backend", "hf", "--run.trackers", f"[{tracker}]")
        assert message.startswith(f"run.trackers={tracker} needs the package {tracker}") and f"[{tracker}]'" in message


def test_a_refused_run_leaves_nothing_behind(tmp_path):
    """Loading settings writes nothing, accepted or refused."""
    refused("--train.batch_pairs", "500")
    load_config("easy_vqa_cpu")
    assert list(tmp_path.iterdir()) == []
