"""What preemption would give back, who may be preempted, and that nobody is preempted in vain."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from release import MadeUp

from sglang_lsa.config import PAGE_SIZE, LSAConfig
from sglang_lsa.engine.arrival import Prompt
from sglang_lsa.engine.choose import Rules
from sglang_lsa.engine.pace import Pace
from sglang_lsa.engine.preemption import pages_let_go
from sglang_lsa.memory.layout.mha import MhaLayout
from sglang_lsa.memory.pager import Pager
from sglang_lsa.patches.prefill_adder_add_one_req import choose_after_preemption, preemptible
from sglang_lsa.patches.scheduler_get_new_batch_prefill_raw import Pass, get_new_batch_prefill

pytestmark = pytest.mark.release

DEVICE_PAGES = 24
NOTHING = np.zeros(0, dtype=np.int64)


def pager_holding(**pages: range) -> Pager:
    """A pool in which these requests hold these pages."""
    keys, values = ([torch.zeros((DEVICE_PAGES + 1) * PAGE_SIZE, 1, 1)] for _ in range(2))
    pager = Pager(MhaLayout(keys, values, PAGE_SIZE), 200)
    pager.ledger.allocate(sorted(set().union(*pages.values())))
    for holder, held in pages.items():
        assert pager.hold(holder, held)
    return pager


def test_a_page_comes_back_when_its_last_holder_goes() -> None:
    pager = pager_holding(a=range(1, 9), b=range(5, 13), keeper=range(11, 16))
    # a alone has 1-4; b has 5-10 besides, when a is gone; 11 and 12 stay. And a page each that they may open.
    assert list(pages_let_go(pager, ["a", "b"], NOTHING)) == [4 + 1, 10 + 2]
    assert list(pages_let_go(pager, ["b", "a"], NOTHING)) == [2 + 1, 10 + 2]
    assert list(pages_let_go(pager, [], NOTHING)) == []


def test_promises_come_back_and_a_shared_prefix_does_not() -> None:
    pager = pager_holding(a=range(1, 9))
    pager.reservations.promise("a", 3)
    assert list(pages_let_go(pager, ["a"], NOTHING)) == [8 + 3 + 1]
    assert list(pages_let_go(pager, ["a"], np.arange(1, 6))) == [3 + 3 + 1], "the prompt holds 1-5 itself"


def running(rid: str, priority: int, queued: float = 0.0, done: bool = False) -> SimpleNamespace:
    stats = SimpleNamespace(wait_queue_entry_time=queued)
    return SimpleNamespace(rid=rid, lsa_key=rid, priority=priority, time_stats=stats, finished=lambda: done)


@pytest.mark.parametrize("sign", [1, -1], ids=["high_first", "low_first"])
def test_the_lowest_and_newest_go_first(sign: int) -> None:
    others = [
        running("equal", 50 * sign),
        running("old", 10 * sign, queued=1.0),
        running("new", 10 * sign, queued=2.0),
        running("near", 41 * sign),
        running("lowest", 0),
        running("finished", 0, done=True),
        preempted := running("preempted", 0),
    ]
    adder = SimpleNamespace(
        running_batch=SimpleNamespace(reqs=others),
        preempt_list=[preempted],
        priority_scheduling_preemption_threshold=10,
    )
    server_args = SimpleNamespace(schedule_low_priority_values_first=sign < 0)
    found = preemptible(adder, SimpleNamespace(priority=50 * sign), server_args)
    assert [req.rid for req in found] == ["lowest", "new", "old"]


class Adder(SimpleNamespace):
    """SGLang's, as far as preemption looks at it: one request at a time goes, and gives its pages back."""

    def __init__(self, pager: Pager, others: list[SimpleNamespace], needed: int, allowed: bool = True):
        arguments = SimpleNamespace(schedule_low_priority_values_first=False) if allowed else None
        super().__init__(
            tree_cache=SimpleNamespace(
                lsa=SimpleNamespace(pager=pager, admission=self), scheduling_pass=Pass(arguments)
            ),
            running_batch=SimpleNamespace(reqs=others),
            can_run_list=[],
            preempt_list=[],
            rem_chunk_tokens=256,
            priority_scheduling_preemption_threshold=10,
        )
        self.pager, self.needed, self.looked_again = pager, needed, 0

    def options(self, custom_params: Any) -> None:
        """Admission's."""

    def postpone(self, prompt: Prompt) -> None:
        """Admission's."""

    def choose(self, prompt: Prompt, running: int, batch: list[str], chunk: int) -> str | None:
        """Admission's: whether ``needed`` pages are there beside one for each running request."""
        return "admitted" if self.needed <= self.pager.unpromised_later - running - 1 else None

    possible = choose

    def preempt_to_schedule(self, req: Any, *server_args: Any) -> bool:
        first = preemptible(self, req, self.tree_cache.scheduling_pass.server_args)[0]
        pages = self.pager.ledger.held_by(first.rid)
        self.pager.forget(first.rid)
        self.pager.ledger.release(pages)
        self.preempt_list.append(first)
        self.running_batch.reqs.remove(first)
        return True

    def prompt(self) -> SimpleNamespace:
        def look(tree: Any) -> None:
            self.looked_again += 1

        return MadeUp(
            rid="high",
            priority=100,
            full_untruncated_fill_ids=[],
            prefix_indices=torch.zeros(0, dtype=torch.int64),
            sampling_params=SimpleNamespace(custom_params=None),
            init_next_round_input=look,
        )


def held(**pages: range) -> tuple[Pager, list[SimpleNamespace]]:
    return pager_holding(**pages), [running(rid, number) for number, rid in enumerate(pages)]


def test_as_few_as_will_do() -> None:
    adder = Adder(*held(a=range(1, 9), b=range(9, 17), c=range(17, 25)), needed=12)
    assert choose_after_preemption(adder, adder.prompt()) == "admitted"
    assert [req.rid for req in adder.preempt_list] == ["a", "b"]
    assert adder.looked_again == 1, "what it had found in the radix tree may be gone"


def test_nobody_goes_in_vain() -> None:
    pager, others = held(a=range(1, 9), b=range(9, 17), high_itself=range(17, 25))
    others[2].priority = 100
    adder = Adder(pager, others, needed=17)
    assert choose_after_preemption(adder, adder.prompt()) is None
    assert adder.preempt_list == []
    allowed = Adder(*held(a=range(1, 25)), needed=4, allowed=False)
    assert choose_after_preemption(allowed, allowed.prompt()) is None


def test_whoever_was_preempted_in_vain_is_queued_again() -> None:
    """SGLang preempts for a place and forgets whom, when there is then no memory for the prompt."""
    queue: list[str] = []
    scheduler = SimpleNamespace(
        tree_cache=SimpleNamespace(lsa=SimpleNamespace(pace=Pace(Rules(LSAConfig(), 100)))),
        server_args=SimpleNamespace(mark="arguments"),
        waiting_queue=[],
        chunked_req=None,
        grammar_manager=SimpleNamespace(has_waiting_grammars=lambda: False),
        enable_priority_preemption=True,
        _add_request_to_queue=lambda req: queue.append(req.rid),
    )

    def without_memory(self: Any, delayer: Any, running_batch: Any) -> tuple[None, str]:
        assert self.tree_cache.scheduling_pass.server_args.mark == "arguments"
        self.tree_cache.scheduling_pass.adder = SimpleNamespace(preempt_list=[running("a", 0), running("b", 0)])
        return None, "running"

    nobody = SimpleNamespace(reqs=[], is_prefill_only=False)
    assert get_new_batch_prefill(without_memory, scheduler, None, nobody) == (None, "running")
    assert queue == ["a", "b"]

    batch = SimpleNamespace(extend_num_tokens=64, reqs=[running("c", 0)])

    def with_memory(self: Any, delayer: Any, running_batch: Any) -> tuple[Any, str]:
        without_memory(self, delayer, running_batch)
        return batch, "running"

    assert get_new_batch_prefill(with_memory, scheduler, None, nobody) == (batch, "running")
    assert queue == ["a", "b"], "SGLang did that itself"
