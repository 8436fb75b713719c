"""Footprints, the store, summaries and error analysis of ``sglang-lsa eval``, without a server."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import figures
import numpy as np
import pytest

from sglang_lsa.evaluation.analysis import blame, evidence_kept, lost, union_of_sets, windows
from sglang_lsa.evaluation.command import keep
from sglang_lsa.evaluation.footprint import footprint, mean_resident
from sglang_lsa.evaluation.plots import plot_depth, plot_footprint
from sglang_lsa.evaluation.quality import write
from sglang_lsa.evaluation.store import Store, key
from sglang_lsa.evaluation.summary import AVERAGE, RUN, complete, markdown, summarise

# --- footprint -------------------------------------------------------------------------------------------------------


def test_mean_resident_pages() -> None:
    """There is a decode step for every token but the first."""
    assert mean_resident("", 640, 11) == pytest.approx(np.mean([-(-context // 64) for context in range(641, 651)]))
    # from 641 on pages 0 and 3 and everything from page 8 (3 pages of 11), from 705 on page 1 and from 10 on
    assert mean_resident("641:8:0,3;705:10:1", 640, 65) == 5
    assert mean_resident("641:8:0,3;705:10:1", 640, 129) == pytest.approx((64 * 5 + 64 * 3) / 128)
    assert mean_resident("643:8:0,3", 640, 5) == pytest.approx((11 + 11 + 5 + 5) / 4), "dense before the first set"
    forgotten = ";".join(f"{tokens}:8:0,3" for tokens in range(1000, 1032))
    assert mean_resident(forgotten, 640, 20) == 5


def test_footprints_count_everything() -> None:
    overhead = {"page_keys": 1010, "indexer": 2020, "queries": 500, "tables": 50}
    status = {"page_bytes": 1000, "virtual": {"pages": 100}, "physical": {"overhead_bytes": overhead}, "rows": 5}
    found = {arm: footprint(arm, "641:8:0,3", 640, 64, status) for arm in ("full", "lsa", "quest", "window")}
    assert found["full"]["footprint"] == 1.0
    assert found["lsa"]["device_bytes"] == 5 * 1000 + 11 * 20 + 100 + 10
    assert found["quest"]["device_bytes"] == 5 * 1000 + 11 * 10 + 100 + 10
    assert found["window"]["device_bytes"] == 5 * 1000 + 10
    assert found["window"]["footprint"] == pytest.approx(5010 / 11_000)
    assert {one["resident"] for one in found.values()} == {1.0, 5 / 11}
    assert footprint("lsa", "", 640, 1, status)["footprint"] is None, "the first token is prefill's"


# --- store -----------------------------------------------------------------------------------------------------------


def test_a_store_goes_on_after_an_interruption(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "deep" / "answers.jsonl"
    store = Store(path)
    store.add({"key": "a", "n": 1})
    store.add({"key": "b", "n": 2})
    path.write_text(path.read_text()[:-4])
    again = Store(path)
    assert again.rows == {"a": {"key": "a", "n": 1}}
    again.add({"key": "b", "n": 3})
    assert Store(path).rows["b"]["n"] == 3
    path.write_text("no json\n" + path.read_text())
    with pytest.raises(ValueError, match="line 1, is no answer: move the file away"):
        Store(path)


def test_keys_tell_everything_apart() -> None:
    assert key("m", {"a": 1, "b": 2}, (1, 2)) == key("m", {"b": 2, "a": 1}, (1, 2))
    assert len({key("m", {}, (1, 2)), key("m", {}, (12,)), key("m", {"a": 1}, (1, 2)), key("n", {}, (1, 2))}) == 4


# --- summary ---------------------------------------------------------------------------------------------------------


def rows_of(task: str, arms: dict[str, list[float]], suite: str = "s", turn: int = 0, **more: Any) -> list[dict]:
    return [
        {
            "model": "m",
            "suite": suite,
            "task": task,
            "length": 4096,
            "sample": f"{task}-{number}",
            "turn": turn,
            "label": label,
            "arm": label.split()[0],
            "budget": 1.0 if label == "full" else 0.1,
            "score": score,
            "footprint": 1.0 if label == "full" else 0.1,
            "depth": number / 10,
            "averaged": True,
            "commit": "c",
            "command": "sglang-lsa eval",
            **more,
        }
        for label, scores in arms.items()
        for number, score in enumerate(scores)
    ]


def test_summary_is_paired_and_averages_what_full_attention_can_do() -> None:
    rows = rows_of("easy", {"full": [1, 1, 1, 1], "lsa 10%": [1, 1, 1, 0]})
    rows += rows_of("hard", {"full": [0, 0, 0, 1], "lsa 10%": [1, 1, 1, 1]})
    rows += rows_of("middle", {"full": [1, 0, 1, 0], "lsa 10%": [1, 0, 1, 0]})
    found = {(row["task"], row["suite"], row["arm"]): row for row in summarise(rows)}
    easy, hard, middle = (found[task, "s", "lsa"] for task in ("easy", "hard", "middle"))
    assert (easy["accuracy"], easy["delta"], easy["n"]) == (75.0, -25.0, 4)
    assert easy["delta_ci_low"] < -25 < easy["delta_ci_high"] <= 0
    assert (hard["accuracy"], hard["delta"], hard["counted"]) == (100.0, 75.0, False)
    assert (middle["delta_ci_low"], middle["delta"], middle["delta_ci_high"]) == (0, 0, 0)
    for suite in ("s", "all"):
        average = found[AVERAGE, suite, "lsa"]
        assert (average["accuracy"], average["delta"], average["tasks"], average["n"]) == (62.5, -12.5, 2, 8)
    assert found["easy", "s", "full"]["delta"] == 0
    text = markdown(list(found.values()))
    assert "| m | s | hard | lsa 10.0% | 100.0 (" in text and text.count(" *") == 2


def test_tasks_without_right_answers_tell_what_was_kept() -> None:
    rows = rows_of("bank", {"full": [None, None], "lsa 10%": [None, None]}, evidence_kept=0.25)  # type: ignore[list-item]
    found = summarise(rows + rows_of("easy", {"full": [1, 1], "lsa 10%": [1, 1]}))
    bank = next(row for row in found if row["task"] == "bank" and row["arm"] == "lsa")
    assert (bank["accuracy"], bank["delta_ci_low"], bank["evidence_kept"], bank["n"]) == (None, None, 0.25, 2)
    assert next(row for row in found if row["task"] == AVERAGE and row["arm"] == "lsa")["tasks"] == 1
    assert "| m | s | bank | lsa 10.0% | evidence 25% (n 2) |" in markdown(found)


@pytest.mark.parametrize(
    ("sets", "evidence", "kept"),
    [
        ("100:3:0,1", (0, 2), 0.5),
        ("100:3:0,1;164:4:2", (0, 2), 0.5),
        ("100:3:0,2;164:4:", (0, 2), 0.5),
        ("100:0:", (0, 2), 1.0),
        ("100:3:0,1", (), None),
        ("", (0, 2), None),
    ],
)
def test_evidence_kept(sets: str, evidence: tuple[int, ...], kept: float | None) -> None:
    assert evidence_kept(sets, evidence) == kept


def test_tasks_can_be_kept_out_of_averages() -> None:
    rows = rows_of("a", {"full": [1, 1], "lsa 10%": [1, 1]})
    rows += rows_of("b", {"full": [1, 1], "lsa 10%": [0, 0]}, averaged=False)
    found = [row for row in summarise(rows) if row["task"] == AVERAGE and row["arm"] == "lsa"]
    assert {row["accuracy"] for row in found} == {100.0}


def test_turns_of_a_sample_are_not_independent() -> None:
    """Five turns of one sample are one number to the bootstrap."""
    scores = {"full": [1.0] * 6, "lsa 10%": [1.0, 0.0] * 3}
    many = [row for turn in range(5) for row in rows_of("t", scores, turn=turn)]
    one, five = (next(r for r in summarise(rows) if r["arm"] == "lsa") for rows in (rows_of("t", scores), many))
    assert (five["n"], one["n"]) == (30, 6)
    assert [five[name] for name in ("delta", "delta_ci_low", "delta_ci_high")] == [
        one[name] for name in ("delta", "delta_ci_low", "delta_ci_high")
    ]


def test_only_questions_that_every_arm_answered_count() -> None:
    rows = rows_of("t", {"full": [1, 1, 1], "lsa 10%": [1, 1]}) + rows_of("other", {"full": [1], "quest 10%": [1]})
    assert {row["sample"] for row in complete(rows)} == {"t-0", "t-1", "other-0"}


def test_evidence_is_compared_only_where_all_have_some() -> None:
    rows = rows_of("known", {"full": [1, 1], "lsa 10%": [1, 0], "evidence 10%": [1, 1]})
    rows += rows_of("some", {"full": [1, 1], "lsa 10%": [1, 1], "evidence 10%": [1]})
    found = {(row["task"], row["suite"], row["arm"]): row for row in summarise(rows)}
    assert ("known", "s", "evidence") in found and ("some", "s", "evidence") not in found
    assert found["some", "s", "lsa"]["n"] == 2
    assert (AVERAGE, "s", "evidence") not in found and found[AVERAGE, "s", "lsa"]["tasks"] == 2


def test_the_order_of_answers_does_not_matter() -> None:
    rows = rows_of("t", {"full": [1, 1, 0, 1, 1], "lsa 10%": [1, 0, 0, 1, 0]})
    assert sorted(map(str, summarise(rows))) == sorted(map(str, summarise(rows[::-1])))


def test_results_of_several_runs_are_one_table(tmp_path: pathlib.Path) -> None:
    """Averages are made anew of everything; later answers to the same questions replace earlier ones."""
    keep(tmp_path, rows_of("t", {"full": [1, 1], "lsa 10%": [0, 0]}))
    keep(tmp_path, rows_of("u", {"full": [1, 1], "lsa 10%": [1, 1]}, model="other"))
    everything = keep(tmp_path, rows_of("u", {"full": [1, 1], "lsa 10%": [1, 1]}))
    found = {(r["model"], r["task"], r["arm"]): r["accuracy"] for r in summarise(everything) if r["suite"] == "s"}
    assert found["m", AVERAGE, "lsa"] == 50.0 and found["other", AVERAGE, "lsa"] == 100.0
    everything = keep(tmp_path, rows_of("t", {"full": [1, 1], "lsa 10%": [1, 1]}))
    write(tmp_path, summarise(everything))
    rows = json.loads((tmp_path / "quality.json").read_text())["rows"]
    assert {row["accuracy"] for row in rows if row["arm"] == "lsa"} == {100.0}
    assert "| other | s | u | lsa 10.0% | 100.0 (" in (tmp_path / "quality.md").read_text()


def test_a_run_is_told_once(tmp_path: pathlib.Path) -> None:
    """Rows name the run that gave their answers, also where an older file does not say when and on what it was."""
    here = {"hardware": "2 CPU cores", "date": "2026-11-28"}
    keep(tmp_path, rows_of("t", {"full": [1, 1]}))
    everything = keep(tmp_path, rows_of("u", {"full": [1, 1]}, **here) + rows_of("v", {"full": [1, 1]}, **here))
    found = summarise(everything)
    rows = write(tmp_path, found)
    assert json.loads((tmp_path / "quality.json").read_text()) == {
        "runs": [
            {"id": 1, "command": "sglang-lsa eval", "hardware": None, "commit": "c", "date": None},
            {"id": 2, "command": "sglang-lsa eval", "hardware": "2 CPU cores", "commit": "c", "date": "2026-11-28"},
        ],
        "rows": rows,
    }
    assert {row["task"]: row["run"] for row in rows} == {AVERAGE: 1, "t": 1, "u": 2, "v": 2}
    assert not any(set(row) & set(RUN) for row in rows)


@pytest.mark.parametrize("name", figures.QUALITY)
def test_published_tables_are_those_of_the_rows(name: str, tmp_path: pathlib.Path) -> None:
    results = pathlib.Path(__file__).resolve().parents[2] / "docs" / "results"
    published = json.loads((results / f"{name}.json").read_text())
    runs = {run["id"]: run for run in published["runs"]}
    assert {row["run"] for row in published["rows"]} == runs.keys()
    assert all(run[part] for run in runs.values() for part in RUN)
    write(tmp_path, [row | runs[row["run"]] for row in published["rows"]])
    assert (tmp_path / "quality.md").read_text() == (results / f"{name}.md").read_text()


def test_pictures(tmp_path: pathlib.Path) -> None:
    rows = rows_of("t", {"full": [1] * 8, "lsa 10%": [1, 0] * 4})
    assert plot_footprint(tmp_path / "a.png", summarise(rows), "m") and plot_depth(tmp_path / "b.png", rows, "m")
    assert (tmp_path / "a.png").read_bytes()[:4] == (tmp_path / "b.png").read_bytes()[:4] == b"\x89PNG"
    assert not plot_footprint(tmp_path / "c.png", [], "m") and not plot_depth(tmp_path / "c.png", [], "m")


# --- error analysis --------------------------------------------------------------------------------------------------


def test_analysis_says_what_was_missing_and_when() -> None:
    assert windows("641:8:0,3;705:10:1", [3, 9]) == [
        {"tokens": 641, "resident": 5, "missing": []},
        {"tokens": 705, "resident": 3, "missing": [3, 9]},
    ]
    about = {"references": ["x"], "answer": "y", "evidence": [3, 9], "sets": "641:8:0,3;705:10:1"}
    rows = rows_of("t", {"full": [1, 1], "lsa 10%": [0, 1]}, **about)
    (entry,) = lost(rows)
    assert (entry["sample"], entry["full_answer"], len(entry["windows"])) == ("t-0", "y", 2)
    never = {**entry, "windows": windows("641:0:", [3, 9])}
    first = {**entry, "windows": windows("641:10:1", [3, 9])}
    unknown = {**entry, "evidence": []}
    (row,) = blame([entry, never, first, first, unknown])
    names = ("worse", "missing_at_first", "missing_later", "nothing_missing", "unknown")
    assert [row[name] for name in names] == [5, 2, 1, 1, 1]


def test_analysis_says_what_missed_pages_were_worth() -> None:
    watched = [
        {"tokens": 641, "pages": [[3, 0.5, 0], [9, 0.1, 4]], "lowest": 0.25},
        {"tokens": 700, "pages": [[3, 0.5, 0]], "lowest": None},
    ]
    assert windows("641:10:0,3;705:10:1", [3, 9], watched) == [
        {"tokens": 641, "resident": 3, "missing": [9], "scores": [[9, 0.1, 4]], "lowest": 0.25},
        {"tokens": 705, "resident": 3, "missing": [3, 9]},
    ]


# --- several questions about one context -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of_turns", "share"),
    [
        (["640:8:0,3"], 0.4),
        (["640:8:0,3", "640:8:0,3"], 0.4),
        (["640:8:0,3", "640:8:0,5"], 0.5),
        (["640:0:;642:8:0,3;700:9:1,2,4", "641:9:0"], 5 / 11),
        (["640:8:0,3", ""], None),
        (["640:8:0,3", "640:0:"], None),
        ([], None),
    ],
)
def test_pages_that_several_questions_have_together(of_turns: list[str], share: float | None) -> None:
    assert union_of_sets(of_turns) == share


def test_tasks_of_several_questions_tell_what_they_have_together() -> None:
    def row(sample: str, turn: int, label: str, sets: str) -> dict[str, Any]:
        about = {"model": "m", "suite": "s", "task": "t", "length": 4096, "averaged": True, "commit": "", "command": ""}
        return about | {
            "sample": sample,
            "turn": turn,
            "label": label,
            "arm": label,
            "budget": 0.1,
            "score": 1.0,
            "sets": sets,
        }

    sets = ("640:8:0,3", "640:8:0,5", "640:8:0,3", "640:8:0,3")
    rows = [row(f"s{n // 2}", n % 2, "lsa", one) for n, one in enumerate(sets)]
    rows += [row(f"s{n // 2}", n % 2, "full", "") for n in range(4)]
    found = {r["arm"]: r["resident_union"] for r in summarise(rows) if r["task"] == "t"}
    assert found == {"lsa": pytest.approx(0.45), "full": None}
    single = [r for r in rows if r["turn"] == 0]
    assert all(r["resident_union"] is None for r in summarise(single) if r["task"] == "t")
