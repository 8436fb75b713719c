"""The hooks of a forward pass, which may be run twice, or given up."""

from __future__ import annotations

import time
from collections import deque
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from release import RELEASE

from sglang_lsa.engine.prefill import DevicePoolFull
from sglang_lsa.engine.step import Step
from sglang_lsa.patches import model_runner_forward, scheduler_run_batch

pytestmark = pytest.mark.release


# a forward pass that is run twice, or given up


class Runtime:
    """Of the runtime, what these hooks call; it notes that."""

    def __init__(self, calls: list[str], looks: bool = False, fails: BaseException | None = None) -> None:
        self.calls, self.fails = calls, fails
        self.step = Step(looks=(0,) if looks else ())

    def choose_resident(self) -> None:
        self.calls.append("choose")

    def before_forward(self, batch: Any, new_pages: Any) -> int:
        self.calls.append(f"before {batch.kind} {new_pages}")
        if self.fails is not None:
            raise self.fails
        return 7

    def after_forward(self, number: int) -> None:
        self.calls.append(f"after {number}")

    def forward_failed(self, error: BaseException) -> None:
        self.calls.append("failed")

    def run_on(self, stream: str) -> None:
        self.calls.append(f"on {stream}")


@pytest.mark.parametrize(
    ("runtime", "extend", "calls"),
    [
        pytest.param(True, True, ["forward", "choose", "forward"], id="a resident prefix"),
        pytest.param(True, False, ["forward"], id="decode"),
        pytest.param(False, True, ["forward"], id="no resident prefix"),
        pytest.param(None, True, ["forward"], id="before the runtime exists"),
    ],
)
def test_a_pass_with_a_first_look_is_run_twice(runtime: bool | None, extend: bool, calls: list[str]) -> None:
    seen: list[str] = []
    runner = SimpleNamespace() if runtime is None else SimpleNamespace(lsa=Runtime(seen, looks=runtime))
    forward_batch = SimpleNamespace(forward_mode=SimpleNamespace(is_extend=lambda: extend))

    def original(self: Any, batch: Any, *args: Any, **kwargs: Any) -> int:
        assert (self, batch, args, kwargs) == (runner, forward_batch, (1,), {"more": 2})
        seen.append("forward")
        return len(seen)

    result = model_runner_forward.forward(original, runner, forward_batch, 1, more=2)
    assert seen == calls
    assert result == len(calls), "the last run's"


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (torch.OutOfMemoryError("CUDA error"), True),
        (MemoryError(), True),
        (DevicePoolFull("LSA: the device pool"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"), True),
        (RuntimeError("LSA: SGLang allocated 3 pages for a batch that needs 4"), False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("odd"), False),
        (KeyboardInterrupt(), False),
    ],
    ids=repr,
)
def test_out_of_memory(error: BaseException, memory: bool) -> None:
    assert scheduler_run_batch.out_of_memory(error) is memory


def scheduler(runtime: Runtime, overlap: bool = False) -> SimpleNamespace:
    return SimpleNamespace(
        tp_worker=SimpleNamespace(model_runner=SimpleNamespace(lsa=runtime)),
        enable_overlap=overlap,
        device="cuda" if overlap else "cpu",
        forward_stream="stream",
        token_to_kv_pool_allocator=SimpleNamespace(take_new_pages=lambda: "pages"),
    )


BATCH = SimpleNamespace(
    reqs=[],
    seq_lens_cpu=torch.zeros(0, dtype=torch.int64),
    forward_mode=SimpleNamespace(is_extend=lambda: False, is_decode=lambda: True),
)


@pytest.mark.parametrize("overlap", [False, True], ids=["cpu", "gpu"])
def test_pages_are_brought_in_before_a_pass_and_mirrored_after_it(overlap: bool) -> None:
    calls: list[str] = []

    def original(self: Any, batch: Any, *args: Any) -> str:
        assert batch is BATCH
        calls.append(f"run {args}")
        return "result"

    result = scheduler_run_batch.run_batch(original, scheduler(Runtime(calls), overlap), BATCH, 3)
    assert result == "result"
    assert calls == ["on stream"] * overlap + ["before decode pages", "run (3,)", "after 7"]


@pytest.mark.parametrize(
    ("error", "given_up"),
    [
        (RuntimeError("LSA: SGLang allocated 3 pages"), False),
        (ValueError("odd"), False),
        (KeyError("request"), False),
        (DevicePoolFull("LSA: full"), True),
        (MemoryError(), True),
        (torch.OutOfMemoryError("no memory"), True),
    ],
    ids=repr,
)
@pytest.mark.parametrize("where", ["before", "in"])
def test_only_a_lack_of_memory_is_survived(
    where: str, error: Exception, given_up: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the batch fails, and nothing else; whatever else goes wrong is a bug, and SGLang ends."""
    calls: list[str] = []
    monkeypatch.setattr(scheduler_run_batch, "give_up", lambda *arguments: ("given up", *arguments))

    def original(self: Any, batch: str) -> str:
        raise error

    stand_in = scheduler(Runtime(calls, fails=error if where == "before" else None))
    if given_up:
        result = scheduler_run_batch.run_batch(original, stand_in, BATCH)
        assert result == ("given up", stand_in, BATCH, error)
    else:
        with pytest.raises(type(error)) as raised:
            scheduler_run_batch.run_batch(original, stand_in, BATCH)
        assert raised.value is error
    assert calls == ["before decode pages"] + ["failed"] * given_up


def test_giving_up_releases_kv_as_this_sglang_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It happens when memory has run out alone: a parameter of another name would be found by a user."""
    from sglang.srt.disaggregation import utils
    from sglang.srt.mem_cache import common

    release = mock.create_autospec(common.release_kv_cache)
    monkeypatch.setattr(common, "release_kv_cache", release)
    monkeypatch.setattr(utils, "prepare_abort", lambda req, message, status: setattr(req, "message", message))
    sent: list[Any] = []
    req = SimpleNamespace(rid="a", finished=lambda: False, is_retracted=False)
    req.finished_reason = SimpleNamespace(to_json=lambda: {"type": "abort"})
    pager = SimpleNamespace(make_equal=lambda: None)
    scheduler = SimpleNamespace(
        tree_cache="tree",
        chunked_req=req,
        forward_ct=7,
        tp_worker=SimpleNamespace(model_runner=SimpleNamespace(lsa=SimpleNamespace(pager=pager))),
        ipc_channels=SimpleNamespace(
            send_to_tokenizer=SimpleNamespace(send_output=lambda output, of: sent.append(output.rid))
        ),
    )
    batch = SimpleNamespace(reqs=[req], launch_ts=None)
    scheduler_run_batch.give_up(scheduler, batch, MemoryError("no more"))
    kept_out = {"checkpoint" if RELEASE.checkpoints else "is_insert": False}
    release.assert_called_once_with(req, "tree", **kept_out)
    assert (sent, scheduler.chunked_req) == (["a"], None)
    assert "no more" in req.message


@pytest.mark.parametrize("prefills", [True, False], ids=["prefill", "decode"])
def test_sglang_counts_a_batch_that_was_given_up(prefills: bool) -> None:
    """Memory may run out before SGLang has said of a batch when it was launched, and behind which pass."""
    from sglang.srt.managers.scheduler import Scheduler

    mode = SimpleNamespace(
        is_extend_without_speculative=lambda: prefills,
        is_split_prefill=lambda: False,
        is_decode=lambda: not prefills,
        is_target_verify=lambda: False,
    )
    batch = SimpleNamespace(reqs=[], forward_mode=mode, extend_num_tokens=5, after_idle_gap=False)
    batch.launch_ts = batch.forward_iter = None
    scheduler = mock.MagicMock(forward_ct=7, total_prefill_busy_us=0, total_prefill_uncached_tokens=0)
    before = time.monotonic()
    scheduler._prev_step, scheduler._prev_decode_launch_ts = (7, before, prefills), before
    scheduler._prev_prefill_end_ts, scheduler._pause_started_at, scheduler._pause_intervals = before, None, deque()
    result = scheduler_run_batch.give_up(scheduler, batch, MemoryError("no more"))
    batch.reqs = [SimpleNamespace(rid="a")]
    Scheduler._record_step_counters(scheduler, batch, result)
    batch.forward_iter, batch.launch_ts = 8, time.monotonic()  # the next one, which is told apart from it
    Scheduler._record_step_counters(scheduler, batch, result)
    assert 0 <= scheduler.total_prefill_busy_us < 60e6
