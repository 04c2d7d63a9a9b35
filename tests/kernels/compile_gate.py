"""Compiles every form in which a Triton kernel is launched for sm_80, sm_90 and sm_100, and reads what became of it.

Run by test_compile_gate.py in a process of its own, or by hand: `python -m tests.kernels.compile_gate`. No GPU is
needed: a driver that launches nothing notes how each launch specialises its kernel, types, alignments and constants,
first of the ops at a real vocabulary, then of the whole fuzzing suite. Prints what was found for the former, and exits
with 1 where any form has spills or a stack, needs more shared memory than the chip has, or, at a real vocabulary, reads
logits in less than 16 bytes; or where a kernel of the package was never launched.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import rethinker_kernels as ops
from rethinker_kernels import linear
from rethinker_kernels.triton_kernels import grpo_loss, group_advantages, log_softmax, scaled, tiles
from rethinker_kernels.triton_kernels import linear as linear_kernels

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes a program may use, by architecture."""

PROCESSORS = 132
"""Of the GPU whose launches are noted: they decide which rows are few."""

VOCABULARY, ROWS = 151_936, 8 * PROCESSORS

KERNELS = [
    log_softmax.forward_kernel,
    log_softmax.combine_kernel,
    log_softmax.backward_kernel,
    linear_kernels.grpo_rows_kernel,
    scaled.scaled_kernel,
    grpo_loss.loss_kernel,
    grpo_loss.total_kernel,
    group_advantages.group_kernel,
]


@dataclass(eq=False)
class Form:
    """One specialisation of a kernel."""

    kernel: JITFunction
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], list]
    warps: int
    name: str  # of the op at a real vocabulary that launched it first; empty for the fuzzing suite's own

    def constant(self, name: str) -> Any:
        return self.constants.get((self.kernel.arg_names.index(name),))

    def __str__(self) -> str:
        types = [kind for kind in self.signature.values() if kind != "constexpr"]
        return f"{self.kernel.__name__}({', '.join(types)}; {list(self.constants.values())}; {self.warps} warps)"


class Launches:
    """Notes launches in place of a driver, with GPU tiles and Triton kernels for CPU tensors."""

    def __init__(self) -> None:
        self.forms: list[Form] = []
        self.name = ""

    def install(self) -> None:
        fake = MagicMock()
        fake.get_current_target.return_value = GPUTarget("cuda", 90, 32)
        fake.get_current_device.return_value = 0
        driver.set_active(fake)
        launches = self

        def note(kernel, key, signature, device, constants, options, attributes, warmup):
            launches.forms.append(Form(kernel, signature, constants, attributes, options.num_warps, launches.name))
            kernel.device_caches[device][0][key] = done = MagicMock()
            return done

        JITFunction._do_compile = note
        for name, module in list(sys.modules.items()):
            if name.startswith("rethinker_kernels"):
                if hasattr(module, "takes_triton"):
                    module.takes_triton = lambda tensor: tensor.dtype != torch.float64
                if hasattr(module, "tiles") and module is not tiles:
                    module.tiles = lambda device: tiles._of_gpu(PROCESSORS)
        # What kernels leave unwritten makes assertions fail; only their launches count here.
        linear.product = lambda a, b, out, add=False: None

    def of_real_ops(self) -> None:
        """The ops as training calls them: 16-bit heads, fp32 ones, and few rows."""
        offsets = torch.tensor([0, 100, ROWS])
        index, values = torch.zeros(ROWS, dtype=torch.int64), torch.zeros(ROWS)
        surrogate = {"cu_seqlens": offsets, "normalizer": 1.0}
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            short = str(dtype).removeprefix("torch.").replace("float", "fp").replace("bfp", "bf")
            for rows, kind in ((ROWS, ""), (512, ", half filled"), (8, ", split")):
                for entropy in (False, True):
                    logits = torch.empty(rows, VOCABULARY, dtype=dtype, requires_grad=True)
                    self.name = f"log-softmax{' + entropy' * entropy}, {short}{kind}"
                    outputs = ops.selective_log_softmax(logits, index[:rows], return_entropy=entropy)
                    (sum(o.sum() for o in outputs) if entropy else outputs.sum()).backward()
            hidden = torch.empty(ROWS, 16, dtype=dtype, requires_grad=True)
            weight = torch.empty(VOCABULARY, 16, dtype=dtype, requires_grad=True)
            self.name = f"linear log-softmax, {short}"
            ops.linear_selective_log_softmax(hidden, weight, index, return_entropy=True)[0].sum().backward()
            for kl_coef in (0.0, 0.1):
                self.name = f"linear grpo{' + kl' * bool(kl_coef)}, {short}"
                more = {"kl_coef": kl_coef, "ref_logps": values, "nll_weights": values}
                ops.linear_grpo_loss(hidden, weight, index, values, values, **more, **surrogate)[0].backward()
        for importance in ("token", "sequence"):
            self.name = f"grpo loss, one ratio per {importance}"
            logps = torch.zeros(ROWS, requires_grad=True)
            ops.grpo_loss(logps, values, values, importance=importance, kl_coef=0.1, ref_logps=values, **surrogate)
        self.name = "group advantages"
        ops.group_advantages(values, offsets)
        self.name = ""

    def of_the_fuzzing_suite(self) -> None:
        file = Path(__file__).with_name("fuzz_triton.py")
        with contextlib.redirect_stdout(io.StringIO()) as said:
            status = pytest.main(["-q", "-p", "no:cacheprovider", "-n", "0", str(file)], plugins=[self])
        if status != 0:
            raise RuntimeError(said.getvalue()[-6000:])

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item, call):
        """A failed comparison is a pass here: nothing was computed."""
        report = (yield).get_result()
        failed = call.excinfo is not None and call.when == "call"
        if failed and (
            call.excinfo.errisinstance(AssertionError) or "opcheck" in str(call.excinfo.value)[:200].lower()
        ):
            report.outcome = "passed"


def tool(name: str) -> str:
    """A program of the CUDA toolkit that the triton wheel carries."""
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def measure(form: Form, capability: int) -> dict[str, int]:
    """Compile, and read resources and instructions from the binary."""
    source = ASTSource(form.kernel, form.signature, form.constants, form.attributes)
    options = {"num_warps": form.warps}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [tool("cuobjdump"), "--dump-resource-usage", "--dump-sass", cubin.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said)}
    widths = [int(w) for w in re.findall(r"\bLDG\.E(?:\.[A-Z]\w*)*?\.(64|128)\b", said)] or [32]
    return {
        "registers": found["REG"],
        "stack": found["STACK"],
        "local": found["LOCAL"],
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", said)),
        "shared": compiled.metadata.shared,
        "widest": max(widths) // 8,
        "compares": len(re.findall(r"\bISETP\b", said)),
        "wide compares": len(re.findall(r"\bISETP\S*\.EX\b", said)),
    }


def faults(form: Form, capability: int, found: dict[str, int]) -> list[str]:
    """What is wrong with a compiled kernel, in words."""
    wrong = [f"{name} {found[name]}" for name in ("stack", "local", "spills") if found[name]]
    if found["shared"] > SHARED_MEMORY[capability]:
        wrong.append(f"shared memory {found['shared']} of {SHARED_MEMORY[capability]}")
    reads_rows = "logits" in form.signature and form.kernel is not log_softmax.combine_kernel
    if form.name and reads_rows and found["widest"] < 16:
        wrong.append(f"loads of {found['widest']} bytes")
    return wrong


FORMS: list[Form] = []
"""All forms, for the processes that compile them: they are forked, as forms cannot be sent."""


def _measured(task: tuple[int, int]) -> dict[str, int]:
    position, capability = task
    return measure(FORMS[position], capability)


def main() -> int:
    launches = Launches()
    launches.install()
    launches.of_real_ops()
    launches.of_the_fuzzing_suite()
    FORMS.extend(launches.forms)
    tasks = [(position, capability) for capability in SHARED_MEMORY for position in range(len(FORMS))]
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        results = pool.map(_measured, tasks, chunksize=4)
    wrong = [f"{kernel.__name__}: never launched" for kernel in KERNELS if kernel not in {f.kernel for f in FORMS}]
    if not any(f.constant("SPLIT") for f in FORMS if f.kernel is log_softmax.forward_kernel and not f.name):
        wrong.append("forward_kernel: no split rows in the fuzzing suite")
    print(
        f"{'op':42} {'kernel':16} {'arch':>6} {'warps':>5} {'regs':>5} {'shared':>7} {'ISETP':>6} {'64-bit':>6} {'load':>5}"
    )
    for (position, capability), found in zip(tasks, results, strict=True):
        form = FORMS[position]
        name = form.kernel.__name__.removesuffix("_kernel")
        wrong += [f"sm_{capability} {form}: {fault}" for fault in faults(form, capability, found)]
        if form.name:
            print(
                f"{form.name:42} {name:16} sm_{capability:<3} {form.warps:5} {found['registers']:5} {found['shared']:7} "
                f"{found['compares']:6} {found['wide compares']:6} {found['widest']:4}B"
            )
    print(f"triton {triton.__version__}: {len(FORMS)} forms of {len(KERNELS)} kernels, {len(wrong)} faults")
    print(*wrong, sep="\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
