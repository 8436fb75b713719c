"""``sglang-lsa eval`` against a real server."""

from __future__ import annotations

import json
import pathlib

import pytest

from sglang_lsa.cli import main
from sglang_lsa.server_process import ServerProcess

pytestmark = [pytest.mark.server, pytest.mark.slow]


def evaluate(server: ServerProcess, output: pathlib.Path, *more: str) -> list[dict]:
    """Two samples of two tasks, of which one is five requests about one context."""
    arguments = ["eval", "--url", server.url, "--suites", "ruler", "scbench", "--tasks", "niah_single_1", "kv_shared"]
    arguments += ["--lengths", "2048", "--samples", "2", "--arms", "quest", "window", "recency", "evidence", "--apart"]
    arguments += [
        "--budgets",
        "0.25",
        "--endpoint",
        f"plain={server.url}",
        "--name",
        "smollm2",
        "--output",
        str(output),
    ]
    assert main([*arguments, *more]) == 0
    return json.loads((output / "quality.json").read_text())["rows"]


def test_every_arm_answers_and_nothing_is_asked_twice(whole: ServerProcess, tmp_path: pathlib.Path) -> None:
    rows = evaluate(whole, tmp_path)
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    arms = {"full", "quest", "window", "recency", "evidence", "quest_apart", "plain"}
    judged = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(answers) == len(judged) == 12 * len(arms) and {row["arm"] for row in judged} == arms
    found = {(row["task"], row["arm"]): row for row in rows}
    columns = {
        "suite",
        "task",
        "length",
        "model",
        "arm",
        "budget",
        "accuracy",
        "delta",
        "delta_ci_low",
        "delta_ci_high",
    }
    columns |= {"n", "footprint", "run"}
    assert all(columns <= set(row) for row in rows)
    needle = {arm: found["niah_single_1", arm] for arm in arms}
    assert needle["full"]["accuracy"] > 0 and needle["full"]["footprint"] == 1.0
    assert len({needle[arm]["accuracy"] for arm in ("full", "evidence", "quest", "quest_apart", "plain")}) == 1
    assert needle["recency"]["accuracy"] < needle["full"]["accuracy"]
    for arm in ("quest", "window", "recency", "evidence"):
        assert needle[arm]["resident"] == pytest.approx(0.25, abs=0.05)  # 8 of 32 or 33 pages
        assert needle[arm]["resident"] < needle[arm]["footprint"] < needle[arm]["resident"] + 0.05
    assert found["kv_shared", "full"]["n"] == 10
    for row in judged:
        if row["arm"].endswith("_apart"):
            assert not row["cached_tokens"]
        elif row["arm"] != "full":
            assert row["prompt_tokens"] - row["cached_tokens"] <= 64, "full attention has brought it into the tree"
            assert bool(row.get("sets")) == (row["arm"] != "plain")
    for name in ("quality.md", "errors.json", "quality-smollm2.png", "depth-smollm2.png"):
        assert (tmp_path / name).stat().st_size > 0
    errors = json.loads((tmp_path / "errors.json").read_text())
    assert any(entry["arm"] == "recency" and entry["windows"][0]["missing"] for entry in errors["answers"])
    missed = [w for entry in errors["answers"] if entry["arm"] == "window" for w in entry["windows"] if w["missing"]]
    assert missed, "the last pages have no needle"
    for window in missed:
        assert [page for page, _, _ in window["scores"]] == window["missing"]
        assert all(score < window["lowest"] and rank > 0 for _, score, rank in window["scores"])

    before = whole.get("/lsa/status")["radix"]
    assert evaluate(whole, tmp_path) == rows
    assert whole.get("/lsa/status")["radix"] == before, "a second run has everything"
    lines = (tmp_path / "answers.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "answers.jsonl").write_text("".join(lines[:-1]) + lines[-1][:50])
    again = evaluate(whole, tmp_path)
    assert whole.get("/lsa/status")["radix"]["prompt_tokens"] > before["prompt_tokens"]
    assert [row["accuracy"] for row in again] == [row["accuracy"] for row in rows]


def test_full_attention_and_all_pages_are_0_from_full_attention(whole: ServerProcess, tmp_path: pathlib.Path) -> None:
    """Exactly: alone on the server, every pass of a question has the same shapes. Few pages are far from it."""
    arguments = ["eval", "--url", whole.url, "--suites", "ruler", "--tasks", "niah_single_2", "--lengths", "2048"]
    arguments += ["--samples", "1", "--arms", "quest", "recency", "--budgets", "1.0", "0.25", "--together", "1"]
    arguments += ["--kl", "--output", str(tmp_path)]
    assert main(arguments) == 0
    rows = {row["label"]: row for row in map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())}
    assert all(row["kl_steps"] > 0 and row["kl_outside"] < 0.5 for row in rows.values())
    for label in ("full", "quest 100.0%", "recency 100.0%"):
        assert rows[label]["kl"] == 0.0
    assert 0.0 < rows["quest 25.0%"]["kl"] < rows["recency 25.0%"]["kl"]
    assert "; KL 0.0000 (0.0000 to 0.0000)" in (tmp_path / "quality.md").read_text()
    assert len(list(tmp_path.glob("kl-*.png"))) == 1
    before = whole.get("/lsa/status")["radix"]
    assert main(arguments) == 0
    assert whole.get("/lsa/status")["radix"] == before, "what was compared is not compared again"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--url", "http://127.0.0.1:9"], "is the server running?"),
        (["--arms", "lsa", "--suites", "ruler", "--tasks", "niah_single_1"], "use one of quest, recency, random, full"),
        (["--tasks", "niah"], "--tasks niah: no suite asked for has it: use some of niah_single_1"),
        (["--texts", "/nowhere"], "--texts /nowhere: has no .txt, .md or .rst files"),
        (["--qa", "/nowhere"], "--qa /nowhere: has neither squad.json nor hotpotqa.json"),
        (["--ruler-texts", "/nowhere"], "--ruler-texts /nowhere: has no PaulGrahamEssays.json"),
        (["--qmsum", "/nowhere.jsonl"], "/nowhere.jsonl cannot be read"),
        (["--longbench-v2", "/nowhere.json"], "/nowhere.json cannot be read"),
        (["--samples", "0"], "--samples 0 is too small"),
        (["--budgets", "2"], "--budgets 2.0 is out of range"),
        (["--lengths", "500"], "500 tokens are too few for this task"),
        (["--endpoint", "full=http://x"], "--endpoint full=http://x: write NAME="),
        (["--suites"], "there is nothing to ask"),
    ],
    ids=lambda value: value[0].removeprefix("--") if isinstance(value, list) else "",
)
def test_wrong_use_is_refused(
    arguments: list[str], words: str, whole: ServerProcess, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ["eval", "--url", whole.url, "--lengths", "2048", "--samples", "1", "--output", str(tmp_path)]
    assert main([*start, *arguments]) == 1
    assert words in capsys.readouterr().err
