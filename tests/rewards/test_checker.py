"""Law 11: checking cannot hang, crash or be silently wrong off the main thread. Law 7: scores go by request id."""

from __future__ import annotations

import gc
import logging
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace

import pytest

from rethinker.config import ConfigError, RewardConfig
from rethinker.rewards.checker import AnswerChecker
from rethinker.rewards.functions import load_rewards
from rethinker.samples import Query
from tests.speed import least_cpu_s

REWARDS = """
import ctypes, os, sys, time

class Mute(Exception):
    def __str__(self): raise RuntimeError("even this")

def by_word(response, answer, query):
    word, _, rest = response.partition(" ")
    if word == "hang":
        while True: pass
    if word == "sleep":
        time.sleep(float(rest))
    if word == "exit":
        os._exit(3)
    if word == "sys.exit":
        sys.exit(0)
    if word == "segfault":
        ctypes.string_at(0)
    if word == "hog":
        blocks = []
        while True: blocks.append(bytearray(2**24))
    if word == "raise":
        raise KeyError(rest)
    if word == "child":
        os.spawnlp(os.P_NOWAIT, "sleep", "sleep", rest)
        while True: pass
    if word == "nan":
        return float("nan")
    if word == "text":
        return "right"
    if word == "digits":
        return "1.0"
    if word == "none":
        return None
    if word == "complex":
        return 1j
    if word == "huge":
        return 10**400
    if word == "mute":
        raise Mute
    if word == "surrogate":
        raise ValueError("half \\ud800")
    if word == "generator":
        return (x for x in [1])
    if word == "interrupt":
        raise KeyboardInterrupt
    if word == "fork":
        return float(rest) if os.fork() else 99.0
    if word == "thread":
        import threading
        threading.Thread(target=time.sleep, args=(60,)).start()
    if word == "print":
        print("x" * 100_000)
        sys.stderr.write("noise\\n")
    if word == "close":
        os.closerange(0, 100)
    if word == "alarm":
        import signal
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        while True: pass
    if word == "bool":
        return rest == "1"
    if word == "query":
        return float(query.question == "2 + 2?" and answer == query.answer == "4" and query.metadata["level"] == 3)
    if word == "torch":
        return float("torch" in sys.modules)
    return float(rest or 1)
"""


@pytest.fixture(scope="module")
def reward_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "rewards.py"
    path.write_text(REWARDS)
    return path


@pytest.fixture(scope="module")
def config(reward_file):
    return RewardConfig(function=f"{reward_file}:by_word", workers=2, timeout_s=1.0, memory_gb=0.0625)


@pytest.fixture(scope="module")
def workers(config):
    with AnswerChecker(config) as checker:
        yield checker


@pytest.fixture
def checker(workers):
    """Its workers serve all tests, whatever a test did to them; its counts are this test's."""
    workers.failures.clear()
    workers._named.clear()
    return workers


def ask(responses: dict[str, str]) -> list[tuple[str, str, Query]]:
    query = Query(id="q7", question="2 + 2?", answer="4", metadata={"level": 3})
    return [(request, response, query) for request, response in responses.items()]


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ("hang", "timeout"),
        ("exit", "crash"),
        ("segfault", "crash"),
        ("hog", "crash"),
        ("raise it", "error"),
        ("sys.exit", "error"),
        ("text", "error"),
        ("digits", "error"),
        ("none", "error"),
        ("complex", "error"),
        ("huge", "error"),
        ("mute", "error"),
        ("surrogate", "error"),
        ("generator", "error"),
        ("interrupt", "error"),
        ("close", "crash"),
        ("alarm", "timeout"),
        ("nan", "non_finite"),
    ],
)
def test_a_check_that_fails_scores_0_is_counted_and_harms_no_other(checker, response, reason):
    """Law 11: whatever a check does, it alone scores 0, and the ones before and behind it get their own rewards."""
    responses = {f"r{i}": f"value {i}" for i in range(20)}
    responses["r5"] = response
    start = time.monotonic()
    scores = checker.score(ask(responses))
    assert scores == {request: 0.0 if request == "r5" else float(request[1:]) for request in responses}
    assert checker.failures == {reason: 1}
    assert time.monotonic() - start < 15
    assert checker.score(ask({"again": "value 3"})) == {"again": 3.0}


@pytest.mark.parametrize("response", ["fork 5", "thread 5", "print 5", "bool 1"])
def test_what_a_reward_may_do(checker, response, capfd):
    """Law 7: fork and let the child return, leave a thread, print, return a number of another library: its own score
    is counted once, and every other response keeps its own."""
    responses = {f"r{i}": f"value {i}" for i in range(20)}
    responses["r5"] = response
    scores = checker.score(ask(responses))
    assert scores == {request: float(request[1:]) for request in responses} | {"r5": 1.0 if "bool" in response else 5.0}
    assert not checker.failures and checker.score(ask({"again": "value 3"})) == {"again": 3.0}


def test_rewards_of_numpy(tmp_path):
    """A NumPy number is a reward, an array of one is too, an array of two is an error."""
    (tmp_path / "r.py").write_text("import numpy as np\ndef f(r, a, q): return np.float32(0.5) * eval(r)\n")
    with AnswerChecker(RewardConfig(function=f"{tmp_path / 'r.py'}:f", workers=1)) as checker:
        assert checker.score(ask({"a": "1", "b": "np.array(2)", "c": "np.ones(2)", "d": "np.nan"})) == {
            "a": 0.5,
            "b": 1.0,
            "c": 0.0,
            "d": 0.0,
        }
        assert checker.failures == {"error": 1, "non_finite": 1}


def test_many_hanging_checks_cost_a_deadline_each_and_end(checker):
    """Law 11: every worker hangs repeatedly, all other checks still get their rewards."""
    responses = {f"r{i}": "hang" if i % 5 == 0 else f"value {i}" for i in range(20)}
    start = time.monotonic()
    scores = checker.score(ask(responses))
    assert all(score == (0.0 if i % 5 == 0 else i) for i, score in enumerate(scores.values()))
    assert checker.failures == {"timeout": 4}
    assert time.monotonic() - start < 15


def test_scores_go_by_request_id_when_checks_end_out_of_order(checker):
    """Law 7: with random durations on two workers the answers come back shuffled; every id still has its own reward."""
    generator = random.Random(0)
    responses = {f"r{i}": f"sleep {generator.random() / 50}" for i in range(60)}
    scores = checker.score(ask(responses))
    assert scores == {request: float(response.split()[1]) for request, response in responses.items()}


def test_a_request_id_given_twice_is_refused(checker):
    """Law 7: two responses under one id could get each other's reward."""
    with pytest.raises(ValueError, match="twice"):
        checker.score(ask({"a": "value 1"}) + ask({"a": "value 2"}))
    with AnswerChecker(RewardConfig()) as boxed, pytest.raises(ValueError, match="twice"):
        boxed.score(ask({"a": "x"}) + ask({"a": "y"}))


@pytest.mark.parametrize("function", ["boxed", "custom"])
def test_scoring_off_the_main_thread(checker, boxed_checker, function):
    """Law 11: checks that use a process and a deadline give the same scores in any thread."""
    right = {"a": "value 1", "b": "raise"}
    if function == "boxed":
        checker, right = boxed_checker, {"a": "\\boxed{x^2-1}", "b": "\\boxed{\\sqrt{2}}"}
    query = Query(id="q", question="", answer="(x-1)(x+1)")
    found = {}
    thread = threading.Thread(target=lambda: found.update(checker.score([(k, v, query) for k, v in right.items()])))
    thread.start()
    thread.join(60)
    assert found == {"a": 1.0, "b": 0.0}


def test_two_threads_may_score_at_once(checker):
    """Concurrent calls do not mix their answers."""
    found = [None] * 4

    def work(n: int) -> None:
        found[n] = checker.score(ask({f"{n}/{i}": f"value {100 * n + i}" for i in range(30)}))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [{f"{n}/{i}": 100.0 * n + i for i in range(30)} for n in range(4)]


def test_the_custom_reward_sees_the_query_and_no_torch(checker):
    """A reward gets (response, answer, query) with all fields; its process is light."""
    assert checker.score(ask({"a": "query", "b": "torch"})) == {"a": 1.0, "b": 0.0}


def test_a_raising_reward_is_named_once(checker, caplog):
    """The log says once what the custom reward raised and for which query; the counter has all of them."""
    with caplog.at_level(logging.WARNING):
        checker.score(ask({f"r{i}": "raise colour" for i in range(10)}))
    assert [r.getMessage() for r in caplog.records] == [
        "a check scored 0 (error, KeyError: 'colour'): query 'q7', 'raise colour' for '4'"
    ]
    assert checker.failures == {"error": 10}


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0] != "Z"


def sleepers(seconds: str) -> list[int]:
    found = subprocess.run(["pgrep", "-f", f"^sleep {seconds}$"], capture_output=True, text=True, check=False)
    return [int(pid) for pid in found.stdout.split()]


def test_a_killed_check_takes_its_child_processes_along(checker):
    """A reward that starts a program and hangs leaves nothing running."""
    assert checker.score(ask({"a": "child 98765.5"})) == {"a": 0.0}
    time.sleep(0.2)
    assert not sleepers("98765.5")


def test_close_leaves_no_process_behind(config):
    """Workers are gone and reaped after close; a closed checker says so."""
    checker = AnswerChecker(config)
    checker.score(ask({f"r{i}": "value 1" for i in range(40)}))
    pids = [worker._process.pid for worker in checker._workers]
    assert len(pids) == 2 and all(map(alive, pids))
    checker.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):  # a zombie would still be found
            os.kill(pid, 0)
    with pytest.raises(RuntimeError, match="closed"):
        checker.score([])


@pytest.mark.parametrize("moment", ["while a process is made", "while processes start", "while they check"])
def test_close_ends_checks_under_way(moment, config, monkeypatch):
    """A call that runs in another thread while the checker is closed ends at once, and starts no further process."""
    checker, ends, made = AnswerChecker(replace(config, timeout_s=60.0)), [], threading.Event()
    workers, popen = checker._workers, subprocess.Popen

    def slow(*arguments, **options):  # the process is there, and its worker does not know it yet
        process = popen(*arguments, **options)
        made.set()
        while not workers[0]._closed:
            time.sleep(0.01)
        return process

    if moment == "while a process is made":
        monkeypatch.setattr(subprocess, "Popen", slow)
    if moment == "while they check":
        checker.score(ask({"a": "4", "b": "5"}))

    def score() -> None:
        try:
            checker.score(ask({f"r{i}": "sleep 20" for i in range(100)}))
        except RuntimeError as error:
            ends.append(str(error))

    thread = threading.Thread(target=score)
    thread.start()
    while not (made.is_set() or ("made" not in moment and all(worker._link for worker in workers))):
        time.sleep(0.01)
    start = time.monotonic()
    checker.close()
    thread.join(10)
    assert time.monotonic() - start < 10  # the first check alone would take 20 seconds
    assert ends == ["the answer checker is closed"]
    assert all(worker._process is None for worker in checker._workers)


@pytest.mark.parametrize("ending", ["forgets", "is killed", "is killed in a check"])
def test_workers_end_when_the_trainer(reward_file, tmp_path, ending):
    """A trainer that never closes its checker, or is killed, even while a check hangs, leaves no worker running."""
    script = tmp_path / "trainer.py"
    script.write_text(
        textwrap.dedent(f"""
        import os, threading, time
        from rethinker.config import RewardConfig
        from rethinker.samples import Query
        from rethinker.rewards.checker import AnswerChecker
        checker = AnswerChecker(RewardConfig(function="{reward_file}:by_word", workers=1, timeout_s=0.5))
        checker.score([("a", "value 1", Query("q", "", ""))])
        print(checker._workers[0]._process.pid, flush=True)
        if "check" in {ending!r}:
            threading.Thread(target=checker.score, args=([("a", "hang", Query("q", "", ""))],), daemon=True).start()
            time.sleep(0.2)
        if "killed" in {ending!r}:
            os.kill(os.getpid(), 9)
        """)
    )
    run = subprocess.run([sys.executable, script], stdout=subprocess.PIPE, text=True, timeout=60, check=False)
    pid = int(run.stdout)
    deadline = time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)


def test_an_interrupted_call_does_not_answer_the_next(checker):
    """Law 7: answers that were under way when a call broke off are not taken for those of the next call."""
    threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        checker.score(ask({f"r{i}": "sleep 0.3" for i in range(100)}))
    assert checker.score(ask({f"r{i}": f"value {i}" for i in range(8)})) == {f"r{i}": float(i) for i in range(8)}


def test_plain_answers_need_no_process_and_are_fast():
    """Thousands of easy checks a second, without starting a worker."""
    items = [
        (str(i), f"a {shape}, so \\boxed{{{shape}}}", Query(str(i), "What shape is it?", "circle"))
        for i, shape in enumerate(["circle", "triangle"] * 4000)
    ]
    with AnswerChecker(RewardConfig()) as checker:
        scores = checker.score(items[:4])
        assert [scores[str(i)] for i in range(4)] == [1.0, 0.0, 1.0, 0.0]
        assert least_cpu_s(lambda: checker.score(items)) < 2.0  # 8,000 checks: at least 4,000 a second
        assert all(worker._process is None for worker in checker._workers)


def test_workers_that_were_started_early_take_the_first_checks():
    """They are not waited for, nor started twice; checks that need a process find them, and `close` ends them."""
    with AnswerChecker(RewardConfig()) as checker:
        checker.start()
        checker.start()
        assert not any(worker._ready for worker in checker._workers)
        early = [worker._process for worker in checker._workers]
        query = Query("0", "What is x?", "2\\sqrt{2}")
        assert checker.score([(str(i), f"\\boxed{{{i} \\sqrt{{2}}}}", query) for i in (1, 2)]) == {"1": 0.0, "2": 1.0}
        assert [worker._process for worker in checker._workers] == early
    assert None not in early and all(process.poll() is not None for process in early)


def test_an_early_worker_that_died_is_started_again():
    """As after any other death between two checks."""
    with AnswerChecker(RewardConfig(workers=1)) as checker:
        checker.start()
        process = checker._workers[0]._process
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        query = Query("0", "What is x?", "2\\sqrt{2}")
        assert checker.score([("0", "\\boxed{\\sqrt{8}}", query)]) == {"0": 1.0} and not checker.failures
        assert checker._workers[0]._process not in (None, process)


def test_what_went_wrong_in_an_early_worker_is_told_by_the_first_check(tmp_path):
    """Here the reward loads in the trainer alone. One that is closed while it starts leaves no process behind."""
    file = tmp_path / "reward.py"
    file.write_text(f"import os\nif os.getpid() != {os.getpid()}: raise OSError('no table')\ndef f(*_): return 1.0\n")
    with AnswerChecker(RewardConfig(function=f"{file}:f", workers=1)) as checker:
        checker.start()
        with pytest.raises(ConfigError, match="OSError: no table"):
            checker.score([("0", "a", Query("0", "?", "b"))])
    with AnswerChecker(RewardConfig()) as checker:
        checker.start()
        processes = [worker._process for worker in checker._workers]
    assert all(process.poll() is not None for process in processes)
    checker.start()
    assert all(worker._process is None for worker in checker._workers)


def test_a_verdict_is_kept(boxed_checker, monkeypatch):
    """An answer that a worker has judged is not asked again in a later episode for the same question."""
    query = Query(id="q", question="Which root?", answer="3\\sqrt{5}")
    assert boxed_checker.score([("a", "so \\boxed{\\sqrt{45}}", query), ("b", "\\boxed{\\sqrt{46}}", query)]) == {
        "a": 1.0,
        "b": 0.0,
    }
    monkeypatch.setattr(boxed_checker, "_run", lambda calls, _: pytest.fail(f"asked again: {calls}") if calls else [])
    again = replace(query, id="p")
    assert boxed_checker.score([("c", "or \\boxed{\\sqrt{45}}", again), ("d", "\\boxed{\\sqrt{46}}", again)]) == {
        "c": 1.0,
        "d": 0.0,
    }


def test_a_verdict_is_of_its_own_answer(boxed_checker):
    """Law 7: a response is right or wrong by its own query's answer and options, in one call and later."""
    two, three = (Query(id="q", question="Which root?", answer=f"2\\sqrt{{{n}}}") for n in (2, 3))
    response = "\\boxed{\\sqrt{8}}"
    for _ in range(2):
        assert boxed_checker.score([("a", response, two), ("b", response, three)]) == {"a": 1.0, "b": 0.0}
    options = [
        Query("q", "Which?", "A", metadata={"choices": choices}) for choices in (["red", "blue"], ["blue", "red"])
    ]
    found = boxed_checker.score([(str(i), "\\boxed{red}", query) for i, query in enumerate(options)])
    assert found == {"0": 1.0, "1": 0.0}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("boxes", "give boxed, format, judge, overlong, or path/to/file.py:function"),
        ("{folder}/none.py:by_word", "there is no file"),
        ("{folder}/rewards.py:by_wrod", "it has .*by_word"),
        ("{folder}/rewards.py", "give boxed, format, judge, overlong, or path"),
        ("{folder}/broken.py:f", "fails to import .ModuleNotFoundError"),
        ("{folder}/short.py:f", "must take .response, answer, query."),
        ("{folder}/exits.py:f", "fails to import .SystemExit: 0."),
        ("~nobody-here/x.py:f", "there is no file"),
    ],
)
def test_a_wrong_reward_function_is_refused_at_once(reward_file, spec, message):
    """The error names reward.function and the fix before any worker starts."""
    folder = reward_file.parent
    (folder / "broken.py").write_text("import no_such_module_at_all")
    (folder / "exits.py").write_text("import sys\nsys.exit(0)")
    (folder / "short.py").write_text("def f(response): return 1.0")
    with pytest.raises(ConfigError, match=rf"(?s)reward\.function=.*{message}"):
        AnswerChecker(RewardConfig(function=spec.format(folder=folder)))


def test_a_reward_that_loads_here_but_not_in_its_process_is_an_error_not_a_zero(tmp_path):
    """A worker that cannot start stops the run with the reason instead of scoring everything 0."""
    path = tmp_path / "once.py"
    path.write_text(f"import os\nassert os.getpid() == {os.getpid()}, 'only there'\ndef f(r, a, q): return 1.0")
    with AnswerChecker(RewardConfig(function=f"{path}:f")) as checker, pytest.raises(ConfigError, match="only there"):
        checker.score(ask({"a": "x"}))


def test_load_reward_gives_the_function(reward_file):
    """The same function serves outside the checker."""
    (reward,) = load_rewards(RewardConfig(function=f"{reward_file}:by_word"))
    assert reward.call("value 4", "", None) == 4.0
    gc.collect()
