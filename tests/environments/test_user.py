"""An environment of the user's cannot hang, crash or confuse a run: it runs in processes that can be killed."""

from __future__ import annotations

import gc
import io
import logging
import os
import random
import re
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from rethinker.config import ConfigError, EnvironmentConfig
from rethinker.environments import Observation, load
from rethinker.environments.images import png_of
from rethinker.environments.runner import Runner
from tests.environments.helpers import IMAGE, QUERY, open_image, pixels, shown_size

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = '''
import asyncio, ctypes, io, os, sys, time
from PIL import Image
from rethinker.environments import Observation

def png(*size):
    with io.BytesIO() as file:
        Image.new("1", size).save(file, "PNG")
        return file.getvalue()

class Counter:
    """Counts turns; the word that a turn begins with says what else happens."""

    def reset(self, query):
        if query.question.startswith("do "):
            return self.do(query.question[3:])
        return {"turns": 0, "question": query.question}

    def step(self, state, text):
        state["turns"] += 1
        said = self.do(text)
        return Observation(f"turn {state['turns']}") if said is None else said

    def do(self, text):
        word, _, rest = text.partition(" ")
        if word == "hang":
            while True: pass
        if word == "sleep":
            time.sleep(float(rest))
            return Observation(rest)
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
        if word == "surrogate":
            raise ValueError("half \\ud800")
        if word == "interrupt":
            raise KeyboardInterrupt
        if word == "fork":
            return Observation(rest if os.fork() else "child")
        if word == "close":
            os.closerange(0, 100)
        if word == "none":
            return rest or "a text"
        if word == "lambda":
            return lambda: 0
        if word == "eval":
            return eval(rest)

class Unpicklable(Counter):
    def step(self, state, text):
        state["it"] = lambda: 0
        return Observation("fine")

class Async:
    async def reset(self, query):
        await asyncio.sleep(0)
        return [query.id]

    async def step(self, state, text):
        await asyncio.sleep(0.01)
        if text == "hang":
            await asyncio.sleep(1e6)
        state.append(text)
        return Observation(" ".join(state), done=len(state) > 2, reward=0.5)

def function(state, text):
    state["turns"] = state.get("turns", 0) + 1
    return Observation(f"{state['query'].answer} {state['turns']}")

class Argument:
    def __init__(self, size): pass
    def reset(self, query): pass
    def step(self, state, text): pass

class NoReset:
    def step(self, state, text): pass

class Short:
    def reset(self, query): pass
    def step(self, text): pass

class Yields:
    def reset(self, query): pass
    def step(self, state, text): yield

class Fails:
    def __init__(self): raise OSError("no table")
    def reset(self, query): pass
    def step(self, state, text): pass

def short(text): return None
number = 3
'''


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("environments") / "mine.py"
    path.write_text(ENVIRONMENTS)
    return path


@pytest.fixture(scope="module")
def config(file):
    return EnvironmentConfig(
        use=[f"{file}:Counter"], workers=2, timeout_s=1.0, memory_gb=0.25, max_images=3, max_text_tokens=8
    )


@pytest.fixture(scope="module")
def runner(config):
    """Two processes for most tests of this file, whatever a test did to them."""
    runner = Runner(config, open_image, shown_size)
    runner.start()
    yield runner
    runner.close()


def step(runner: Runner, state, text: str):
    return runner.step(state, text).result(timeout=60)


FAILURES = [
    ("hang", "timeout"),
    ("exit", "crash"),
    ("segfault", "crash"),
    ("close", "crash"),
    ("hog", "memory"),
    ("raise it", "error"),
    ("sys.exit", "error"),
    ("surrogate", "error"),
    ("interrupt", "error"),
    ("none", "error"),
    ("eval {}", "error"),
    ("eval (Observation, 1)", "error"),
    ("eval Observation", "error"),
    ("eval Observation(3)", "error"),
    ("eval Observation(None)", "error"),
    ("eval Observation('', role='system')", "error"),
    ("eval Observation('', reward=float('nan'))", "error"),
    ("eval Observation('', reward='1')", "error"),
    ("eval Observation('', reward=None)", "error"),
    ("eval Observation('', calls=-1)", "error"),
    ("eval Observation('', failures=['a'])", "error"),
    ("eval Observation('', failures=('two words',))", "error"),
    ("eval Observation('', 'a.png')", "error"),
    ("eval Observation('', 3)", "error"),
    ("eval Observation('', [Image.new('RGB', (9, 9))], role='assistant')", "error"),
    ("eval Observation('<image> and <image>', [Image.new('RGB', (9, 9))])", "error"),
    ("eval Observation('', [Image.new('RGB', (9, 9))] * 4)", "images"),
    ("eval Observation('', ['/nowhere.png'])", "image"),
    ("eval Observation('', [b''])", "image"),
    ("eval Observation('', [b'x' * 10**6])", "image"),
    ("eval Observation('', [os.urandom(50_000_000)])", "image"),
    ("eval Observation('', [3])", "image"),
    ("eval Observation('', ['/dev/zero'])", "image"),
    ("eval Observation('', [Image.new('RGB', (20_000, 20))])", "size"),
    ("eval Observation('', [Image.new('1', (20_000, 5_000))])", "size"),
    ("eval Observation('', [png(20_000, 20)])", "size"),
    ("eval Observation('', [png(20_000, 5_000)])", "size"),
    ("eval Observation('', [Image.new('RGB', (12_000, 6_000))])", "memory"),  # 216 MB
]


@pytest.mark.parametrize(("text", "reason"), FAILURES, ids=[text[:40] for text, _ in FAILURES])
def test_a_step_that_fails_ends_its_response_and_harms_no_other(runner, text, reason):
    """The response ends with the reason; those before, beside and behind it go on with their own states."""
    one, other = runner.reset(QUERY), runner.reset(QUERY)
    state, first = step(runner, one.result(60), "hello")
    start = time.monotonic()
    failing, beside = runner.step(state, text), runner.step(other.result(60), "hello")
    after, answer = failing.result(60)
    assert answer == Observation(done=True, failures=(reason,))
    assert time.monotonic() - start < 10
    assert first == beside.result(60)[1] == Observation("turn 1")
    assert step(runner, state, "again")[1] == Observation("turn 2")  # the state that it was given is what it was
    assert step(runner, after, "again")[1] == answer  # and the one that it left says so again


RESETS = [("hang", "timeout"), ("exit", "crash"), ("raise it", "error"), ("lambda", "error")]


@pytest.mark.parametrize(("what", "reason"), RESETS)
def test_a_reset_that_fails_is_said_by_the_first_step(runner, what, reason):
    """Also of a state that cannot be pickled."""
    state = runner.reset(replace(QUERY, question=f"do {what}")).result(60)
    assert step(runner, state, "hello")[1] == Observation(done=True, failures=(reason,))


WORKS = [
    ("", Observation("turn 1")),
    ("fork 5", Observation("5")),
    ("eval Observation('done', done=True, reward=1, calls=2, failures=('late',))",
     Observation("done", done=True, reward=1.0, calls=2, failures=("late",))),
    ("eval Observation('Wait', role='assistant')", Observation("Wait", role="assistant")),
    ("eval Observation('half \\ud800')", Observation("half ?")),
    ("eval Observation('an <image>')", Observation("an < image >")),  # it has none
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), WORKS, ids=range(len(WORKS)))
def test_what_a_step_may_answer(runner, text, expected):
    answer = step(runner, runner.reset(QUERY).result(60), text)[1]
    assert answer == expected and type(answer) is Observation and not runner.inline


def test_images_are_png_of_a_bounded_size(runner, tmp_path):
    """PIL images of any mode, bytes, paths; large ones are reduced. Marks stand where the text has them, or first."""
    IMAGE.crop((0, 0, 50, 40)).save(tmp_path / "a.png")
    path = repr(str(tmp_path / "a.png"))
    given = f"Image.new('I;16', (30, 20), 65535), {path}, open({path}, 'rb').read()"
    code = f"eval Observation('one <image>, two <image> and <image>', [{given}])"
    state, answer = step(runner, runner.reset(QUERY).result(60), code)
    assert answer.text == "one <image>, two <image> and <image>" and not answer.failures
    assert [pixels(image).shape for image in answer.images] == [(20, 30, 3), (40, 50, 3), (40, 50, 3)]
    assert (pixels(answer.images[0]) == 255).all() and answer.images[1] == answer.images[2]
    assert step(runner, state, "eval Observation('', [Image.new('L', (9, 9))])")[1].failures == ("images",)
    large = step(runner, runner.reset(QUERY).result(60), "eval Observation('look', [Image.new('L', (5_000, 2_000))])")[
        1
    ]
    assert large.text == "<image>look"
    height, width, _ = pixels(large.images[0]).shape
    assert 0.99 < width * height / 300_000 < 1.01 and round(width / height, 1) == 2.5


def test_a_megabyte_of_text_is_cut(runner):
    """In its middle, in the process; no mark of an image is lost with it."""
    text = step(runner, runner.reset(QUERY).result(60), "eval Observation('a' * 500_000 + 'b' * 500_000)")[1].text
    assert len(text) <= 8 * 64 and text[0] == "a" and text[-1] == "b"
    code = "eval Observation('a' * 500_000 + '<image>' + 'b' * 500_000, [Image.new('L', (9, 9))])"
    answer = step(runner, runner.reset(QUERY).result(60), code)[1]
    assert answer.text.count("<image>") == len(answer.images) == 1 and len(answer.text) <= 8 * 64 + len("<image>")


def test_a_large_image_with_the_memory_for_it():
    """200 MB of pixels are reduced to what a model could see."""
    png = png_of(Image.new("RGB", (10_000, 7_000)), 300_000)
    assert len(png) < 10_000 and Image.open(io.BytesIO(png)).size == (654, 459)


def test_answers_go_to_their_calls(runner):
    """Many calls wait for two processes and end out of order: each future has its own call's answer."""
    state = runner.reset(QUERY).result(60)
    draws = random.Random(0)
    texts = [f"sleep {draws.random() / 50}" if i % 9 else "exit" for i in range(60)]
    futures = [runner.step(state, text) for text in texts]
    for text, future in zip(texts, futures, strict=True):
        answer = future.result(60)[1]
        assert answer == (Observation(text[6:]) if text != "exit" else Observation(done=True, failures=("crash",)))


def test_a_slow_call_delays_only_what_waits_for_it(runner):
    """One process hangs; the other answers all that comes meanwhile."""
    state = runner.reset(QUERY).result(60)
    step(runner, state, "hello")
    hanging = runner.step(state, "hang")
    for _ in range(20):
        assert step(runner, state, "hello")[1].text == "turn 1"
    assert not hanging.done() and hanging.result(60)[1].failures == ("timeout",)


def test_a_failure_is_named_once_in_the_log(config, caplog):
    """With what the environment raised, and for which query."""
    runner = Runner(config, open_image, shown_size)
    with caplog.at_level(logging.WARNING):
        state = runner.reset(QUERY).result(60)
        for future in [runner.step(state, "raise colour") for _ in range(10)]:
            assert future.result(60)[1].failures == ("error",)
    runner.close()
    assert [record.getMessage() for record in caplog.records] == [
        f"environment.use=[{config.use[0]}]: step failed (error: KeyError: 'colour'): query 'q7'"
    ]


@pytest.mark.parametrize("name", ["Async", "function", "Unpicklable"])
def test_kinds_of_environments(file, config, name):
    """`async def` methods, and a function alone. A state that cannot be pickled is an error of the step."""
    runner = Runner(replace(config, use=[f"{file}:{name}"], workers=1), open_image, shown_size)
    try:
        state, first = step(runner, runner.reset(QUERY).result(60), "one")
        state, second = step(runner, state, "two")
        if name == "Async":
            assert first == Observation("q7 one", reward=0.5)
            assert second == Observation("q7 one two", done=True, reward=0.5)
            assert step(runner, state, "hang")[1].failures == ("timeout",)
        elif name == "function":
            assert (first.text, second.text) == ("4 1", "4 2")
        else:
            assert first == second == Observation(done=True, failures=("error",))
    finally:
        runner.close()


@pytest.mark.parametrize(
    ("use", "said"),
    [
        (["crop", "crop"], "environment.use=[crop, crop] names one of them twice; name it once"),
        (["verify", "crop"], "crop and python may stand together, verify and an environment of yours stand alone"),
        (["crop", "FILE:Counter"], "crop and python may stand together"),
        (["FILE:Counter", "FILE:function"], "crop and python may stand together"),
        (["zoom"], "environment.use=zoom: give crop, python, verify, or path/to/file.py:function"),
        (["/nowhere.py:Name"], "environment.use=/nowhere.py:Name: there is no file /nowhere.py"),
        (["FILE:Nothing"], "has no function 'Nothing'; it has png, Counter, Unpicklable, Async, function,"),
        (["FILE:number"], "has no function 'number'"),
        (["FILE:short"], "environment.use=[FILE:short]: it must take (state, text); too many positional arguments"),
        (["FILE:Argument"], "environment.use=[FILE:Argument]: the class must take no arguments; missing a required"),
        (["FILE:NoReset"], "[FILE:NoReset]: the class has no method reset; it needs reset(self, query)"),
        (["FILE:Short"], "environment.use=[FILE:Short]: its step must take (self, state, text); too many"),
        (["FILE:Yields"], "environment.use=[FILE:Yields]: its step yields, and is to return; write return"),
        (["BROKEN:f"], "fails to import (SyntaxError"),
    ],
)  # fmt: skip
def test_mistakes_are_told_before_a_run_starts(file, tmp_path, use, said):
    """In one line that names the setting; no process is started."""
    broken = tmp_path / "broken.py"
    broken.write_text("def f(:")
    use = [name.replace("FILE", str(file)).replace("BROKEN", str(broken)) for name in use]
    for make in (load, lambda config: Runner(config, open_image, shown_size)):
        with pytest.raises(ConfigError) as error:
            make(EnvironmentConfig(use=use))
        assert said.replace("FILE", str(file)) in str(error.value) and "\n" not in str(error.value)


def test_what_load_gives(file):
    assert load(EnvironmentConfig()) == ()
    assert load(EnvironmentConfig(use=["python", "crop"])) == ("python", "crop")
    assert load(EnvironmentConfig(use=["verify"])) == ("verify",)
    made = load(EnvironmentConfig(use=[f"{file}:function"]))()
    assert made.step(made.reset(QUERY), "a").text == "4 1"


def test_an_environment_that_cannot_be_made_ends_the_run(file, config):
    """Its constructor runs in the processes alone: the first future says what it raised."""
    runner = Runner(replace(config, use=[f"{file}:Fails"], workers=1), open_image, shown_size)
    with pytest.raises(ConfigError, match=r"Fails\]: its process does not start: OSError: no table"):
        runner.reset(QUERY).result(60)
    runner.close()


@pytest.mark.parametrize("moment", ["while processes start", "while they are asked"])
def test_close_ends_all_at_once(config, moment):
    """Also with calls under way and calls that wait; no process is left behind, and none is started again."""
    runner = Runner(replace(config, timeout_s=60.0), open_image, shown_size)
    state = runner.reset(QUERY).result(60) if "asked" in moment else None
    futures = [runner.step(state, "sleep 30") if state else runner.reset(QUERY) for _ in range(10)]
    while not all(process._process for process in runner._processes):
        time.sleep(0.01)
    start = time.monotonic()
    runner.close()
    for future in futures:
        assert future.cancelled() or isinstance(future.exception(1), RuntimeError) or not state
    assert time.monotonic() - start < 5
    assert all(process._process is None for process in runner._processes)
    assert not [thread for thread in runner._pool._threads if thread.is_alive()]
    with pytest.raises(RuntimeError, match="closed"):
        runner.reset(QUERY).result(1)
    runner.start()
    assert all(process._process is None for process in runner._processes)


@pytest.mark.parametrize("ending", ["forgets", "is killed", "is killed in a call"])
def test_processes_end_when_the_trainer(file, tmp_path, ending):
    """One that never closes its runner, or is killed, even while an environment hangs, leaves no process running."""
    script = tmp_path / "trainer.py"
    script.write_text(
        textwrap.dedent(f"""
        import os, time
        from rethinker.config import EnvironmentConfig
        from rethinker.samples import Query
        from rethinker.environments.runner import Runner
        config = EnvironmentConfig(use=["{file}:Counter"], workers=1, timeout_s=0.5)
        runner = Runner(config, None, lambda width, height: (9, 9))
        state = runner.reset(Query("q", "", "")).result()
        print(runner._processes[0]._process.pid, flush=True)
        if "call" in {ending!r}:
            runner.step(state, "hang")
            time.sleep(0.2)
        if "killed" in {ending!r}:
            os.kill(os.getpid(), 9)
        """)
    )
    run = subprocess.run([sys.executable, script], stdout=subprocess.PIPE, text=True, timeout=60, check=False)
    stat, deadline = f"/proc/{int(run.stdout)}/stat", time.monotonic() + 10

    def alive() -> bool:
        try:
            with open(stat) as of:
                return of.read().rsplit(")", 1)[1].split()[0] != "Z"
        except OSError:
            return False

    while alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive()


def test_no_torch():
    """The room and its processes are light."""
    code = "import sys; from rethinker.environments import runner; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "set()\n"


def test_the_examples_of_the_page_work(tmp_path):
    """docs/environments.md: both of them, as they stand there."""
    blocks = re.findall(r"```python\n# (\w+\.py)(.*?)```", (ROOT / "docs" / "environments.md").read_text(), flags=re.S)
    assert [name for name, _ in blocks] == ["hints.py", "tutor.py"]
    for name, code in blocks:
        (tmp_path / name).write_text(f"#{code}")
    hints = Runner(EnvironmentConfig(use=[f"{tmp_path / 'hints.py'}:Hints"], workers=1), open_image, shown_size)
    state, first = step(hints, hints.reset(QUERY).result(60), "It is \\boxed{5}.")
    assert first == Observation("No. Its first sign is 4.")
    assert step(hints, state, "It is \\boxed{4}.")[1] == Observation(done=True, reward=0.5)
    state, second = step(hints, state, "It is \\boxed{6}.")
    assert not second.done and step(hints, state, "6?")[1] == Observation(done=True)
    hints.close()
    IMAGE.crop((0, 0, 50, 40)).save(tmp_path / "a.png")
    query = replace(QUERY, images=(str(tmp_path / "a.png"),))
    tutor = Runner(EnvironmentConfig(use=[f"{tmp_path / 'tutor.py'}:tutor"], workers=1), open_image, shown_size)
    state, first = step(tutor, tutor.reset(query).result(60), "4")
    assert first.text == "<image>Are you sure?" and pixels(first.images[0]).shape == (40, 50, 3)
    assert step(tutor, state, "4")[1].done
    tutor.close()


def test_descriptors_do_not_add_up(runner):
    """Each process that was killed gives back what it held open here."""
    state = runner.reset(QUERY).result(60)
    step(runner, state, "exit")
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        step(runner, state, "exit")
    assert len(os.listdir("/proc/self/fd")) <= before + 2
