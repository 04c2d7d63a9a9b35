"""The plan's arithmetic where it can be checked without a GPU: published sizes, laws between settings, advice."""

from __future__ import annotations

import functools
import json
import re
import tempfile
from pathlib import Path

import pytest
import torch

from rethinker import cli
from rethinker.config import Config, ConfigError, PolicyConfig
from rethinker.plan.build import ADVICE, Machine, Plan, batches_of, make_plan
from rethinker.plan.memory import GIB, rollout_of, total, training_state
from rethinker.plan.model import Shape, shape_of
from rethinker.policy import lora
from rethinker.policy.cpu_layers import RMSNorm
from rethinker.settings import resolve_config
from tests.plan.published import write

QWEN = "Qwen/Qwen2.5-VL-{}-Instruct"
LAYERS = 2
_FOLDER = tempfile.TemporaryDirectory()


def machine(gpus: int, gib: float = 80, **other) -> Machine:
    return Machine(gpus, gib * GIB, **other)


@functools.cache
def flat(size: str) -> str:
    """A folder with the config.json of a published model that has only two layers: its laws are those of all."""
    return write(QWEN.format(size), Path(_FOLDER.name, size), layers=LAYERS)


def settings(**overrides) -> Config:
    """A recipe's settings for the flat 7B; `__` in a keyword stands for a dot."""
    values = {"policy.model": flat("7B"), "policy.dtype": "bfloat16", "data.max_pixels": 1280 * 28 * 28}
    values |= {"data.max_prompt_tokens": 2048, "rollout.max_new_tokens": 2048, "train.episode_queries": 1024}
    return resolve_config("easy_vqa_cpu", values | {key.replace("__", "."): value for key, value in overrides.items()})


def shape(**overrides) -> Shape:
    return shape_of(settings(**overrides).policy, on_gpu=True)


def phases(plan) -> dict[str, float]:
    return {phase.name: phase.bytes / GIB for phase in plan.phases}


@pytest.mark.parametrize("limit", [2**20, lora.GATHERED, 2**40])
def test_no_group_of_a_weight_sync_is_larger_than_planned(limit, monkeypatch):
    """Of a real size, whether the limit holds a single weight, some, or all; and one group is as large as planned, or
    the planned one is the limit."""
    for module in ("policy.lora", "plan.model"):
        monkeypatch.setattr(f"rethinker.{module}.GATHERED", limit)
    planned = shape(policy__dtype="float32")
    weights = lora.base_parameters(planned.policy.hf)
    groups = [sum(weight.numel() for weight in group.values()) for group in lora.FullWeights(weights)._groups()]
    assert max(groups) <= planned.largest_group in (max(groups), limit)


def test_an_fp32_model_keeps_what_its_layers_keep():
    """On a GPU transformers' norms, on a CPU this project's, which keep less."""
    norms = {on_gpu: _norms(shape_of(settings(policy__dtype="float32").policy, on_gpu)) for on_gpu in (True, False)}
    assert RMSNorm in norms[False] and RMSNorm not in norms[True]


def _norms(planned: Shape) -> set[type]:
    return {type(module) for module in planned.policy.modules() if type(module).__name__.endswith("RMSNorm")}


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        (QWEN.format("3B"), 3_754_622_976),
        (QWEN.format("7B"), 8_292_166_656),
        (QWEN.format("32B"), 33_452_718_336),
        (QWEN.format("72B"), 73_410_777_344),
        ("Qwen/Qwen3-VL-8B-Instruct", 8_767_123_696),
        ("Qwen/Qwen3-VL-30B-A3B-Instruct", 31_070_754_032),
        # Published are 9,653,104,368 with the layer that predicts a second token, which is not trained here.
        ("Qwen/Qwen3.5-9B", 9_653_104_368 - 243_290_624),
    ],
)
def test_published_configs_make_the_published_sizes(model, parameters, tmp_path):
    """A config.json alone gives exactly the parameters of the published weights, and takes no memory for them."""
    found = shape_of(PolicyConfig(model=write(model, tmp_path)), on_gpu=True)
    assert found.parameters == found.trained == parameters
    assert all(parameter.is_meta for parameter in found.policy.parameters())


def test_a_model_that_is_nowhere_is_named(tmp_path, capsys):
    """No config.json, in a folder or in a hub that cannot be reached: one line that says how to get one."""
    for model in ("nobody/nothing", str(tmp_path)):
        with pytest.raises(ConfigError, match=rf"policy.model={model}: no config.json.*hf download NAME config.json"):
            shape_of(PolicyConfig(model=model))
    assert cli.main(["plan", "qwen2_5_vl_7b", "--gpus", "8"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_state_is_eighteen_bytes_per_parameter_over_the_ranks():
    """bf16: 2 + 4 + 4 + 8 bytes per parameter, divided by the ranks; offloaded, the GPU keeps the 2 of the weights and
    the host gets an fp32 gradient besides; a frozen vision tower has weights alone."""
    flat_7b, bucket = shape(), 5e8 * 2
    for ranks in (1, 8, 64):
        device, host = training_state(settings(), flat_7b, ranks, True)
        assert total(device) == pytest.approx(18 * flat_7b.parameters / ranks + bucket)
        assert host == {}
    away = settings(train__deepspeed={"zero_optimization": {"offload_optimizer": {"device": "cpu"}}})
    device, host = training_state(away, flat_7b, 8, True)
    assert total(device) == pytest.approx(2 * flat_7b.parameters / 8 + bucket)
    assert total(host) == pytest.approx(20 * flat_7b.parameters / 8)
    nodes = settings(train__deepspeed={"zero_optimization": {"zero_hpz_partition_size": 8}})
    for ranks, sharing in ((64, 8), (4, 4)):  # of a node, whose GPUs share a second copy of the weights
        device, host = training_state(nodes, flat_7b, ranks, True)
        assert total(device) == pytest.approx((18 / ranks + 2 / sharing) * flat_7b.parameters + bucket)
        assert host == {}
    frozen = shape(policy__freeze_vision=True)
    device, _ = training_state(settings(), frozen, 8, True)
    assert total(device) == pytest.approx((2 * frozen.parameters + 16 * frozen.trained) / 8 + bucket)


def test_only_adapters_have_gradients_and_moments():
    """policy.lora.rank: 2 bytes of every weight, 18 of an adapter's, whatever else is frozen; no second model for
    algorithm.kl_coef; a checkpoint is a model with little more; the sync has a merged weight besides."""
    D, wide = 3584, 18944
    both = {"q_proj": 2 * D, "k_proj": D + 512, "v_proj": D + 512, "o_proj": 2 * D}
    sides = both | dict.fromkeys(("gate_proj", "up_proj", "down_proj"), D + wide)
    adapted = shape(policy__lora__rank=16)
    assert adapted.adapters == adapted.trained == LAYERS * 16 * sum(sides.values()) and adapted.merged == D * wide
    few = shape(policy__lora__rank=16, policy__lora__target_modules=["q_proj"])
    assert few.adapters == LAYERS * 16 * sides["q_proj"] and few.merged == D * D
    assert few.parameters == adapted.parameters == shape().parameters
    for other in ({}, {"algorithm__kl_coef": 0.01}, {"policy__freeze_vision": True}):
        config = settings(policy__lora__rank=16, **other)
        device, _ = training_state(config, shape_of(config.policy), 8, True)
        assert total(device) == pytest.approx((2 * adapted.parameters + 18 * adapted.adapters) / 8 + 5e8 * 2)
    base, lora = (phases(make_plan(settings(policy__lora__rank=rank), machine(1))) for rank in (None, 16))
    assert lora["training"] < base["training"] - 16 * shape().parameters / GIB and lora["disk"] < base["disk"] / 4
    with pytest.raises(ConfigError, match="q_prj.* they have .*self_attn.q_proj"):
        make_plan(settings(policy__lora__rank=16, policy__lora__target_modules=["q_prj"]), machine(8))


def test_deepspeeds_own_settings_are_checked():
    """What DeepSpeed does not take is one error before anything runs."""
    with pytest.raises(ConfigError, match=r"train.deepspeed.zero_optimization: .*reduce_bucket_size"):
        make_plan(settings(train__deepspeed={"zero_optimization": {"reduce_bucket_size": "many"}}), machine(8))


def test_every_switch_moves_its_phase():
    """A reference policy adds its weights, and where it moves to every checkpoint, too; without sleep the engine is
    added to the training; more ranks lessen every phase of a rank and leave the disk; a frozen vision tower keeps no
    activations."""
    base = phases(make_plan(settings(), machine(8)))
    awake = phases(make_plan(settings(rollout__sleep=False), machine(8)))
    assert awake["training"] == pytest.approx(base["training"] + 0.4 * 80)
    reference = phases(make_plan(settings(algorithm__kl_coef=0.01), machine(8)))
    assert reference["rollout"] == pytest.approx(base["rollout"] + 2 * shape().parameters / 8 / GIB)
    moving = phases(make_plan(settings(algorithm__kl_coef=0.01, algorithm__reference_every=5), machine(8)))
    checkpoints = settings().checkpoint.keep + 1
    assert moving == pytest.approx(reference | {"disk": base["disk"] + checkpoints * 2 * shape().trained / GIB})
    wide = phases(make_plan(settings(), machine(16)))
    assert all(wide[name] < base[name] for name in ("training", "rollout", "weight sync"))
    assert wide["disk"] == base["disk"]
    for change in ({"policy__freeze_vision": True}, {"data__max_images": 1}):
        assert phases(make_plan(settings(**change), machine(8)))["training"] < base["training"] - 1, change


@pytest.mark.parametrize("name", ["ssr", "grpo"])
def test_images_of_an_environment_are_planned(name):
    """A micro-batch of responses that show images may hold more of them than one of prompts alone, and never more
    tokens of images than tokens."""
    config, planned = settings(**{"algorithm.name": name, "environment.max_images": 6}), shape()
    plain = batches_of(config, planned, 8).largest
    config.environment.use = ["crop"]
    looking = batches_of(config, planned, 8).largest
    assert plain.image_tokens < looking.image_tokens <= looking.tokens == plain.tokens


def test_sdpa_pays_for_its_mask():
    """With SDPA every layer keeps a float mask of its own; flash attention, the default on a GPU, does without."""
    auto, flash, sdpa = (
        phases(make_plan(settings(policy__attention=kernel), machine(8))) for kernel in ("auto", "flash", "sdpa")
    )
    assert sdpa["training"] > flash["training"] + 0.5
    assert auto == flash


def test_the_cache_is_what_vllms_share_leaves(tmp_path):
    """Weights, working memory and cache together are rollout.gpu_memory_utilization of a GPU; a token takes keys and
    values of every layer, 56 KiB in the 7B; an engine over 4 GPUs holds a quarter of the weights on each."""
    whole = shape_of(PolicyConfig(model=write(QWEN.format("7B"), tmp_path)), on_gpu=True)
    for tp in (1, 4):
        rollout = rollout_of(settings(rollout__tensor_parallel_size=tp), whole, 8, 80 * GIB)
        weights, _, cache = rollout.budget.values()
        assert total(rollout.budget) == pytest.approx(0.4 * 80 * GIB)
        assert weights == 2 * whole.parameters / tp and cache / rollout.cache_tokens == pytest.approx(57344 / tp)
    alone = make_plan(settings(rollout__gpu_memory_utilization=0.05), machine(8))
    assert alone.rollout.cache_tokens < 4096 and alone.rollout.waves == 0 and "vLLM's cache" in alone.problems


def test_a_checkpoint_on_disk():
    """A checkpoint to resume from is the model and 12 bytes per parameter; as many as are kept, one more while it is
    written, and the best and the last model."""
    plan = make_plan(settings(), machine(8))
    keep, disk = plan.config.checkpoint.keep, plan.phases[-1]
    assert disk.bytes == pytest.approx(((keep + 1) * 14 + 2 * 2) * plan.shape.parameters)


OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
CHANGES = {
    "policy.gradient_checkpointing": True,
    "train.micro_batch_tokens": 4096,
    "train.deepspeed": OFFLOAD,
    "policy.lora.rank": 16,
    "rollout.gpu_memory_utilization": {"rollout": 0.2, "vLLM's cache": 0.6},
    "rollout.kv_cache_gb": {"memory": 0.1, "vLLM's cache": 4.0},
    "rollout.sleep": True,
    "rollout.tensor_parallel_size": 2,
    "reward.workers": 1,
    "checkpoint.keep": 1,
    "--gpus": 16,
}


@functools.cache
def plan_with(gpus: int, changes: str) -> Plan:
    """The plan of these settings (JSON): several problems have the same advice."""
    return make_plan(settings(**json.loads(changes)), machine(gpus))


@pytest.mark.parametrize("problem", ADVICE)
def test_all_advice_lessens_its_problem(problem):
    """Every setting that is named for a problem takes less, or leaves the cache more room, when it alone is changed."""

    def size(gpus: int, **changes) -> float:
        plan = plan_with(gpus, json.dumps(changes))
        return -plan.rollout.cache_tokens if problem == "vLLM's cache" else phases(plan)[problem]

    names = re.findall(r"--gpus|[a-z]+\.[a-z_.]*[a-z]", ADVICE[problem])
    assert names
    for name in names:
        value = CHANGES[name]
        value = value[problem] if problem in (value if isinstance(value, dict) else {}) else value
        gpus = 0 if problem == "memory" or name == "rollout.kv_cache_gb" else 8
        less = size(value) if name == "--gpus" else size(gpus, **{name: value})
        assert less < size(gpus, **({"rollout.sleep": False} if name == "rollout.sleep" else {})), name


def test_parallel_sizes_that_cannot_be():
    """A tensor_parallel_size that divides neither the GPUs nor the heads is a mistake, with sizes that work."""
    for wrong in (3, 8):
        with pytest.raises(
            ConfigError, match=rf"tensor_parallel_size={wrong} must divide .*28 attention heads: 1, 2, 4"
        ):
            make_plan(settings(rollout__tensor_parallel_size=wrong), machine(8))


def test_command(capsys, tmp_path):
    """Exit code 0 when it fits and 1 when not, with the verdict in the table and in words, or all as JSON; 2
    and one line for a mistake; nothing is written."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"policy: {{model: {flat('72B')}}}\ntrain: {{micro_batch_tokens: 65536}}\n")
    command = ["plan", str(recipe), "--gpus", "8", "--gpu-memory", "80"]
    assert cli.main(command) == 1
    printed = capsys.readouterr().out
    assert "TOO MUCH" in printed and "Does not fit: training" in printed
    assert ADVICE["training"] in printed and max(map(len, printed.splitlines())) < 260
    assert "\x1b" not in printed  # plain text where it is piped
    assert cli.main([*command, "--policy.gradient_checkpointing", "true"]) == 0
    printed = capsys.readouterr().out
    assert "It fits" in printed and "TOO MUCH" not in printed
    assert cli.main([*command, "--json"]) == 1
    training = json.loads(capsys.readouterr().out)["training"]
    assert sum(training["bytes"].values()) > training["limit"] == 80 * GIB
    assert cli.main(["plan", "--help"]) == 0 and "--gpu-memory" in capsys.readouterr().out
    for mistake, words in (
        (["plan"], "name a recipe first"),
        ([*command, "--train.batch_pairs", "500"], "train.batch_pairs"),
        (["plan", str(recipe), "--gpus", "0"], "--gpus 0"),
        (["plan", str(recipe), "--gpus", "many"], "--gpus"),
        (["plan", str(recipe), "--gpu-memory", "80"], "needs --gpus"),
        (["plan", str(recipe), "--gpu", "8"], "gpu"),
    ):
        assert cli.main(mistake) == 2, mistake
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and words in error
    assert list(tmp_path.iterdir()) == [recipe]


def test_without_gpus_this_machine_is_planned(capsys, monkeypatch):
    """The embedded default on a CPU: host memory of this process against this machine's."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["plan", "easy_vqa_cpu"]) == 0
    printed = capsys.readouterr().out
    assert "this CPU" in printed and "vLLM's key-value cache" in printed and "fits" in printed
    monkeypatch.setattr("rethinker.plan.command.memory_gb", lambda: 2.0)
    assert cli.main(["plan", "easy_vqa_cpu"]) == 1
    assert "train.micro_batch_tokens" in capsys.readouterr().out
