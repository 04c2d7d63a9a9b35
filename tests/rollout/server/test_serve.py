"""`rethinker serve` as it is typed: in a process of its own, where no other import has prepared anything."""

from __future__ import annotations

import shlex
import socket
import subprocess
import sys

import pytest

from rethinker import cli
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


@pytest.mark.parametrize("port", ["taken", "0", "65536", "-1"])
def test_a_port_that_cannot_be_served_at_is_one_line(port, capsys, monkeypatch):
    """Before a model is made: it names the option, the port, and what would work."""
    monkeypatch.setattr("rethinker.embedded.files.model_folder", lambda config, ranks: pytest.fail("it went on"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1]) if port == "taken" else port
        assert cli.main(["serve", "easy_vqa_cpu", f"--port={port}"]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: --port {port}: give one from 1 to 65535 that is free at 127.0.0.1 (")
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("model", "fault"), [("./none", "policy.model=./none is not a"), ("me/none", "has no processor")]
)
def test_a_model_that_is_not_there_is_one_line(model, fault, capsys):
    """Neither in a folder nor by a name."""
    assert cli.main(["serve", "easy_vqa_cpu", "--print-command", "--policy.model", model]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: policy.model=") and fault in message and message.count("\n") == 1
