"""pytest runs in Triton's interpreter: one process imports torch and triton once, and forks another for every run.

`python -m tests.kernels.interpreter` reads a run per line, JSON of `kernels` (the folder that holds rethinker_kernels),
`arguments` (of pytest) and `output` (a file), and answers with its exit status; -11 stands for signal 11.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


class Interpreter:
    """The other end: starts the process at the first run."""

    def __init__(self, output: Path) -> None:
        """
        Args:
            output: the file that a run's output goes to.
        """
        self.output, self.process = output, None

    def run(self, *arguments: str, kernels: Path = ROOT / "kernels") -> tuple[int, str]:
        """(exit status, output) of pytest with these arguments on the package in this folder."""
        if self.process is None:
            # TRITON_INTERPRET counts only if it is set before triton is imported.
            environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
            environment["PYTHONPATH"] = str(ROOT)
            command = [sys.executable, "-m", "tests.kernels.interpreter"]
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, text=True)
        run = {"kernels": str(kernels), "arguments": arguments, "output": str(self.output)}
        print(json.dumps(run), file=self.process.stdin, flush=True)
        status = self.process.stdout.readline()
        return int(status), self.output.read_text(errors="replace")

    def close(self) -> None:
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait(30)


def main() -> None:
    import pytest
    import torch
    import torch._dynamo  # noqa: F401
    import triton.language  # noqa: F401

    for line in sys.stdin:
        run = json.loads(line)
        child = os.fork()
        if child == 0:
            file = os.open(run["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1)
            os.dup2(file, 2)
            sys.path[:0] = [run["kernels"]]
            options = ["-q", "-p", "no:cacheprovider", "--noconftest", "-o", f"pythonpath={run['kernels']}"]
            status = pytest.main([*options, "-W", "ignore::RuntimeWarning", *run["arguments"]])
            sys.stdout.flush()
            os._exit(int(status))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
