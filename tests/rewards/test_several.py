"""Several reward functions in their workers: each kind gets its own responses (law 7), and no failure of one harms
another or hangs (law 11)."""

from __future__ import annotations

import logging
import random
import threading
import time

import pytest

from rethinker.config import ConfigError, RewardConfig
from rethinker.rewards.checker import AnswerChecker
from rethinker.runtime import signals
from rethinker.samples import Query

REWARDS = """
import asyncio, ctypes, os, time

now, most = 0, 0

def act(response):
    word, _, rest = response.partition(" ")
    if word == "hang":
        while True: pass
    if word == "exit": os._exit(3)
    if word == "segfault": ctypes.string_at(0)
    if word == "raise": raise KeyError(rest)
    if word == "sys.exit": raise SystemExit
    if word == "hog":
        blocks = []
        while True: blocks.append(bytearray(2**24))
    return {"nan": float("nan"), "text": "1.0", "none": None}.get(word, float(rest or 1))

def one(response, answer, query): return act(response)

def batch(responses, answers, queries, scale=1):
    assert answers == [query.answer for query in queries]
    values = [act(response) for response in responses]
    return values if scale == 1 else [scale * value for value in values]

def pid(responses, answers, queries): return [os.getpid()] * len(responses)

def size(responses, answers, queries): return [len(responses)] * len(responses)

def short(responses, answers, queries): return [1.0] * (len(responses) - 1)

def words(responses, answers, queries): return "1" * len(responses)

async def many(response, answer, query):
    global now, most
    now += 1
    most = max(most, now)
    try:
        word, _, rest = response.partition(" ")
        if word == "sleep": await asyncio.sleep(float(rest))
        elif word == "wait":
            while True:
                try: await asyncio.sleep(60)
                except asyncio.CancelledError: pass  # and goes on
        elif word == "cancel": raise asyncio.CancelledError
        elif word == "most": return most
        else: return act(response)
        return float(rest)
    finally:
        now -= 1

def facts(response, answer, query, *, tokens, truncated, max_tokens): return tokens + 1000 * truncated + max_tokens / 4

def batch_facts(responses, answers, queries, truncated, tokens, max_tokens):
    return [t + 1000 * cut + most / 4 for t, cut, most in zip(tokens, truncated, max_tokens)]

async def async_facts(response, answer, query, *, tokens, truncated, max_tokens):
    return facts(response, answer, query, tokens=tokens, truncated=truncated, max_tokens=max_tokens)

def red(response, answer, query, images): return sum(file[0] + len(file) / 1e6 for file in images)

def red_batch(responses, answers, queries, images):
    return [sum(file[0] + len(file) / 1e6 for file in files) for files in images]

async def at_once(response, answer, query, images): return act(response)

async def red_async(response, answer, query, images):
    await asyncio.sleep(0.3)
    return act(response) + images[0][0]
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "several.py"
    path.write_text(REWARDS)
    return path


@pytest.fixture
def open_checker(file):
    """Opens a checker of some functions of the file; all are closed in the end."""
    opened = []

    def build(*entries: dict, **settings) -> AnswerChecker:
        given = {"max_tokens": settings.pop("max_tokens", None), "images": settings.pop("images", None)}
        entries = [e | {"function": e["function"].replace("*", f"{file}:")} for e in entries]
        config = RewardConfig(functions=entries, **{"workers": 2, "timeout_s": 5.0, "memory_gb": 0.0625} | settings)
        opened.append(AnswerChecker(config, **given))
        return opened[-1]

    yield build
    for checker in opened:
        checker.close()


def ask(*responses: str, group: int = 4) -> list[tuple[str, str, Query]]:
    queries = [Query(f"q{i}", "2 + 2?", str(i)) for i in range(len(responses) // group + 1)]
    return [(f"r{i}", response, queries[i // group]) for i, response in enumerate(responses)]


@pytest.fixture(scope="module")
def three(file):
    """One function of each kind, with few workers that serve several tests."""
    entries = [{"function": f"{file}:one"}, {"function": f"{file}:batch", "scale": 2}, {"function": f"{file}:many"}]
    with AnswerChecker(RewardConfig(functions=entries, workers=2, timeout_s=10.0)) as checker:
        yield checker


def test_each_kind_gets_its_own_responses(three):
    """Law 7: one at a time, a batch, and many at once, whatever order they end in: values by request id, functions in
    order, and the first one alone where that is all that is asked."""
    chance = random.Random(0)
    items = ask(*(f"sleep {chance.random() / 50}" for _ in range(60)))
    values = three.score_all(items, {})
    assert list(values) == ["one", "batch", "many"] and not three.failures
    for request, response, _ in items:
        number = float(response.split()[1])
        assert [of[request] for of in values.values()] == [number, 2 * number, number]
        assert list(values["many"]) == [request for request, *_ in items]
    assert three.score(items) == values["one"]
    assert three.score_all([], {}) == {"one": {}, "batch": {}, "many": {}}


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ("exit", "crash"),
        ("segfault", "crash"),
        ("hog", "crash"),
        ("hang", "timeout"),
        ("wait", "timeout"),
        ("raise it", "error"),
        ("sys.exit", "error"),
        ("cancel", "error"),
        ("text", "error"),
        ("none", "error"),
        ("nan", "non_finite"),
    ],
)
def test_a_failing_async_call_fails_alone(open_checker, response, reason, caplog):
    """Law 11: whatever a call does, also to its process or its loop, it alone has the value 0, counted and named."""
    checker = open_checker({"function": "boxed"}, {"function": "*many"}, timeout_s=0.5 if reason == "timeout" else 5.0)
    responses = [f"sleep 0.{i:03d}" for i in range(30)]
    responses[5] = response
    start = time.monotonic()
    values = checker.score_all(ask(*responses), {})["many"]
    assert values == {f"r{i}": 0.0 if i == 5 else float(f"0.{i:03d}") for i in range(30)}
    assert checker.failures == {f"many: {reason}": 1} and time.monotonic() - start < 15
    (line,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert line.startswith(f"a check of many scored 0 ({reason}") and f"query 'q1', {response!r} for '1'" in line
    assert checker.score_all(ask("sleep 0.01"), {})["many"] == {"r0": 0.01}


def test_several_async_calls_that_kill_their_process(open_checker):
    """Each is found, and no other pays for them."""
    checker = open_checker({"function": "*many"}, timeout_s=5.0)
    responses = ["exit" if i % 4 == 1 else f"sleep {i / 1000}" for i in range(24)]
    assert checker.score(ask(*responses)) == {f"r{i}": 0.0 if i % 4 == 1 else i / 1000 for i in range(24)}
    assert checker.failures == {"crash": 6}


def test_async_calls_that_wait_share_their_deadline(open_checker):
    """Those that are too late together cost one deadline, and are not made again, whatever they do when cancelled."""
    checker = open_checker({"function": "*many"}, timeout_s=1.0)
    checker.score(ask("sleep 0"))
    start = time.monotonic()
    assert set(checker.score(ask(*["wait"] * 12)).values()) == {0.0} and time.monotonic() - start < 2.4
    assert checker.failures == {"timeout": 12} and checker.score(ask("most")) == {"r0": 13.0}  # they go on for ever


def test_async_calls_run_at_once_up_to_their_limit(open_checker):
    """16 unless the entry says otherwise; the time is that of the waiting, shared."""
    for limit in (16, 5):
        checker = open_checker({"function": "*many", "concurrency": limit})
        checker.score(ask("sleep 0"))
        start = time.monotonic()
        assert set(checker.score(ask(*["sleep 0.1"] * 40)).values()) == {0.1}
        assert 0.1 * -(-40 // limit) <= time.monotonic() - start < 3.9
        assert checker.score(ask("most")) == {"r0": float(limit)}


@pytest.mark.parametrize(
    ("bad", "reason", "lost"),
    [
        ("hang", "timeout", range(8)),
        ("exit", "crash", range(8)),
        ("hog", "crash", range(8)),
        ("raise", "error", range(8)),
        ("nan", "non_finite", [2]),
        ("text", "error", [2]),
        ("none", "error", [2]),
    ],
)
def test_a_failing_batch(open_checker, bad, reason, lost):
    """Law 11: a call that fails costs all its responses, a value that is no number only its own; the other call, in the
    other process, is whole."""
    checker = open_checker({"function": "*batch"}, timeout_s=0.5 if reason == "timeout" else 5.0)
    responses = [f"value {i}" for i in range(16)]
    responses[2] = bad
    assert checker.score(ask(*responses)) == {f"r{i}": 0.0 if i in lost else float(i) for i in range(16)}
    assert checker.failures == {reason: len(lost)}
    assert checker.score(ask("value 3")) == {"r0": 3.0}


@pytest.mark.parametrize(
    ("function", "said"), [("short", "it returned 7 rewards for 8 responses"), ("words", "not a str")]
)
def test_a_batch_returns_a_number_for_each_response(open_checker, caplog, function, said):
    """Values that cannot be told apart are nobody's."""
    checker = open_checker({"function": f"*{function}"})
    assert set(checker.score(ask(*"abcdefgh" * 2)).values()) == {0.0}
    assert checker.failures == {"error": 16} and said in caplog.text


def test_a_batch_is_split_over_the_workers_between_queries(open_checker):
    """Each process has one call, about equally large, and the responses to a query are in the same call."""
    checker = open_checker({"function": "*pid"}, {"function": "*size"})
    values = checker.score_all(ask(*"a" * 20), {})
    assert [values["size"][f"r{i}"] for i in range(20)] == [12.0] * 12 + [8.0] * 8  # 5 queries of 4
    assert checker.score_all(ask("a"), {})["size"] == {"r0": 1.0}
    one = ask(*"a" * 20, group=20)
    assert set(checker.score_all(one, {})["size"].values()) == {20.0}


@pytest.mark.parametrize("function", ["facts", "batch_facts", "async_facts"])
def test_a_function_gets_the_facts_that_it_asks_for(open_checker, function):
    """Of its own response: its length, whether the limit ended it, and the limit."""
    checker = open_checker({"function": f"*{function}"}, max_tokens=400)
    items = ask(*"abcdefgh")
    lengths = {request: (i, i % 3 == 0) for i, (request, *_) in enumerate(items)}
    assert checker.score(items, lengths) == {f"r{i}": i + 1000 * (i % 3 == 0) + 100 for i in range(8)}
    assert checker.failures == {}


def test_images_are_opened_only_for_functions_that_ask(open_checker):
    """Once for the responses to a query, whichever function is asked; each gets those of its own query."""
    opened = []

    def images(query):
        opened.append(query.id)
        return [bytes([int(query.answer)]) * 10]

    items = ask(*"abcdefgh")
    assert set(open_checker({"function": "boxed"}, {"function": "*one"}, images=images).score(items).values()) == {0.0}
    assert not opened
    for function in ("red", "red_batch"):
        checker = open_checker({"function": f"*{function}"}, images=images, workers=1)
        expected = {f"r{i}": pytest.approx(i // 4 + 1e-5) for i in range(8)}
        assert checker.score(items) == expected and not checker.failures
        assert opened == ["q0", "q1"]
        opened.clear()


@pytest.mark.parametrize("error", [ConfigError("no image"), OSError(5, "no image"), EOFError("no image")])
def test_images_are_opened_when_their_turn_comes(open_checker, error):
    """Those of an episode do not fit in memory at once: of the responses that an async function is not asked about,
    none are opened. An image that cannot be opened ends the checks, and no later one gets their values."""
    opened = []

    def images(query):
        opened.append(query.id)
        if query.id == "q2" and len(opened) == 3:  # for the first time
            raise error
        return [bytes([int(query.answer)])]

    stopped = open_checker({"function": "*red_async", "concurrency": 2, "on_failure": "stop"}, images=images)
    stopped.score(ask("raise it", *"bcdefgh"))
    assert stopped.stopping and opened == ["q0"]
    opened.clear()
    checker = open_checker({"function": "*red_async", "concurrency": 8}, images=images)  # seven are under way by then
    with pytest.raises(type(error), match="no image"):
        checker.score(ask(*(f"value {i}" for i in range(9))))
    assert checker.score(ask(*(f"value {100 + i}" for i in range(9)))) == {f"r{i}": 100 + i + i // 4 for i in range(9)}


def test_a_process_that_dies_while_it_is_asked(open_checker):
    """What did not reach it is asked again, and only the guilty call fails: the images are larger than a pipe."""
    checker = open_checker({"function": "*at_once", "concurrency": 9}, images=lambda query: [bytes(4_000_000)])
    items = ask("exit", *(f"value {i}" for i in range(1, 6)), group=1)
    assert checker.score(items) == {"r0": 0.0} | {f"r{i}": float(i) for i in range(1, 6)}
    assert checker.failures.total() == 1


def test_a_failure_that_must_stop_the_run(open_checker):
    """on_failure=stop: what failed is said, the calls that are left are not made, and nothing is asked any more."""
    for function in ("one", "many", "batch"):
        checker = open_checker(
            {"function": "boxed"}, {"function": f"*{function}", "on_failure": "stop", "concurrency": 1}
        )
        checker.check_working()
        checker.score_all(ask("value 1", *["raise it"] * 99), {})
        assert sum(checker.failures.values()) <= {"one": 4, "many": 1, "batch": 100}[function]
        stopping = checker.stopping
        assert (
            stopping.startswith("reward.functions[1].function=") and f":{function}: a check failed (error" in stopping
        )
        assert (
            "KeyError: 'it'), of query 'q0'; repair what failed, or set reward.functions[1].on_failure=zero" in stopping
        )
        failures = checker.failures.total()
        checker.score_all(ask("raise more"), {})
        assert (checker.stopping, checker.failures.total()) == (stopping, failures)
        with pytest.raises(ValueError, match="a check failed"):
            checker.check_working()


def test_what_was_not_asked_is_no_verdict(open_checker):
    """A boxed answer that was skipped because the run is to stop is judged when it is asked again."""
    checker = open_checker({"function": "boxed"}, timeout_s=10.0)
    item = [("a", "\\boxed{\\sqrt{8}}", Query("q", "?", "2\\sqrt{2}"))]
    checker.stopping = "another function failed"
    assert checker.score(item) == {"a": 0.0} and not checker.failures
    checker.stopping = None
    assert checker.score(item) == {"a": 1.0}


def test_a_failure_that_need_not_stop_the_run(open_checker):
    """on_failure=zero, the default, and a failure of another function than the one that must not."""
    checker = open_checker({"function": "*one"}, {"function": "*many", "on_failure": "stop"})
    checker.score(ask("raise it"))
    assert checker.stopping is None and checker.failures == {"one: error": 1}


def test_a_run_that_is_to_stop_does_not_wait_for_its_judges(open_checker, monkeypatch):
    """A signal breaks off calls that would go on for long, of all kinds, and the next ones are not mixed up by them."""
    checker = open_checker({"function": "*one"}, {"function": "*many"}, timeout_s=5.0)
    checker.score_all(ask("value 1"), {})
    abandoned = threading.Event()
    threading.Timer(0.3, abandoned.set).start()
    start = time.monotonic()
    with signals.interruptible(abandoned), pytest.raises(signals.StopRequested):
        checker.score_all(ask(*["sleep 4"] * 100), {})
    assert time.monotonic() - start < 12  # 25 would pass undisturbed
    assert checker.score_all(ask("value 3"), {}) == {"one": {"r0": 3.0}, "many": {"r0": 3.0}}
