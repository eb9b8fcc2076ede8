"""How commands end: Ctrl-C while they import, a reader that is gone, and what is left to a traceback."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from segformer.errors import DataError, ending, error_line, importing, listed, printable, reraise_as, say

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path.name for path in (ROOT / "launch").glob("*.py") if path.name != "slurm_job.py")
# A script of launch/ whose import of torch says that it has begun, and takes long.
SLOW = """
import runpy, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a job in the background of a shell
class Slow:
    def find_spec(self, name, path, target=None):
        if name in ("torch", "bench.kernels"):
            print("importing", flush=True)
            time.sleep(60)
sys.meta_path.insert(0, Slow())
script, *sys.argv[1:] = sys.argv[1:]
runpy.run_path(script, run_name="__main__")
"""
PRINTS = """
import sys
from segformer.errors import ending
with ending():
    print("x" * {size})
    {then}
"""


def interrupted(*command, env=None):
    """Exit code and stderr of a program that is interrupted after its first line."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(
        [sys.executable, "-c", *command], cwd=ROOT, env={**os.environ, **(env or {})}, **pipes
    ) as process:
        assert process.stdout.readline() == "importing\n", process.stderr.read()
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, printed = process.communicate(timeout=30)
    return process.returncode, printed


def unread(code):
    """Exit code and stderr of a program whose stdout nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipes = {"stdout": writing, "stderr": subprocess.PIPE, "text": True}
    ended = subprocess.run([sys.executable, *code], cwd=ROOT, env=env, check=False, **pipes)
    os.close(writing)
    return ended.returncode, ended.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_ctrl_c_during_the_imports_is_one_line_and_130(script):
    assert interrupted(SLOW, f"launch/{script}") == (130, "stopped\n")


def test_ctrl_c_during_the_imports_is_told_by_rank_zero_alone():
    assert interrupted(SLOW, "launch/train.py", env={"RANK": "1"}) == (130, "")


@pytest.mark.parametrize(
    ("name", "handler", "changes"),
    [
        ("__main__", signal.default_int_handler, True),
        ("__main__", signal.SIG_IGN, False),
        ("__mp_main__", signal.default_int_handler, False),
    ],
    ids=["command", "ignores it", "worker"],
)
def test_ctrl_c_is_as_before_after_the_imports(name, handler, changes):
    before = signal.signal(signal.SIGINT, handler)
    try:
        with importing(name):
            assert (signal.getsignal(signal.SIGINT) != handler) == changes
        assert signal.getsignal(signal.SIGINT) == handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_help_into_a_reader_that_is_gone_ends_quietly():
    assert unread(["launch/slurm.py", "--help"]) == (141, "")


@pytest.mark.parametrize("size", [1, 100_000])
def test_output_that_a_full_disk_does_not_take_is_one_line_and_2(size):
    code = ["-c", PRINTS.format(size=size, then="pass")]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, *code], cwd=ROOT, env=env, stdout=full, stderr=-1, check=False
        )
    line = b"what this command printed can't be written: No space left on device\n"
    assert (ended.returncode, ended.stderr) == (2, line)


def test_an_exit_code_survives_a_terminal_that_has_gone():
    code = "from segformer.errors import Preempted, ending\nwith ending():\n    raise Preempted('stopped')"
    with open("/dev/full", "w") as gone:
        ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stderr=gone, check=False)
    assert ended.returncode == 75


DAMAGED = "from segformer.errors import DataError; raise DataError('damaged')"


@pytest.mark.parametrize("value", ["", "x", "-1"])
def test_a_rank_that_is_no_number_ends_a_command_before_it_imports(value, monkeypatch, capsys):
    """torchmetrics reads LOCAL_RANK when it is imported, and would end in a traceback."""
    monkeypatch.setenv("LOCAL_RANK", value)
    with pytest.raises(SystemExit, match="2"), importing("__main__"):
        pytest.fail("imported")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"ConfigError: LOCAL_RANK={value!r} in the environment is no number; start with ")


@pytest.mark.parametrize(
    ("size", "then", "wanted"),
    [
        (1, "pass", (141, "")),
        (100_000, "pass", (141, "")),
        (1, "sys.exit(3)", (3, "")),
        (1, DAMAGED, (2, "DataError: damaged\n")),
    ],
    ids=["at-the-end", "at-once", "exit-code", "error"],
)
def test_output_that_nobody_reads_ends_quietly_and_keeps_code_and_error(size, then, wanted):
    assert unread(["-c", PRINTS.format(size=size, then=then)]) == wanted


def test_a_broken_pipe_that_is_not_stdout_keeps_its_traceback():
    with pytest.raises(BrokenPipeError, match="of a worker"), ending():
        raise BrokenPipeError("of a worker")


def test_an_error_of_another_rank_bears_its_rank(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit) as stop, ending():
        raise DataError("damaged")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "[rank 3] DataError: damaged\n"


def test_reraise_as_says_what_why_and_what_to_do_on_one_line() -> None:
    expected = "^here: No such file or directory; look elsewhere$"
    with pytest.raises(DataError, match=expected), reraise_as(DataError, "here", "look elsewhere"):
        Path("/nowhere/at/all").read_bytes()
    with pytest.raises(DataError, match=r"^n: two lines$"), reraise_as(DataError, "n", on=ValueError):
        raise ValueError("two\n lines")
    with pytest.raises(KeyError), reraise_as(DataError, "another kind passes"):
        raise KeyError


@pytest.mark.parametrize(
    ("names", "text"),
    [([], ""), (["a"], "a"), (list("abcd"), "a, b, c and 1 more"), (["a\x1b[2J"], "a\\x1b[2J")],
)  # fmt: skip
def test_names_are_listed(names, text):
    assert listed(names, limit=3) == text


# Text that does more than show itself: erases, overwrites, forges a line, reorders, is no text, ...
HOSTILE = ["\x1b[2J", "a\rb", "a\nDone", "\u202egnp.exe", "\x9b31m", "\udcff", "\u2028", "\x7f", "\0"]


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_foreign_text_is_shown_and_does_nothing(text, capsys):
    shown = printable(text)
    assert shown.isprintable()
    assert shown.encode("ascii").decode("unicode_escape") == text, "nothing is lost"
    assert printable(shown) == shown
    say(f"class {text}: 1")
    assert capsys.readouterr().out == f"class {shown}: 1\n"
    assert error_line(DataError(f"file {text} is bad")) == f"DataError: file {shown} is bad"


def test_text_of_any_script_is_left_as_it_is():
    text = "\u00e9cole \u6811 \u0434\u0435\u0440\u0435\u0432\u043e \u05e2\u05e5 C:\\a 'b'"
    assert printable(text) is text
