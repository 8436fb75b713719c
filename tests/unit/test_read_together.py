"""What is told of groups is what the tables say that their requests read: in the simulation, at every decode step."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from simulated_scheduler import ForwardPass, Req, Scheduler
from simulation import Simulation

from sglang_lsa.memory.resident_table import COUNT
from sglang_lsa.patches.requests import key_of
from sglang_lsa.serve.metrics import COUNTERS, measure
from sglang_lsa.serve.one_request import overview
from sglang_lsa.serve.read_together import memberships
from sglang_lsa.serve.status import status
from sglang_lsa.serve.view.snapshot import snapshot

METRIC_OF = {
    "lsa_groups": "now",
    "lsa_group_requests": "requests",
    "lsa_group_pages": "pages",
    "lsa_group_chosen_pages": "chosen_pages",
    "lsa_group_steps": "steps",
    "lsa_group_saved_reads": "saved_reads",
    "lsa_group_added_reads": "added_reads",
    "lsa_group_exchanged_pages": "exchanged_pages",
    "lsa_groups_formed": "formed",
    "lsa_group_host_seconds": "host_seconds",
}
"""The name of each metric in ``/lsa/status``."""


class Told(Scheduler):
    """Looks, when a decode step is queued, whether what is told agrees with what it reads."""

    def _read_in_groups(self, reqs: list[Req], queued: ForwardPass) -> None:
        super()._read_in_groups(reqs, queued)
        runtime, grouping = self.runtime, self.runtime.step.grouping
        told = memberships(runtime, runtime.requests.values())
        numbers = np.repeat(np.arange(len(grouping.sizes)), grouping.sizes) if grouping is not None else ()
        expected: dict[str, dict[str, int]] = {}
        for index, req in enumerate(reqs):
            if grouping is None or (place := grouping.places[index]) < 0:
                continue
            request, number = runtime.requests[key_of(req)], int(numbers[place])
            shared = grouping.groups[number].positions
            tail = len(request.pages) - request.resident.tail_start
            expected[request.key] = {
                "number": number,
                "members": grouping.sizes[number],
                "pages": len(grouping.pages[number]),
                "added_pages": len(np.setdiff1d(shared, request.resident.positions)),
                "own_pages": int(grouping.own.table[request.row, COUNT]) + tail,
            }
        assert told == expected
        self._compare(expected, snapshot(runtime))

    def _compare(self, expected: dict[str, dict[str, int]], frame: dict[str, Any]) -> None:
        """What the live view and ``/lsa/requests`` make of it, and the sums."""
        of_keys = [expected.get(key) for key in self.runtime.requests]
        assert [request["group"] for request in frame["requests"]] == of_keys
        assert [entry["group"] for entry in overview(self.runtime)["running"]] == of_keys
        members = Counter(membership["number"] for membership in expected.values())
        assert [group["members"] for group in frame["groups"]] == [members[n] for n in range(len(members))]
        for membership in expected.values():
            group = frame["groups"][membership["number"]]
            assert sum(character != "0" for character in group["map"]) == group["pages"] == membership["pages"]
        sums = status(self.runtime)["groups"]
        assert (sums["now"], sums["requests"]) == (len(members), len(expected))
        for name in ("pages", "chosen"):
            assert sum(group[name] for group in frame["groups"]) == sums[name if name == "pages" else "chosen_pages"]
        added = sum(membership["added_pages"] for membership in expected.values())
        assert added == sum(g["members"] * g["pages"] - g["chosen"] for g in frame["groups"])
        values = measure(self.runtime)
        assert {name: values[name] for name in METRIC_OF} == {name: sums[known] for name, known in METRIC_OF.items()}
        self.counts["members told"] += len(expected)
        self.counts["added told"] += added


def test_what_is_told_is_what_is_read() -> None:
    """Seeds that together have what there is to tell: pages that members did not choose, and such as were exchanged."""
    counts, totals = Counter[str](), Counter[str]()
    for seed in (16, 27, 33, 38, 45):
        simulation = Simulation(seed, scheduler=Told, groups=True)
        simulation.run(100)
        counts.update(simulation.counts)
        totals.update(measure(simulation.runtime))
    assert counts["members told"] > 600 and counts["added told"] > 30
    assert {name for name in METRIC_OF if totals[name]} == COUNTERS.keys() & METRIC_OF.keys(), (
        "an idle server has no groups, and each counter counted"
    )


def test_a_server_without_groups_tells_of_none() -> None:
    """Nothing is shown of what it does not do; its metrics are there, and say 0."""
    simulation = Simulation(1)
    for _ in range(60):
        simulation.step()
    runtime = simulation.runtime
    assert len(runtime.requests) > 1
    frame = snapshot(runtime)
    assert frame["groups"] is None and status(runtime)["groups"] is None
    assert {request["group"] for request in frame["requests"]} == {None}
    assert {entry["group"] for entry in overview(runtime)["running"]} == {None}
    assert {measure(runtime)[name] for name in METRIC_OF} == {0}
