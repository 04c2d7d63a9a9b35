"""policy.compile under ZeRO-3, which gathers layers at once: the same steps as of plain layers that it gathers a matrix
at a time, one graph for all layers, and weights that do not stay gathered."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from rethinker.policy.loading import load_model
from rethinker.policy.model import compile_layers, gather_by_layer
from tests import forked
from tests.integration import compiled_steps
from tests.integration.compiled_steps import COMPILED_BY
from tests.integration.test_zero3 import relative_error
from tests.policy.conftest import tiny_folder  # noqa: F401  (a fixture)
from tests.policy.switches import batch_for, errors, make, outcome


def test_layers_that_fit_the_prefetch_bucket_are_gathered_at_once(tiny_folder):  # noqa: F811
    """A larger one would wait for weights that could not be fetched before it."""
    from deepspeed.utils import get_z3_leaf_modules

    def gathered(largest: float) -> set[str]:
        model = load_model(tiny_folder, torch.float32)
        gather_by_layer(model, largest)
        return {type(module).__name__ for module in get_z3_leaf_modules(model)}

    layer = load_model(tiny_folder, torch.float32).model.language_model.layers[0]
    size = sum(p.numel() for p in layer.parameters())
    assert gathered(size) == {"Qwen2_5_VLDecoderLayer", "Qwen2_5_VLVisionBlock"}
    assert gathered(size - 1) == {"Qwen2_5_VLVisionBlock"} and gathered(0) == set()


def launch(model: Path, scratch: Path, *runs: str, ranks: int = 1) -> dict:
    """What compiled_steps.py saw, by run."""
    output = scratch / "steps.pt"
    arguments = [str(model), str(scratch), str(output), *runs]
    forked.run(partial(compiled_steps.main, *arguments), scratch / "steps.log", ranks, seconds=580)
    return torch.load(output, weights_only=False)


def check(results: dict, reference: bool = False) -> None:
    for plain, compiled in zip(results[False], results[True], strict=True):
        for name in ("loss", "entropy", "kl", "old_kl", "grad_norm"):
            assert compiled["metrics"][name] == pytest.approx(plain["metrics"][name], rel=1e-5, abs=1e-7), name
        assert relative_error(compiled["gradients"], plain["gradients"]) <= 1e-5
        assert plain["live"] == compiled["live"] == 0
        assert plain["graphs"] == 0
    assert not results["breaks"]
    graphs = [step["graphs"] for step in results[True]]
    most = 6 if reference else 4  # one row and several: without gradients, with them, and the reference's
    assert 1 <= graphs[-1] <= most and graphs[COMPILED_BY - 1] == graphs[-1], graphs


@pytest.fixture(scope="module")
def traced(tiny_folder, tmp_path_factory):  # noqa: F811
    return launch(tiny_folder, tmp_path_factory.mktemp("compiled"), "eager checkpointing", "aot_eager lora kl")


def test_steps_are_those_of_the_plain_layers(traced):
    """Loss, entropy and gradients of seven batches of different shapes within 1e-5 relative, with gradient
    checkpointing; no graph is cut, none is compiled after each kind of batch came once, and after a forward no layer's
    weights are left gathered. Here the graphs run as they were traced: inductor's code takes a minute to compile."""
    check(traced["eager checkpointing"])


def test_adapters_in_compiled_layers(traced):
    """With policy.lora, whose frozen weights are the reference, nothing before the first layer is trained: the first
    layer's adapters get the same gradients all the same."""
    check(traced["aot_eager lora kl"], reference=True)


@pytest.mark.soak
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("options", [(), ("checkpointing", "kl"), ("checkpointing", "lora", "kl")], ids=" ".join)
def test_inductors_code_takes_the_same_steps(ranks, options, tiny_folder, tmp_path):  # noqa: F811
    """The same with the code that policy.compile runs, on one rank and on two."""
    run = " ".join(("inductor", *options))
    check(launch(tiny_folder, tmp_path, run, ranks=ranks)[run], reference="kl" in options)


def test_flash_attention_stays_apart(tiny_folder, tmp_path, monkeypatch):  # noqa: F811
    """Compiled layers call flash attention, which cuts them. Log-probs and gradients are those of SDPA in plain layers,
    and nothing is compiled anew for other lengths."""
    monkeypatch.setattr("rethinker.policy.model.compile_layers", partial(compile_layers, backend="eager"))
    torch._dynamo.reset()
    plain, compiled = make(tiny_folder, attention="sdpa"), make(tiny_folder, attention="flash", compile=True)
    stats = torch._dynamo.utils.counters["stats"]
    before, graphs = stats["unique_graphs"], []
    for lengths in ((2, 3), (5, 4, 9), (30, 1), (7,)):
        batch = batch_for(tiny_folder, plain, tmp_path, lengths)
        logp_error, gradient_error = errors(outcome(compiled, batch), outcome(plain, batch))
        assert logp_error <= 1e-5 and gradient_error <= 1e-5
        graphs.append(stats["unique_graphs"] - before)
    assert 2 <= graphs[1] == graphs[-1], graphs
