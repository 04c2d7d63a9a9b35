"""A whole run with a judge, on images and with second passes: its rewards are the judge's, and a judge that fails and
moves costs nothing but time."""

from __future__ import annotations

import json

import pytest

from rethinker.runtime.completions import read_completions
from tests.integration.interruptions import finish, newest, prepare, rows, start
from tests.rewards.judges import serving

SMALL = ("--rollout.backend", "hf", "--train.max_steps", "8", "--rollout.max_new_tokens", "12")


def parity(handler, body, number):
    """The score that the run's own function `parity` gives, after the image's part of the request."""
    image, *texts = body["messages"][0]["content"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,")
    response = "".join(part["text"] for part in texts).replace("< |", "<|")
    handler.server.over.wait(number % 7 / 500)  # in another order than asked
    handler.score(f"Score: {len(response) % 2}")


def judged_at(server, **entry) -> tuple[str, ...]:
    judge = {"function": "judge", "address": server.address, "model": "referee", "prompt": "{response}", "retries": 0}
    functions = [judge | {"on_failure": "stop", "timeout_s": 60} | entry]
    return ("--reward.function", "boxed", "--reward.functions", json.dumps(functions), *SMALL)


@pytest.mark.timeout(600)
def test_a_run_with_a_judge_is_the_run_with_its_scores(tmp_path):
    """Law 7: the same run, bit for bit, as with a function that gives the same scores, though the judge fails in the
    middle, which stops the run, and the run goes on with a judge at another address (law 10)."""
    prepare(tmp_path)
    finish(tmp_path, "own", *SMALL)

    def fails(handler, body, number):
        if len(rows(tmp_path / "stopped")) < 4:  # within the first episode
            return parity(handler, body, number)
        handler.say({"error": {"message": "oops"}}, 500)

    with serving(fails) as server:
        assert start(tmp_path, "stopped", *judged_at(server)).wait(300) == 2
    log = (tmp_path / "stopped.log").read_text()
    (line,) = {line for line in log.splitlines() if line.startswith("error:")}
    assert f"{server.address} fails: its own log says why (status 500); 'oops'" in line and "--resume auto" in line
    assert newest(tmp_path / "stopped") == 4
    with serving(parity) as server:
        finish(tmp_path, "stopped", "--resume", "auto", *judged_at(server, retries=3))
    assert rows(tmp_path / "stopped") == rows(tmp_path / "own")
    for episode in (0, 1):
        own, judged = (read_completions(tmp_path / name / "completions", episode) for name in ("own", "stopped"))
        assert [group.rewards for group in own] == [group.rewards for group in judged]


def test_a_judge_that_is_not_there_ends_the_run_before_it_begins(tmp_path):
    """With on_failure=stop in one line, before anything is sampled; here the address has no such model."""
    prepare(tmp_path)
    with serving(lambda handler, body, number: handler.say({"error": {"message": "none"}}, 404)) as server:
        assert start(tmp_path, "wrong", *judged_at(server, model="ref")).wait(300) == 2
        assert len(server.bodies) == 1
    log = (tmp_path / "wrong.log").read_text()
    assert "it cannot judge" in log and "has no model=ref, but referee, other" in log and "Traceback" not in log
