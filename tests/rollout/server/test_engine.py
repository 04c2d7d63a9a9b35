"""vLLM servers as behaviour policy: laws 1, 4 and 7 over loopback, and every way in which a server can fail a run.

One real server serves all tests here; where a second one is needed, a relay to the same server can be cut off.
"""

from __future__ import annotations

import asyncio
import http.server
import json
import logging
import os
import signal
import threading
import time
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
import torch
from transformers import AutoConfig

from rethinker.config import ConfigError
from rethinker.curation import command as curation
from rethinker.embedded.tiny import create_tiny
from rethinker.evaluation import command as evaluation
from rethinker.rollout.deadline import Deadline
from rethinker.rollout.engine import make_engine
from rethinker.rollout.server import replicas
from rethinker.rollout.server import sync as server_sync
from rethinker.rollout.server.replicas import NoServerLeft
from rethinker.runtime import signals
from rethinker.runtime.signals import StopRequested
from rethinker.samples import Prompt
from rethinker.settings import resolve_config
from tests.rollout.helpers import TOLERANCE, Policy, check_sampled_placeholders, make_prompts, rollout_config
from tests.rollout.served import Relay, Served, free_port

PLAIN = {"n": 2, "max_new_tokens": 12, "temperature": 1.0}
LONG = {"n": 32, "max_new_tokens": 32, "temperature": 1.0, "seed": 0}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """One matrix for embedding and head, as in Qwen2.5-VL-3B: CPU kernels hold a copy that a sync must renew, too."""
    folder = tmp_path_factory.mktemp("served")
    model = create_tiny(folder / "model", seed=0, tie_word_embeddings=True)
    served = Served(model, folder / "log", rollout_config())
    yield served
    served.close()


@pytest.fixture(scope="module")
def asked(served):
    """With one image, none, two, one."""
    return make_prompts(served.folder)


@pytest.fixture
def policy(served):
    """The trainer's model, as saved."""
    return Policy(served.folder)


def connect(served, folder=None, **rollout):
    """A trainer's connection, once the server has the weights in the model's folder."""
    config = rollout_config(backend="server", servers=[served.address()], **rollout)
    engine = make_engine(config, folder or served.folder, rank=0, world_size=1, local_rank=0)
    engine.sync(Policy(served.folder), 0)
    return engine


@pytest.fixture
def engine(served):
    """A trainer's connection."""
    engine = connect(served)
    yield engine
    engine.close()


def test_logprobs_equal_the_policys_before_and_after_every_sync(engine, policy, asked):
    """Law 1: with images and without, as first loaded and after two syncs, for images seen before each sync."""
    assert policy.error(asked, engine.generate(asked, seed=0, **PLAIN)) < TOLERANCE
    for version in (1, 2):
        policy.perturb(seed=version)
        assert policy.error(asked, engine.generate(asked, seed=0, **PLAIN)) > 1e-2  # so the sync is what does it
        engine.sync(policy, version)
        assert policy.error(asked, engine.generate(asked, seed=version, **PLAIN)) < TOLERANCE


@pytest.mark.parametrize(("path", "part"), [("/reset_encoder_cache", "visual"), ("/reset_prefix_cache", "")])
def test_a_cache_kept_over_a_sync_breaks_law_1(engine, policy, asked, monkeypatch, path, part):
    """Law 1 needs both resets: with one of them planted away, the old weights' results are used again."""
    engine.generate(asked, seed=0, **PLAIN)
    policy.perturb(seed=3, part=part)
    each = engine._replicas.each

    def without(other, *arguments, **options):
        return {} if other == path else each(other, *arguments, **options)

    with monkeypatch.context() as planted:
        planted.setattr(engine._replicas, "each", without)
        engine.sync(policy, 1)
    if path == "/reset_encoder_cache":  # else a stale prefix would hide that the image was not looked at again
        with Deadline("the test", 60) as deadline:
            each("/reset_prefix_cache", deadline)
    assert policy.error(asked, engine.generate(asked, seed=0, **PLAIN)) > 1e-3
    engine.sync(policy, 2)
    assert policy.error(asked, engine.generate(asked, seed=0, **PLAIN)) < TOLERANCE


def test_greedy_equals_transformers(engine, policy, asked, served):
    """At temperature 0 a server and the hf engine, as vLLM in process, give the same tokens, texts and log-probs."""
    inside = make_engine(rollout_config(backend="hf"), served.folder, rank=0, world_size=1, local_rank=0)
    policy.perturb(seed=5)
    for one in (engine, inside):
        one.sync(policy, 1)
    greedy = {"n": 1, "max_new_tokens": [3, 24, 24, 9], "temperature": 0.0, "seed": 0}
    ours, theirs = engine.generate(asked, **greedy), inside.generate(asked, **greedy)
    for (one,), (other,) in zip(ours, theirs, strict=True):
        assert (one.text, one.finish_reason) == (other.text, other.finish_reason)
        assert one.token_ids.tolist() == other.token_ids.tolist()
        assert one.logprobs == pytest.approx(other.logprobs, abs=TOLERANCE)
    inside.close()


def test_a_sampled_placeholder_ends_the_response(engine, policy, asked):
    """Law 4: with a policy that likes placeholders, every response ends at its first one, with its log-prob."""
    check_sampled_placeholders(engine, policy, asked)


def test_completions_belong_to_their_prompt_whatever_order_they_come_in(engine, policy, asked, monkeypatch):
    """Law 7: answers arrive in reverse order of the prompts; each goes to its own, and one request carries a group."""
    call, order, ended = engine._replicas.call, [], [asyncio.Event() for _ in range(len(asked) + 1)]
    ended[-1].set()

    async def late(address, path, body=None, **options):
        answer = await call(address, path, body, **options)
        index = int(body["request_id"].rpartition("-")[2])
        await ended[index + 1].wait()
        order.append(index)
        ended[index].set()
        return answer

    monkeypatch.setattr(engine._replicas, "call", late)
    sampled = engine.generate(asked, seed=0, **PLAIN)
    assert order == [3, 2, 1, 0]
    assert policy.error(asked, sampled) < TOLERANCE
    assert policy.error(asked, [sampled[-1], *sampled[:-1]]) > 1e-2  # so a swap would have been seen


def test_an_answer_to_another_request_is_refused(engine, asked, monkeypatch):
    """Law 7: a server that swaps two answers is found out by their ids."""
    call, first = engine._replicas.call, {}

    async def swapped(address, path, body=None, **options):
        answer = await call(address, path, body, **options)
        return first.setdefault("answer", answer)

    monkeypatch.setattr(engine._replicas, "call", swapped)
    with pytest.raises(RuntimeError, match=r"answered request \S+ with an answer to"):
        engine.generate(asked, seed=0, **PLAIN)


def test_the_seed_decides_not_the_pace(engine, asked):
    """The same seed samples the same tokens, however requests meet in a batch; another seed others; samples differ."""

    def tokens(prompts, seed):
        sampled = engine.generate(prompts, n=4, max_new_tokens=12, temperature=1.0, seed=seed)
        return [[one.token_ids.tolist() for one in group] for group in sampled]

    crowd = tokens(asked * 8, 1)
    assert crowd[:4] == tokens(asked, 1) != tokens(asked, 2)
    assert crowd[:4] != crowd[4:8]
    assert all(len({tuple(one) for one in group}) == 4 for group in crowd)


def test_weights_of_another_trainer_are_refused(engine, served, asked):
    """Every answer says which weights sampled it: a second trainer at the same server is found out by the first."""
    other = connect(served)
    with pytest.raises(RuntimeError, match=r"sampled with the weights .* another trainer"):
        engine.generate(asked, seed=0, **PLAIN)
    other.close()


def test_the_sync_tells_what_did_not_arrive(engine, policy, asked, monkeypatch):
    """A damaged file, a damaged tensor, a tensor without value: each time an error; the next whole sync is right."""
    name = "model.language_model.layers.2.self_attn.v_proj.bias"
    save, worker = server_sync.save_file, engine._replicas.worker

    def cut(method, *arguments, path=None, **others):
        if method == "rethinker_load":
            os.truncate(path, os.path.getsize(path) - 1)
            others["path"] = path
        return worker(method, *arguments, **others)

    def damaged(tensors, path):
        tensors[name].view(-1)[-1] += 1e-6
        save(tensors, path)

    with monkeypatch.context() as planted:
        planted.setattr(engine._replicas, "worker", cut)
        with pytest.raises(
            RuntimeError, match=r"http://127\S+ answered /collective_rpc .* is not what the trainer wrote"
        ):
            engine.sync(policy, 1)
    with monkeypatch.context() as planted:
        planted.setattr(engine.config.rollout, "check_sync", True)
        planted.setattr(server_sync, "save_file", damaged)
        with pytest.raises(RuntimeError, match=rf"rollout\.check_sync: .*{name} of http://127"):
            engine.sync(policy, 2)
        planted.setattr(server_sync, "save_file", save)
        engine.sync(policy, 3)
    assert policy.error(asked, engine.generate(asked, seed=0, **PLAIN)) < TOLERANCE
    part = "layers.1.mlp.up_proj.weight"  # half a fused layer
    kept = lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.endswith(part)}  # noqa: E731
    monkeypatch.setattr(server_sync, "save_file", lambda tensors, path: save(kept(tensors), path))
    with pytest.raises(RuntimeError, match=rf"no value for 1 of vLLM's parameters, the first .*{part}"):
        engine.sync(policy, 4)
    assert not list(Path(engine._transfer._folder.name).iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: setattr(c.data, "max_pixels", 2 * 64 * 64), r"data\.min_pixels, data\.max_pixels is .*4096"),
        (lambda c: setattr(c.data, "max_images", 3), r"data\.max_images.*is 2 there and 3 here"),
        (lambda c: setattr(c.data, "max_prompt_tokens", 500), r"rollout\.max_new_tokens is 224 there and 532 here"),
        (lambda c: setattr(c.policy, "dtype", "bfloat16"), r"policy\.dtype is float32 there and bfloat16 here"),
    ],
)
def test_a_server_with_other_settings_is_refused(served, change, message):
    """What would make other samples or other pixels is named, with both values, before any weight is sent."""
    config = rollout_config(backend="server", servers=[served.address()])
    change(config)
    advice = "change it here, or start it with `rethinker serve`"
    with pytest.raises(ConfigError, match=rf"rollout\.servers: http://127.*{message}.*; {advice}"):
        make_engine(config, served.folder, rank=0, world_size=1, local_rank=0)


def test_a_server_of_another_model_is_refused(served, tmp_path):
    """Another vocabulary is named; the same model with other weights gets this run's."""
    other = create_tiny(tmp_path / "other", seed=0)
    saved = json.loads((other / "config.json").read_text())
    size = AutoConfig.from_pretrained(other).get_text_config().vocab_size
    for part in (saved, saved["text_config"]):
        if "vocab_size" in part:
            part["vocab_size"] = size + 64
    (other / "config.json").write_text(json.dumps(saved))
    with pytest.raises(ConfigError, match=rf"policy.model's text_vocab_size is {size} there and {size + 64} here;"):
        connect(served, str(other))


def test_the_run_begins_with_its_own_weights(served, asked):
    """A server holds what another trainer left, even half an update; a run, new or resumed, brings its own weights."""
    engine, policy = connect(served), Policy(served.folder)
    policy.perturb(seed=7)
    engine.sync(policy, 1)
    broken = {name: tensor.clone() for name, tensor in policy} | {"model.language_model.norm.weight": torch.ones(1)}
    with Deadline("the test", 60) as deadline, pytest.raises(RuntimeError, match="HTTP 500"):
        engine._transfer.send([], iter(broken.items()), deadline)
    engine.close()
    engine = connect(served)
    assert Policy(served.folder).error(asked, engine.generate(asked, seed=0, **PLAIN)) < TOLERANCE
    engine.close()


def test_evaluation_and_curation_bring_the_checkpoints_weights(served, policy, tmp_path):
    """`rethinker eval` by a server that holds a run's weights: the answers of transformers with the checkpoint; and
    `rethinker curate` asks it, too."""
    engine = connect(served)
    policy.perturb(seed=7)
    engine.sync(policy, 1)
    engine.close()
    config, rows = rollout_config(), {}
    settings = {
        f"data.{name}": getattr(config.data, name) for name in ("min_pixels", "max_pixels", "max_prompt_tokens")
    }
    settings |= {"policy.dtype": "float32", "rollout.max_new_tokens": 12, "data.max_images": 1}
    given = [f"--{name}={value}" for name, value in settings.items()]
    for backend, further in {"hf": [], "server": [f"--rollout.servers=[{served.address()}]"]}.items():
        output = tmp_path / backend
        arguments = ["--benchmark=digits", "--limit=6", f"--rollout.backend={backend}", f"--output={output}"]
        evaluation.main([served.folder, *arguments, *given, *further])
        rows[backend] = [row["token_ids"] for row in parquet.read_table(output / "responses.parquet").to_pylist()]
    assert rows["server"] == rows["hf"]
    given += ["--samples=2", "--limit=4", f"--output={tmp_path / 'curated'}", f"--policy.model={served.folder}"]
    with pytest.raises(ConfigError, match="answers no question sometimes"):  # but it has been asked
        curation.main(["easy_vqa_cpu", "--rollout.backend=server", *further, *given])


def test_what_is_no_server_is_refused(served):
    """Nothing at the address, or something else: the error names it and says how to start a server."""

    class Other(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_error(404, "not here")

        def log_message(self, *_):
            pass

    config = rollout_config(backend="server", servers=[f"http://127.0.0.1:{free_port()}"])
    with pytest.raises(ConfigError, match=r"rollout server http://127\S+ is lost: .*`rethinker serve`"):
        make_engine(config, served.folder, rank=0, world_size=1, local_rank=0)
    with http.server.HTTPServer(("127.0.0.1", 0), Other) as stub:
        threading.Thread(target=stub.serve_forever, daemon=True).start()
        config.rollout.servers = [f"http://127.0.0.1:{stub.server_port}"]
        with pytest.raises(ConfigError, match=rf"{config.rollout.servers[0]} answered /collective_rpc.* HTTP 404"):
            make_engine(config, served.folder, rank=0, world_size=1, local_rank=0)
        stub.shutdown()


@pytest.fixture
def relay(served):
    relay = Relay(served.address())
    yield relay
    relay.close()


def test_prompts_are_spread_evenly(engine, relay, policy, asked):
    """Data parallel: each of two addresses gets half of the requests, and every answer is right."""
    engine._replicas.alive.append(relay.address)
    sampled = engine.generate(asked * 4, seed=0, **PLAIN)
    assert relay.requests == 8
    assert policy.error(asked * 4, sampled) < TOLERANCE


def test_a_lost_server_is_dropped_and_its_requests_go_to_the_other(engine, relay, asked, caplog):
    """Cut off in the middle of a rollout: a warning names it, all groups are whole, and the samples are the same."""
    whole = engine.generate(asked * 4, **LONG)
    engine._replicas.alive.append(relay.address)
    relay.last = 5  # of 8
    with caplog.at_level(logging.WARNING):
        sampled = engine.generate(asked * 4, **LONG)
    assert relay.requests >= relay.last
    assert sampled == whole
    assert [r.levelname for r in caplog.records if relay.address in r.getMessage()] == ["WARNING"]
    assert engine._replicas.alive != [] and relay.address not in engine._replicas.alive


def test_a_connection_that_breaks_once_loses_no_server(engine, relay, asked, monkeypatch):
    """A reset connection to a server that is well is asked again, quietly."""
    call, broken = engine._replicas.call, []

    async def fragile(address, path, body=None, **options):
        if not broken:
            broken.append(address)
            raise replicas.Disconnected(address, "reset")
        return await call(address, path, body, **options)

    monkeypatch.setattr(engine._replicas, "call", fragile)
    assert [len(group) for group in engine.generate(asked, seed=0, **PLAIN)] == [2] * len(asked)
    assert broken == engine._replicas.alive


def test_a_server_that_is_silent_is_dropped(engine, served, asked, monkeypatch):
    """The only server, stopped (SIGSTOP): after SILENT_S the run ends and says so, before its deadline."""
    monkeypatch.setattr(replicas, "PING_S", 0.5)
    monkeypatch.setattr(replicas, "SILENT_S", 1.0)
    served.signal(signal.SIGSTOP)
    start = time.monotonic()
    try:
        with pytest.raises(NoServerLeft, match=rf"{served.address()}: silent for 1 s.*rethinker serve.*--resume auto"):
            engine.generate(asked, seed=0, **PLAIN)
    finally:
        served.signal(signal.SIGCONT)
    print(f"a silent server: named after {time.monotonic() - start:.2f} s")


@pytest.mark.parametrize("work", ["rollout", "sync"])
def test_a_server_that_hangs_meets_the_deadline(engine, served, policy, asked, monkeypatch, work):
    """Stopped (SIGSTOP): rollout and sync end at rollout.timeout_s and name it; continued, all is well again."""
    monkeypatch.setattr(engine.config.rollout, "timeout_s", 2.0)
    served.signal(signal.SIGSTOP)
    start = time.monotonic()
    try:
        with pytest.raises(
            TimeoutError, match=rf"{work}.*rollout\.timeout_s=2 .*no answer yet from {served.address()}"
        ):
            engine.generate(asked, **LONG) if work == "rollout" else engine.sync(policy, 1)
    finally:
        served.signal(signal.SIGCONT)
    took = time.monotonic() - start
    print(f"a hanging server, {work}: named after {took:.2f} s of 2 s")
    assert 2.0 <= took < 4.0
    monkeypatch.setattr(engine.config.rollout, "timeout_s", 120)
    policy.perturb(seed=8)
    engine.sync(policy, 2)
    assert policy.error(asked, engine.generate(asked, seed=0, **PLAIN)) < TOLERANCE


def test_a_request_to_stop_breaks_a_rollout_off(engine, policy, asked, monkeypatch):
    """SIGTERM in a rollout that may be thrown away: it ends within a second, and the server stops working on it."""
    call, start = engine._replicas.call, []

    async def asked_to_stop(*arguments):
        answer = await call(*arguments)
        if not start:
            start.append(time.monotonic())
            signals._State.name = "SIGTERM"
        return answer

    try:
        with monkeypatch.context() as planted, pytest.raises(StopRequested), signals.interruptible():
            planted.setattr(engine._replicas, "call", asked_to_stop)
            engine.generate(asked * 64, **LONG)
    finally:
        signals._State.name = None
    assert time.monotonic() - start[0] < 1.2
    engine.sync(policy, 1)  # its prefix cache can be cleared only when no request is left
    assert policy.error(asked, engine.generate(asked, seed=0, **PLAIN)) < TOLERANCE


def test_a_prompt_that_differs_is_refused(engine, asked):
    """Image tokens unlike the policy's, and prompts that are too long: the error names query and settings."""
    prompt, image_token = asked[0], engine._requests.model_config.image_token_id
    at = prompt.token_ids.index(image_token)
    short = prompt.token_ids[:at] + prompt.token_ids[at + 1 :]
    wrong = Prompt(prompt.query_id, short, prompt.compact_ids, prompt.images)
    with pytest.raises(ConfigError, match=r"'q0'.*data\.min_pixels=4096 and data\.max_pixels=4096"):
        engine.generate([asked[1], wrong], seed=0, **PLAIN)
    with pytest.raises(ConfigError, match=r"data\.max_prompt_tokens=192"):
        engine.generate(asked, n=1, max_new_tokens=220, temperature=1.0, seed=0)


def test_the_server_refuses_in_its_own_words(engine, asked):
    """An HTTP error that is no loss: address, route and the server's message."""
    with pytest.raises(
        RuntimeError, match=r"http://127\S+ answered /inference/v1/generate with HTTP 400: .*temperature"
    ):
        engine.generate(asked, n=1, max_new_tokens=4, temperature=-1.0, seed=0)


@pytest.mark.parametrize(
    ("rollout", "message"),
    [
        ({"backend": "server"}, "rollout.servers"),
        ({"servers": ["http://127.0.0.1:8100"]}, "rollout.backend=server"),
        ({"weight_folder": "/tmp"}, "rollout.backend=server"),
        (
            {"backend": "server", "servers": ["127.0.0.1:8100"]},
            "='127.0.0.1:8100' must be an address like http://127.0.0.1:8100",
        ),
        (
            {"backend": "server", "servers": ["http://host:port"]},
            "='http://host:port' must be an address like http://127.0.0.1:8100",
        ),
        (
            {"backend": "server", "servers": ["http://host:8100/v1"]},
            "='http://host:8100/v1' must be an address like http://127.0.0.1:8100",
        ),
        ({"backend": "server", "servers": ["http://host:8100", "http://host:8100/"]}, "twice"),
        ({"check_sync": True, "tensor_parallel_size": 2}, "compares whole tensors"),
    ],
)
def test_settings_of_servers_are_checked(rollout, message):
    """Addresses are whole, and given exactly when they are used."""
    with pytest.raises(ConfigError, match=message):
        resolve_config("easy_vqa_cpu", {f"rollout.{name}": value for name, value in rollout.items()})
    good = resolve_config(
        "easy_vqa_cpu", ["--rollout.backend", "server", "--rollout.servers", "[http://a:1,http://b:2]"]
    )
    assert good.rollout.servers == ["http://a:1", "http://b:2"]


def test_a_killed_server_ends_the_rollout_by_name(engine, served, asked):
    """SIGKILL to the only server in the middle of a rollout: an error that names it, within the deadline."""
    address = served.address()
    timer = threading.Timer(0.5, lambda: served.signal(signal.SIGKILL))
    timer.start()
    start = time.monotonic()
    with pytest.raises(NoServerLeft, match=rf"no rollout server is left \({address}: .*--resume auto"):
        engine.generate(asked * 64, **LONG)
    took = time.monotonic() - start
    timer.join()
    served.process.wait(10)
    print(f"a killed server: named {took - 0.5:.2f} s after the SIGKILL; rollout.timeout_s=120")
    assert took < 10
    with pytest.raises(NoServerLeft):
        engine.sync(Policy(served.folder), 1)
