"""Servers that are forks of a process that has imported SGLang: here of one that imports an empty package instead."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import psutil
import pytest
from ready_servers import LSA, Copy, Ready, ReadyServers

ROOT = pathlib.Path(__file__).resolve().parents[2]
HTTP_SERVER = "sglang/srt/entrypoints/http_server.py"
SPAWNS = """
import multiprocessing, os, pathlib, sys, time
def write(folder):
    (pathlib.Path(folder) / "child").write_text(f"{os.getpid()} {__name__} {os.environ['SAID']} {os.getcwd()}")
    sys.exit(7)
if __name__ == "__main__":
    os.environ["SAID"] = "here"
    child = multiprocessing.get_context("spawn").Process(target=write, args=(sys.argv[1],))
    child.start()
    pathlib.Path(sys.argv[1], "begun").write_text(str(child.pid))
    child.join()
    print("ended with", child.exitcode, flush=True)
    if sys.argv[2:]:
        time.sleep(600)
"""


@pytest.fixture
def folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """The current one: a server's modules, and this package's, are found there."""
    made = tmp_path / "installed" / HTTP_SERVER
    made.parent.mkdir(parents=True)
    for parent in list(made.parents)[:3]:
        (parent / "__init__.py").touch()
    made.touch()
    here = tmp_path / "here"
    here.mkdir()
    (here / "sglang_lsa").symlink_to(ROOT / "sglang_lsa")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'installed'}:{ROOT}")
    monkeypatch.chdir(here)
    return here


@pytest.fixture
def ready(folder: pathlib.Path) -> Iterator[Ready]:
    ready = Ready(dict(os.environ))
    yield ready
    ready.stop()


def begin(ready: Ready, folder: pathlib.Path, code: str, *arguments: str) -> Copy:
    (folder / "served.py").write_text(code)
    with (folder / "log").open("wb") as out:
        return ready.begin(["served", *arguments], out.fileno())


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("print('so')", 0, "so"),
        ("raise SystemExit('no such thing')", 1, "no such thing"),
        ("1 / 0", 1, "ZeroDivisionError"),
        ("import os; os.abort()", -signal.SIGABRT, ""),
    ],
    ids=["ends", "exits", "fails", "aborts"],
)
def test_how_a_server_ends(ready: Ready, folder: pathlib.Path, code: str, status: int, said: str) -> None:
    server = begin(ready, folder, code)
    assert server.wait(30) == server.returncode == status
    assert said in (folder / "log").read_text()
    assert ready.is_idle()


def test_it_is_told_apart_from_one_that_goes_on(ready: Ready, folder: pathlib.Path) -> None:
    server = begin(ready, folder, "import time; time.sleep(600)")
    assert server.poll() is None and not ready.is_idle()
    with pytest.raises(subprocess.TimeoutExpired):
        server.wait(0.1)
    assert os.getsid(server.pid) == server.pid
    server.kill()
    assert server.wait(30) == -signal.SIGKILL
    server.kill()


def test_a_server_that_ends_just_now_can_be_killed() -> None:
    status, told = os.pipe()
    ended = subprocess.Popen(["true"])
    ended.wait()
    Copy(ended.pid, status).kill()
    os.close(told)
    os.close(status)


def test_what_it_spawns_is_what_multiprocessing_would_spawn(ready: Ready, folder: pathlib.Path) -> None:
    server = begin(ready, folder, SPAWNS, str(folder))
    assert server.wait(30) == 0, (folder / "log").read_text()
    assert "ended with 7" in (folder / "log").read_text()
    pid = (folder / "begun").read_text()
    assert (folder / "child").read_text().split() == [pid, "__mp_main__", "here", str(folder)]


def test_what_lies_here_comes_before_what_is_installed(ready: Ready, folder: pathlib.Path) -> None:
    """As with ``python -m``; else the tests of a checkout would start the servers of another."""
    begin(ready, folder, "import sys, sglang_lsa; print(sys.path[0], sglang_lsa.__file__)").wait(30)
    path, package = (folder / "log").read_text().split()
    assert path == str(folder)
    assert package.startswith(str(folder))


def test_a_process_that_cannot_import_says_so(folder: pathlib.Path) -> None:
    (folder.parent / "installed" / HTTP_SERVER).write_text("raise SystemExit(3)")
    ready = Ready(dict(os.environ))
    with pytest.raises(RuntimeError, match="ended with status 3"):
        begin(ready, folder, "")
    with pytest.raises(RuntimeError, match="ended with status 3"):
        begin(ready, folder, "")
    ready.stop()


def test_an_interrupt_from_the_keyboard_is_not_for_it(ready: Ready) -> None:
    """It goes to the group of processes that runs the tests, which then stop their servers."""
    assert os.getpgid(ready.process.pid) != os.getpgid(0)


def test_one_that_was_killed_is_replaced(folder: pathlib.Path) -> None:
    servers = ReadyServers()

    def help_of_the_launcher() -> int:
        with (folder / "log").open("wb") as out:
            return servers.begin(
                [sys.executable, "-m", LSA, "--lsa-no"], signal.SIGKILL, env=os.environ, stdout=out
            ).wait(30)

    assert help_of_the_launcher() == 2
    (ready,) = servers.ready.values()
    ready.process.kill()
    ready.process.wait()
    assert help_of_the_launcher() == 2
    servers.stop()


def test_all_end_when_the_tests_are_killed(folder: pathlib.Path) -> None:
    """The process that has imported SGLang, the server, and what waits there to be told something."""
    (folder / "served.py").write_text(SPAWNS)
    code = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT / "tests" / "support")!r})
from ready_servers import Ready
ready = Ready(dict(os.environ))
with open("log", "wb") as out:
    ready.begin(["served", {str(folder)!r}, "and waits"], out.fileno())
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code]) as tests:
        try:
            wait(lambda: "ended with" in (folder / "log").read_text() if (folder / "log").exists() else False)
            begun = psutil.Process(tests.pid).children(recursive=True)
        finally:
            tests.kill()
    assert len(begun) >= 4, "one that is ready, a server, and two that wait"
    wait(lambda: not any(map(runs, begun)))


def runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait(until: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.05)
