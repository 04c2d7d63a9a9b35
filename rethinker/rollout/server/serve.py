"""`rethinker serve RECIPE`: vLLM servers for runs with rollout.backend=server, started with exactly what a run needs.

The servers are child processes with process groups of their own; they end with this command, however it ends.
"""

from __future__ import annotations

import ctypes
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rethinker.command_line import Parser
from rethinker.config import Config, ConfigError

_DESCRIPTION = """Start vLLM servers for training RECIPE with rollout.backend=server, wait until they answer, and print
what to add to `rethinker train`. Give the same recipe and settings as to the training. Ctrl-C ends the servers.

On a machine with GPUs every server takes rollout.tensor_parallel_size of those in CUDA_VISIBLE_DEVICES, and weights
arrive by NCCL; on a CPU they arrive as files through a folder (rollout.weight_folder)."""


@dataclass
class Server:
    """One server process."""

    address: str
    process: subprocess.Popen
    log: Path

    def words(self) -> str:
        """The last lines of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])

    def signal(self, number: int) -> bool:
        """Send a signal to the server's process group; whether there still is one."""
        self.process.poll()  # a process that has ended leaves its group only when its parent has looked
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            return False
        return True


def main(arguments: Sequence[str]) -> int:
    """Start servers and stay until they, or this command, are ended.

    Raises:
        ConfigError: a mistake in the options or the settings, or a server that does not start.
    """
    parser = _parser()
    options, overrides = parser.parse_recipe(arguments)
    from rethinker.settings import resolve_config

    config = resolve_config(options.recipe, overrides)  # before anything slow is imported
    if options.replicas < 1:
        parser.error(f"--replicas {options.replicas} must be at least 1")
    if not 0 < options.port <= 65536 - options.replicas:
        parser.error(f"--port {options.port} must leave room for {options.replicas} ports below 65536")
    import torch

    from rethinker.embedded.files import model_folder

    gpus = torch.cuda.device_count()
    ports = range(options.port, options.port + options.replicas)
    environments = [environment(config, i, options.replicas, gpus) for i in range(options.replicas)]
    commands = [command(config, model_folder(config), options.host, port, gpu=gpus > 0) for port in ports]
    if options.print_command:
        for line, variables in zip(commands, environments, strict=True):
            print(" ".join([*(f"{name}={shlex.quote(value)}" for name, value in variables.items()), shlex.join(line)]))
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.default_int_handler)
    servers: list[Server] = []
    try:
        for line, variables, port in zip(commands, environments, ports, strict=True):
            servers.append(start(line, variables, options.host, port, Path(config.run.dir) / "servers"))
        wait(servers, options.wait_s)
        addresses = ",".join(server.address for server in servers)
        print(f"ready; train with: --rollout.backend server --rollout.servers '[{addresses}]'", flush=True)
        while servers:
            time.sleep(0.5)
            for server in [server for server in servers if server.process.poll() is not None]:
                servers.remove(server)
                code = server.process.returncode
                print(f"{server.address} ended with code {code}: {server.words()}", file=sys.stderr, flush=True)
                end([server])  # what it leaves behind
        return 1
    finally:
        end(servers)


def command(config: Config, model_dir: str, host: str, port: int, *, gpu: bool) -> list[str]:
    """The command line of one server."""
    from rethinker.rollout.vllm_settings import VLLMRequests, engine_arguments

    settings = engine_arguments(config, VLLMRequests(config, model_dir), gpu=gpu)
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
        # A prompt in two parts takes back a draw of the request's own generator, which CPU generators cannot.
        settings |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(8192, settings["max_model_len"])}
        if config.rollout.tensor_parallel_size == 1:
            settings["distributed_executor_backend"] = "uni"  # one process fewer
    line = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model_dir]
    for name, value in settings.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            line.append(f"--{option}" if value else f"--no-{option}")
        else:
            line += [f"--{option}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return line


def environment(config: Config, replica: int, replicas: int, gpus: int) -> dict[str, str]:
    """Environment variables of one server besides this process's own.

    Raises:
        ConfigError: there are not GPUs enough.
    """
    from rethinker.runtime.torchvision_cpu import child_environment

    variables = {"VLLM_SERVER_DEV_MODE": "1"}  # the routes by which weights come
    variables["VLLM_LOGGING_LEVEL"] = os.environ.get("VLLM_LOGGING_LEVEL", "WARNING")
    if gpus:
        each = config.rollout.tensor_parallel_size
        if replicas * each > gpus:
            raise ConfigError(
                f"--replicas {replicas} of rollout.tensor_parallel_size={each} need {replicas * each} GPUs, and "
                f"{gpus} are visible"
            )
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
        return variables | {"CUDA_VISIBLE_DEVICES": ",".join(visible[replica * each : (replica + 1) * each])}
    threads = max(1, (os.cpu_count() or 1) // replicas)
    variables["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(threads))
    return variables | {"VLLM_CPU_OMP_THREADS_BIND": "nobind"} | child_environment()


def start(line: list[str], variables: dict[str, str], host: str, port: int, logs: Path) -> Server:
    """Start one server process; its output goes to `logs`/<port>.log.

    Raises:
        ConfigError: the port is taken.
    """
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        raise ConfigError(f"--port {port}: {host}:{port} cannot be served ({error.strerror})") from error
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / f"{port}.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            line,
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            env=os.environ | variables,
            start_new_session=True,
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
    shown = host if host not in ("0.0.0.0", "::") else socket.gethostname()
    return Server(f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}", process, log)


def wait(servers: list[Server], seconds: float) -> None:
    """Wait until every server answers.

    Raises:
        ConfigError: one ended, or took longer than `seconds`; with its last words.
    """
    begin = time.monotonic()
    waiting = list(servers)
    while waiting:
        time.sleep(0.25)
        passed = time.monotonic() - begin
        for server in list(waiting):
            if is_healthy(server.address):
                waiting.remove(server)
                print(f"{server.address} serves after {passed:.0f} s, log {server.log}", flush=True)
            elif (code := server.process.poll()) is not None or passed > seconds:
                fault = (
                    f"did not start (code {code})" if code is not None else f"is not up after --wait-s {seconds:g} s"
                )
                raise ConfigError(f"the server {server.address} {fault}; {server.log} ends with: {server.words()}")


def is_healthy(address: str) -> bool:
    """Whether a server answers; no proxy is asked."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{address}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:  # an HTTP error is one, too
        return False


def end(servers: list[Server]) -> None:
    """End servers with all their processes: SIGTERM, and after 15 s SIGKILL."""
    for number, seconds in ((signal.SIGTERM, 15), (signal.SIGKILL, 5)):
        limit = time.monotonic() + seconds
        left = [server for server in servers if server.signal(number)]
        while left and time.monotonic() < limit:
            time.sleep(0.05)
            left = [server for server in left if server.signal(0)]


def _end_with_parent() -> None:
    """In the child: SIGTERM when this command is killed and cannot end its servers itself (PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _parser() -> Parser:
    parser = Parser(
        prog="rethinker serve",
        usage="rethinker serve RECIPE [--port N] [--replicas N] [--host ADDRESS] [--section.name value ...]",
        description=_DESCRIPTION,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a shipped recipe or a .yaml file")
    parser.add_argument("--port", type=int, default=8100, help="of the first server; the others follow [8100]")
    parser.add_argument("--replicas", type=int, default=1, help="servers of the whole model [1]")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to serve at [127.0.0.1]. WARNING: whoever reaches a server can replace its weights, run its "
        "workers' methods and stop it, without a password; open it to a closed network only",
    )
    parser.add_argument("--wait-s", type=float, default=900.0, help="longest start, in seconds [900]")
    parser.add_argument(
        "--print-command", action="store_true", help="print what would be run, to start it elsewhere, and stop"
    )
    return parser
