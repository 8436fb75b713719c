"""How many decode steps follow a pass over prompts, and that a scheduling pass is one of either kind."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_lsa.config import LSAConfig
from sglang_lsa.engine.choose import Rules
from sglang_lsa.engine.pace import Pace
from sglang_lsa.patches.scheduler_get_new_batch_prefill_raw import get_new_batch_prefill

pytestmark = pytest.mark.release


def pace(bound: int) -> Pace:
    return Pace(Rules(LSAConfig(prefill_tokens_per_step=bound), 100))


def steps_after(pace: Pace, tokens: int, decoding: int = 3) -> int:
    """Decode steps until prompts are computed again."""
    pace.computed(tokens)
    steps = 0
    while pace.prompts_wait(decoding):
        steps += 1
    return steps


@pytest.mark.parametrize(
    ("bound", "tokens", "steps"),
    [(256, 8192, 32), (256, 8100, 31), (256, 256, 1), (256, 255, 0), (1, 5, 5), (0, 8192, 0), (10**6, 8192, 0)],
)
def test_steps_are_by_the_tokens_that_were_computed(bound: int, tokens: int, steps: int) -> None:
    counted = pace(bound)
    assert [steps_after(counted, tokens) for _ in range(2)] == [steps, steps]
    assert counted.waits == 2 * steps


def test_steps_without_prompts_are_steps() -> None:
    """A prompt that comes later waits for what is left."""
    counted = pace(256)
    counted.computed(1024)
    assert [counted.prompts_wait(1, prompts=prompts) for prompts in (False, False, True, True, True)] == [
        False, False, True, True, False
    ]  # fmt: skip
    assert counted.waits == 2


def test_prompts_wait_for_nobody() -> None:
    """When those that decoded are gone, what was owed to them is nobody's."""
    counted = pace(256)
    counted.computed(8192)
    assert counted.prompts_wait(1)
    assert not counted.prompts_wait(0)
    assert not counted.prompts_wait(2)


def test_a_change_counts_at_once() -> None:
    counted = pace(0)
    counted.computed(1024)
    counted.rules.config = LSAConfig(prefill_tokens_per_step=512)
    assert [counted.prompts_wait(1) for _ in range(3)] == [True, True, False]
    counted.computed(1024)
    counted.rules.config = LSAConfig()
    assert not counted.prompts_wait(1)


class Scheduler:
    """SGLang's, which has prompts of 100 tokens without end."""

    def __init__(self, bound: int):
        self.tree_cache = SimpleNamespace(lsa=SimpleNamespace(pace=pace(bound)))
        self.enable_priority_preemption, self.asked = False, 0
        self.waiting_queue, self.chunked_req = ["a prompt"], None

    def next(self, *reqs: Any, prefill_only: bool = False) -> str:
        def original(self: Any, **_: Any) -> tuple[Any, Any]:
            self.asked += 1
            return SimpleNamespace(extend_num_tokens=100), running

        running = SimpleNamespace(reqs=list(reqs), is_prefill_only=prefill_only)
        batch, same = get_new_batch_prefill(original, self, prefill_delayer_single_pass=None, running_batch=running)
        assert same is running
        return "decode" if batch is None else "prefill"


def req(finished: bool = False) -> Any:
    return SimpleNamespace(finished=lambda: finished)


def test_steps_and_passes_take_turns() -> None:
    scheduler = Scheduler(50)
    assert [scheduler.next(req(), req(True)) for _ in range(7)] == ["prefill", "decode", "decode"] * 2 + ["prefill"]
    assert scheduler.asked == 3, "a scheduling pass that is a decode step looks at no prompt"
    assert [Scheduler(0).next(req()) for _ in range(3)] == ["prefill"] * 3


@pytest.mark.parametrize("chunked", [None, "a chunk"])
def test_no_prompts(chunked: Any) -> None:
    """SGLang looks after its queues then, as ever; a chunk that is next waits like a prompt."""
    scheduler = Scheduler(50)
    scheduler.waiting_queue, scheduler.chunked_req = [], chunked
    assert [scheduler.next(req()) for _ in range(2)] == ["prefill", "decode" if chunked else "prefill"]
    assert scheduler.asked == (1 if chunked else 2)


@pytest.mark.parametrize(
    "running", [{"reqs": []}, {"reqs": [req(True)]}, {"reqs": [req()], "prefill_only": True}], ids=str
)
def test_nobody_who_decodes(running: dict[str, Any]) -> None:
    """Else nothing would run in that pass."""
    scheduler = Scheduler(50)
    reqs = running.pop("reqs")
    assert [scheduler.next(*reqs, **running) for _ in range(3)] == ["prefill"] * 3
