"""`rethinker serve` as it is typed: in a process of its own, where no other import has prepared anything."""

from __future__ import annotations

import shlex
import subprocess
import sys

from rethinker.embedded.tiny import create_tiny


def test_the_command_of_a_server_can_be_printed(tmp_path):
    """For a model folder of the user's: vLLM's server with the run's settings; nothing is started."""
    folder = create_tiny(tmp_path / "model", seed=0)
    arguments = ["easy_vqa_cpu", "--policy.model", str(folder), "--port", "8123", "--print-command"]
    command = [sys.executable, "-m", "rethinker", "serve", *arguments, "--rollout.max_new_tokens", "17"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    line = shlex.split(done.stdout)
    assert line[line.index("--port") + 1] == "8123"
    assert "vllm.entrypoints.openai.api_server" in line and str(folder) in line
    assert "--logprobs-mode" in line and "VLLM_SERVER_DEV_MODE=1" in line
