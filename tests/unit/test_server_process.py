"""The port of a server that is about to start is nobody else's, and how a server ends."""

from __future__ import annotations

import asyncio
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable

import psutil
import pytest

from sglang_lsa.server_process import ServerProcess, held_port


def test_a_held_port_is_nobody_elses() -> None:
    """A looked-up port was: the system handed it to others in the half minute until the server listened."""
    with held_port() as held, socket.socket() as other:
        with pytest.raises(OSError, match="in use"):
            other.bind(held.getsockname())
        own_choice = pathlib.Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
        assert held.getsockname()[1] < int(own_choice[0])


def test_held_ports_differ() -> None:
    held = [held_port() for _ in range(50)]
    assert len({each.getsockname() for each in held}) == 50
    for each in held:
        each.close()


def test_a_server_listens_on_a_held_port() -> None:
    """As SGLang's does, with asyncio's own options; the next server of the same test run takes another port."""

    async def scenario() -> bytes:
        async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"here")
            writer.close()

        with held_port() as held:
            server = await asyncio.start_server(greet, *held.getsockname())
            reader, writer = await asyncio.open_connection(*held.getsockname())
            said = await reader.read()
            writer.close()
            server.close()
            return said

    assert asyncio.run(scenario()) == b"here"


def test_a_server_ends_with_the_process_that_began_it_not_with_the_thread(tmp_path: pathlib.Path) -> None:
    """Even if that process is killed, and cannot stop anything."""
    (tmp_path / "served.py").write_text(
        "import os, pathlib, time\n"
        f"pathlib.Path({str(tmp_path / 'pid.partial')!r}).write_text(str(os.getpid()))\n"
        f"os.replace({str(tmp_path / 'pid.partial')!r}, {str(tmp_path / 'pid')!r})\n"
        "time.sleep(600)\n"
    )
    code = f"""
import pathlib, threading, time
from sglang_lsa.server_process import ServerProcess
environment = {{"PYTHONPATH": {str(tmp_path)!r}}}
def begin():
    ServerProcess("served", [], pathlib.Path({str(tmp_path / "log")!r}), environment)
thread = threading.Thread(target=begin)
thread.start()
thread.join()
pathlib.Path({str(tmp_path / "begun")!r}).write_text("")
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code]) as began:
        try:
            wait((tmp_path / "pid").exists)
            wait((tmp_path / "begun").exists)
            server = int((tmp_path / "pid").read_text())
            time.sleep(0.5)  # what would have ended with the thread has ended by now
            assert running(server)
            assert "served" in pathlib.Path(f"/proc/{server}/cmdline").read_text()
        finally:
            began.send_signal(signal.SIGKILL)
    wait(lambda: not running(server))


def test_a_server_is_stopped_once_what_it_started_has_ended(tmp_path: pathlib.Path) -> None:
    """SGLang's main process goes on for six seconds; a child may have something to write."""
    child = (
        "import pathlib, signal, sys, time\n"
        "def end(*_):\n"
        "    time.sleep(1)\n"
        f"    pathlib.Path({str(tmp_path / 'written')!r}).touch()\n"
        "    sys.exit()\n"
        "signal.signal(signal.SIGTERM, end)\n"
        f"pathlib.Path({str(tmp_path / 'begun')!r}).touch()\n"
        "time.sleep(600)\n"
    )
    (tmp_path / "served.py").write_text(
        "import signal, subprocess, sys, time\n"
        "from multiprocessing import resource_tracker\n"
        "resource_tracker.ensure_running()  # ignores SIGTERM, and ends with this process\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "time.sleep(600)\n"
    )
    with ServerProcess("served", [], tmp_path / "log", {"PYTHONPATH": str(tmp_path)}) as server:
        wait((tmp_path / "begun").exists)
        started = psutil.Process(server.process.pid).children()
        assert len(started) == 2
        begun = time.monotonic()
    assert time.monotonic() - begun < 5
    assert (tmp_path / "written").exists()
    assert not any(running(each.pid) for each in started)
    assert server.process.returncode == -signal.SIGKILL


def running(pid: int) -> bool:
    """Whether a process is there that has not ended; one whose parent is gone may wait for init as a zombie."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait(until: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_child_in_its_own_session_ends_too(tmp_path: pathlib.Path) -> None:
    (tmp_path / "served.py").write_text(
        "import pathlib, subprocess, sys, time\n"
        "child = [sys.executable, '-c', 'import time; time.sleep(120)']\n"
        "child = subprocess.Popen(child, start_new_session=True)\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(child.pid))\n"
        "time.sleep(600)\n"
    )
    with ServerProcess("served", [], tmp_path / "log", {"PYTHONPATH": str(tmp_path)}):
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.05)
        child = psutil.Process(int((tmp_path / "pid").read_text()))
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_what_a_server_that_crashed_had_started_is_waited_for(tmp_path: pathlib.Path) -> None:
    """It ends by itself, and in its own time."""
    code = (
        "import pathlib, signal, sys, time\n"
        "ended, ready = map(pathlib.Path, sys.argv[1:])\n"
        "signal.signal(15, lambda *_: (time.sleep(1), ended.touch(), sys.exit()))\n"
        "ready.touch()\n"
        "time.sleep(60)\n"
    )
    (tmp_path / "child.py").write_text(code)
    (tmp_path / "served.py").write_text(
        "import os, subprocess, sys, time\n"
        f"begun = [{str(tmp_path / 'child.py')!r}, {str(tmp_path / 'ended')!r}, {str(tmp_path / 'ready')!r}]\n"
        "subprocess.Popen([sys.executable, *begun])\n"
        "while not os.path.exists(begun[2]):\n"
        "    time.sleep(0.05)\n"
        "os._exit(1)\n"
    )
    with ServerProcess("served", [], tmp_path / "log", {"PYTHONPATH": str(tmp_path)}) as server:
        server.process.wait()
    assert (tmp_path / "ended").exists()
