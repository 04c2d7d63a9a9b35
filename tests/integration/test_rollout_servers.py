"""Training over two servers of `rethinker serve`: whole runs, on one rank and two, and a lost server."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from functools import partial

import psutil
import pyarrow.parquet as parquet
import pytest
from torch.distributed.elastic.utils.distributed import get_free_port as free_port

from rethinker import cli
from rethinker.settings import resolve_config
from tests import forked
from tests.integration.interruptions import ROOT, finish, kill, prepare, rows, start

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1500)]
SAME = 1e-9  # nats of mismatch_kl: rounding in fp32


def servers_of(folder) -> list[psutil.Process]:
    """Processes that serve the model in a folder."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if "vllm.entrypoints.openai.api_server" in line and str(folder / "model") in line:
            found.append(process)
    return found


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The folder of model and data, and the settings that train over the two servers."""
    folder = tmp_path_factory.mktemp("pair")
    prepare(folder)
    command = [sys.executable, "-m", "rethinker", "serve", "easy_vqa_cpu", "--policy.model", str(folder / "model")]
    command += ["--rollout.max_new_tokens", "16", "--rollout.kv_cache_gb", "0.1", "--port"]
    logs, processes = [folder / "serve_0.log", folder / "serve_1.log"], []
    try:
        for log in logs:
            options = {"cwd": ROOT, "env": os.environ | {"OMP_NUM_THREADS": "1"}, "start_new_session": True}
            with log.open("w") as output:
                line = [*command, str(free_port())]
                processes.append(subprocess.Popen(line, stdout=output, stderr=output, **options))
        for log, process in zip(logs, processes, strict=True):
            while "Application startup complete" not in log.read_text():
                assert process.poll() is None, log.read_text()
                time.sleep(0.5)
        addresses = [re.search(r"--rollout.servers '\[(.*)\]'", log.read_text())[1] for log in logs]
        yield folder, ["--rollout.backend", "server", "--rollout.servers", f"[{','.join(addresses)}]"]
        for process in processes:
            process.send_signal(signal.SIGINT)
            process.wait(60)
        assert servers_of(folder) == []
    finally:
        for process in processes:
            process.kill()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_trains_over_servers(pair, ranks):
    """Law 1 in a whole run, with forced rethinking: what the servers sample is what the policy scores."""
    folder, options = pair
    finish(folder, f"over_{ranks}", *options, "--train.max_steps", "2", "--rollout.check_sync", "true", ranks=ranks)
    steps = rows(folder / f"over_{ranks}")
    assert [row["step"] for row in steps] == [1, 2]
    assert max(row["mismatch_kl"] for row in steps) < SAME
    # The servers answer for a checkpoint as transformers do with it, on every rank.
    run, answers = folder / f"over_{ranks}", {}
    limit = resolve_config(run / "config.yaml").data.max_prompt_tokens
    for name, further in {"server": [*options, f"--data.max_prompt_tokens={limit}"], "hf": []}.items():
        output = run / "evaluations" / name
        given = ["--benchmark=easy_vqa", "--limit=9", f"--rollout.backend={name}", f"--output={output}"]
        command = partial(cli.main, ["eval", str(run / "checkpoints" / "last"), *given, *further])
        forked.run(command, folder / "eval.log", ranks)
        answers[name] = parquet.read_table(output / "responses.parquet")["token_ids"].to_pylist()
    assert answers["server"] == answers["hf"]


def test_rollouts_one_episode_ahead(pair):
    """Every episode but the first was sampled with the weights before the last sync, which mismatch_kl shows and the
    correction takes into account; a run that is killed goes on."""
    folder, options = pair
    options = [*options, "--rollout.max_staleness", "1", "--algorithm.rollout_correction", "token_truncate"]
    options += ["--train.max_steps", "16", "--checkpoint.every", "2"]  # four steps an episode
    options += ["--train.max_generated_tokens", "1000000"]
    options += ["--train.learning_rate", "1e-4"]  # at 1e-3 the ceiling of mismatch_kl ends the run: 0.56 in one episode
    process = start(folder, "ahead", *options)
    while len(rows(folder / "ahead")) < 6:
        assert process.poll() is None, (folder / "ahead.log").read_text()[-4000:]
        time.sleep(0.1)
    kill(process)
    process.wait()
    finish(folder, "ahead", *options, "--resume", "auto")
    steps = rows(folder / "ahead")
    assert [row["step"] for row in steps] == list(range(1, 17))
    assert all(row["skipped"] == 0 for row in steps)
    apart = {row["episode"]: row["mismatch_kl"] for row in steps}
    # Nothing is ahead of the first episode, nor of the first one after the resume: both come from the newest weights.
    assert apart[0] < SAME and sum(value < SAME for value in apart.values()) == 2
    assert max(apart.values()) < 0.1


def test_a_run_outlives_one_of_its_servers(pair):
    """One of two servers is killed (SIGKILL) in the run: a warning names it, and the run ends as if it had not been."""
    folder, options = pair
    process = start(folder, "outlives", *options, "--train.max_steps", "8")
    while len(rows(folder / "outlives")) < 2:
        assert process.poll() is None, (folder / "outlives.log").read_text()[-4000:]
        time.sleep(0.1)
    victim = servers_of(folder)[0]
    address = f"http://127.0.0.1:{victim.cmdline()[victim.cmdline().index('--port') + 1]}"
    os.killpg(victim.pid, signal.SIGKILL)
    assert process.wait(300) == 0, (folder / "outlives.log").read_text()[-4000:]
    log = (folder / "outlives.log").read_text()
    log += "".join(file.read_text() for file in (folder / "outlives" / "logs").glob("*"))
    assert f"the rollout server {address} is lost" in log
    steps = rows(folder / "outlives")
    assert len(steps) == 8
    assert max(row["mismatch_kl"] for row in steps) < SAME
