"""The benchmarks without GPUs: the command line, and the scheduler's own time."""

from __future__ import annotations

import json
import pathlib
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from rich.console import Console

from sglang_lsa import cli
from sglang_lsa.bench import overhead, prefill, refresh_together, serving, serving_arms
from sglang_lsa.serve.status import status as status_of
from sglang_lsa.server_process import ServerFailed
from sglang_lsa.streaming import RequestFailed

# --- command line ----------------------------------------------------------------------------------------------------


@pytest.fixture
def keep_signal_handlers() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("keep_signal_handlers")
def test_no_gpu_is_status_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["bench", "serving", "--output", str(tmp_path / "out")]) == 1
    message = "sglang-lsa bench: sglang-lsa bench serving needs an NVIDIA GPU: torch sees none on this machine\n"
    assert capsys.readouterr().err == message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["nonsense"],
        ["serving", "--models", "80b"],
        ["serving", "--policies", "lru"],
        ["serving", "--models"],
        ["serving", "--arms", "1k,2k"],
        ["serving", "--systems", "vllm"],
        ["serving", "--kv-cache-dtype", "int8"],
        ["prefill", "--prompts", "128K"],
        ["prefill", "--prompts", "0"],
        ["prefill", "--pools", "full,"],
    ],
    ids=lambda argv: " ".join(argv) or "none",
)
def test_wrong_usage_is_status_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["bench", *argv])
    assert exit_.value.code == 2
    assert "usage: sglang-lsa bench" in capsys.readouterr().err


@pytest.mark.usefixtures("keep_signal_handlers")
@pytest.mark.parametrize(
    "failure", [ServerFailed("the log: x.log"), RequestFailed("HTTP 400: x.log")], ids=["server", "request"]
)
def test_a_failed_benchmark_is_status_1(
    failure: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(output: pathlib.Path, console: Console, **asked: Any) -> None:
        assert output == tmp_path
        assert (asked["models"], asked["workloads"]) == (["1b"], ["iso"])
        assert asked["systems"] == ["stock", "stock-flashinfer", "lsa"]
        assert (asked["kv_dtype"], asked["resume"], asked["arms"]) == ("auto", False, list(serving_arms.ARMS))
        assert (asked["policies"], asked["server_args"]) == (["quest", "random"], "--tp 2")
        raise failure

    monkeypatch.setattr(serving, "run", run)
    argv = ["--models", "1b", "--workloads", "iso", "--server-args=--tp 2", "--output", str(tmp_path)]
    assert cli.main(["bench", "serving", *argv]) == 1
    assert "x.log" in capsys.readouterr().err


@pytest.mark.usefixtures("keep_signal_handlers")
def test_prefill_without_a_gpu_is_status_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["bench", "prefill", "--output", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith("sglang-lsa bench: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("keep_signal_handlers")
def test_what_prefill_is_asked_to_measure(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(prefill, "run", lambda output, console, **asked: seen.append(asked | {"output": output}))
    assert cli.main(["bench", "prefill", "--output", str(tmp_path)]) == 0
    assert cli.main(["bench", "prefill", "--pools", "16gb", "--workloads", "question", "--repeats", "5"]) == 0
    assert [asked["pools"] for asked in seen] == [["full", "quarter", "16gb"], ["16gb"]]
    assert [asked["workloads"] for asked in seen] == [["ttft", "question"], ["question"]]
    assert [asked["repeats"] for asked in seen] == [3, 5]
    assert seen[0]["output"] == tmp_path


# --- the scheduler's own time ----------------------------------------------------------------------------------------


def test_overhead_is_that_of_requests_that_are_pruned_and_refreshed(tmp_path: pathlib.Path) -> None:
    """Times themselves are for machines that do nothing else."""
    scheduler = overhead.Scheduler(2, 4096)
    for _ in range(2):
        scheduler.prefill(4096)
    scheduler.crowd()
    for _ in range(70):
        scheduler.decode()
    lookahead, requests = scheduler.runtime.lookahead, scheduler.runtime.requests.values()
    assert lookahead.counts.refreshes >= 4 and lookahead.counts.failures == lookahead.counts.stalls == 0
    assert all(len(request.resident.positions) < 20 and request.resident.tail_start >= 64 for request in requests)
    assert scheduler.pager.ledger.recalls > 0, "pages come from the mirror"


def test_windows_that_begin_together_are_measured_stage_by_stage() -> None:
    """Every request is refreshed in every window, all in the same three steps, and pages come from the mirror."""
    found = refresh_together.measure_together(4, 4096)
    stages = [found[name] for name in ("queue_us", "choose_us", "switch_us")]
    assert min(stages) > 0 and found["total_us"] == pytest.approx(sum(stages))
    assert found["request_us"] == pytest.approx(found["total_us"] / 4) and found["recalled_pages"] > 0
    scheduler = refresh_together.together(4, 4096)
    counts, steps = scheduler.runtime.lookahead.counts, []
    for _ in range(refresh_together.WINDOW):
        before = counts.refreshes
        scheduler.decode()
        steps.append(counts.refreshes - before)
    assert sorted(steps)[-2:] == [0, 4]


@pytest.mark.parametrize("groups", [False, True])
def test_windows_of_requests_over_one_prefix_are_measured(groups: bool) -> None:
    found = refresh_together.measure_shared(8, 16384, groups, circles=groups)
    assert found["window_us"] > found["refresh_us"] > 0 and found["step_us"] > 0
    assert (found["form_us"] > 0) == groups and found["answers"] == ("circles" if groups else "random")
    shared = refresh_together.Shared(8, 16384, groups, circles=False)
    counts, refreshes, at_once = shared.runtime.lookahead.counts, list[int](), list[int]()
    for _ in range(refresh_together.WINDOW):
        before = counts.refreshes
        shared.decode()
        refreshes.append(counts.refreshes - before)
        at_once.append(0 if shared.runtime.groups is None else len(shared.runtime.groups.members()))
    assert sum(refreshes) == 8 and max(refreshes) == (2 if groups else 1)
    assert set(at_once) == {1 if groups else 0}, "all are over one prefix"


def test_what_decode_holds_is_sampled_while_no_prompt_waits() -> None:
    """For ``held_bytes``: one look at 16 passes costs a step nothing that can be seen."""
    scheduler = overhead.Scheduler(2, 2048)
    for _ in range(2):
        scheduler.prefill(2048)
    held = []
    for _ in range(48):
        scheduler.decode()
        held.append(scheduler.pager.ledger.held_pages)
    seen = scheduler.runtime.decoding
    assert list(seen) == [2]
    assert seen[2].samples == 3 and min(held) <= seen[2].held_pages / 3 <= max(held)
    scheduler.pager.reservations.promise("r3", 1)
    for _ in range(16):
        scheduler.decode()
    assert seen[2].samples == 3
    assert status_of(scheduler.runtime)["decoding"] == {"2": {"samples": 3, "held_pages": seen[2].held_pages}}


def test_overhead_says_what_was_measured(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(overhead, "LONG", 8192)
    monkeypatch.setattr(overhead, "LONG_WINDOWS", 3)
    assert (
        cli.main(["bench", "overhead", "--requests", "1", "--tokens", "2048", "--output", str(tmp_path / "o.json")])
        == 0
    )
    found = json.loads((tmp_path / "o.json").read_text())
    (row,) = found["batches"]
    assert (row["requests"], row["tokens"], found["end"]["tokens"], found["end"]["windows"]) == (1, 2048, 8192, 5)
    assert all(value > 0 for value in row.values()) and found["end"]["end_ms"] > 0
    assert "end of a request of 8,192 tokens, 5 windows" in capsys.readouterr().out
    assert cli.main(["bench", "overhead", "--tokens", "64"]) == 1
    assert "1,024 tokens or more" in capsys.readouterr().err
