"""Many questions about one document: documents, what is read in a step, arms, the comparison. Asking: tests/server."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
from rich.console import Console

from sglang_lsa import cli
from sglang_lsa.embedded_model import embedded_model_path
from sglang_lsa.evaluation.groups import Asking, arms_of, run
from sglang_lsa.evaluation.groups_documents import make_documents
from sglang_lsa.evaluation.groups_report import ALL, markdown, summarise, table, write
from sglang_lsa.evaluation.suites.together import KINDS, SENTENCES
from sglang_lsa.evaluation.union import Member, Reads, reads, what_was_read


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(embedded_model_path())


# --- documents -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_questions_have_one_document_and_answers_in_places_of_their_own(kind: str, tokenizer: Any) -> None:
    (document,) = make_documents(tokenizer, [kind], [3000], 1, 6)
    assert (document.kind, document.length, len(document.questions)) == (kind, 3000, 6)
    assert len({question.sample.context for question in document.questions}) == 1
    longest = max(len(question.ids) + question.asked.new_tokens for question in document.questions)
    assert 0.85 * 3000 <= longest <= 3000, "as long as one prompt and its answer, not all six"
    assert all(question.ids[: len(document.common)] == document.common for question in document.questions)
    context, wanted = document.questions[0].sample.context, SENTENCES if kind == "several" else 1
    for question in document.questions:
        turn = question.asked
        assert len(turn.references) == len(turn.evidence) == wanted
        for value, (begin, end) in zip(turn.references, turn.evidence, strict=True):
            assert context.count(value) == 1 and value in context[begin:end]
            assert value not in turn.question + turn.start
    places = [span for question in document.questions for span in question.asked.evidence]
    assert len(set(places)) == 6 * wanted
    depths = sorted(begin / len(context) for begin, _ in places)
    assert depths[0] < 0.25 and depths[-1] > 0.75


def test_a_server_that_cannot_decode_them_at_once_is_refused(tokenizer: Any) -> None:
    (document,) = make_documents(tokenizer, ["one"], [2048], 1, 3)
    shared = len(document.common) // 64
    needed = shared + sum(-(-(len(q.ids) + q.asked.new_tokens) // 64) - shared for q in document.questions)
    document.check(3, needed)
    with pytest.raises(ValueError, match="decodes 2 requests at once, fewer than --questions 3: ask fewer"):
        document.check(2, needed)
    with pytest.raises(
        ValueError, match=f"need {needed * 64} tokens of device KV, and the server has {needed * 64 - 64}"
    ):
        document.check(3, needed - 1)


# --- what is read ----------------------------------------------------------------------------------------------------


def test_the_union_counts_pages_of_the_document_once() -> None:
    """Pages of 64; the first four are the document's. Each prompt has 300 tokens: a tail of its own on page 4."""
    members = [Member(300, 4, "301:4:0,1"), Member(300, 4, "301:4:1,3")]
    assert reads(members, 4) == Reads(steps=3, pages=6.0, union=5.0, set_pages=3.0)
    assert reads(members, 5) == Reads(steps=3, pages=6.0, union=4.0, set_pages=3.0), "were page 4 the document's too"


def test_sets_change_and_a_page_opens() -> None:
    """A prompt of 318 tokens: its second step fills page 4, the third opens page 5, and a set of one page comes."""
    found = reads([Member(318, 6, "319:4:0,1;322:4:2")], 4)
    pages = [3, 3, 4, 3, 3]
    assert found == Reads(5, sum(pages) / 5, sum(pages) / 5, sum(pages) / 5)


def test_steps_before_a_first_set_and_after_an_end_are_left_out() -> None:
    late, short = Member(300, 8, "303:4:0"), Member(300, 5, "301:4:0")
    found = reads([late, short], 4)
    assert found == Reads(steps=2, pages=4.0, union=3.0, set_pages=2.0)  # steps 3 and 4
    assert reads([late, Member(300, 3, "301:4:0")], 4) is None
    assert reads([Member(300, 8, "301:0:;303:4:0"), short], 4) == found, "a set of all pages is none yet"


def test_full_attention_reads_everything() -> None:
    assert reads([Member(300, 3, "")] * 3, 4) == Reads(steps=2, pages=15.0, union=7.0, set_pages=5.0)


def test_a_group_reads_evidence_for_its_members() -> None:
    """Ten of twelve chose pages 1 to 9, the others 10 to 18; the answer to the first of them is on page 10."""
    prompt, few, many = 20 * 64 + 5, "10,11,12,13,14,15,16,17,18", "1,2,3,4,5,6,7,8,9"
    sets = [f"{prompt + 1}:20:0,{chosen}" for chosen in [many] * 10 + [few] * 2]
    members = [Member(prompt, 4, each, (10,) if place < 10 else ()) for place, each in enumerate(sets)]
    apart, together = reads(members, 20), reads(members, 20, grouped=True)
    assert apart is not None and together is not None
    assert (apart.evidence, together.evidence) == (0.0, 1.0)
    assert (apart.pages, apart.union) == (together.pages, together.union) == (12 * 11, 19 + 12)
    alone = [*members[:10], Member(prompt, 4, f"{prompt + 1}:20:0,{many}"), members[11]]
    found = reads(alone, 20, grouped=True)
    assert found is not None and found.evidence == 0.0, "one of twelve is not enough"


def status(groups: dict[str, float] | None, refreshes: int, held: int) -> dict[str, Any]:
    decoding = {"2": {"samples": held // 5, "held_pages": held}}
    return {"page_bytes": 10, "ranks": {"size": 2}, "groups": groups, "refreshes": refreshes, "decoding": decoding}


def groups(steps: int, each: int) -> dict[str, float]:
    names = ("saved_reads", "added_reads", "formed", "host_seconds", "exchanged_pages")
    counted = dict.fromkeys(names, steps * each)
    return {"steps": steps, "summed_groups": steps, "summed_requests": 2 * steps, **counted}


def test_what_was_read_is_by_sets_and_by_the_counts_of_the_server() -> None:
    both = {"prompt_tokens": 300, "new_tokens": 4, "evidence": [1, 2]}
    answers = [both | {"sets": sets} for sets in ("301:4:0,1", "301:4:1,3")]
    apart = what_was_read(answers, 4 * 64 + 9, status(None, 5, 0), status(None, 7, 20))
    assert (apart["pages"], apart["union"], apart["attention_reads"], apart["shared_pages"]) == (6.0, 5.0, 6.0, 4)
    assert (apart["union_bytes"], apart["held_bytes"]) == (100, 100), "of both ranks"
    assert apart["evidence_read"] == 0.5 and "groups" not in apart
    together = what_was_read(answers, 4 * 64, status(groups(7, 1), 5, 0), status(groups(10, 1), 7, 20))
    assert (together["groups"], together["members"], together["exchanged"]) == (1.0, 2.0, 1.5)
    assert (together["pages"], together["union"], together["attention_reads"]) == (6.0, 5.0, 5.0)
    none = what_was_read(answers, 4 * 64, status(groups(7, 1), 5, 0), status(groups(7, 1), 7, 20))
    assert (none["groups"], none["attention_reads"]) == (0.0, 6.0)


# --- arms and the comparison -----------------------------------------------------------------------------------------


def test_arms_and_their_servers() -> None:
    arms = arms_of([0.0, 0.1, 0.1])
    assert [arm.name for arm in arms] == ["full", "separate", "grouped", "grouped 0.1"]
    configs = [json.loads(arm.server_config) for arm in arms]
    assert configs == [{"groups": False}] * 2 + [{"groups": True}, {"groups": True, "group_margin": 0.1}]


def test_full_attention_is_asked_once_for_all_budgets(tokenizer: Any) -> None:
    (document,), (full, separate) = make_documents(tokenizer, ["one"], [2048], 1, 2), arms_of([])
    asking = [Asking("m", "quest", budget, None, "") for budget in (0.1, 0.2)]
    assert len({each.key(document, full) for each in asking}) == 1
    assert len({each.key(document, separate) for each in asking}) == 2
    assert asking[0].options(full) == {"enabled": False}
    assert asking[0].options(separate) == {"policy": "quest", "budget": 0.1}


def a_round(arm: str, right: list[int], document: int = 0, kind: str = "one", **more: Any) -> dict[str, Any]:
    answers = [
        {"answer": "42" if each else "", "references": ["42"], "metric": "all", "evidence": [3], "sets": "301:4:0,3"}
        | {"said_tokens": 9, "stalls": 0, "shrunk": 0}
        for each in right
    ]
    budget = {"policy": "full", "budget": 1.0} if arm == "full" else {"policy": "quest", "budget": 0.1}
    read = {"set_pages": 3.0, "pages": 6.0, "union": 5.0, "union_bytes": 5_000_000, "attention_reads": 5.0}
    about = {"model": "m", "kind": kind, "length": 4096, "document": document, "questions": len(right), "arm": arm}
    run = {"command": "c", "hardware": "h", "commit": "d", "date": "2000-01-01"}
    return about | budget | read | {"answers": answers, "indexer": None, "server_args": "", **run} | more


def test_every_arm_is_paired_with_full_attention_and_with_separate_sets() -> None:
    rounds = [
        a_round("grouped", [1, 1, 0, 1], group_steps=9, groups=1.0, members=4.0, exchanged=0.0),
        a_round("separate", [1, 0, 0, 1]),
        a_round("full", [1, 1, 1, 1]),
        a_round("full", [0, 0, 0, 0], document=1),  # nobody else was asked about it
    ]
    found = {row["arm"]: row for row in summarise(rounds)}
    assert list(found) == ["full", "separate", "grouped"]
    assert [row["accuracy"] for row in found.values()] == [100.0, 50.0, 75.0]
    assert {row["n"] for row in found.values()} == {4} and {row["documents"] for row in found.values()} == {1}
    grouped = found["grouped"]
    assert (grouped["full_delta"], grouped["separate_delta"]) == (-25.0, 25.0)
    assert grouped["separate_delta_ci_low"] == 0.0 <= 25.0 < grouped["separate_delta_ci_high"]
    assert found["separate"]["full_delta"] == -50.0 and grouped["evidence_kept"] == 1.0
    text = markdown(list(found.values()))
    assert "| grouped | 9.0 | 75.0 | -25.0 (-75.0 to +0.0) | +25.0 (+0.0 to +75.0) |" in text
    assert "| 5.0 | 5.0 |" in text and "| 1.0 (4.0) |" in text
    assert table(list(found.values())).row_count == 3


def test_kinds_are_told_apart_and_together() -> None:
    rounds = [a_round(arm, [1, 0], kind=kind) for arm in ("full", "separate") for kind in ("one", "among")]
    rounds += [a_round("separate", [1, 1], kind="one")]  # asked again: the last one counts
    found = {(row["kind"], row["arm"]): row["accuracy"] for row in summarise(rounds)}
    assert found == {
        (ALL, "full"): 50.0,
        (ALL, "separate"): 75.0,
        ("one", "full"): 50.0,
        ("one", "separate"): 100.0,
        ("among", "full"): 50.0,
        ("among", "separate"): 50.0,
    }


def test_what_full_attention_cannot_do_is_there_and_does_not_count() -> None:
    can = {"one": [1, 1, 0, 0], "several": [1, 1, 1, 1], "among": [0, 0, 1, 0]}
    rounds = [a_round(arm, right, kind=kind) for arm in ("full", "separate") for kind, right in can.items()]
    found = summarise(rounds)
    assert {row["kind"]: row["counted"] for row in found} == {ALL: True, "one": True, "several": True, "among": False}
    assert {(row["accuracy"], row["n"]) for row in found if row["kind"] == ALL} == {(75.0, 8)}
    assert "| full | 9.0 | 25.0 * |" in markdown(found)
    assert ALL not in {row["kind"] for row in summarise([row for row in rounds if row["kind"] != "several"])}


def test_indexers_and_arguments_are_not_mixed() -> None:
    """The first indexer was asked about two documents, the second about one of them."""
    first, second = (dict[str, Any](policy="indexer", indexer=name) for name in ("a", "b"))
    rounds = [a_round("full", [1, 1], document) for document in (0, 1)]
    rounds += [a_round("separate", [1, 1], document, **first) for document in (0, 1)]
    rounds += [a_round("separate", [0, 0], **second)]
    rounds += [a_round(arm, [0, 1], server_args="--dtype float32", **first) for arm in ("full", "separate")]
    found = [row for row in summarise(rounds) if row["arm"] == "separate"]
    assert [(row["indexer"], row["server_args"], row["accuracy"], row["documents"]) for row in found] == [
        ("a", "", 100.0, 2),
        ("b", "", 0.0, 1),
        ("a", "--dtype float32", 50.0, 1),
    ]
    assert "| m; b 10.0% |" in markdown(found) and "| m; a 10.0%; --dtype float32 |" in markdown(found)


def test_results_name_their_run(tmp_path: pathlib.Path) -> None:
    rows = write(tmp_path, summarise([a_round("full", [1]), a_round("separate", [1])]))
    written = json.loads((tmp_path / "group-quality.json").read_text())
    assert written["rows"] == rows and [row["run"] for row in rows] == [1, 1]
    assert written["runs"] == [{"id": 1, "command": "c", "hardware": "h", "commit": "d", "date": "2000-01-01"}]
    assert "| separate |" in (tmp_path / "group-quality.md").read_text()


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--questions", "1"], "--questions 1 is out of range: use 2 to 60"),
        (["--questions", "61"], "--questions 61 is out of range: use 2 to 60"),
        (["--documents", "0"], "--documents 0 is too small: use 1 or more"),
        (["--budget", "0"], "--budget 0.0 is out of range"),
        (["--margins", "1"], "--margins 1.0 is out of range: use shares of a score in [0, 1)"),
        (["--server-args", "--lsa-config x.json"], "--server-args has --lsa-config, which each arm has its own of"),
        (["--kinds", "several", "--lengths", "2048"], "cannot be made 2048 tokens long"),
        (["--texts", "/nowhere"], "--texts /nowhere: has no .txt, .md or .rst files"),
    ],
)
def test_bad_input_starts_no_server(
    arguments: list[str], words: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "groups", "--output", str(tmp_path / "out"), *arguments]) == 1
    assert words in capsys.readouterr().err


def test_what_was_answered_needs_no_server(
    tokenizer: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asking, arms = Asking("m", "quest", 0.1, None, ""), arms_of([0.0])
    (document,) = make_documents(tokenizer, ["one"], [2048], 1, 2)
    rows = [a_round(arm.name, [1, 1]) | {"key": asking.key(document, arm)} for arm in arms]
    (tmp_path / "group-answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr("sglang_lsa.evaluation.groups.server", None)
    options: dict[str, Any] = {"kinds": ["one"], "lengths": [2048], "documents": 1, "questions": 2, "budget": 0.1}
    options |= {"margins": [0.0], "texts": None, "server_args": "", "indexer": None, "command": "again"}
    found = run(tmp_path, Console(quiet=True), model=str(embedded_model_path()), name="m", **options)
    assert [row["arm"] for row in found] == ["full", "separate", "grouped"]
    with (tmp_path / "group-answers.jsonl").open("a") as file:  # in between, with other weights
        file.write(json.dumps(a_round("separate", [0, 0]) | {"key": "another"}) + "\n")
    again = run(tmp_path, Console(quiet=True), model=str(embedded_model_path()), name="m", **options)
    assert again == found, "of this command's rounds"
