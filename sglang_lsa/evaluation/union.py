"""What requests over one document read in a decode step: by the sets that a server tells, and by its counts. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sglang_lsa.bench.serving import group_figures, held_bytes
from sglang_lsa.config import PAGE_SIZE, GivenSet, read_sets
from sglang_lsa.engine.groups import Reader, form
from sglang_lsa.memory.pages import pages_spanned


@dataclass(frozen=True)
class Member:
    """One request.

    Attributes:
        prompt_tokens, new_tokens: of its prompt and its answer.
        sets: as in ``/lsa/requests``; empty for one that reads everything.
        evidence: pages that its answer is in.
    """

    prompt_tokens: int
    new_tokens: int
    sets: str
    evidence: tuple[int, ...] = ()


@dataclass(frozen=True)
class Reads:
    """Means over decode steps.

    Attributes:
        steps: over how many.
        pages: that the requests read, each for itself.
        union: different ones of these: pages of the document count once.
        set_pages: of one request.
        evidence: share of the evidence's pages that a request reads, in its own set or with its group; None where none
            has evidence.
    """

    steps: int
    pages: float
    union: float
    set_pages: float
    evidence: float | None = None


def reads(members: Sequence[Member], shared_pages: int, grouped: bool = False) -> Reads | None:
    """What requests that decode beside each other read in a step: their first steps are one step, and so on.

    On a GPU a first set arrives some steps after the first token, and until then a request reads everything. Steps in
    which that is so for one of them are left out; so are those in which one has ended.

    Args:
        shared_pages: the first so many pages are the same for all.
        grouped: what enough of them chose is read by all of a group.

    Returns:
        None if there is no such step.
    """
    sets = [read_sets(member.sets) for member in members]
    begins = [next((each.tokens for each in own if each.tail_start), 0) for own in sets]
    first = max(begin - member.prompt_tokens for begin, member in zip(begins, members, strict=True))
    steps = range(max(1, first), min(member.new_tokens for member in members))
    pages = union = 0
    found: list[float] = []
    for step in steps:
        now = [_in_force(own, member.prompt_tokens + step) for own, member in zip(sets, members, strict=True)]
        read = [_read(each, member.prompt_tokens + step) for each, member in zip(now, members, strict=True)]
        seen = np.zeros(shared_pages, dtype=bool)
        for own in read:
            below = own[:shared_pages]
            seen[: len(below)] |= below
            pages += int(own.sum())
            union += int(own[shared_pages:].sum())
        union += int(seen.sum())
        for group in form([_reader(*each, shared_pages) for each in zip(now, read, strict=True)]) if grouped else ():
            for place in group.members:
                read[place][group.positions] = True
        found += [
            float(own[list(member.evidence)].mean())
            for own, member in zip(read, members, strict=True)
            if member.evidence
        ]
    if not steps:
        return None
    count = len(steps)
    evidence = float(np.mean(found)) if found else None
    return Reads(count, pages / count, union / count, pages / count / len(members), evidence)


def _in_force(sets: Sequence[GivenSet], context: int) -> GivenSet | None:
    """The set of a step that leaves the request with so many tokens; None if it reads everything."""
    now = next((each for each in reversed(sets) if each.tokens <= context), None)
    return now if now is not None and now.tail_start else None


def _read(now: GivenSet | None, context: int) -> np.ndarray:
    """Which pages that step reads; bool ``[pages]``."""
    read = np.ones(pages_spanned(context, PAGE_SIZE), dtype=bool)
    if now is not None:
        read[: now.tail_start] = False
        read[list(now.positions)] = True
    return read


def _reader(now: GivenSet | None, read: np.ndarray, shared_pages: int) -> Reader:
    """The request as the engine looks at it when it forms groups; one that reads everything is in none."""
    tail = now.tail_start if now is not None else 0
    return Reader(np.arange(min(shared_pages, tail)), np.flatnonzero(read[:tail]))


def what_was_read(
    answers: Sequence[dict[str, Any]], shared_tokens: int, before: dict[str, Any], after: dict[str, Any]
) -> dict[str, Any]:
    """By the sets of the requests, and by what the server counted between two of its statuses.

    Args:
        answers: with ``prompt_tokens``, ``new_tokens``, ``sets`` and ``evidence`` of each request.
        shared_tokens: that all prompts begin with.

    Returns:
        ``pages``, ``union``, ``set_pages``, ``steps`` and, as ``evidence_read``, ``evidence`` of :class:`Reads`, if
        there was such a step; ``union_bytes``; ``held_bytes``, the KV that the server held at steps that it looked at;
        ``attention_reads``, pages that attention read in a step, which is less than ``pages`` where some were read for
        several requests at once. Where there were groups also ``exchanged`` pages of a set, ``groups`` and ``members``
        of a step with some, and ``group_...`` as in ``bench serving``.
    """
    shared = shared_tokens // PAGE_SIZE
    members = [
        Member(each["prompt_tokens"], each["new_tokens"], each["sets"], tuple(each["evidence"])) for each in answers
    ]
    read = reads(members, shared, after["groups"] is not None)
    page_bytes = after["page_bytes"] * after["ranks"]["size"]
    found: dict[str, Any] = {"shared_pages": shared, "held_bytes": held_bytes(before, after, page_bytes)}
    if read is not None:
        found |= {"evidence_read" if name == "evidence" else name: value for name, value in asdict(read).items()}
        found |= {"union_bytes": round(read.union * page_bytes), "attention_reads": read.pages}
    if (now := after["groups"]) is None:
        return found
    then = before["groups"]
    steps, sets = max(1, now["steps"] - then["steps"]), max(1, after["refreshes"] - before["refreshes"])
    figures = group_figures(then, now)
    if read is not None:
        share = min(1.0, figures["group_steps"] / read.steps)
        found["attention_reads"] -= figures["group_saved_reads"] * share
    found["exchanged"] = (now["exchanged_pages"] - then["exchanged_pages"]) / sets
    found["groups"], found["members"] = ((now[n] - then[n]) / steps for n in ("summed_groups", "summed_requests"))
    return found | figures
