"""`rethinker serve RECIPE`: vLLM's own server, with exactly what runs with rollout.backend=server need."""

from __future__ import annotations

import json
import os
import shlex
import socket
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence

from rethinker.checks import check_model
from rethinker.command_line import Parser
from rethinker.config import Config
from rethinker.settings import resolve_config

_DESCRIPTION = """Start a vLLM server for training RECIPE with rollout.backend=server, and print what to add to
`rethinker train`. Give the same recipe and settings as to the training. For several servers run it several times, each
with a --port and, in CUDA_VISIBLE_DEVICES, with GPUs of its own: rollout.tensor_parallel_size of them.

On GPUs weights arrive by NCCL; on a CPU they arrive as a file through a folder (rollout.weight_folder)."""


def main(arguments: Sequence[str]) -> int:
    """Become vLLM's server; returns only with --print-command."""
    parser = Parser(
        prog="rethinker serve",
        usage="rethinker serve RECIPE [--port N] [--host ADDRESS] [--print-command] [--section.name value ...]",
        description=_DESCRIPTION,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a shipped recipe or a .yaml file")
    parser.add_argument("--port", type=int, default=8100, help="[8100]")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to serve at [127.0.0.1]. WARNING: whoever reaches a server can replace its weights, run its "
        "workers' methods and stop it, without a password; open it to a closed network only",
    )
    parser.add_argument(
        "--print-command", action="store_true", help="print what would be run, to start it elsewhere, and stop"
    )
    options, overrides = parser.parse_recipe(arguments)
    config = resolve_config(options.recipe, overrides)  # before anything slow is imported
    check_model(config.policy.model)
    if not options.print_command:
        family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
        try:  # vLLM would say it at the end of a traceback; the trainer must know the port, so 0 will not do
            socket.create_server((options.host, options.port or -1), family=family).close()
        except (OSError, OverflowError) as error:
            parser.error(f"--port {options.port}: give one from 1 to 65535 that is free at {options.host} ({error})")
    import torch

    from rethinker.embedded.files import model_folder
    from rethinker.policy.loading import load_processor
    from rethinker.runtime.distributed import ALONE

    gpu, folder = torch.cuda.is_available(), model_folder(config, ALONE)
    load_processor(folder)  # its error, where no hub has this name, is one line
    line, variables = command(config, folder, options.host, options.port, gpu=gpu)
    if options.print_command:
        print(" ".join([*(f"{name}={shlex.quote(value)}" for name, value in variables.items()), shlex.join(line)]))
        return 0
    host = socket.gethostname() if options.host in ("0.0.0.0", "::") else options.host
    address = f"http://{f'[{host}]' if ':' in host else host}:{options.port}"
    print(f"once it is up, train with: --rollout.backend server --rollout.servers '[{address}]'", flush=True)
    os.execve(line[0], line, os.environ | variables)


def command(config: Config, model_dir: str, host: str, port: int, *, gpu: bool) -> tuple[list[str], dict[str, str]]:
    """The command line of a server, and its environment variables besides this process's own."""
    from rethinker.rollout.vllm_settings import SERVED, TRANSFER, VLLMRequests, engine_arguments
    from rethinker.runtime.torchvision_cpu import child_environment

    requests = VLLMRequests(config, model_dir)
    variables = {"VLLM_SERVER_DEV_MODE": "1"}  # the routes by which weights come
    variables[SERVED] = json.dumps(requests.shared_settings() | {TRANSFER: "nccl" if gpu else "file"})
    settings = engine_arguments(config, requests, gpu=gpu)
    settings |= {
        "host": host,
        "port": port,
        "worker_extension_cls": "rethinker.rollout.server.worker.ServerWorker",
        "enable_scale_out": True,  # /inference/v1/generate: token ids in and out
        "disable_uvicorn_access_log": True,
    }
    if gpu:
        settings["weight_transfer_config"] = {"backend": "nccl"}
    else:
        variables |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind"} | child_environment()
        settings |= requests.for_seeds()
        if config.rollout.tensor_parallel_size == 1:
            settings["distributed_executor_backend"] = "uni"  # one process fewer
    line = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model_dir]
    for name, value in settings.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            line.append(f"--{option}" if value else f"--no-{option}")
        else:
            line += [f"--{option}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return line, variables
