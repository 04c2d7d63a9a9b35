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
import urllib.error
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
_LEAVE_S = 15.0  # to end by themselves after SIGTERM
_PR_SET_PDEATHSIG = 1


@dataclass
class Server:
    """One server process."""

    address: str
    process: subprocess.Popen
    log: Path

    def words(self) -> str:
        """The last lines of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])


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
    environments = [environment(config, i, options.replicas, gpus) for i in range(options.replicas)]
    model = model_folder(config)  # what to serve first; a run sends its own weights when it starts
    commands = [command(config, model, options.host, options.port + i, gpu=gpus > 0) for i in range(options.replicas)]
    if options.print_command:
        for line, variables in zip(commands, environments, strict=True):
            print(" ".join([*(f"{name}={shlex.quote(value)}" for name, value in variables.items()), shlex.join(line)]))
        return 0
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGHUP, _interrupt)
    servers: list[Server] = []
    try:
        for i, (line, variables) in enumerate(zip(commands, environments, strict=True)):
            servers.append(start(line, variables, options.host, options.port + i, Path(config.run.dir) / "servers"))
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
    from rethinker.rollout.vllm_settings import WORKER, Asking, engine_arguments

    settings = engine_arguments(config, Asking(config, model_dir), gpu=gpu)
    settings |= {
        "host": host,
        "port": port,
        "weight_transfer_config": {"backend": "nccl" if gpu else "file"},
        "worker_extension_cls": WORKER,
        "enable_scale_out": True,  # /inference/v1/generate: token ids in and out
        "disable_uvicorn_access_log": True,
    }
    if not gpu:
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
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
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
    """Until every server answers.

    Raises:
        ConfigError: one ended, or took longer than `seconds`; with its last words.
    """
    begin = time.monotonic()
    waiting = list(servers)
    while waiting:
        time.sleep(0.25)
        for server in list(waiting):
            if server.process.poll() is not None:
                raise ConfigError(
                    f"the server {server.address} did not start (code {server.process.returncode}); {server.log} ends "
                    f"with: {server.words()}"
                )
            if is_healthy(server.address):
                waiting.remove(server)
                print(f"{server.address} serves after {time.monotonic() - begin:.0f} s, log {server.log}", flush=True)
        if waiting and time.monotonic() - begin > seconds:
            raise ConfigError(
                f"the server {waiting[0].address} does not answer after --wait-s {seconds:g} seconds; {waiting[0].log} "
                f"ends with: {waiting[0].words()}"
            )


def is_healthy(address: str) -> bool:
    """Whether a server answers."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{address}/health", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def end(servers: list[Server]) -> None:
    """End servers with all their processes: SIGTERM, and after _LEAVE_S SIGKILL."""
    for server in servers:
        _signal(server, signal.SIGTERM)
    limit = time.monotonic() + _LEAVE_S
    while time.monotonic() < limit and any(_signal(server, 0) for server in servers):
        for server in servers:
            server.process.poll()  # reaps it
        time.sleep(0.05)
    for server in servers:
        _signal(server, signal.SIGKILL)
        server.process.wait()
    while time.monotonic() < limit + 5 and any(_signal(server, 0) for server in servers):
        time.sleep(0.05)  # what the server had started is on its way out


def _signal(server: Server, number: int) -> bool:
    """Send a signal to a server's process group; whether there is one."""
    try:
        os.killpg(server.process.pid, number)
    except ProcessLookupError:
        return False
    return True


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _end_with_parent() -> None:
    """In the child: SIGTERM when this command is killed and cannot end its servers itself."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


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
