"""What went wrong: for answers that an arm got worse than full attention, which evidence was not resident, and when."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from sglang_lsa.config import PAGE_SIZE, read_sets
from sglang_lsa.evaluation.arms import FULL
from sglang_lsa.memory.pages import pages_spanned


def lost(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry for every question and arm that scored less than full attention did.

    Returns:
        The question, both answers, and ``windows``: see :func:`windows`.
    """
    by_question: dict[tuple[str, str, int], dict[str, dict[str, Any]]] = {}
    for row in rows:
        if row["score"] is not None:
            by_question.setdefault((row["model"], row["sample"], row["turn"]), {})[row["label"]] = row
    found = []
    for answers in by_question.values():
        full = answers.get(FULL)
        for row in answers.values():
            if full is not None and row["score"] < full["score"]:
                about = {name: row[name] for name in ("suite", "task", "length", "sample", "turn", "arm", "budget")}
                found.append(
                    {
                        **about,
                        "score": row["score"],
                        "full_score": full["score"],
                        "references": row["references"],
                        "answer": row["answer"],
                        "full_answer": full["answer"],
                        "evidence": row["evidence"],
                        "windows": windows(row.get("sets") or "", row["evidence"], row.get("watched") or ()),
                    }
                )
    return found


def windows(sets: str, evidence: Sequence[int], watched: Iterable[dict[str, Any]] = ()) -> list[dict[str, Any]]:
    """What of the evidence each resident set lacked; ``sets`` and ``watched`` as in ``/lsa/requests``.

    Returns:
        Of each set the context in ``tokens`` at which it begins, how many pages were ``resident``, which pages of the
        evidence were ``missing``; and where that is known ``scores`` of these, each ``[page, score, rank]`` with the
        number of pages that scored higher, and the ``lowest`` score that was enough.
    """
    found = []
    known = {window["tokens"]: window for window in watched}
    for at, tail, chosen in map(dataclasses.astuple, read_sets(sets)):
        missing = [page for page in evidence if page not in chosen and page < tail]
        pages = len(chosen) + pages_spanned(at, PAGE_SIZE) - tail
        window = {"tokens": at, "resident": pages, "missing": missing}
        if missing and (scored := known.get(at)) is not None:
            window["scores"] = [page for page in scored["pages"] if page[0] in missing]
            window["lowest"] = scored["lowest"]
        found.append(window)
    return found


def union_of_sets(of_turns: Iterable[str]) -> float | None:
    """Share of a context that the first sets of several questions about it have together, each page counted once.

    Args:
        of_turns: ``sets`` of each question, as in ``/lsa/requests``.

    Returns:
        None if a question has no set, or read everything.
    """
    together, pages = set[int](), 0
    for sets in of_turns:
        if (first := next((one for one in read_sets(sets) if one.tail_start), None)) is None:
            return None
        spanned = pages_spanned(first.tokens, PAGE_SIZE)
        pages = max(pages, spanned)
        together.update(first.positions, range(first.tail_start, spanned))
    return len(together) / pages if pages else None


def evidence_kept(sets: str, evidence: Sequence[int]) -> float | None:
    """Share of the evidence's pages that were resident, mean over the sets; None if no evidence or no set is known."""
    if not evidence or not sets:
        return None
    missing = [len(window["missing"]) for window in windows(sets, evidence)]
    return 1 - sum(missing) / len(missing) / len(evidence)


def blame(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each suite, task and arm: how many answers got worse, and in how many of them a page of the evidence was not
    resident in the first window, in a later one only, or never (the evidence was there, and the answer is worse for
    something else); and answers of which no evidence is known, or that read everything."""
    found: dict[tuple[str, str, int, str, float], dict[str, Any]] = {}
    for entry in entries:
        about = {name: entry[name] for name in ("suite", "task", "length", "arm", "budget")}
        row = found.setdefault(
            tuple(about.values()),
            about | {"worse": 0, "missing_at_first": 0, "missing_later": 0, "nothing_missing": 0, "unknown": 0},
        )
        row["worse"] += 1
        missing = [bool(window["missing"]) for window in entry["windows"]]
        if not missing or not entry["evidence"]:
            row["unknown"] += 1
        else:
            row["missing_at_first" if missing[0] else "missing_later" if any(missing) else "nothing_missing"] += 1
    return list(found.values())


def write_analysis(path: pathlib.Path, rows: Iterable[dict[str, Any]]) -> None:
    """``{"summary": blame, "answers": lost}`` as JSON."""
    entries = lost(rows)
    path.write_text(json.dumps({"summary": blame(entries), "answers": entries}, indent=1) + "\n")
