"""The hooks of admission, with SGLang's adder and queue as far as they look at them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from release import MadeUp

from sglang_lsa.config import PAGE_SIZE, LSAConfig, RequestOptions
from sglang_lsa.engine.admission import Admission, Admitted
from sglang_lsa.engine.arrival import Arrival, Verdict
from sglang_lsa.engine.lookahead import Lookahead
from sglang_lsa.engine.policies import Recency
from sglang_lsa.engine.reading import IN_PLACE, STREAMED
from sglang_lsa.memory.layout.mha import MhaLayout
from sglang_lsa.memory.pager import Pager
from sglang_lsa.memory.resident_table import ResidentTable
from sglang_lsa.patches import scheduler_add_request_to_queue
from sglang_lsa.patches.prefill_adder_add_chunked_req import add_chunked_req
from sglang_lsa.patches.prefill_adder_add_one_req import add_one_req
from sglang_lsa.patches.requests import promise
from sglang_lsa.patches.scheduler_get_new_batch_prefill_raw import Pass

pytestmark = pytest.mark.release


# the hooks of admission, with SGLang's adder as far as they look at it


DEVICE_PAGES = 24


class Adder(SimpleNamespace):
    """Puts a prefill batch together: SGLang's own part takes every prompt, as much of it as fits the chunk."""

    def __init__(self, chunk: int | None, running: int = 0) -> None:
        keys, values = ([torch.zeros((DEVICE_PAGES + 1) * PAGE_SIZE, 1, 1)] for _ in range(2))
        pager = Pager(MhaLayout(keys, values, PAGE_SIZE), 200)
        config = LSAConfig(policy="recency", budget=0.5, min_pages=1, floor_tokens=0, min_context=4 * PAGE_SIZE)
        lookahead = Lookahead(config, pager, ResidentTable(4, 13, PAGE_SIZE), {"recency": Recency()})
        admission = Admission(pager, lookahead.rules, chunk)
        super().__init__(
            tree_cache=SimpleNamespace(
                lsa=SimpleNamespace(admission=admission, pager=pager), scheduling_pass=Pass(None)
            ),
            running_batch=SimpleNamespace(reqs=[object()] * running) if running else None,
            can_run_list=[],
            rem_chunk_tokens=chunk,
            rem_total_tokens=100_000.0,
        )
        self.admission, self.pager = admission, pager
        self.seen: list[int | None] = []
        """Tokens of a chunk that SGLang's own part was left."""
        self.refuses = False

    def hold(self, pages: int) -> None:
        self.pager.ledger.allocate(range(1, pages + 1))
        assert self.pager.hold("running", range(1, pages + 1))

    def original(self, adder: Adder, req: Any, *args: Any, **kwargs: Any) -> Any:
        assert adder is self
        self.seen.append(self.rem_chunk_tokens)
        if self.refuses:
            return "refused"
        self.can_run_list.append(req)
        return ("taken", args, kwargs)

    def add_one(self, req: Any, *args: Any, **kwargs: Any) -> Any:
        return add_one_req(self.original, self, req, *args, **kwargs)

    def add_chunked(self, req: Any) -> Any:
        return add_chunked_req(self.original, self, req)


def prompt(pages: int, rid: str = "a") -> SimpleNamespace:
    return MadeUp(
        rid=rid,
        full_untruncated_fill_ids=[7] * pages * PAGE_SIZE,
        prefix_indices=torch.zeros(0, dtype=torch.int64),
        sampling_params=SimpleNamespace(custom_params=None),
    )


@pytest.mark.parametrize(
    ("chunk", "pages", "kind", "seen"),
    [
        pytest.param(8192, 3, IN_PLACE, 8192, id="in place"),
        pytest.param(8192, 60, STREAMED, 12 * PAGE_SIZE, id="streamed, half of the pool at most"),
        pytest.param(256, 60, STREAMED, 256, id="streamed, in small chunks"),
        pytest.param(None, 23, IN_PLACE, None, id="no chunks"),
    ],
)
def test_a_streamed_prompt_bounds_its_chunk(chunk: int | None, pages: int, kind: str, seen: int | None) -> None:
    adder, req = Adder(chunk), prompt(pages)
    assert adder.add_one(req, False, truncation=True) == ("taken", (False,), {"truncation": True})
    assert adder.seen == [seen]
    assert adder.rem_chunk_tokens == seen
    assert adder.admission.admitted[req.rid].how == kind
    assert adder.pager.reservations.owed(req.rid) == adder.admission.admitted[req.rid].demand


def test_a_prompt_that_sglang_does_not_take_is_promised_nothing() -> None:
    adder = Adder(256)
    adder.refuses = True
    assert adder.add_one(prompt(3)) == "refused"
    assert (adder.admission.admitted, adder.pager.reservations.total) == ({}, 0)
    adder.refuses = False
    adder.add_one(prompt(60))
    assert adder.admission.admitted["a"].how == STREAMED, "it is alone: the other was not taken"


def test_a_prompt_that_the_pool_cannot_take_now_leaves_admission_open() -> None:
    """SGLang's NO_TOKEN would close it until a request ends."""
    from sglang.srt.managers.schedule_policy import AddReqResult

    adder = Adder(256)
    adder.hold(20)
    assert adder.add_one(prompt(60)) is AddReqResult.OTHER
    assert (adder.seen, adder.pager.reservations.total) == ([], 0)
    assert adder.rem_chunk_tokens == 256
    assert adder.add_one(prompt(3, "short"))[0] == "taken"


@pytest.mark.parametrize(("running", "fits"), [(0, 9), (4, 5)])
def test_a_prompt_leaves_a_page_for_every_other_request(running: int, fits: int) -> None:
    """Those that decode, and those admitted in the same pass."""
    adder = Adder(8192, running)
    adder.hold(10)
    assert adder.add_one(prompt(3, "first"))[0] == "taken"
    assert adder.add_one(prompt(fits, "second"))[0] == "taken"
    assert adder.admission.admitted["second"].how == IN_PLACE
    assert adder.pager.unpromised_pages == 14 - 3 - fits == running + 2
    assert adder.add_one(prompt(1, "third")) is not None
    assert "third" not in adder.admission.admitted


def test_prompts_that_are_computed_alone() -> None:
    """Whoever comes first; a chunk of a streamed prompt that is under way comes first of all."""
    from sglang.srt.managers.schedule_policy import AddReqResult

    adder = Adder(256)
    adder.add_one(prompt(3, "short"))
    assert adder.add_one(prompt(60, "long")) is AddReqResult.OTHER
    other = Adder(256)
    other.add_one(prompt(60, "long"))
    assert other.add_one(prompt(3, "short")) is AddReqResult.OTHER
    chunked = Adder(256)
    long = prompt(60, "long")
    promise(chunked.admission, long, Admitted(STREAMED, long.prefix_indices.numpy(), 12, 256))
    chunked.add_chunked(long)
    assert chunked.add_one(prompt(3, "short")) is AddReqResult.OTHER
    for each in (adder, other, chunked):
        assert (len(each.can_run_list), each.admission.waits) == (1, 0)


@pytest.mark.parametrize(
    ("chunk", "promised", "total", "seen"),
    [
        pytest.param(8192, 256, 100_000.0, 256, id="what was promised"),
        pytest.param(256, 512, 100_000.0, 256, id="SGLang's chunk is smaller"),
        pytest.param(8192, None, 100_000.0, 8192, id="in place"),
        pytest.param(1000, None, 100_000.0, 960, id="a chunk ends with a page"),
        pytest.param(8192, None, 700.5, 640, id="few slots are left"),
        pytest.param(8192, 256, 100.0, 64, id="one page of slots is left"),
        pytest.param(8192, None, 63.0, 8192, id="less than a page is left: up to SGLang"),
        pytest.param(8192, 256, -20.0, 256, id="nothing is left: up to SGLang"),
    ],
)
def test_the_next_chunk(chunk: int, promised: int | None, total: float, seen: int) -> None:
    adder, req = Adder(chunk), prompt(60)
    adder.rem_total_tokens = total
    kind = IN_PLACE if promised is None else STREAMED
    promise(adder.admission, req, Admitted(kind, req.prefix_indices.numpy(), 12, promised))
    assert adder.add_chunked(req)[0] == "taken"
    assert adder.seen == [seen]


# the hook that refuses


class Judge:
    """Admission's verdict, and how often it was asked."""

    def __init__(self, reason: str | None = None, longest: int | None = None):
        self.reason, self.most, self.asked = reason, longest, 0

    def judge(self, arrival: Arrival) -> Verdict:
        self.asked += 1
        return Verdict(self.options(arrival.custom_params), self.reason)

    def options(self, custom_params: Any) -> RequestOptions:
        return RequestOptions.parse(custom_params, LSAConfig())

    def longest(self, options: RequestOptions) -> int | None:
        return self.most


def queued(judge: Judge, **req: Any) -> SimpleNamespace:
    """A request that came to the queue once."""
    values = {"rid": "a", "to_finish": None, "origin_input_ids": [7] * 100, "logprob_start_len": 100, "told": None}
    values["sampling_params"] = SimpleNamespace(custom_params=None, max_new_tokens=10)
    asked = SimpleNamespace(**{**values, **req})
    asked.set_finish_with_abort = lambda reason: vars(asked).update(told=reason)
    scheduler = SimpleNamespace(
        tp_worker=SimpleNamespace(model_runner=SimpleNamespace(lsa=SimpleNamespace(admission=judge)))
    )
    for again in ({}, {"is_retracted": True}):
        scheduler_add_request_to_queue.refuse_impossible(scheduler, asked, **again)
    return asked


@pytest.mark.parametrize("truncate", [False, True])
def test_a_request_is_judged_once(truncate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    serving = SimpleNamespace(allow_auto_truncate=truncate)
    monkeypatch.setattr("sglang.srt.runtime_context.get_serving", lambda: serving)
    refusing = Judge("it is too long")
    assert queued(refusing).told == "it is too long"
    assert refusing.asked == 1, "what comes back to the queue may stay"
    assert queued(allowing := Judge(longest=60)).told is None
    seen = queued(Judge(longest=60))
    assert (len(seen.origin_input_ids), seen.logprob_start_len) == ((60, 60) if truncate else (100, 100))
    assert len(queued(Judge(longest=None)).origin_input_ids) == 100
    assert allowing.asked == 1
    given_up = Judge("another reason")
    assert queued(given_up, to_finish="SGLang's reason").told is None
    assert given_up.asked == 0
