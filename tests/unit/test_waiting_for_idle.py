"""New weights and the release of memory wait until the scheduler is idle; new work waits behind them."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.io_struct import (
    AbortReq,
    GetInternalStateReq,
    ReleaseMemoryOccupationReqInput,
    TokenizedEmbeddingReqInput,
    UpdateWeightFromDiskReqInput,
    UpdateWeightsFromTensorReqInput,
)
from sglang.srt.sampling.sampling_params import SamplingParams

from sglang_lsa.patches.scheduler_process_input_requests import wait_until_idle


class Batch(SimpleNamespace):
    def __init__(self, *finished: bool):
        super().__init__(reqs=[Running(each) for each in finished])

    def is_empty(self) -> bool:
        return not self.reqs

    def filter_batch(self) -> None:
        self.reqs = [req for req in self.reqs if not req.finished()]


class Running:
    def __init__(self, done: bool):
        self.done = done

    def finished(self) -> bool:
        return self.done


class Scheduler(SimpleNamespace):
    """SGLang's, as far as the hook looks at it: idle when nothing runs, waits or has a result to come."""

    def __init__(self, running: Batch | None = None, paused: bool = False, waiting: int = 0):
        self.told: list[Any] = []
        super().__init__(
            running_batch=running or Batch(),
            last_batch=None,
            waiting_queue=[Running(False)] * waiting,
            result_queue=deque(),
            enable_overlap=True,
            _engine_paused=paused,
            ipc_channels=SimpleNamespace(
                send_to_tokenizer=SimpleNamespace(send_output=lambda output, message: self.told.append(output))
            ),
        )

    def is_fully_idle(self) -> bool:
        last = self.last_batch is None or self.last_batch.is_empty()
        return self.running_batch.is_empty() and last and not self.result_queue and not self.waiting_queue

    def process_batch_result(self, batch: Batch, result: Any) -> None:
        assert result == "result"

    def takes(self, *messages: Any) -> list[Any]:
        """What reaches the scheduler of these messages in one turn of its loop."""
        (scheduler, ready), more = wait_until_idle(self, list(messages))
        assert scheduler is self and not more
        return ready


WEIGHTS = UpdateWeightFromDiskReqInput(model_path="elsewhere")
WORK = TokenizedEmbeddingReqInput(
    input_text=None, input_ids=None, mm_inputs=None, token_type_ids=None, sampling_params=SamplingParams()
)
STATE, RELEASE = GetInternalStateReq(), ReleaseMemoryOccupationReqInput()


def test_an_idle_scheduler_takes_everything() -> None:
    scheduler = Scheduler()
    assert scheduler.takes(STATE, WEIGHTS, RELEASE, WORK) == [STATE, WEIGHTS, RELEASE, WORK]
    assert scheduler.takes() == []


def test_new_weights_wait_for_requests_that_just_finished() -> None:
    """SGLang's HTTP process has told their answers; the scheduler forgets them in its next pass."""
    scheduler = Scheduler(Batch(True, True))
    assert scheduler.takes(WEIGHTS, STATE) == [STATE]
    assert scheduler.takes() == []
    scheduler.running_batch = Batch()
    assert scheduler.takes(STATE) == [WEIGHTS, STATE]
    assert scheduler.takes() == []


@pytest.mark.parametrize("message", [WEIGHTS, RELEASE], ids=["weights", "release"])
def test_new_work_waits_behind_them(message: Any) -> None:
    scheduler = Scheduler(Batch(False))
    abort = AbortReq(rid="hung up")
    assert scheduler.takes(message, WORK, abort) == [abort], "what runs can be aborted"
    scheduler.running_batch = Batch()
    assert scheduler.takes(STATE) == [message, WORK, abort, STATE], "and so can what was held back"
    assert scheduler.takes() == []


def test_work_that_came_first_comes_first() -> None:
    scheduler = Scheduler()
    assert scheduler.takes(WORK, WEIGHTS) == [WORK]
    scheduler.running_batch = Batch(False)
    assert scheduler.takes() == []
    scheduler.running_batch = Batch()
    assert scheduler.takes() == [WEIGHTS]


def test_weights_that_leave_the_cache_do_not_wait() -> None:
    kept = UpdateWeightFromDiskReqInput(model_path="elsewhere", flush_cache=False)
    assert Scheduler(Batch(False)).takes(kept) == [kept]


@pytest.mark.parametrize("waiting", [0, 1])
def test_paused_requests_would_go_on_with_old_kv(waiting: int) -> None:
    scheduler = Scheduler(Batch(False, True), paused=True, waiting=waiting)
    tensors = UpdateWeightsFromTensorReqInput(serialized_named_tensors=[])
    assert scheduler.takes(WEIGHTS, tensors) == []
    assert scheduler.takes() == [], "they are answered, not held"
    assert [told.success for told in scheduler.told] == [False, False]
    assert scheduler.told[0].message.startswith(f"{1 + waiting} requests are paused")
    assert "flush_cache=false" in scheduler.told[0].message


def test_a_paused_scheduler_forgets_finished_requests_for_new_weights() -> None:
    """No pass comes while it is paused, so that nobody else would."""
    scheduler = Scheduler(Batch(True), paused=True)
    scheduler.last_batch = scheduler.running_batch
    scheduler.result_queue.append((scheduler.last_batch, "result"))
    assert scheduler.takes(WEIGHTS) == [WEIGHTS]
    assert scheduler.is_fully_idle()
    assert scheduler.told == []
