"""groups: who reads pages of a common prefix together; and what one step of a batch in groups reads."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_lsa.config import AUTO, LSAConfig
from sglang_lsa.engine import build
from sglang_lsa.engine.grouping import Grouping, Groups
from sglang_lsa.engine.groups import (
    MOST_GROUPS,
    RULES,
    Group,
    GroupRules,
    Reader,
    all_own_positions,
    form,
    own_positions,
)
from sglang_lsa.engine.remap import ResidentSets
from sglang_lsa.engine.request import Asked, Request
from sglang_lsa.engine.window import Clock
from sglang_lsa.memory.ledger import Ledger
from sglang_lsa.memory.resident_table import ResidentTable

REPEATABLE = settings(derandomize=True, database=None, deadline=None, max_examples=300)
ANY = GroupRules(least_saved=1e-9)
"""Every group that saves something."""


def reader(prefix: list[int] | np.ndarray, positions: list[int] | np.ndarray) -> Reader:
    return Reader(np.asarray(prefix, dtype=np.int64), np.asarray(positions, dtype=np.int64))


def formed(readers: list[Reader], rules: GroupRules = ANY) -> list[tuple[tuple[int, ...], list[int]]]:
    return [(group.members, group.positions.tolist()) for group in form(readers, rules)]


# --- examples --------------------------------------------------------------------------------------------------------


def test_what_two_keep_is_read_once() -> None:
    memory = [7, 8, 9, 10]
    readers = [reader([*memory, 20], [0, 2, 3, 4]), reader([*memory, 30], [0, 1, 3, 4])]
    (group,) = form(readers, ANY)
    assert group.members == (0, 1)
    assert group.positions.tolist() == [0, 3]
    assert [own_positions(each, group).tolist() for each in readers] == [[2, 4], [1, 4]]
    assert (group.chosen, group.saved_reads, group.added_reads) == (4, 2, 0)


def test_a_member_reads_what_enough_of_the_others_keep() -> None:
    """The third did not choose page 1, and reads it: it costs nothing to read it for three."""
    memory = [7, 8, 9]
    readers = [reader(memory, [0, 1]), reader(memory, [0, 1]), reader(memory, [0])]
    (group,) = form(readers, ANY)
    assert group.positions.tolist() == [0, 1]
    assert (group.saved_reads, group.added_reads) == (3, 1)


def test_the_same_position_of_another_text_is_another_page() -> None:
    assert formed([reader([1, 2, 3], [0, 1, 2]), reader([4, 5, 6], [0, 1, 2])]) == []


def test_pages_behind_the_common_prefix_are_not_shared() -> None:
    assert formed([reader([1, 2, 3], [0, 1, 2]), reader([1, 2, 9], [0, 1, 2])]) == [((0, 1), [0, 1])]


@pytest.mark.parametrize("few", [[], [reader([1], [0])], [reader([], []), reader([], [])]])
def test_nobody_to_share_with(few: list[Reader]) -> None:
    assert form(few, ANY) == ()


def test_who_must_be_left_alone_is() -> None:
    """Full attention, or a tail that begins at page 0: nothing of it may be shared."""
    readers = [reader([], []), reader([1, 2], [0, 1]), reader([], []), reader([1, 2], [0, 1])]
    assert formed(readers) == [((1, 3), [0, 1])]


def test_a_common_system_prompt_does_not_hide_two_memories() -> None:
    """All begin with page 1; two pairs share much more, and are two groups."""
    first, second = [1, *range(10, 20)], [1, *range(20, 30)]
    everything = list(range(11))
    readers = [reader(text, everything) for text in (first, second, first, second)]
    assert formed(readers) == [((0, 2), everything), ((1, 3), everything)]


def test_one_group_where_what_is_common_to_all_is_worth_more() -> None:
    common = list(range(1, 9))
    readers = [reader([*common, 10 + i // 2], list(range(9))) for i in range(4)]
    assert formed(readers) == [((0, 1, 2, 3), list(range(8)))]


def test_a_short_prefix_of_one_does_not_cut_those_of_others() -> None:
    text = list(range(1, 12))
    readers = [reader(text, list(range(11))), reader(text[:2], [0, 1]), reader(text, list(range(11)))]
    assert formed(readers) == [((0, 2), list(range(11)))]


def test_small_groups_are_not_formed() -> None:
    pages = list(range(int(RULES.least_saved)))
    assert form([reader(pages, pages)] * 2) == ()
    (group,) = form([reader(pages, pages)] * 3)
    assert group.saved >= RULES.least_saved


def test_many_queries_take_longer_than_one() -> None:
    """So a page that two of a hundred keep is read twice, not for all."""
    readers = [reader([1, 2], [0, 1] if i < 2 else [0]) for i in range(100)]
    assert formed(readers) == [(tuple(range(100)), [0])]
    assert formed(readers, GroupRules(query_cost=0.0, least_saved=1e-9)) == [(tuple(range(100)), [0, 1])]


def test_no_more_groups_than_buffers_have_room_for() -> None:
    """Those that save most are formed."""
    readers = [reader([text, 1000 + text, 2000 + text][: 2 + text % 2], [0, 1]) for text in range(20) for _ in range(2)]
    readers += [reader(range(5000, 5009), range(9))] * 2
    found = form(readers, ANY)
    assert len(found) == MOST_GROUPS
    assert (40, 41) in [group.members for group in found]


# --- properties ------------------------------------------------------------------------------------------------------


@st.composite
def steps(draw: st.DrawFn) -> list[Reader]:
    """Requests over a tree of texts: each text is another one's beginning, and something of its own."""
    texts: list[list[int]] = [[]]
    fresh = itertools.count(1)
    for _ in range(draw(st.integers(1, 4))):
        before = draw(st.sampled_from(texts))
        texts.append([*before, *(next(fresh) for _ in range(draw(st.integers(0, 5))))])
    readers = []
    for _ in range(draw(st.integers(0, 8))):
        text = draw(st.sampled_from(texts))
        prefix = [*text[: draw(st.integers(0, len(text)))], *(next(fresh) for _ in range(draw(st.integers(0, 2))))]
        below_the_tail = len(prefix) + draw(st.integers(0, 2))  # what it generated is not shared
        chosen = [p for p in range(below_the_tail) if draw(st.booleans())] if prefix else []
        readers.append(reader(prefix, chosen))
    return readers


RULES_DRAWN = st.builds(GroupRules, st.sampled_from([0.0, 1 / 64, 0.3]), st.sampled_from([1e-9, 2.0, 5.0]))


@REPEATABLE
@given(steps(), RULES_DRAWN)
def test_every_member_reads_all_that_it_chose_once(readers: list[Reader], rules: GroupRules) -> None:
    groups = form(readers, rules)
    members = [place for group in groups for place in group.members]
    assert len(members) == len(set(members)), "a request is in two groups"
    for group in groups:
        assert len(group.members) >= 2
        assert sorted(group.members) == list(group.members)
        pages = {tuple(readers[place].prefix[group.positions].tolist()) for place in group.members}
        assert len(pages) == 1, "members have other pages at these positions"
        for place in group.members:
            own = own_positions(readers[place], group)
            assert not np.intersect1d(own, group.positions).size, "a page is read twice"
            assert set(own) | set(group.positions) >= set(readers[place].positions.tolist())
            assert (np.diff(own) > 0).all()
            assert (np.diff(group.positions) > 0).all()
        own_of_all = [own_positions(readers[place], group).tolist() for place in group.members]
        found = all_own_positions(readers, group)
        assert [own.tolist() for own in found] == own_of_all, "all at once and each alone have other pages"
        assert all(own.dtype == np.int64 for own in found)


@REPEATABLE
@given(steps(), RULES_DRAWN)
def test_reads_are_counted_as_they_are(readers: list[Reader], rules: GroupRules) -> None:
    for group in form(readers, rules):
        apart = sum(len(readers[place].positions) for place in group.members)
        together = sum(len(own_positions(readers[place], group)) for place in group.members) + len(group.positions)
        assert group.saved_reads == apart - together > 0
        reads = sum(len(own_positions(readers[place], group)) + len(group.positions) for place in group.members)
        assert group.added_reads == reads - apart >= 0
        assert group.saved >= rules.least_saved
        assert group.saved == pytest.approx(
            group.saved_reads - rules.query_cost * len(group.members) * len(group.positions)
        )


@REPEATABLE
@given(steps(), st.randoms(use_true_random=False))
def test_the_order_of_the_batch_does_not_matter(readers: list[Reader], chance) -> None:
    order = list(range(len(readers)))
    chance.shuffle(order)
    shuffled = form([readers[place] for place in order], ANY)
    back = {tuple(sorted(order[place] for place in group.members)): group.positions.tolist() for group in shuffled}
    assert back == dict(formed(readers))


def all_saved(readers: list[Reader], members: list[int], common: int, rules: GroupRules) -> float:
    """What a group of these requests over so many pages saves, by counting page by page; 0 if it is none."""
    price, saved = rules.price(len(members)), 0.0
    for position in range(common):
        saved += max(0.0, sum(position in readers[place].positions for place in members) - price)
    return saved if saved >= rules.least_saved else 0.0


def best_saved(readers: list[Reader], members: list[int], rules: GroupRules) -> float:
    """The most that groups can save which are, each, all requests below one place of the tree of prefixes."""
    if len(members) < 2:
        return 0.0
    prefixes = [readers[place].prefix.tolist() for place in members]
    common = 0
    while all(len(prefix) > common for prefix in prefixes) and len({prefix[common] for prefix in prefixes}) == 1:
        common += 1
    below: dict[int, list[int]] = {}
    for place, prefix in zip(members, prefixes, strict=True):
        if len(prefix) > common:
            below.setdefault(prefix[common], []).append(place)
    return max(
        all_saved(readers, members, common, rules), sum(best_saved(readers, some, rules) for some in below.values())
    )


@REPEATABLE
@given(steps(), RULES_DRAWN)
def test_no_other_cut_of_the_tree_saves_more(readers: list[Reader], rules: GroupRules) -> None:
    saved = sum(group.saved for group in form(readers, rules))
    assert saved == pytest.approx(best_saved(readers, list(range(len(readers))), rules))


def test_groups_are_told_apart_by_identity() -> None:
    """A plan is made for a group, and numpy arrays have no truth value."""
    one, other = (Group((0, 1), np.arange(2), 4, 1.0) for _ in range(2))
    assert one == one
    assert one != other


# --- of the requests of a server -------------------------------------------------------------------------------------

PAGE = 64


def world(prompts: list[list[int]], tail_starts: list[int], chosen: list[list[int]]) -> tuple[Groups, list[Request]]:
    """Requests whose pages, by virtual id, are on the device at ``100 + id``; each holds what it reads."""
    ledger = Ledger(virtual_pages=60, physical_pages=60)
    sets = ResidentSets(ResidentTable(len(prompts) + 1, 40, PAGE), ledger)
    requests = []
    for number, (pages, tail_start, positions) in enumerate(zip(prompts, tail_starts, chosen, strict=True)):
        request = Request(f"r{number}", number + 1, Asked("quest", 0.5), prompt_tokens=PAGE * len(pages))
        request.pages = np.array([*pages, 50 + number], dtype=np.int64)
        ledger.v2p[request.pages] = 100 + request.pages
        sets.enter(request.row)
        sets.remap(request, np.array(positions, dtype=np.int64), tail_start)
        requests.append(request)
    return Groups(sets, ANY), requests


def own_of(grouping: Grouping, request: Request) -> list[int]:
    """Physical pages that a request reads by itself below its tail, as the table says."""
    count = int(grouping.own.count[request.row])
    assert int(grouping.own.tail_start[request.row]) == request.resident.tail_start
    assert grouping.own.shortening[request.row] == (request.resident.tail_start - count) * PAGE
    return grouping.own.pages[request.row, :count].tolist()


MEMORY = [1, 2, 3, 4, 5]


def test_a_batch_in_groups() -> None:
    """The second is in no group; its row says what it reads all the same."""
    prompts = [[*MEMORY, 10], [20, 21, 22], [*MEMORY, 30]]
    groups, requests = world(prompts, [6, 3, 6], [[0, 2, 5], [0, 1], [0, 2, 4, 5]])
    grouping = groups.of(requests)
    assert grouping is not None
    assert (grouping.order.tolist(), grouping.places.tolist(), grouping.sizes) == ([0, 2], [0, -1, 1], (2,))
    assert [pages.tolist() for pages in grouping.pages] == [[101, 103]]
    assert [own_of(grouping, request) for request in requests] == [[110], [120, 121], [105, 130]]
    assert groups.of(requests) is grouping, "nothing has changed"
    assert (groups.steps, groups.saved_reads, groups.formed) == (2, 4, 1)
    assert groups.sets.table.table[1, 0] == 3, "what a request reads all together stays what it was"


def test_full_attention_is_left_alone() -> None:
    groups, requests = world([MEMORY] * 3, [5, 0, 5], [[0, 1], [], [0, 1]])
    grouping = groups.of(requests)
    assert grouping is not None and grouping.groups[0].members == (0, 2)
    assert own_of(grouping, requests[1]) == []
    groups, requests = world([MEMORY] * 3, [0, 0, 0], [[], [], []])
    assert groups.of(requests) is None


def test_who_asked_for_it_is_left_alone() -> None:
    """Whose pages others then read without it."""
    shared = [1, 2, 3, 4]
    groups, requests = world([[*shared, 5], [*shared, 6], [*shared, 7]], [4, 4, 4], [[0, 1, 2]] * 3)
    requests[1].asked = Asked("quest", 0.5, groups=False)
    found = groups.of(requests)
    assert found is not None and [group.members for group in found.groups] == [(0, 2)]
    requests[2].asked = Asked("quest", 0.5, groups=False)
    groups.forget()
    assert groups.of(requests) is None


def test_pages_of_a_tail_are_not_read_twice() -> None:
    """The tail of the second begins within the common prefix: what lies behind that is its own."""
    groups, requests = world([MEMORY] * 3, [5, 2, 5], [[0, 1, 3], [0, 1], [0, 1, 3]])
    grouping = groups.of(requests)
    assert grouping is not None
    assert grouping.groups[0].members == (0, 1, 2) and grouping.groups[0].positions.tolist() == [0, 1]
    assert own_of(grouping, requests[0]) == [104]


def test_what_was_generated_is_not_shared() -> None:
    """A page that two requests have at the same position, but behind what one of them calls its prompt."""
    groups, requests = world([MEMORY] * 2, [5, 5], [[0, 1, 4], [0, 1, 4]])
    requests[1].prompt_tokens = 4 * PAGE + 63
    grouping = groups.of(requests)
    assert grouping is not None and grouping.groups[0].positions.tolist() == [0, 1]


def test_groups_follow_who_decodes_and_what_they_read() -> None:
    groups, requests = world([MEMORY] * 3, [5, 5, 5], [[0, 1], [0, 1], [0, 2]])
    first = groups.of(requests)
    assert first is not None and first.groups[0].members == (0, 1, 2)
    pair = groups.of(requests[1:])
    assert pair is not None and pair.groups[0].positions.tolist() == [0], "who left took its choice along"
    groups.sets.remap(requests[2], np.array([1, 2]), 5)
    again = groups.of(requests[1:])
    assert again is not None and again.groups[0].positions.tolist() == [1], "a window began"
    groups.sets.ledger.v2p[2] = 199
    groups.sets.moved(requests[1])
    moved = groups.of(requests[1:])
    assert moved is not None and moved.pages[0].tolist() == [199], "a page moved"
    groups.sets.remap(requests[2], np.zeros(0, dtype=np.int64), 0)
    assert groups.of(requests[1:]) is None, "it asked for everything"
    assert groups.of([]) is None
    assert groups.formed == 6


def test_groups_that_nobody_decided_on_are_not_formed() -> None:
    """Auto is for the arguments of a server to decide; a runtime of a program's own has none."""
    lookahead: Any = SimpleNamespace(sets=ResidentSets(ResidentTable(2, 4, 64), Ledger(4, 4)), clock=Clock(64))
    assert build.groups(LSAConfig(groups=AUTO), lookahead, {}) is None
    assert isinstance(build.groups(LSAConfig(groups=True), lookahead, {}), Groups)
