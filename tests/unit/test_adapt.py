"""``sglang-lsa adapt`` without a server: settings, what is refused before work, how far a run is, the card."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
import torch

from sglang_lsa.adapt import checks
from sglang_lsa.adapt.lock import LOCK, locked
from sglang_lsa.adapt.parser import shown
from sglang_lsa.adapt.result import compared, draw
from sglang_lsa.adapt.settings import Settings
from sglang_lsa.adapt.state import FILE, State
from sglang_lsa.adapt.steps import StepFailed, progress_in, run_step
from sglang_lsa.cli import main
from sglang_lsa.embedded_model import embedded_model_path
from sglang_lsa.evaluation.suites.ruler import TASKS
from sglang_lsa.indexer.checkpoint import ModelShape
from sglang_lsa.texts.families import FAMILIES

SMOLLM2 = ModelShape(576, 30, 9, 3, 64)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"each": 0}, "--each 0 is too small"),
        ({"lengths": (100,)}, "--lengths 100 is too short: use 512 or more"),
        ({"eval_lengths": ()}, "--eval-lengths is empty"),
        ({"families": ("novels",)}, "--families novels: there is no such one"),
        ({"families": ("text", "copying")}, "add one that asks for something"),
        ({"budget": 1.5}, "--budget 1.5 is out of range"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_impossible_settings_are_refused(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        Settings(**changed)


def test_defaults_are_of_what_there_is() -> None:
    settings = Settings()
    assert set(settings.families) == set(FAMILIES) and set(settings.tasks) <= set(TASKS)
    assert settings.prompts == 9 * 3 * 10 and shown(settings.lengths) == "4096 8192 16384"


# --- before any work --------------------------------------------------------------------------------------------------


def test_a_model_that_is_no_model_is_refused(tmp_path: pathlib.Path) -> None:
    small = Settings(lengths=(1024,), eval_lengths=(1024,))
    for given, words in (
        ("no/such-model-anywhere", "is no folder, and no model on this machine"),
        (__file__, "is a file: give a folder"),
        (str(tmp_path), "has no config.json"),
    ):
        with pytest.raises(ValueError, match=words):
            checks.require_model(given, small)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    with pytest.raises(ValueError, match="has no weights"):
        checks.require_model(str(tmp_path), small)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"cannot be read|does not generate"):
        checks.require_model(str(tmp_path), small)


def test_the_embedded_model_is_taken_within_its_length() -> None:
    model = str(embedded_model_path())
    assert checks.require_model(model, Settings(lengths=(1024,), eval_lengths=(4096,))) == SMOLLM2
    with pytest.raises(ValueError, match=r"ask for 16384 tokens, and .* was made for 8192: use at most 7936"):
        checks.require_model(model, Settings())
    with pytest.raises(ValueError, match="--tasks juggling: there is no such task"):
        checks.require_model(model, Settings(lengths=(1024,), eval_lengths=(1024,), tasks=("juggling",)))


def test_other_weights_are_seen(tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(3 << 20))
    seen = {checks.fingerprint(str(tmp_path))}
    for at in (0, 3 << 19, (3 << 20) - 1):
        with weights.open("r+b") as file:
            file.seek(at)
            file.write(b"x")
        seen.add(checks.fingerprint(str(tmp_path)))
    (tmp_path / "config.json").write_text("{ }")
    seen.add(checks.fingerprint(str(tmp_path)))
    assert len(seen) == 5


@pytest.mark.parametrize(
    ("server_args", "free", "fit"),
    [
        ("", [56, 0, 0, 0], 3),
        ("", [0, 90, 90, 90], 1),
        ("--tp-size 2", [56, 56, 0, 0], 4),
        ("--tp-size 2", [56, 30, 90, 90], 2),
        ("--tp-size 2 --base-gpu-id 2", [0, 0, 40, 90], 3),
        ("--tp-size 8", [90, 90, 90, 90], 1),
    ],
)
def test_servers_record_side_by_side_as_the_gpus_of_one_have_room(
    server_args: str, free: list[int], fit: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server with weights of 5 GiB takes 18, and 13 of each of two GPUs."""
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(5 << 30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu=0: (free[gpu] << 30, 90 << 30))
    assert checks.servers_that_fit(str(tmp_path), server_args) == fit


def test_a_disk_that_is_too_small_is_refused(tmp_path: pathlib.Path) -> None:
    needed = checks.recorded_bytes(SMOLLM2, Settings(lengths=(4096,), each=10**7))
    with pytest.raises(ValueError, match=r"GB free, and recordings take up to .* GB: free some"):
        checks.require_disk(tmp_path, needed)
    checks.require_disk(tmp_path / "new", 1000)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        checks.require_disk(tmp_path / "file", 1000)


def test_a_folder_of_something_else_is_refused(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    about = {"model": "a", "weights": "1", "lengths": (4096,)}
    state = State.open(tmp_path, about)
    state.save()
    state.finish("record", 3.14159)
    assert State.open(tmp_path, about).done == {"record": 3.1}
    for changed, words in (
        ({"model": "b"}, "was begun with model 'a', and this is 'b'"),
        ({"weights": "2"}, "was of other weights"),
        ({"lengths": (8192,)}, r"was begun with lengths \[4096\], and this is \[8192\]"),
    ):
        with pytest.raises(ValueError, match=words):
            State.open(tmp_path, about | changed)
    for text in ("{", "[]", '{"format": 9}', '{"format": 1, "about": {}, "done": [1]}'):
        (tmp_path / FILE).write_text(text)
        with pytest.raises(ValueError, match=r"adapt.json cannot be used"):
            State.open(tmp_path, about)
    (tmp_path / FILE).unlink()
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"has other files \(thesis.tex\): use a new folder"):
        State.open(tmp_path, about)
    arguments = ["adapt", "--output", str(tmp_path), "--lengths", "1024", "--eval-lengths", "1024"]
    assert main(arguments) == 1
    assert "has other files (thesis.tex)" in capsys.readouterr().err
    assert not (tmp_path / "work").exists(), "before any work"


HOLDER = """
import pathlib, sys, time
from sglang_lsa.adapt.lock import locked
with locked(pathlib.Path(sys.argv[1])):
    print("here", flush=True)
    time.sleep(600)
"""


def test_two_runs_are_not_in_one_folder(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A second one is told who is there; one that was killed is no obstacle."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE) as first:
        try:
            assert first.stdout is not None and first.stdout.readline() == b"here\n"
            words = rf"is in use by process {first.pid} on .*, since .*: wait for it"
            with pytest.raises(ValueError, match=words), locked(tmp_path):
                raise AssertionError("two in one folder")
            assert main(["adapt", "--output", str(tmp_path), "--lengths", "1024", "--eval-lengths", "1024"]) == 1
            assert f"in use by process {first.pid}" in capsys.readouterr().err
            assert [path.name for path in tmp_path.iterdir()] == [LOCK], "it has done nothing"
        finally:
            first.kill()
    assert (tmp_path / LOCK).exists(), "what a killed one leaves"
    with locked(tmp_path):
        assert f"process {os.getpid()} on" in (tmp_path / LOCK).read_text()
        with pytest.raises(ValueError, match="in use by process"), locked(tmp_path):
            pass
    assert not list(tmp_path.iterdir())


# --- steps ------------------------------------------------------------------------------------------------------------


def test_the_last_bar_of_a_log_is_shown(tmp_path: pathlib.Path) -> None:
    log = tmp_path / "log"
    log.write_text("starting\n")
    assert progress_in(log) == ("", 0.0)
    log.write_text("\rrecording:  10%|#   | 3/30 [00:01<00:10]\rrecording:  50%|##  | 15/30 [00:02<00:02, 9prompt/s]")
    assert progress_in(log) == ("recording", 0.5)
    log.write_text(log.read_text() + "\n  5%|5   | 6/120 [00:01<00:20,  5.00it/s]")
    assert progress_in(log) == ("", 0.05)


def test_a_step_that_fails_says_what_it_said(tmp_path: pathlib.Path) -> None:
    with pytest.raises(StepFailed, match=r"sglang-lsa train ended with status 1:\n[\s\S]*run sglang-lsa record first"):
        run_step(("train", tmp_path / "nothing"), tmp_path / "log", lambda what, share: None)


def test_a_step_ends_with_the_one_who_began_it(tmp_path: pathlib.Path) -> None:
    """Even if that one is killed, so that no server is left on the device."""
    code = f"""
import pathlib, sys
from sglang_lsa.adapt import steps
sys.executable = {str(tmp_path / "python")!r}
steps.run_step(("x",), pathlib.Path({str(tmp_path / "log")!r}), lambda what, share: None)
"""
    (tmp_path / "python").write_text(
        f"#!/bin/sh\necho $$ > {tmp_path}/pid\ntrap 'echo stopped > {tmp_path}/stopped; exit' TERM\n"
        "while true; do sleep 0.1; done\n"
    )
    (tmp_path / "python").chmod(0o755)
    began = subprocess.Popen([sys.executable, "-c", code])
    wait(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip())
    began.send_signal(signal.SIGKILL)
    began.wait()
    wait(lambda: (tmp_path / "stopped").exists())
    wait(lambda: not os.path.exists(f"/proc/{(tmp_path / 'pid').read_text().strip()}"))


def wait(until: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# --- the card ---------------------------------------------------------------------------------------------------------


def row(arm: str, **changed: Any) -> dict[str, Any]:
    values = {
        "suite": "ruler",
        "task": "vt",
        "length": 4096,
        "arm": arm,
        "accuracy": 50.0,
        "delta": 0.0 if arm == "full" else -5.0,
        "delta_ci_low": -9.0,
        "delta_ci_high": 1.0,
        "footprint": 0.12,
        "counted": True,
        "kl": 0.01,
        "kl_ci_low": 0.005,
        "kl_ci_high": 0.02,
        "kl_n": 9,
        "n": 9,
    }
    return values | changed


def test_the_card_has_answers_with_intervals_and_a_picture(tmp_path: pathlib.Path) -> None:
    rows = [
        row("full"),
        row("lsa"),
        row("random", counted=False, kl=None),
        row("recency", kl_n=7),
        row("lsa", suite="all", task="average"),
    ]
    text = compared(rows, Settings(), {"record": 100.0, "train": 50.0})
    assert "| vt | 4096 | full | 50.0 |  |  | 12.0% | 0.0100 (0.0050 to 0.0200) |" in text
    assert "| vt | 4096 | lsa | 50.0 | -5.0 | -9.0 to +1.0 | 12.0% | 0.0100 (0.0050 to 0.0200) |" in text
    assert "| vt * | 4096 | random | 50.0 | -5.0 | -9.0 to +1.0 | 12.0% |  |" in text
    assert "| vt | 4096 | recency | 50.0 | -5.0 | -9.0 to +1.0 | 12.0% | 0.0100 (0.0050 to 0.0200, n 7) |" in text
    assert "sets of at most 10.0% of a context's pages, of short ones 1,536 tokens. `lsa`" in text
    assert "average" not in text and "record 100 s, train 50 s" in text and "](adapt.png)" in text
    recall = [
        {"document": "d", "family": "facts", "tokens": 4000, "selector": selector, "budget": budget, "recall": 0.5,
         "f1": 0.5, "mass": 0.5, "evidence": None, "told": None, "golden": 1.0}
        for selector in ("indexer", "quest") for budget in (0.135, 0.07)
    ]  # fmt: skip
    draw(tmp_path / "picture.png", recall, rows)
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"
