"""The plan's arithmetic where it can be checked without a GPU: published sizes, laws between settings, remedies."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch

from rethinker import cli
from rethinker.config import Config, ConfigError, PolicyConfig
from rethinker.plan import memory
from rethinker.plan.build import Machine, make_plan, remedies
from rethinker.plan.memory import GIB, total, training_state
from rethinker.plan.rollout import rollout_of
from rethinker.plan.shapes import PUBLISHED, meta_model, shape_of
from rethinker.settings import resolve_config

QWEN = "Qwen/Qwen2.5-VL-{}-Instruct"


def machine(gpus: int, gib: float = 80, **other) -> Machine:
    return Machine(gpus, gib * GIB, 8, None, **other)


def settings(size: str = "7B", **overrides) -> Config:
    """A recipe's settings for a real model; `__` in a keyword stands for a dot."""
    values = {"policy.model": QWEN.format(size), "policy.dtype": "bfloat16", "data.max_pixels": 1280 * 28 * 28}
    values |= {"data.max_prompt_tokens": 2048, "rollout.max_new_tokens": 2048, "train.episode_queries": 1024}
    return resolve_config("easy_vqa_cpu", values | {key.replace("__", "."): value for key, value in overrides.items()})


def phases(plan) -> dict[str, float]:
    return {phase.name: phase.bytes / GIB for phase in plan.phases}


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        (QWEN.format("3B"), 3_754_622_976),
        (QWEN.format("7B"), 8_292_166_656),
        (QWEN.format("32B"), 33_452_718_336),
        (QWEN.format("72B"), 73_410_777_344),
        ("Qwen/Qwen3-VL-8B-Instruct", 8_767_123_696),
    ],
)
def test_known_models_have_their_published_sizes(model, parameters):
    """The shapes that ship with the package make exactly the parameters of the published weights."""
    assert model in PUBLISHED
    assert shape_of(model).parameters == parameters


def test_a_model_that_is_nowhere_is_named(tmp_path):
    """Neither a folder, nor cached, nor known: one error that says what would work."""
    with pytest.raises(ConfigError, match=r"policy.model=nobody/nothing has no config.json here.*Qwen2.5-VL-7B"):
        shape_of("nobody/nothing")
    with pytest.raises(ConfigError, match="has no config.json"):
        shape_of(str(tmp_path))


def test_state_is_eighteen_bytes_per_parameter_over_the_ranks():
    """bf16: 2 + 4 + 4 + 8 bytes per parameter, divided by the ranks; offloaded, the GPU keeps the 2 of the weights and
    the host gets an fp32 gradient besides; a frozen vision tower has weights alone."""
    shape, bucket = shape_of(QWEN.format("7B")), 5e8 * 2
    for ranks in (1, 8, 64):
        device, host = training_state(settings(), shape, ranks, True)
        assert total(device) == pytest.approx(18 * shape.parameters / ranks + bucket)
        assert host == []
    away = settings(train__deepspeed={"zero_optimization": {"offload_optimizer": {"device": "cpu"}}})
    device, host = training_state(away, shape, 8, True)
    assert total(device) == pytest.approx(2 * shape.parameters / 8 + bucket)
    assert total(host) == pytest.approx(20 * shape.parameters / 8)
    nodes = settings(train__deepspeed={"zero_optimization": {"zero_hpz_partition_size": 8}})
    for ranks, sharing in ((64, 8), (4, 4)):  # of a node, whose GPUs share a second copy of the weights
        device, host = training_state(nodes, shape, ranks, True)
        assert total(device) == pytest.approx((18 / ranks + 2 / sharing) * shape.parameters + bucket)
        assert host == []
    device, _ = training_state(settings(policy__freeze_vision=True), shape, 8, True)
    assert total(device) == pytest.approx((18 * shape.text_parameters + 2 * shape.vision_parameters) / 8 + bucket)


def test_only_adapters_have_gradients_and_moments():
    """policy.lora.rank: 2 bytes of every weight, 18 of an adapter's, whatever else is frozen; no second model for
    algorithm.kl_coef; a checkpoint is a model with little more; the sync has a merged weight besides."""
    shape, config = shape_of(QWEN.format("7B")), settings(policy__lora__rank=16)
    sides = {name: wide + high for name, wide, high in shape.linears}
    assert len(sides) == 7 and sides["self_attn.q_proj"] == 2 * 3584 and sides["mlp.up_proj"] == 3584 + 18944
    adapters = memory.lora_parameters(config, shape)
    assert adapters == 28 * 16 * sum(sides.values())
    few = settings(policy__lora__rank=16, policy__lora__target_modules=["q_proj"])
    assert memory.lora_parameters(few, shape) == 28 * 16 * 2 * 3584
    for other in ({}, {"algorithm__kl_coef": 0.01}, {"policy__freeze_vision": True}):
        device, _ = training_state(settings(policy__lora__rank=16, **other), shape, 8, True)
        assert total(device) == pytest.approx((2 * shape.parameters + 18 * adapters) / 8 + 5e8 * 2)
    base, lora = phases(make_plan(settings(), machine(8))), phases(make_plan(config, machine(8)))
    assert lora["training"] < base["training"] - 16 and lora["disk"] < base["disk"] / 4
    with pytest.raises(ConfigError, match="nearest: q_proj"):
        make_plan(settings(policy__lora__rank=16, policy__lora__target_modules=["q_prj"]), machine(8))


def test_rollouts_ahead_run_beside_the_training():
    """rollout.max_staleness=1: a step takes the longer of its halves, not their sum."""
    servers = {"rollout__backend": "server", "rollout__servers": ["http://127.0.0.1:1"]}
    ahead = {"rollout__max_staleness": 1, "algorithm__rollout_correction": 2.0}
    after, beside = (make_plan(settings(**servers, **more), machine(8)).times for more in ({}, ahead))
    training = max(after.train_s, after.gather_s)
    assert (after.step_s, beside.step_s) == (training + after.rollout_s, max(training, after.rollout_s))


def test_a_nodes_copy_of_the_weights_spares_the_network():
    """hpZ: of 3 transfers of the weights per micro-batch 1 stays between nodes, and 2 run at NVLink's speed, which is
    9 times the network's; in one node nothing changes."""
    hpz = {"zero_optimization": {"zero_hpz_partition_size": 8}}
    configs = [settings(train__micro_batch_tokens=256, train__deepspeed=zero) for zero in ({}, hpz)]
    for gpus, share in ((8, 1.0), (64, (1 + 2 / 9) / 3)):
        plain, copied = (make_plan(config, machine(gpus)).times.gather_s for config in configs)
        assert copied / plain == pytest.approx(share, abs=0.02)


def test_deepspeeds_own_settings_are_checked():
    """What DeepSpeed does not take is one error before anything runs."""
    with pytest.raises(ConfigError, match=r"train.deepspeed.zero_optimization: .*reduce_bucket_size"):
        make_plan(settings(train__deepspeed={"zero_optimization": {"reduce_bucket_size": "many"}}), machine(8))


def test_every_switch_moves_its_phase():
    """Checkpointing, fewer tokens and a frozen vision tower lessen training; without sleep the engine is added to it; a
    reference policy adds its weights; more ranks lessen every phase of a rank and leave the disk."""
    base = phases(make_plan(settings(), machine(8)))
    for change in (
        {"policy__gradient_checkpointing": True},
        {"train__micro_batch_tokens": 8192},
        {"policy__freeze_vision": True},
        {"data__max_images": 1},
    ):
        assert phases(make_plan(settings(**change), machine(8)))["training"] < base["training"] - 1, change
    awake = phases(make_plan(settings(rollout__sleep=False), machine(8)))
    assert awake["training"] == pytest.approx(base["training"] + 0.4 * 80)
    reference = phases(make_plan(settings(algorithm__kl_coef=0.01), machine(8)))
    assert reference["rollout"] == pytest.approx(base["rollout"] + 2 * 8.292166656e9 / 8 / GIB)
    wide = phases(make_plan(settings(), machine(16)))
    assert all(wide[name] < base[name] for name in ("training", "rollout", "weight sync"))
    assert wide["disk"] == base["disk"]


def test_sdpa_pays_for_its_mask():
    """With SDPA every layer keeps a float mask of its own; flash attention, the default on a GPU, does without."""
    auto, flash, sdpa = (
        phases(make_plan(settings(policy__attention=kernel), machine(8))) for kernel in ("auto", "flash", "sdpa")
    )
    assert sdpa["training"] > flash["training"] + 1
    assert auto == flash


def test_the_cache_is_what_vllms_share_leaves():
    """Weights, working memory and cache together are rollout.gpu_memory_utilization of a GPU; a token takes keys and
    values of every layer, 56 KiB in the 7B; an engine over 4 GPUs holds a quarter of the weights on each."""
    shape = shape_of(QWEN.format("7B"))
    for tp in (1, 4):
        rollout = rollout_of(settings(rollout__tensor_parallel_size=tp), shape, 8, 80 * GIB)
        assert total(rollout.terms) == pytest.approx(0.4 * 80 * GIB)
        assert rollout.terms[0].bytes == 2 * shape.parameters / tp
        assert rollout.terms[-1].bytes / rollout.cache_tokens == pytest.approx(57344 / tp)
    alone = rollout_of(settings("72B"), shape_of(QWEN.format("72B")), 8, 80 * GIB)
    assert alone.cache_missing > 0 and alone.waves == 0


def test_a_checkpoint_on_disk():
    """A checkpoint to resume from is the model and 12 bytes per parameter; as many as are kept, one more while it is
    written, and the best and the last model."""
    config = settings()
    keep, parameters = config.checkpoint.keep, 8_292_166_656
    assert make_plan(config, machine(8)).disk.bytes == pytest.approx(((keep + 1) * 14 + 2 * 2) * parameters)


@pytest.mark.parametrize(
    ("overrides", "where", "problem"),
    [
        ({}, machine(8), "training"),
        ({"rollout__sleep": False, "policy__gradient_checkpointing": True}, machine(1), "training"),
        ({"rollout__gpu_memory_utilization": 0.9}, machine(8), "rollout"),
        ({"rollout__sleep": False, "rollout__gpu_memory_utilization": 0.9}, machine(8), "weight sync"),
        ({"rollout__gpu_memory_utilization": 0.2}, machine(8), "vLLM's cache"),
        ({"reward__workers": 64}, Machine(8, 80 * GIB, 8, 200 * GIB), "host memory of a node"),
        ({}, Machine(8, 80 * GIB, 8, None, disk=100 * GIB), "disk"),
        ({}, Machine(0, 0, 1, 32 * GIB), "memory"),
    ],
)
def test_every_remedy_lessens_its_problem(overrides, where, problem):
    """Two or three options are named for what does not fit; each alone takes less, or leaves the cache more room."""

    def size(config, where) -> float:
        plan = make_plan(config, where)
        return -plan.rollout.cache_tokens if problem == "vLLM's cache" else phases(plan)[problem]

    config = settings(**overrides)
    plan = make_plan(config, where)
    assert problem in plan.problems
    options = dict(option.removeprefix("--").split(" ") for option in remedies(plan, problem))
    assert 2 <= len(options) <= 3
    for name, value in options.items():
        changed, machine_then = copy.deepcopy(config), where
        if name == "gpus":
            machine_then = dataclasses.replace(where, gpus=int(value))
        else:
            changed = settings(**overrides | {name: value})
        assert size(changed, machine_then) < size(config, where), name


def test_parallel_sizes_that_cannot_be(capsys):
    """A tensor_parallel_size that divides neither the GPUs nor the heads is a mistake, with sizes that work."""
    with pytest.raises(ConfigError, match=r"tensor_parallel_size=3 must divide the number of GPUs \(8\)"):
        make_plan(settings(rollout__tensor_parallel_size=3), machine(8))
    with pytest.raises(ConfigError, match=r"must divide the model's 28 attention heads; on 8 GPUs: 1, 2, 4"):
        make_plan(settings(rollout__tensor_parallel_size=8), machine(8))


def test_command(capsys, tmp_path):
    """Exit code 0 when it fits and 1 when not, with the same verdict in the table and in --json; 2 and one line for a
    mistake; nothing is written."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"policy: {{model: {QWEN.format('7B')}}}\n")
    command = ["plan", str(recipe), "--gpus", "8", "--gpu-memory", "80"]
    assert cli.main(command) == 1
    printed = capsys.readouterr().out
    assert (
        "TOO MUCH" in printed
        and "--policy.gradient_checkpointing true" in printed
        and max(map(len, printed.splitlines())) < 260
    )
    assert "\x1b" not in printed  # plain text where it is piped
    fixed = [*command, "--policy.gradient_checkpointing", "true", "--queries", "1000"]
    assert cli.main(fixed) == 0 and "It fits" in capsys.readouterr().out
    assert cli.main([*fixed, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["fits"] and said["phases"]["training"]["total"] < 80 * GIB and said["batches"]["schedule_steps"] == 46
    assert cli.main([*command, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["advice"]["training"][0] == "--policy.gradient_checkpointing true"
    assert cli.main(["plan", "--help"]) == 0 and "--gpu-memory" in capsys.readouterr().out
    for mistake, words in (
        (["plan"], "name a recipe first"),
        ([*command, "--train.batch_pairs", "500"], "train.batch_pairs"),
        ([*command, "--mfu", "2"], "--mfu 2"),
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
    assert cli.main(["plan", "easy_vqa_cpu", "--host-memory", "2"]) == 1
    assert "--train.micro_batch_tokens" in capsys.readouterr().out


def test_activations_hold_at_any_depth_and_length():
    """What is counted with two layers and thousands of tokens predicts a run of five layers and 1,024 tokens."""
    from rethinker.plan import activations

    config = copy.deepcopy(shape_of("tiny").config)
    config.text_config.num_hidden_layers = 5
    shape = dataclasses.replace(shape_of("tiny"), name="five layers", config=config)
    counted = activations.text_activations(shape, dtype="bfloat16", kernel="flash", row=0, checkpointing=False)
    policy = activations.policy_without_data(shape, PolicyConfig(dtype="bfloat16"), "flash", 5)
    positions = torch.empty(3, 1, 1024, dtype=torch.int64, device="meta")
    with activations.Count() as count:
        embeds = torch.empty(1, 1024, shape.hidden, dtype=torch.bfloat16, device="meta", requires_grad=True)
        masks = {"full_attention": None, "sliding_attention": None}
        output = policy.hf.model.language_model(
            inputs_embeds=embeds, position_ids=positions, attention_mask=masks, use_cache=False
        )
        kept = count.bytes
    assert kept / 1024 == pytest.approx(counted.kept, rel=0.03)
    del output


def test_meta_models_take_no_memory():
    """A model of any size is built without its weights."""
    model = meta_model(shape_of(QWEN.format("72B")).config, depth=1)
    assert all(parameter.is_meta for parameter in model.parameters())
