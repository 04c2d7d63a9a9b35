"""What all tests share: an environment without the model hub, and a way to run the command as a user does."""

from __future__ import annotations

import gc
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rethinker.runtime.torchvision_cpu import make_importable
from tests.families import table
from tests.families.table import cell  # noqa: F401  # a fixture

ROOT = Path(__file__).parents[1]

gc.disable()  # until all tests are collected

# A shell's background job ignores Ctrl-C, one under nohup a lost terminal, and so would all that a test starts and
# interrupts.
if threading.current_thread() is threading.main_thread():
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual)

# Two files run at a time, and a forked copy of a process has no OpenMP threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need a download
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])

SLOW = """
integration/test_resume.py kernels/test_triton.py integration/test_training.py kernels/test_compile_gate.py
rollout/test_router_replay.py plan/test_measured.py integration/test_faults.py rollout/test_two_ranks.py
rollout/server/test_engine.py integration/test_compiled_layers.py benchmarks/test_gpu_suite.py
benchmarks/test_end_to_end.py integration/test_saving.py integration/test_refill.py integration/test_out_of_memory.py
integration/test_lora.py benchmarks/test_train_step.py integration/test_moving_reference.py rollout/test_vllm_engine.py
rollout/test_vllm_cpu_ops.py benchmarks/test_ablation.py evaluation/test_command.py integration/test_zero3.py
test_recipes.py embedded/test_warmup.py plan/test_plan.py runtime/test_torchvision_cpu.py report/test_browser.py
rewards/test_checker.py integration/test_loss_head.py rewards/test_mutations.py report/test_page.py
rollout/test_faults.py kernels/test_csrc.py rollout/test_weight_sync.py test_wheel.py rewards/test_published.py
rewards/test_several.py integration/test_rewards.py integration/test_judge.py rewards/test_judge.py
rewards/test_judge_faults.py environments/test_user.py environments/test_python.py rewards/test_judge_server.py
rollout/server/test_serve.py kernels/test_precision.py
families/test_rollout.py kernels/test_csrc_cuda_on_host.py kernels/test_merge_attention.py embedded/test_tiny.py
integration/test_virl39k.py kernels/test_memory.py fuzz/test_fuzz.py families/test_packing.py families/test_pixels.py
kernels/test_sum_tree.py kernels/test_compile.py benchmarks/test_kernels.py families/test_ranks.py
policy/test_recurrent.py benchmarks/test_replay_benchmark.py kernels/test_sum_tree_agreement.py
rollout/test_hf_engine.py runtime/test_ownership.py embedded/test_files.py plan/test_families.py test_cli.py
curation/test_curate.py policy/test_experts.py policy/test_packing.py policy/test_lora.py data/test_streaming.py
families/test_prompts.py policy/test_foreign_models.py report/test_figures.py data/test_formats.py
data/test_templates.py data/test_prompts.py rewards/test_bounds.py policy/test_saved_model.py test_export.py
""".split()
"""Files that take about 3 seconds or more, the longest first, so that no long one begins when the others end. They
start vLLM, ranks, compilers or Triton's interpreter; `make quick` leaves them out, and shows which others belong here.
"""
assert all((ROOT / "tests" / name).is_file() for name in SLOW)

make_importable()  # many tests import transformers' processors, and they import torchvision


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--families-table", type=Path, help="the page whose table gets what tests of families find")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if page := session.config.getoption("--families-table"):
        table.write(page, session.config.stash.get(table.CELLS, {}))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files named in SLOW come first, and their tests are marked `slow`. Tests marked `gpu` are skipped, by name of the
    hardware, where there is no CUDA device."""
    place = {ROOT / "tests" / name: number for number, name in enumerate(SLOW)}
    items.sort(key=lambda item: place.get(item.path, len(SLOW)))  # stable: a file's tests stay together
    for item in items:
        if item.path in place:
            item.add_marker(pytest.mark.slow)
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """What was imported stays: each full garbage collection would look through it for a second or more."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    """Python's end finds it again: some libraries complain of what is left."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def seeded():
    """A test draws the same random numbers wherever it runs, but for generators that it makes itself."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True)
def handlers_stay():
    """A test that leaves a signal's handler behind fails itself: the processes that a later test forks and ends would
    handle SIGTERM instead of ending.
    """
    numbers = (signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == before, "the test left a signal's handler behind"


@pytest.fixture
def rethinker(tmp_path):
    """Runs the `rethinker` command in a process of its own, in an empty folder."""

    def run(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "rethinker", *arguments]
        return subprocess.run(
            command, **{"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 60} | options
        )

    return run
