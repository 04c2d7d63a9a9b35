"""`python` computes and does nothing else: two walls, each of which holds without the other."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time

import pytest

from rethinker.config import EnvironmentConfig
from rethinker.environments import sandbox
from rethinker.environments.python import PythonProcess
from rethinker.environments.runner import Runner
from rethinker.environments.tools import schemas
from rethinker.runtime import killable
from rethinker.runtime.killable import LostError
from tests.environments.helpers import QUERY, call, open_image, pixels, shown_size


@pytest.fixture(scope="module")
def runner():
    """Two processes for all tests of this file, whatever a test did to them."""
    config = EnvironmentConfig(use=["crop", "python"], workers=2, timeout_s=1.0, memory_gb=0.125, max_text_tokens=64)
    runner = Runner(config, open_image, shown_size)
    runner.start()
    yield runner
    runner.close()


def ran(runner: Runner, code: str) -> tuple[str, tuple[str, ...]]:
    """What the model reads, and the failures."""
    _, answer = runner.step(runner.reset(QUERY).result(), call("python", code=code)).result(timeout=60)
    assert answer.calls == 1 and not answer.done
    return answer.text.removeprefix("<tool_response>\n").removesuffix("\n</tool_response>"), answer.failures


COMPUTES = [
    ("1 + 1", "2"),
    ("print('a', 1, sep='-', end='!')\n3", "a-1!"),
    ("'text'", "'text'"),
    ("x = 3", "(it printed nothing)"),
    ("", "(it printed nothing)"),
    ("None", "(it printed nothing)"),
    ("math.sqrt(16)", "4.0"),
    ("import math as m\nfrom fractions import Fraction\nFraction(m.comb(5, 2), 4)", "Fraction(5, 2)"),
    ("from math import *\nround(pi, 2)", "3.14"),
    ("from decimal import *\ngetcontext().prec = 5\nDecimal(1) / 3", "Decimal('0.33333')"),
    ("Decimal = decimal.Decimal\nlen(str(Decimal(1) / 3))", "30"),  # the precision is not the last call's
    ("def f(n):\n    return n if n < 2 else f(n - 1) + f(n - 2)\n[f(n) for n in range(6)]", "[0, 1, 1, 2, 3, 5]"),
    ("from functools import lru_cache\n@lru_cache(None)\ndef f(n):\n    return n < 2 or f(n - 1) + f(n - 2)\nf(80)",
     "37889062373143906"),
    ("try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    print('no:', e)", "no: division by zero"),
    ("d = {}\nfor _ in range(3):\n    d[_] = f'{_:>3}'\nd", "{0: '  0', 1: '  1', 2: '  2'}"),
    ("sorted(collections.Counter('abca').most_common(1))", "[('a', 2)]"),
    ("re.sub(r'\\d', '#', 'a1b2').upper()", "'A#B#'"),
    ("statistics.median([1, 5, 2])", "2"),
    ("'<image>'", "'< image >'"),  # no place of an image
    ("print('\\ud800')", "?"),
    ("print('é€😀')", "é€😀"),
    ("((1))" + " + 1" * 500, "501"),
]  # fmt: skip


@pytest.mark.parametrize(("code", "shown"), COMPUTES, ids=range(len(COMPUTES)))
def test_what_it_computes(runner, code, shown):
    """What it prints, else the value of its last expression, whatever ran in the process before."""
    assert [ran(runner, code) for _ in range(2)] == [(shown, ())] * 2


def test_processes_agree(runner):
    """Also on the order of a set of texts, which hashing draws anew for each process of Python's."""
    answers = {process.ask(("print(set('abcdefghij'))", 1000), 30.0) for process in runner._processes}
    assert len(answers) == 1 and len(runner._processes) == 2


GOES_WRONG = [
    ("while True: pass", "timeout", "no answer within 1 seconds"),
    ("10 ** 10 ** 10", "timeout memory", ""),
    ("x = []\nwhile True: x.append('x' * 10**6)", "memory", "0.125 GiB"),
    ("while True: print('x' * 1000)", "timeout", ""),
    ("x = iter([1])\nfor _ in range(2 * 10**5): x = map(abs, x)\nnext(x)", "crash", "SIGSEGV"),
    ("-" * 90_000 + "1", "error memory crash", ""),
    ("(" * 90_000, "error", "SyntaxError"),
    ("1" + " + 1" * 20_000, "error memory crash", ""),
    ("x = 1\n" + "if x:\n" * 3, "error", "IndentationError"),
    ("def f(n): return f(n + 1)\nf(0)", "error", "RecursionError"),
    ("x = []\nfor _ in range(10**5): x = [x]\nx", "error", "RecursionError"),
    ("10 ** 5000", "error", "4300 digits"),
    ("print(1)\n1 / 0", "error", "1\nZeroDivisionError: division by zero (line 2)"),
    ("x =", "error", "SyntaxError: invalid syntax (line 1)"),
    ("'\ud800'", "error", "UnicodeEncodeError"),
    ("\0", "error", ""),
    ("raise Exception('<image>' * 1000)", "error", "< image >"),
    ("from math import nothing", "forbidden", "math has no nothing here (line 1)"),
    ("open('/etc/passwd')", "error", "NameError"),
    ("1" * 100_001, "size", "100,000"),
]


@pytest.mark.parametrize(("code", "reasons", "said"), GOES_WRONG, ids=range(len(GOES_WRONG)))
def test_what_goes_wrong_is_read_and_counted(runner, code, reasons, said):
    """The model reads what happened, and the next call is answered as if nothing had."""
    start = time.monotonic()
    text, failures = ran(runner, code)
    assert len(failures) == 1 and failures[0] in reasons.split()
    assert said in text and "<image>" not in text and len(text) <= 64 * 64
    assert time.monotonic() - start < 10
    assert ran(runner, "6 * 7") == ("42", ())


def test_long_output_loses_its_middle(runner):
    """Its ends stay, and what is left is bounded by characters."""
    text, failures = ran(runner, "print('first' + 'x' * 10**6)\nprint('last')")
    assert not failures and text.startswith("first") and text.endswith("last")
    assert "characters left out" in text and len(text) <= 64 * 64
    text, failures = ran(runner, "for i in range(10**5): print(i)")
    assert not failures and text.startswith("0\n1\n") and text.endswith("\n99998\n99999") and len(text) <= 64 * 64


@pytest.mark.parametrize("arguments", [{}, {"code": 3}, {"code": None}, {"code": "1", "file": "a"}, {"script": "1"}])
def test_arguments(runner, arguments):
    _, answer = runner.step(runner.reset(QUERY).result(), call("python", **arguments)).result()
    assert answer.failures == ("arguments",)


def test_tools_together(runner):
    """Both in one turn, in order; a tool that there is not; a turn without python is answered at once."""
    state = runner.reset(QUERY).result()
    text = call("crop", bbox_2d=[0, 0, 50, 50]) + call("python", code="1/0") + call("sql") + "<tool_call>{"
    state, answer = runner.step(state, f"So: {text}").result()
    assert (answer.calls, answer.failures) == (4, ("error", "unknown", "malformed"))
    assert [
        part.splitlines()[0].removesuffix(" <tool_call>") for part in answer.text.split("<tool_response>\n")[1:]
    ] == [
        "image 2: <image>",
        "ZeroDivisionError: division by zero (line 1)",
        "error: there is no tool 'sql'; there are crop, python",
        "error: the call cannot be read: it is no JSON (Expecting property name enclosed in double quotes); write",
    ]
    assert pixels(answer.images[0]).shape == (200, 200, 3)
    slow = runner.step(state, call("python", code="while True: pass"))
    crop = runner.step(state, call("crop", bbox_2d=[0, 0, 50, 50], image=2))
    assert crop.done() and not slow.done() and not runner.inline
    assert runner.step(state, "It is 4.").result()[1].done
    assert slow.result()[1].failures == ("timeout",)
    assert [schema["function"]["name"] for schema in schemas(EnvironmentConfig(use=["crop", "python"]))] == [
        "crop",
        "python",
    ]


ESCAPES = r"""
().__class__.__base__.__subclasses__()
(lambda: 0).__globals__
print.__self__
f'{print.__self__}'
'{0.__class__}'.format(1)
'{x.__class__}'.format_map({'x': 1})
list(map(str.format, ['{0.__class__}'], [1]))
(x for x in [1]).gi_frame.f_back.f_globals
(x for x in [1]).gi_code
type(1)
getattr(1, 'real')
vars()
globals()
locals()
dir()
eval('1')
exec('1')
compile('1', '', 'eval')
__import__('os')
__builtins__
__name__
breakpoint()
input()
open('/etc/passwd').read()
memoryview(b'1')
object()
super()
import os
import sys
import math.os
import collections.abc
import importlib
from os import system
from . import sandbox
from math import __loader__
from functools import singledispatch
from operator import attrgetter
operator.attrgetter('real')
operator.methodcaller('upper')
functools.update_wrapper(1, 2)
functools.partial(print).func
collections.abc
collections.namedtuple('a', 'b')
re.enum
re.compile('1').__class__
statistics.random
statistics.sys
fractions.operator
math.sqrt.__module__
class A: pass
with open('x') as f: pass
async def f(): pass
match 1:\n case int(real=x): x
try: 1/0\nexcept Exception as e: e.__traceback__
try: 1/0\nexcept Exception as e: e.with_traceback(None)
try: 1/0\nexcept Exception as e: e.args
def __getattr__(x): pass
lambda __x: 1
x = lambda: 1; x.__code__ = 1
math.pi = 4
x = []; x.append = 1
del math.pi
str.join = 1
def f(): yield\nf().send
print(file=1)
print('x', file=open)
ｇｅｔａｔｔｒ(1, 'real')
"""


@pytest.mark.parametrize("code", [line.replace("\\n", "\n") for line in ESCAPES.split("\n") if line])
def test_the_first_wall_without_the_second(code):
    """In a process that may do anything, no expression leads to what is not on the list, and none is computed."""
    text, reason = sandbox.run(f"{code}\nprint('got through')", 1000)
    assert reason == "forbidden" or (reason == "error" and any(f"{kind}Error: " in text for kind in ("Name", "Type")))
    assert "got through" not in text


def test_names_that_code_can_reach_hold_no_module_and_no_way_out():
    """Of what is offered: functions, types and numbers; nothing that takes a name of an attribute, or runs text."""
    offered = {name: value for names in sandbox.MODULES.values() for name, value in names.items()} | sandbox.BUILTINS
    assert not [name for name, value in offered.items() if isinstance(value, type(sys))]
    ways_out = (
        "attrgetter methodcaller getattr setattr eval exec compile open vars dir globals type object update_wrapper"
    )
    assert not set(sandbox.BUILTINS) & set(ways_out.split()) and set(offered) & set(ways_out.split()) == {"compile"}
    assert offered["compile"] is sandbox.re.compile
    frames = (
        "gi_frame gi_code cr_frame ag_frame f_back f_globals f_locals f_code f_builtins tb_frame tb_next args func obj"
    )
    assert not sandbox.ATTRIBUTES & set(frames.split()) and not [name for name in sandbox.ATTRIBUTES if name[0] == "_"]


SECOND = """
import json, os, socket, subprocess, sys, threading
results = os.dup(1)
inherited = open({file!r}, "w")
from rethinker.environments.python import wall
wall(0.25)

def tried(what):
    try:
        what()
        return "done"
    except BaseException as error:
        return type(error).__name__

def written():
    inherited.write("x" * 10)
    inherited.flush()

import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
found = {{
    "read": tried(lambda: open("/etc/passwd")),
    "write": tried(lambda: open({file!r}, "a")),
    "grow": tried(written),
    "socket": tried(socket.socket),
    "pair": tried(os.pipe),
    "fork": tried(os.fork),
    "program": tried(lambda: subprocess.run(["true"])),
    "thread": tried(threading.Thread(target=print).start),
    "import": tried(lambda: __import__("sqlite3")),
    "memory": tried(lambda: bytearray(2**29)),
    "more": tried(lambda: __import__("resource").setrlimit(__import__("resource").RLIMIT_NOFILE, (99, 99))),
    "become": tried(lambda: os.setuid(0)) if os.getuid() == 65534 else "PermissionError",
    "kill": tried(lambda: os.kill({parent}, 0)) if os.getuid() == 65534 else "PermissionError",
}}
print("to nobody")
os.write(results, json.dumps(found).encode())
"""


def test_the_second_wall_without_the_first(tmp_path):
    """Code of any kind, in a process behind the kernel's bounds: no file, socket, program, thread or memory."""
    code = SECOND.format(file=str(tmp_path / "file"), parent=os.getpid())
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    found = json.loads(done.stdout)
    assert found == {
        "read": "OSError",
        "write": "OSError",
        "grow": "OSError",
        "socket": "OSError",
        "pair": "OSError",
        "fork": "BlockingIOError",
        "program": "OSError",
        "thread": "RuntimeError",
        "import": found["import"],  # any error of the import system's
        "memory": "MemoryError",
        "more": "ValueError",
        "become": "PermissionError",
        "kill": "PermissionError",
    }
    assert found["import"] in ("OSError", "ImportError", "ModuleNotFoundError")
    assert done.stderr == "" and (tmp_path / "file").read_bytes() == b""


class Made:
    """A pickle of it makes a folder where it is read."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_the_tools_process_without_the_first_wall(tmp_path, monkeypatch):
    """Code that has all builtins, and reaches modules, opens nothing; a pickle in place of an answer is not read, and
    an answer that stops half-way is not waited for."""
    monkeypatch.setattr(killable, "TRANSFER_S", 1.0)

    class Process(PythonProcess):
        inside = "tests.environments.without_first_wall"

    process = Process(EnvironmentConfig(use=["python"], memory_gb=0.25))
    reach = "[c for c in object.__subclasses__() if c.__name__ == '_wrap_close'][0].__init__.__globals__"
    pickled = pickle.dumps(Made(str(tmp_path / "made")))
    message = len(pickled).to_bytes(4, "big") + pickled
    try:
        assert process.ask((f"{reach}['getpid']()", 1000), 30.0) == (str(process._process.pid), "")
        assert "Too many open files" in process.ask(("open('/etc/passwd')", 1000), 30.0)[0]
        assert "Resource temporarily unavailable" in process.ask((f"{reach}['fork']()", 1000), 30.0)[0]
        for written in (message, message[:5]):
            forged = f"for fd in range(3, 1000):\n try: {reach}['write'](fd, {written})\n except OSError: pass"
            with pytest.raises(LostError, match="connection was closed"):
                process.ask((f"{forged}\nwhile True: pass", 1000), 30.0)
        assert process.ask(("6 * 7", 1000), 30.0) == ("42", "")
    finally:
        process.close()
    assert not (tmp_path / "made").exists()
