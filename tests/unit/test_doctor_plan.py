"""What ``sglang-lsa doctor`` says about a server: how many contexts fit, and what is wrong with its plan."""

from __future__ import annotations

from typing import Any

import pytest
from doctor_reports import contexts, cpu_server

from sglang_lsa.config import LSAConfig
from sglang_lsa.doctor.command import context_finding, plan_findings
from sglang_lsa.doctor.contexts import Fit
from sglang_lsa.doctor.findings import NOTE, OK, TROUBLE
from sglang_lsa.doctor.machine import GB
from sglang_lsa.doctor.server import HostMemory
from sglang_lsa.indexer.expectation import Expectation

# --- contexts --------------------------------------------------------------------------------------------------------


def test_each_context_holds_its_resident_set_and_a_page_to_grow_into() -> None:
    """100 pages of 1,000: sets of 10 and a page each, and for the last one's prompt a chunk of 32 pages and one."""
    found = contexts(6400)
    assert found == Fit(
        6400, stock=10, lsa=1 + (1000 - 1 - 33) // 11, limit="device pool", resident_pages=10, pages=100
    )


@pytest.mark.parametrize(
    ("options", "lsa", "limit"),
    [
        pytest.param({}, 88, "device pool", id="device pool"),
        pytest.param({"virtual": 1050}, 10, "host mirror", id="host mirror"),
        pytest.param({"virtual": 99, "physical": 99}, 0, "host mirror", id="longer than the mirror"),
        pytest.param({"requests": 5}, 5, "--max-running-requests", id="requests"),
        pytest.param({"chunk": None}, 82, "device pool", id="prompts in one pass"),
        pytest.param({"chunk": 64 * 400}, 82, "device pool", id="a chunk longer than the prompt"),
        pytest.param({"physical": 60}, 3, "device pool", id="a chunk larger than half of the pool"),
        pytest.param({"physical": 60, "chunk": None}, 0, "device pool", id="no chunks, larger than the pool"),
        pytest.param({"budget": 1.0}, 9, "device pool", id="all pages"),
        pytest.param({"policy": "full"}, 9, "device pool", id="policy full"),
        pytest.param({"policy": "full", "physical": 100}, 0, "device pool", id="all pages, larger than the pool"),
        pytest.param({"min_context": 8192}, 9, "device pool", id="too short to be pruned"),
        pytest.param({"min_pages": 50}, 19, "device pool", id="least pages"),
        pytest.param({"floor_tokens": 50 * 64 + 63}, 19, "device pool", id="least tokens"),
    ],
)
def test_what_limits_contexts_of_100_pages(options: dict[str, Any], lsa: int, limit: str) -> None:
    found = contexts(6400, **options)
    assert (found.lsa, found.limit) == (lsa, limit)


def test_of_a_budget_of_auto_what_sets_are_expected_to_take_is_counted() -> None:
    known = {"indexer": Expectation(((0.0, 0.0, 0.0), (1.0, 1.0, 0.05)), "a test")}
    auto = {"budget": "auto", "indexer": "x", "policy": "indexer", "max_budget": 0.5}
    assert contexts(6400, **auto, expectations=known).resident_pages == 5 + 3  # 0.6 of a twentieth of 95 pages
    assert contexts(6400, **auto, target_coverage=1.0, expectations=known).resident_pages == 5 + 5
    assert contexts(6400, **auto).resident_pages == 50, "nobody knows"


def test_pruning_starts_at_half_of_a_small_pool() -> None:
    assert contexts(6400, physical=150, min_context=100_000).resident_pages == 10
    assert contexts(6400, physical=220, min_context=100_000).resident_pages == 100


def test_no_set_is_larger_than_half_of_the_pool() -> None:
    assert contexts(6400, physical=40, budget=0.9).resident_pages == 20


@pytest.mark.parametrize(("on_gpu", "stock"), [(True, 11), (False, 10)])
def test_what_lsa_takes_beside_kv_is_kv_for_stock(on_gpu: bool, stock: int) -> None:
    assert contexts(6400, overhead=6400, on_gpu=on_gpu).stock == stock


# --- findings about a plan -------------------------------------------------------------------------------------------


def test_a_mirror_smaller_than_the_device_is_noted() -> None:
    (finding,) = plan_findings(cpu_server(device="cuda"))
    assert finding.status == NOTE
    assert float(finding.fix.split()[1].rstrip(",")) * GB >= (300_032 + 64) * 23040
    assert plan_findings(cpu_server(device="cuda", config=LSAConfig(device_tokens=4096)))[0].status == OK
    assert plan_findings(cpu_server(device="cuda", budgeted_tokens=64_000))[0].status == OK


def test_a_cpu_server_that_needs_more_than_there_is() -> None:
    assert plan_findings(cpu_server())[0].status == OK
    (finding,) = plan_findings(cpu_server(host=HostMemory(2 * GB, "measured")))
    assert finding.status == TROUBLE


def test_default_lengths_are_no_trouble() -> None:
    server = cpu_server(virtual=64 * 70)
    notes = [context_finding(server, server.fit(8192), asked) for asked in (False, True)]
    assert [note.status for note in notes if note] == [NOTE, TROUBLE]
    assert context_finding(server, server.fit(4096), asked=True) is None


def test_a_context_that_reads_all_and_is_larger_than_the_pool() -> None:
    server = cpu_server(config=LSAConfig(policy="full"))
    problem = context_finding(server, server.fit(8192), asked=True)
    assert problem is not None
    assert "a budget below 1 and a policy other than full" in problem.fix
