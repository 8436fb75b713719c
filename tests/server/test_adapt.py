"""``sglang-lsa adapt`` with real servers: killed twice, it goes on, and leaves an indexer that a server takes."""

from __future__ import annotations

import json
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from sglang_lsa.adapt.checks import recorded_bytes
from sglang_lsa.adapt.settings import Settings
from sglang_lsa.indexer.checkpoint import ModelShape, read_checkpoint_config
from sglang_lsa.indexer.manifest import Manifest

pytestmark = [pytest.mark.server, pytest.mark.slow]
SERVER = "--dtype float32 --lsa-device-tokens 4096 --lsa-host-memory-gb 0.2 "
SERVER += "--json-model-override-args '{\"num_hidden_layers\": 6}'"


def begin(output: pathlib.Path, model: str, log: pathlib.Path, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "sglang_lsa.cli", "adapt", "--model", model, "--output", str(output)]
    command += ["--lengths", "600", "--each", "1", "--families", "facts", "records", "--steps", "4"]
    command += ["--tasks", "niah_single_1", "--eval-lengths", "1280", "--samples", "1", "--budget", "0.5"]
    with log.open("ab") as out:
        return subprocess.Popen([*command, f"--server-args={SERVER}", *more], stdout=out, stderr=subprocess.STDOUT)


def kill_when(run: subprocess.Popen[bytes], ready: Callable[[], bool], log: pathlib.Path) -> None:
    while not ready():
        assert run.poll() is None, log.read_text()[-3000:]
        time.sleep(0.1)
    run.send_signal(signal.SIGKILL)
    run.wait()


def left(output: pathlib.Path) -> list[str]:
    """Running processes that were begun for this folder."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(output) in words:
            found.append(words)
    return found


def test_it_goes_on_wherever_it_was_killed(model_path: str, tmp_path: pathlib.Path) -> None:
    output, log = tmp_path / "indexer", tmp_path / "log"
    recordings = output / "work" / "recordings"
    kill_when(begin(output, model_path, log), lambda: bool(list(recordings.glob("*.safetensors"))), log)
    deadline = time.monotonic() + 60
    while left(output):
        assert time.monotonic() < deadline, left(output)
        time.sleep(0.2)
    kept = {path: path.stat().st_mtime_ns for path in recordings.glob("*.safetensors")}
    assert kept and not (output / "config.json").exists(), "half-done, it is no indexer"
    known = set(Manifest.open(recordings).entries)

    again = begin(output, model_path, log, "--keep-recordings")
    kill_when(again, lambda: "train" in json.loads((output / "adapt.json").read_text())["done"], log)
    manifest = Manifest.open(recordings)
    assert len(manifest.entries) == 4
    for path, written in kept.items():
        if path.stem in known:
            assert path.stat().st_mtime_ns == written, "what is there is not made again"
    assert begin(output, model_path, log, "--keep-recordings").wait() == 0, log.read_text()[-3000:]

    assert read_checkpoint_config(output).model.num_hidden_layers == 6
    card = (output / "README.md").read_text()
    assert "## Held-out recall" in card and "| niah_single_1" in card and "KL a token" in card
    assert (output / "adapt.png").read_bytes()[:4] == b"\x89PNG"
    rows = json.loads((output / "evaluation" / "quality.json").read_text())["rows"]
    assert {row["arm"] for row in rows} >= {"full", "lsa", "recency", "random"}
    assert all(row["kl"] is not None for row in rows)
    settings = Settings(lengths=(600,), each=1, families=("facts", "records"))
    whole = sum(path.stat().st_size for path in recordings.glob("**/*.safetensors"))
    assert whole < recorded_bytes(ModelShape(576, 6, 9, 3, 64), settings) < 6 * whole

    before = time.monotonic()
    assert begin(output, model_path, log).wait() == 0 and "is done: serve with" in log.read_text()
    assert time.monotonic() - before < 60, "nothing is done twice"
    assert begin(output, model_path, log, "--samples", "2").wait() == 1
    assert "was begun with samples 1, and this is 2" in log.read_text()
