"""The training-step benchmark times the same step in every variant, and nothing that computes another one."""

from __future__ import annotations

import copy
import dataclasses
import json
import multiprocessing
import multiprocessing.dummy
from pathlib import Path

import pytest
import torch

from benchmarks import train_step, train_step_run
from benchmarks.train_step_run import Job, agreement, agrees, compare, gradients, run_variant, step
from benchmarks.train_step_variants import VARIANTS, Settings, behaviour_logps, padded
from benchmarks.train_step_workload import SIZES, Counts, Traffic, Workload, build_model, flops, model_config
from tests import forked

TRAFFIC = Traffic(2, 4, (3, 6), (4, 9), 6, 20)
SETTINGS = Settings("cpu", torch.float32, 100, False, "sdpa")


def tiny_model():
    return build_model(model_config(SIZES["tiny"]), "cpu", torch.float32)


@pytest.fixture(scope="module")
def workload() -> Workload:
    made = Workload(SIZES["tiny"], TRAFFIC)
    made.set_behaviour(behaviour_logps(tiny_model(), made, SETTINGS), 0.08)
    return made


@pytest.fixture(scope="module")
def expected(workload):
    """Loss and gradients of `eager`."""
    return taken("eager", workload)


def taken(variant: str, workload: Workload, plant=None, settings: Settings = SETTINGS):
    """A variant's (loss, gradients), after `plant` has damaged its micro-batches."""
    model = tiny_model().train(settings.gradient_checkpointing)
    prepared = VARIANTS[variant](model, workload, settings)
    assert len(prepared.batches) > 1
    for batch in prepared.batches if plant else ():
        plant(batch)
    return step(model, prepared, "cpu").item(), gradients(model)


@pytest.mark.parametrize(
    ("size", "billions"), [("3B", 3.75), ("7B", 8.29), ("32B", 33.5), ("72B", 73.4)], ids=lambda value: str(value)
)
def test_sizes_are_qwen2_5_vls(size, billions):
    """Each config makes a model with as many parameters as the published one, to 0.5%."""
    model = build_model(model_config(SIZES[size]), "meta", torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(1e9 * billions, rel=5e-3)


@pytest.mark.parametrize("variant", ["torch.compile", "rethinker", "rethinker per-sample"])
def test_variants_agree(variant, workload, expected, monkeypatch):
    """Loss and gradients are those of `eager`, in fp32 to rounding, whatever the micro-batches."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # compiling takes a minute here
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: None)
    found = agreement(taken(variant, workload), expected)
    assert found["loss_error"] <= 1e-6 and found["gradient_error"] <= 1e-5 and not found["missing"]


@pytest.mark.parametrize("variant", ["eager", "rethinker"])
def test_gradient_checkpointing_changes_memory_only(variant, workload, expected, monkeypatch):
    """With checkpointing every decoder layer runs twice, and loss and gradients stay."""
    runs = []
    layer = type(tiny_model().model.language_model.layers[0])
    original = layer.forward
    monkeypatch.setattr(
        layer, "forward", lambda self, *args, **kwargs: runs.append(1) or original(self, *args, **kwargs)
    )
    taken(variant, workload)
    once = len(runs)
    found = taken(variant, workload, settings=dataclasses.replace(SETTINGS, gradient_checkpointing=True))
    assert len(runs) == 3 * once
    assert agrees(agreement(found, expected), torch.float32)


def shift_labels(batch):
    batch.source_index[1:] = batch.source_index[:-1].clone()


def leak_between_responses(batch):
    batch.response_id.clamp_(max=1)


def lose_an_image(batch):
    batch.image_inputs["pixel_values"][:100] = 0


def scale_advantages(batch):
    batch.advantages *= 1.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("plant", [shift_labels, leak_between_responses, lose_an_image, scale_advantages])
def test_a_wrong_variant_is_caught(plant, dtype, workload, expected):
    """Each of these faults exceeds the tolerances, those of bf16 too."""
    assert not agrees(agreement(taken("rethinker", workload, plant), expected), dtype)


def test_a_missing_gradient_or_nan_is_no_agreement(expected):
    """Neither a parameter without a gradient nor a NaN passes for agreement."""
    loss, parts = expected
    name = "model.visual.patch_embed.proj.weight"
    without = {key: part for key, part in parts.items() if key != name}
    assert not agrees(agreement((loss, without), expected), torch.bfloat16)
    assert not agrees(agreement((loss, parts | {name: parts[name] * float("nan")}), expected), torch.bfloat16)
    assert not agrees(agreement((float("nan"), parts), expected), torch.bfloat16)


def test_padding_stays_within_the_budget_and_is_counted(workload):
    """No padded micro-batch of several samples exceeds the budget, none is lost, and the counts are of the tensors."""
    batches, counts = padded(tiny_model(), workload, SETTINGS)
    sizes = [batch.input_ids.numel() for batch in batches]
    assert all(n <= SETTINGS.micro_batch_tokens or len(b.input_ids) == 1 for n, b in zip(sizes, batches, strict=True))
    assert sum(len(b.input_ids) for b in batches) == len(workload.samples)
    assert counts.tokens == sum(sizes) >= workload.useful.tokens
    assert sum(int(b.attention_mask.sum()) for b in batches) == workload.useful.tokens
    assert sum(int(b.mask.sum()) for b in batches) == workload.useful.head_rows


def test_flops_are_those_of_the_matrix_products():
    """The formula is what torch counts in a forward and backward, but for biases, norms and the vision's scores."""
    from torch.utils.flop_counter import FlopCounterMode

    model, T, patches = tiny_model(), 200, 144
    model.set_attn_implementation({"text_config": "eager", "vision_config": "eager"})  # counted as matrix products
    embeds = torch.randn(1, T, SIZES["tiny"].hidden, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        hidden = model.model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        model.lm_head(hidden[:, -50:]).sum().backward()
    # Plain attention computes all pairs, the masked ones too.
    assert flops(model, Counts(T, 50, 0, T * T)) == pytest.approx(counter.get_total_flops(), rel=0.01)

    pixels = torch.randn(patches, 3 * 2 * 8 * 8, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model.model.visual(pixels, torch.tensor([[1, 12, 12]])).pooler_output.sum().backward()
    scores = 12 * sum(block.attn.dim for block in model.model.visual.blocks) * patches**2
    assert counter.get_total_flops() - scores <= flops(model, Counts(patches=patches)) <= counter.get_total_flops()


class Pipe:
    """Stands for the pipe of a variant's process, in this one."""

    def __init__(self):
        self.sent = []

    def send(self, message):
        self.sent.append(message)

    def recv(self):
        raise AssertionError("nothing to ask a variant that cannot run")


def job(variant: str, workload: Workload) -> Job:
    return Job(variant, SIZES["tiny"], None, workload, SETTINGS, 2, torch.get_num_threads(), None)


def test_a_lack_of_memory_or_of_a_package_is_a_result(workload, monkeypatch):
    """What stops a variant is reported with its reason and is not fatal."""
    if not torch.cuda.is_available():  # Liger is missing, or finds no GPU
        pipe = Pipe()
        run_variant(pipe, job("liger", workload))
        ((kind, reason),) = pipe.sent
        assert kind == "skipped" and "liger" in reason

    def raises(error):
        def variant(*_):
            raise error

        return variant

    for error, kind, reason in (
        (torch.OutOfMemoryError("tried to allocate 5 GiB\nmore"), "failed", "out of memory: tried to allocate 5 GiB"),
        (ImportError("no peer"), "skipped", "no peer"),
        (ValueError("bad"), "failed", "ValueError: bad"),
    ):
        monkeypatch.setitem(train_step_run.VARIANTS, "eager", raises(error))
        pipe = Pipe()
        run_variant(pipe, job("eager", workload))
        assert pipe.sent == [(kind, reason)]


@pytest.mark.parametrize("in_turns", [True, False])
def test_a_variant_that_disagrees_is_not_timed(in_turns, workload, monkeypatch):
    """A second variant that takes another step than the first is stopped before it is timed (threads as processes)."""
    monkeypatch.setattr(train_step_run.multiprocessing, "get_context", lambda _: multiprocessing.dummy)
    other = copy.deepcopy(workload)
    other.samples[0].advantage *= -1
    jobs = [job("eager", workload), job("rethinker", other), job("rethinker per-sample", workload)]
    (_, first), (_, second), (_, third) = compare(jobs, in_turns=in_turns)
    assert first["median_s"] > 0 and first["agreement"]["gradient_error"] == 0
    assert "disagrees with eager" in second["failed"] and "median_s" not in second
    assert first["repeats"] == third["repeats"] == 2 and third["agreement"]["with"] == "eager"


def test_the_command_writes_results_and_a_chart(tmp_path: Path, monkeypatch, capsys):
    """The whole run: variants agree, rates follow from tokens and times, and a CPU's figures are named as such."""
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: forked.FORKS)  # three processes that import nothing
    lengths = "--size tiny --queries 2 --group-size 3 --response-median 6 --response-max 12 --repeats 2"
    arguments = [*lengths.split(), "--variants", "eager", "rethinker", "--out", str(tmp_path)]
    assert train_step.main(arguments) == 0
    (found,) = tmp_path.glob("*/train_step.json")
    report = json.loads(found.read_text())
    useful = Counts(**report["useful"])
    for name in ("eager", "rethinker"):
        result = report["variants"][name]
        assert result["useful_tokens_per_s"] * result["median_s"] == pytest.approx(useful.tokens)
        low, high = result["quartiles_s"]
        assert 0 < low <= result["median_s"] <= high
    assert report["variants"]["eager"]["processed"]["tokens"] >= useful.tokens
    assert report["variants"]["rethinker"]["processed"]["tokens"] < useful.tokens
    assert report["machine"]["versions"]["torch"] and report["settings"]["size"] == "tiny"
    if not torch.cuda.is_available():
        assert "says nothing about one" in report["note"] and "No CUDA device" in capsys.readouterr().out
    assert "<svg" in (found.parent / "train_step.svg").read_text()
