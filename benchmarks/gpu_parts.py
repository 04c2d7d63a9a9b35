"""What `make gpu` consists of: each part's commands, in order of worth, and how long they may take."""

from __future__ import annotations

from dataclasses import dataclass

SANITIZED = (
    "(test_log_softmax and near and 7-129) or out_of_range or (test_linear_grpo_loss and options1 and token-token) "
    "or test_any_loss or (test_grpo and options0-token)"
)
"""A part of the fuzzing suite that reaches every kernel: compute-sanitizer slows it down a hundred times."""

TRAIN = (
    "python -m rethinker train easy_vqa_cpu --run.dir {out}/runs --run.name tiny --train.max_steps 5 "
    "--policy.warmup.steps 60 --policy.warmup.look_steps 60 --train.batch_pairs 128 --train.episode_queries 64 "
    "--validation.size 64 --rollout.backend "
)
STEP = "python -m benchmarks.train_step --layers 8 --queries 4 --repeats 2 --variants eager liger rethinker --out {out}"
END_TO_END = (
    "python -m benchmarks.end_to_end --size 3B --layers 8 --queries 8 --steps 2 --max-new-tokens 128 "
    "--trl-micro-batch 8 --json {out}/end_to_end.json"
)
METRICS = (
    "dram__bytes_read.sum,dram__bytes_write.sum,lts__t_sector_hit_rate.pct,gpu__time_duration.sum,"
    "sm__warps_active.avg.pct_of_peak_sustained_active,smsp__issue_active.avg.pct,launch__registers_per_thread"
)
PYTEST = "python -m pytest -q -p no:cacheprovider -W ignore"
FUZZ = "tests/kernels/fuzz_triton.py tests/kernels/fuzz_exponentials.py"


@dataclass(frozen=True)
class Part:
    """Commands, and how long they may take. In a command {out} is an empty folder for results, {workers} a number of
    processes, {gpu_tests} the files with tests marked gpu; NAME=value before it sets its environment."""

    name: str
    about: str
    commands: tuple[str, ...]
    toy: tuple[str, ...]  # the same for a dry run
    seconds: int  # it took on an H200
    limit: int  # seconds
    needs: tuple[str, ...] = ()  # packages and programs
    checks: bool = False  # whether it decides the exit status
    side_by_side: bool = False  # its commands; only where nothing is timed


PARTS = (
    Part(
        "ceilings",
        "what the device can do: a copy, matrix products in a burst and sustained",
        ("python -m benchmarks.ceilings --out {out}/ceilings.json",),
        ("python -m benchmarks.ceilings --out {out}/ceilings.json",),
        seconds=20,
        limit=90,
    ),
    Part(
        "correctness",
        "the kernels' fuzzing suite and all tests marked gpu",
        (
            PYTEST + " {workers} -m '' " + FUZZ + " --junitxml {out}/fuzz.xml",
            PYTEST + " {workers} -m gpu {gpu_tests} -k 'not fuzz_on and not sanitizer' --junitxml {out}/gpu_tests.xml",
        ),
        (
            "TRITON_INTERPRET=1 " + PYTEST + " tests/kernels/fuzz_triton.py -k 'near and uniform and 7-129 or of_k3' "
            "--junitxml {out}/fuzz.xml",
            PYTEST + " -m gpu {gpu_tests} --junitxml {out}/gpu_tests.xml",
        ),
        seconds=40,
        limit=300,
        checks=True,
        side_by_side=True,
    ),
    Part(
        "sum_tree",
        "replay's sampler: microseconds per call and per launch",
        ("python -m benchmarks.replay --sizes 1048576 --repeats 30 --methods 'rethinker C++' --out {out}",),
        ("python -m benchmarks.replay --sizes 1000 --repeats 3 --methods 'rethinker C++' --out {out}",),
        seconds=25,
        limit=90,
    ),
    Part(
        "ops",
        "the fused ops beside plain PyTorch and against floors measured here",
        ("python -m benchmarks.kernels --providers rethinker pytorch --out {out}",),
        ("python -m benchmarks.kernels --providers rethinker pytorch --repeats 1 --out {out}",),
        seconds=45,
        limit=120,
    ),
    Part(
        "sweeps",
        "chunk rows and row tiles",
        ("python -m benchmarks.sweeps --out {out}/sweeps.json",),
        ("TRITON_INTERPRET=1 python -m benchmarks.sweeps --out {out}/sweeps.json",),
        seconds=40,
        limit=150,
    ),
    Part(
        "peers",
        "the head's loss beside every installed peer",
        ("python -m benchmarks.kernels linear_grpo --repeats 5 --without torch.compile --out {out}",),
        (
            "python -m benchmarks.kernels linear_grpo --repeats 1 --out {out} --providers rethinker "
            "'cut-cross-entropy, cross-entropy only'",
        ),
        seconds=60,
        limit=180,
    ),
    Part(
        "attention",
        "shared prompts: the policy's kernel, varlen with prompts repeated, FlexAttention",
        ("python -m benchmarks.attention --out {out}/attention.json",),
        ("python -m benchmarks.attention --out {out}/attention.json",),
        seconds=75,
        limit=200,
        checks=True,
    ),
    Part(
        "training",
        "rethinker train on the tiny model, sampled with transformers, 5 steps",
        (TRAIN + "hf",),
        (TRAIN + "hf --print_config",),
        seconds=35,
        limit=180,
        needs=("deepspeed", "datasets", "easy_vqa", "pydantic"),
        checks=True,
    ),
    Part(
        "train_step_3b",
        "forward and backward of a step at 3B shapes, 8 layers: own, eager, Liger",
        (STEP + " --size 3B",),
        (STEP + " --size 3B --help",),
        seconds=75,
        limit=240,
        checks=True,
    ),
    Part(
        "train_step_7b",
        "the same at 7B shapes",
        (STEP + " --size 7B",),
        (STEP + " --size 7B --help",),
        seconds=75,
        limit=240,
        checks=True,
    ),
    Part(
        "end_to_end",
        "a whole step beside TRL's, 3B shapes, 8 layers",
        (END_TO_END,),
        (END_TO_END + " --help",),
        seconds=120,
        limit=300,
        needs=("trl", "deepspeed", "datasets", "pydantic"),
    ),
    Part(
        "vllm",
        "rethinker train with vLLM in the same process, asleep while a step trains",
        (TRAIN + "vllm",),
        (TRAIN + "vllm --print_config",),
        seconds=90,
        limit=240,
        needs=("vllm", "deepspeed", "datasets", "easy_vqa", "pydantic"),
        checks=True,
    ),
    Part(
        "sanitizer",
        "compute-sanitizer over a part of the fuzzing suite",
        tuple(
            f"PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool {tool} --error-exitcode 9 {PYTEST} "
            f"{FUZZ} -k '{SANITIZED}' --junitxml {{out}}/{tool}.xml"
            for tool in ("memcheck", "racecheck")
        ),
        ("TRITON_INTERPRET=1 " + PYTEST + f" tests/kernels/fuzz_triton.py -k '{SANITIZED}' --collect-only",),
        seconds=120,
        limit=300,
        needs=("compute-sanitizer",),
        checks=True,
        side_by_side=True,
    ),
    Part(
        "ncu",
        "hardware counters of the row kernel: does its second read come from the L2 cache?",
        (
            f"ncu --clock-control none --kernel-name regex:grpo_rows --launch-count 1 --metrics {METRICS} --csv "
            "--log-file {out}/ncu.csv python -m benchmarks.sweeps tiles --out {out}/under_ncu.json",
        ),
        ("TRITON_INTERPRET=1 python -m benchmarks.sweeps tiles --out {out}/under_ncu.json",),
        seconds=40,
        limit=120,
        needs=("ncu",),
    ),
)
