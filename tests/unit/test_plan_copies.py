"""In which order plans are written and copied. What happens otherwise: tests/gpu/test_plan_copies.py."""

from __future__ import annotations

import pytest

from sglang_lsa.attend.plan_copies import PlanCopies


class Wrapper:
    def __init__(self, name: str):
        self.name = name


class Written(list[str]):
    """What happened, in order."""

    def __init__(self) -> None:
        self.events = 0

    def event(self) -> Event:
        self.events += 1
        return Event(self, self.events)


class Event:
    def __init__(self, written: Written, number: int):
        self.written, self.number = written, number

    def record(self) -> None:
        self.written.append(f"record {self.number}")

    def synchronize(self) -> None:
        self.written.append(f"wait {self.number}")


def test_the_next_plan_of_a_wrapper_waits_for_the_copy_of_its_last() -> None:
    written = Written()
    copies, wrapper = PlanCopies(written.event), Wrapper("a")
    for _ in range(3):
        with copies.planning(wrapper):
            written.append("plan")
    assert written == ["plan", "record 1", "wait 1", "plan", "record 1", "wait 1", "plan", "record 1"]


def test_plans_of_other_wrappers_are_not_waited_for() -> None:
    """Else every step with two of them would wait for the forward pass before it."""
    written = Written()
    copies, first, second = PlanCopies(written.event), Wrapper("a"), Wrapper("b")
    for _ in range(2):
        for wrapper in (first, second):
            with copies.planning(wrapper):
                written.append(f"plan {wrapper.name}")
    once = ["plan a", "record 1", "plan b", "record 2"]
    assert written == [*once, "wait 1", "plan a", "record 1", "wait 2", "plan b", "record 2"]


def test_a_plan_that_failed_may_have_queued_its_copy() -> None:
    written = Written()
    copies, wrapper = PlanCopies(written.event), Wrapper("a")
    with pytest.raises(ValueError, match="too large"), copies.planning(wrapper):
        raise ValueError("too large")
    with copies.planning(wrapper):
        pass
    assert written == ["record 1", "wait 1", "record 1"]
