"""A judge in its worker process, as a run has it: whatever its server does, the others' values are their own (law 7), a
failure is counted and named once, and nothing hangs (law 11)."""

from __future__ import annotations

import logging
import random
import time

import pytest

from rethinker.config import ConfigError, RewardConfig
from rethinker.rewards.checker import AnswerChecker
from rethinker.rewards.functions import load_rewards
from rethinker.samples import Query
from tests.rewards.judges import FAULTS, free_port, serving

TIMEOUT_S = 2.0


def config_of(server: str, **entry) -> RewardConfig:
    judge = {"function": "judge", "address": server, "model": "referee", "prompt": "Rate {response}", "retries": 1}
    return RewardConfig(functions=[judge | {"timeout_s": TIMEOUT_S} | entry])


def checker_of(server: str, **entry) -> AnswerChecker:
    return AnswerChecker(
        config_of(server, **entry), images=lambda query: [f"PNG of {name}".encode() for name in query.images]
    )


def text_of(body) -> str:
    content = body["messages"][0]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def in_any_order(handler, body, number):
    """A response's last word is its score; the answers come in another order than the requests."""
    handler.server.over.wait(random.random() / 20)
    handler.score(f"Score: {text_of(body).split()[-1]}")


@pytest.fixture(scope="module")
def judging():
    """A server whose script each test sets, and a checker that asks it."""
    with serving(in_any_order) as server, checker_of(server.address) as checker:
        checker.try_out()  # the client's own first request takes its time
        yield server, checker


@pytest.fixture
def judged(judging):
    """The values of some responses; before, nothing has failed yet."""
    server, checker = judging
    server.script, server.most = in_any_order, 0
    server.bodies.clear()
    checker.failures.clear()
    checker._named.clear()

    def run(*responses: str, script=in_any_order, shown=()) -> list[float]:
        server.script = script
        items = [(f"r{i}", text, Query(f"q{i}", "?", "1", shown)) for i, text in enumerate(responses)]
        values = checker.score_all(items, {})["judge"]
        return [values[f"r{i}"] for i in range(len(responses))]

    return run


def test_every_response_has_its_own_score(judged, judging):
    """Law 7, with many at once, as many as `concurrency` allows."""
    scores = [round(random.random(), 6) for _ in range(200)]
    assert judged(*(f"response {score}" for score in scores)) == scores
    assert 8 < judging[0].most <= 16


def test_the_querys_images_are_shown(judged, judging):
    assert judged("x 1", shown=("a.png", "b.png")) == [1.0]
    content = judging[0].bodies[0]["messages"][0]["content"]
    assert [part["type"] for part in content] == ["image_url", "image_url", "text"]


@pytest.mark.parametrize(("name", "reason", "advice"), [(name, *of[1:]) for name, of in FAULTS.items()], ids=FAULTS)
def test_the_run_goes_on(judged, judging, caplog, name, reason, advice):
    """Every third request meets the fault: it is worth 0 and counted, the others have their scores, and one line names
    the function, what happened and what to change."""
    fault, checker = FAULTS[name][0], judging[1]
    start = time.monotonic()

    def some(handler, body, number):
        (fault if "bad" in text_of(body) else in_any_order)(handler, body, number)

    responses = [f"{'bad' if n % 3 == 0 else 'good'} {n} {n / 10}" for n in range(10)]
    with caplog.at_level(logging.WARNING):
        values = judged(*responses, script=some)
    assert values == [0.0 if n % 3 == 0 else n / 10 for n in range(10)]
    assert checker.failures == {reason: 4}
    (line,) = [record.getMessage() for record in caplog.records]
    assert advice in line and "query 'q" in line and "\n" not in line and len(line) < 1200
    assert time.monotonic() - start < TIMEOUT_S + 10


def test_it_goes_on_with_a_server_that_comes_back(judged, caplog):
    """Down, up again at the same place, and up for good: the same checker asks it all the time."""
    port = free_port()
    with checker_of(f"http://127.0.0.1:{port}/v1", retries=0, name="ref", timeout_s=30) as checker:

        def values(*responses: str) -> list[float]:
            items = [(text, text, Query("q", "?", "1")) for text in responses]
            return list(checker.score_all(items, {})["ref"].values())

        with caplog.at_level(logging.WARNING):
            assert values("a 1", "b 1") == [0.0, 0.0] and checker.failures == {"error": 2}
            with serving(in_any_order, port):
                assert values("a 1", "b 0.5") == [1.0, 0.5]
            assert values("a 1", "c 1") == [1.0, 0.0]  # what is known needs no server
        (line,) = [record.getMessage() for record in caplog.records]
        assert "cannot be reached: start the judge there, or correct address" in line


@pytest.mark.parametrize("name", ["slow", "no number"])
def test_the_run_stops(name):
    """With on_failure stop a failure says why the run is to end, and no response is asked about afterwards."""

    def some(handler, body, number):
        (FAULTS[name][0] if "bad" in text_of(body) else in_any_order)(handler, body, number)

    with serving(some) as server, checker_of(server.address, on_failure="stop", concurrency=2) as checker:
        items = [(f"{n}", f"{'good bad'.split()[n == 3]} {n} 1", Query(f"q{n}", "?", "1")) for n in range(50)]
        checker.score_all(items, {})
        assert len(server.bodies) < 40 and checker.failures.total() == 1
        with pytest.raises(
            ConfigError, match=r"reward.functions\[0\].function=judge: a check failed .*'q3'"
        ) as refused:
            checker.check_working()
        assert FAULTS[name][2] in str(refused.value) and "on_failure=zero" in str(refused.value)
        asked = len(server.bodies)
        checker.score_all(items[10:], {})
        assert len(server.bodies) == asked


def test_it_is_tried_out_before_the_run(caplog):
    """A judge that cannot judge ends the run in one line, or warns; one that can is silent."""
    with serving(in_any_order) as server:
        good = {"prompt": "Score {response}"}
        server.script = lambda handler, body, number: handler.score("Score: 1")
        with checker_of(server.address, timeout_s=30, **good) as checker, caplog.at_level(logging.WARNING):
            checker.try_out()
            assert not caplog.records and server.bodies[0]["messages"][0]["content"][0]["type"] == "image_url"
            server.script = lambda handler, body, number: handler.say({"error": {"message": "unknown"}}, 404)
            checker.try_out()  # the score is known
            assert not caplog.records
        wrong = checker_of(server.address, model="ref", on_failure="stop", timeout_s=30)
        with wrong as checker:
            with pytest.raises(ConfigError) as refused:
                checker.try_out()
            message = str(refused.value)
            assert message.startswith("reward.functions[0].function=judge: it cannot judge (error: JudgeError: ")
            assert "has no model=ref, but referee, other" in message and "\n" not in message
    with checker_of(server.address, retries=0, timeout_s=30) as checker, caplog.at_level(logging.WARNING):
        checker.try_out()
        (line,) = [record.getMessage() for record in caplog.records]
        assert "it cannot judge" in line and "cannot be reached" in line and not checker.failures


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"adress": "http://a/v1"}, r"reward.functions\[0\].adress: judge takes no such option: did you mean address"),
        ({"address": "a"}, r"reward.functions\[0\].address='a': must be the address"),
        ({"scale": [1, 0]}, r"reward.functions\[0\].scale=\[1, 0\]: must be the lowest"),
        ({"max_tokens": 9}, r"reward.functions\[0\].max_tokens is a fact"),
    ],
)
def test_a_wrong_option_is_refused_at_once(entry, message):
    with pytest.raises(ConfigError, match=message):
        load_rewards(config_of("http://127.0.0.1:8000/v1", **entry))
    with pytest.raises(ConfigError, match=r"reward.functions\[0\].model is missing: judge needs the address"):
        load_rewards(RewardConfig(functions=[{"function": "judge", "address": "http://127.0.0.1:8000/v1"}]))
