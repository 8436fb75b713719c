"""How many decode steps follow a pass over prompts, and that a scheduling pass is one of either kind."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_lsa.config import LSAConfig
from sglang_lsa.engine.choose import Rules
from sglang_lsa.engine.pace import Pace
from sglang_lsa.patches.scheduler_get_new_batch_prefill_raw import get_new_batch_prefill

pytestmark = pytest.mark.release


def pace(bound: int, burst: int = 0) -> Pace:
    return Pace(Rules(LSAConfig(prefill_tokens_per_step=bound, prefill_burst_tokens=burst), 100))


def steps_after(pace: Pace, tokens: int, decoding: int = 3, part: bool = False) -> int:
    """Decode steps until prompts are computed again."""
    pace.computed(tokens, part)
    steps = 0
    while pace.prompts_wait(decoding):
        steps += 1
    return steps


@pytest.mark.parametrize(
    ("bound", "tokens", "steps"),
    [
        (256, 8192, [32, 32, 32]),
        (256, 8100, [31, 32, 31]),
        (256, 256, [1, 1, 1]),
        (256, 100, [0, 0, 1]),
        (1, 5, [5, 5, 5]),
        (0, 8192, [0, 0, 0]),
        (10**6, 8192, [0, 0, 0]),
    ],
)
def test_steps_are_by_the_tokens_that_were_computed(bound: int, tokens: int, steps: list[int]) -> None:
    """Of all passes: short ones, one after the other, are worth steps as well."""
    counted = pace(bound)
    assert [steps_after(counted, tokens) for _ in range(3)] == steps
    assert counted.waits == sum(steps)


@pytest.mark.parametrize(
    ("burst", "steps"),
    [
        (0, [4, 4, 4, 4, 1]),
        (1024, [4, 4, 4, 4, 1]),
        (1025, [0, 8, 0, 8, 1]),
        (3000, [0, 0, 12, 0, 5]),
        (10**6, [0, 0, 0, 0, 17]),
    ],
)
def test_steps_come_after_whole_prompts(burst: int, steps: list[int]) -> None:
    """And after as many tokens of one as may be computed in one go."""
    counted = pace(256, burst)
    assert [steps_after(counted, 1024, part=True) for _ in range(4)] + [steps_after(counted, 256)] == steps
    assert steps_after(counted, 512) == 2


def test_steps_that_are_due_are_not_a_prompts_to_put_off() -> None:
    """A chunk that comes while they are done, and one of a prompt that is gone."""
    counted = pace(256, 4096)
    counted.computed(1024)
    assert counted.prompts_wait(1)
    counted.computed(1024, part=True)
    assert not counted.prompts_wait(1), "what is left of them comes with the prompt's"
    assert not counted.prompts_wait(1, prompts=False)
    assert counted.prompts_wait(1, prompts=True), "nothing is left of it but a step that no prompt waited for"


def test_steps_for_which_there_was_no_memory_are_still_due() -> None:
    """After the next pass, also where they are those of many chunks."""
    counted = pace(256, 65_536)
    for _ in range(3):
        counted.computed(8192, part=True)
        assert not counted.prompts_wait(1)
    counted.computed(8192)
    assert not counted.prompts_wait(1, step_fits=lambda: False)
    assert steps_after(counted, 256) == 4 * 32 + 1
    for _ in range(100):
        counted.computed(8192, part=True)
        assert not counted.prompts_wait(1, step_fits=lambda: False)
    assert steps_after(counted, 256) == 65_536 // 256 + 1, "but no more than those of a burst"


def test_steps_count_where_a_prompt_ended_half_computed() -> None:
    """It was aborted, and others are waiting that cannot be admitted: SGLang decodes."""
    counted = pace(256, 65_536)
    counted.computed(8192, part=True)
    waited = [counted.prompts_wait(1, chunked=False) for _ in range(33)]
    assert waited == [True] * 32 + [False]
    assert steps_after(counted, 256) == 1


def test_steps_without_prompts_are_steps() -> None:
    """A prompt that comes later waits for what is left."""
    counted = pace(256)
    counted.computed(1024)
    assert [counted.prompts_wait(1, prompts=prompts) for prompts in (False, False, True, True, True)] == [
        False, False, True, True, False
    ]  # fmt: skip
    assert counted.waits == 2


def test_a_step_without_prompts_is_worth_what_is_less_than_one() -> None:
    counted = pace(256)
    counted.computed(200)
    assert not counted.prompts_wait(1, prompts=False)
    counted.computed(200)
    assert not counted.prompts_wait(1)
    counted.computed(200)
    assert counted.prompts_wait(1)


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


def test_no_step_without_memory() -> None:
    """It is asked for where a step is due, and prompts would wait."""
    counted, asked = pace(256), list[bool]()

    def fits(answer: bool) -> Callable[[], bool]:
        return lambda: asked.append(answer) or answer  # type: ignore[func-returns-value]

    assert not counted.prompts_wait(1, step_fits=fits(True))
    counted.computed(1024)
    assert not counted.prompts_wait(1, prompts=False, step_fits=fits(False))
    assert asked == []
    assert counted.prompts_wait(1, step_fits=fits(True))
    assert not counted.prompts_wait(1, step_fits=fits(False))
    assert (asked, counted.waits) == ([True, False], 1)


class Scheduler:
    """SGLang's, which has prompts of 100 tokens without end, and so many tokens of memory on the host."""

    def __init__(self, bound: int, free: int = 10**6, evictable: int = 0, device: bool = True, burst: int = 0):
        self.make_room = list[list[int]]()
        lsa = SimpleNamespace(pace=pace(bound, burst), pager=SimpleNamespace(page=64))
        lsa.make_room = lambda computed: self.make_room.append(computed) or device  # type: ignore[func-returns-value]
        self.tree_cache = SimpleNamespace(lsa=lsa, evictable_size=lambda: evictable)
        self.token_to_kv_pool_allocator = SimpleNamespace(available_size=lambda: free)
        self.is_hybrid_swa = self.enable_priority_preemption = False
        self.asked = 0
        self.waiting_queue: list[str] = ["a prompt"]
        self.chunked_req: Any = None
        self.company = 0
        self.grammar_queue = list[str]()
        self.grammar_manager = SimpleNamespace(has_waiting_grammars=lambda: bool(self.grammar_queue))

    def next(self, *reqs: Any, prefill_only: bool = False) -> str:
        def original(self: Any, *_: Any) -> tuple[Any, Any]:
            self.asked += 1
            reqs = [self.chunked_req or "a prompt"] + ["another"] * self.company
            return SimpleNamespace(extend_num_tokens=100, reqs=reqs), running

        running = SimpleNamespace(reqs=list(reqs), is_prefill_only=prefill_only)
        batch, same = get_new_batch_prefill(original, self, prefill_delayer_single_pass=None, running_batch=running)
        assert same is running
        return "decode" if batch is None else "prefill"


def req(finished: bool = False, computed: int = 64, prompt: int = 64) -> Any:
    """As of either release."""
    kv = SimpleNamespace(kv_committed_len=computed)
    ids = range(prompt)
    return SimpleNamespace(finished=lambda: finished, kv_committed_len=computed, kv=kv, full_untruncated_fill_ids=ids)


def test_steps_and_passes_take_turns() -> None:
    scheduler = Scheduler(50)
    assert [scheduler.next(req(), req(True)) for _ in range(7)] == ["prefill", "decode", "decode"] * 2 + ["prefill"]
    assert scheduler.asked == 3, "a scheduling pass that is a decode step looks at no prompt"
    assert [Scheduler(0).next(req()) for _ in range(3)] == ["prefill"] * 3


@pytest.mark.parametrize("chunked", [None, req()], ids=["nothing", "a chunk"])
def test_no_prompts(chunked: Any) -> None:
    """SGLang looks after its queues then, as ever; a chunk that is next waits like a prompt."""
    scheduler = Scheduler(50)
    scheduler.waiting_queue, scheduler.chunked_req = [], chunked
    assert [scheduler.next(req()) for _ in range(2)] == ["prefill", "decode" if chunked else "prefill"]
    assert scheduler.asked == (1 if chunked else 2)


def test_a_prompt_in_chunks_is_one_prompt() -> None:
    scheduler = Scheduler(50, burst=10**6)
    scheduler.chunked_req = req()
    assert [scheduler.next(req()) for _ in range(3)] == ["prefill"] * 3
    scheduler.company = 1
    assert [scheduler.next(req()) for _ in range(2)] == ["prefill", "decode"], "another prompt ends in that pass"
    scheduler.company, scheduler.chunked_req = 0, None
    while scheduler.next(req()) == "decode":
        pass
    assert [scheduler.next(req()) for _ in range(3)] == ["decode", "decode", "prefill"]


def test_a_prompt_that_is_aborted_between_its_chunks_is_no_prompt() -> None:
    """Steps are due then, whatever waits in the queue."""
    scheduler = Scheduler(50, burst=10**6)
    scheduler.chunked_req = req()
    assert scheduler.next(req()) == "prefill"
    scheduler.chunked_req = None
    assert [scheduler.next(req()) for _ in range(3)] == ["decode", "decode", "prefill"]


def test_a_prompt_that_waits_for_its_grammar_waits_for_steps_too() -> None:
    """SGLang takes it out of the queue of grammars in the pass that computes it."""
    scheduler = Scheduler(50)
    scheduler.waiting_queue, scheduler.grammar_queue = [], ["a prompt"]
    assert [scheduler.next(req()) for _ in range(4)] == ["prefill", "decode", "decode", "prefill"]


@pytest.mark.parametrize(
    ("free", "evictable", "step"),
    [(5 * 64, 0, "decode"), (3 * 64, 2 * 64, "decode"), (5 * 64 - 1, 0, "prefill"), (0, 4 * 64, "prefill")],
)
def test_the_rest_of_a_prompt_keeps_its_memory(free: int, evictable: int, step: str) -> None:
    """SGLang has counted it when it admitted the prompt, and stops where it is gone: four pages here, beside the one
    that a decode step opens."""
    scheduler = Scheduler(50, free, evictable)
    scheduler.chunked_req = req(computed=512, prompt=512 + 200)
    decoding = req(computed=128), req(computed=129), req(True, computed=128)
    assert [scheduler.next(*decoding) for _ in range(2)] == ["prefill", step]
    assert scheduler.make_room == ([[128, 129]] if step == "decode" else [])
    scheduler.chunked_req = None
    assert scheduler.next(*decoding) == "decode", "a prompt that waits in the queue has no memory"


def test_nobody_is_retracted_for_a_prompt_that_waits() -> None:
    """Who decodes alone would be ended, for device pages that are promised to the prompt."""
    scheduler = Scheduler(50, device=False)
    scheduler.chunked_req = req(prompt=1000)
    assert [scheduler.next(req()) for _ in range(3)] == ["prefill"] * 3
    assert scheduler.make_room == [[64]] * 2


@pytest.mark.parametrize(
    "running",
    [{"reqs": []}, {"reqs": [req(True)]}, {"reqs": [req()], "prefill_only": True}],
    ids=["none", "finished", "embeddings"],
)
def test_nobody_who_decodes(running: dict[str, Any]) -> None:
    """Else nothing would run in that pass."""
    scheduler = Scheduler(50)
    reqs = running.pop("reqs")
    assert [scheduler.next(*reqs, **running) for _ in range(3)] == ["prefill"] * 3
