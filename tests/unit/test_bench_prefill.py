"""``bench prefill`` without a GPU: what is compared, and what is measured."""

from __future__ import annotations

import csv
import io
import pathlib
from typing import Any

import pytest
from bench_rows import ATTENDING, GB, LSA, STOCK
from rich.console import Console

from sglang_lsa.bench import prefill_groups, prefill_report
from sglang_lsa.bench.prefill_report import PREFILL
from sglang_lsa.bench.report import SERVING
from sglang_lsa.bench.shapes import SHAPES
from sglang_lsa.bench.systems import SYSTEMS
from sglang_lsa.config import PAGE_SIZE


def prefill_row(system: str, seconds: float, context: int = 131_072, **other: Any) -> dict[str, Any]:
    """Of a new prompt; of a question, when told how it reads its prefix."""
    found = {
        "model": "8b",
        "system": system,
        "pool_tokens": 140_032,
        "kv_pool_bytes": 140_032 * 131_072,
        "workload": "question" if "prefill" in other else "ttft",
        "context": context,
        "prefill": None,
        "device": None,
        "ttft_s": seconds,
        "ttft_all_s": [seconds],
        "gpu": "GPU of a test",
        "server_args": "",
        "pool": "full",
        **ATTENDING[system],
    }
    lsa = {"streamed_bytes": 0, "recalled_bytes": 3 << 30, "staging_bytes": 300 << 20} if system == "lsa" else {}
    return found | lsa | other


QUARTER = {"pool": "quarter", "pool_tokens": 32_768, "kv_pool_bytes": 4 << 30, "streamed_bytes": 60 << 30}
NEW_PROMPTS = [
    prefill_row("stock", 10.0),
    prefill_row("lsa", 10.5),
    prefill_row("lsa", 12.0, **QUARTER),
    prefill_row("lsa", 60.0, 400_000, pool="16gb"),
]
FLASHINFER_PROMPT = prefill_row("stock-flashinfer", 15.0)
QUESTIONS = [
    prefill_row("lsa", 9.0, 263_168, prefill="exact", device="cold"),
    prefill_row("lsa", 1.5, 263_168, prefill="resident", device="cold"),
    prefill_row("lsa", 8.0, 263_168, prefill="exact", device="warm"),
    prefill_row("lsa", 0.5, 263_168, prefill="resident", device="warm"),
]


def ratios(rows: list[dict[str, Any]]) -> list[str]:
    found = prefill_report.ratios(rows, ", ")
    return [found.get(id(row), "") for row in rows]


def test_prompts_are_compared_with_stock_and_questions_with_exact_answers() -> None:
    assert ratios(QUESTIONS) == ["", "6.00x faster", "", "16.00x faster"]
    assert ratios([*NEW_PROMPTS, *QUESTIONS[:2]]) == ["", "1.05x stock", "1.20x stock", "", "", "6.00x faster"]
    assert ratios([FLASHINFER_PROMPT, *NEW_PROMPTS[:2]]) == ["", "", "1.05x stock, 0.70x stock-flashinfer"]


def test_the_ratio_of_a_prompt_is_written_for_the_faster_stock_and_for_each(tmp_path: pathlib.Path) -> None:
    PREFILL.write(tmp_path, [*NEW_PROMPTS, FLASHINFER_PROMPT, *QUESTIONS])
    rows = {(row["system"], row["pool"], row["workload"]): row for row in PREFILL.read(tmp_path)}
    found = {name: value for name, value in rows["lsa", "quarter", "ttft"].items() if name.startswith("ttft_ratio")}
    assert found == {
        "ttft_ratio": 1.2,
        "ttft_ratio_to": "stock",
        "ttft_ratio_to_stock": 1.2,
        "ttft_ratio_to_stock-flashinfer": 0.8,
    }
    assert not any("ttft_ratio" in row for key, row in rows.items() if key[::2] != ("lsa", "ttft"))


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([], id="none"),
        pytest.param(NEW_PROMPTS[1:], id="no stock"),
        pytest.param([NEW_PROMPTS[0], NEW_PROMPTS[3]], id="stock of another prompt"),
        pytest.param([QUESTIONS[1], QUESTIONS[3]], id="no exact answer"),
        pytest.param([QUESTIONS[0], QUESTIONS[3]], id="exact on a cold device, resident on a warm one"),
        pytest.param([QUESTIONS[0] | {"pool_tokens": 64}, QUESTIONS[1]], id="exact with another pool"),
    ],
)
def test_what_cannot_be_compared_has_no_ratio(rows: list[dict[str, Any]]) -> None:
    assert ratios(rows) == [""] * len(rows)


def test_the_table_of_prefill() -> None:
    text = io.StringIO()
    Console(file=text, width=220).print(prefill_report.table([*NEW_PROMPTS, *QUESTIONS]))
    lines = [line for line in text.getvalue().splitlines() if "8b" in line]
    assert len(lines) == 8
    for line, parts in (
        (lines[0], ("stock", " fa3 ", "bfloat16", " 1 ", "full 17.1 GB", "131,072", "10.000", " - ")),
        (
            lines[1],
            ("lsa", "fa3/flashinfer", " 64 ", "full 17.1 GB", "10.500", "1.05x stock", " 0.0 ", " 3.0 ", " 300.0 "),
        ),
        (lines[2], ("lsa", "quarter 4.0 GB", "12.000", "1.20x stock", " 60.0 ")),
        (lines[5], ("question", "263,168", "resident", "cold", "1.500", "6.00x faster")),
    ):
        for part in parts:
            assert part in line
    assert "x stock" not in lines[3] and "x faster" not in lines[4]


@pytest.mark.parametrize(
    "rows",
    [[], NEW_PROMPTS[:1], QUESTIONS[:1], [*NEW_PROMPTS, *QUESTIONS]],
    ids=["none", "a prompt", "a question", "all"],
)
def test_the_picture_of_prefill(rows: list[dict[str, Any]], tmp_path: pathlib.Path) -> None:
    prefill_report.plot(tmp_path / "prefill.png", rows)
    picture = (tmp_path / "prefill.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n") and len(picture) > 5000


def test_results_of_prefill_lie_beside_those_of_serving(tmp_path: pathlib.Path) -> None:
    """In files of their own, with a picture of their own; a later row of the same replaces an earlier one."""

    def write(rows: list[dict[str, Any]]) -> None:
        PREFILL.write(tmp_path, rows)

    SERVING.write(tmp_path, [STOCK, LSA])
    serving_files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write([*NEW_PROMPTS, *QUESTIONS])
    write([prefill_row("lsa", 11.0), QUESTIONS[0] | {"device": "hot"}])
    rows = PREFILL.read(tmp_path)
    times = {tuple(row[name] for name in prefill_report.KEY[:7]): row["ttft_s"] for row in rows}
    assert len(rows) == len(times) == 9
    assert times["8b", "lsa", "full", "ttft", 131_072, None, None] == 11.0
    assert times["8b", "lsa", "full", "question", 263_168, "exact", "cold"] == 9.0
    assert times["8b", "lsa", "quarter", "ttft", 131_072, None, None] == 12.0

    assert {path.name for path in tmp_path.iterdir()} == {
        *serving_files,
        *(f"prefill.{ending}" for ending in ("json", "csv", "png")),
    }
    assert all((tmp_path / name).read_bytes() == content for name, content in serving_files.items())
    with (tmp_path / "prefill.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [row["ttft_s"] for row in written] == [str(row["ttft_s"]) for row in rows]
    assert {row["streamed_bytes"] for row in written} == {"", "0", str(60 << 30)}


def test_the_rows_of_prefill_are_in_an_order_of_their_own(tmp_path: pathlib.Path) -> None:
    for folder, order in (("a", [*NEW_PROMPTS, *QUESTIONS]), ("b", [*QUESTIONS[::-1], *NEW_PROMPTS[::-1]])):
        (tmp_path / folder).mkdir()
        PREFILL.write(tmp_path / folder, order)
    assert PREFILL.read(tmp_path / "a") == PREFILL.read(tmp_path / "b")


GROUPS_OF_PREFILL = [
    *prefill_groups.groups(("full", "quarter", "16gb"), (), ("ttft", "question"), "auto"),
    *prefill_groups.groups(("full", "quarter", "16gb"), (131_072, 262_144), ("ttft", "question"), "fp8_e4m3"),
]


@pytest.mark.parametrize("group", GROUPS_OF_PREFILL, ids=lambda group: f"{group.name}-{group.pool_tokens}")
def test_the_mirror_holds_what_a_group_asks(group: prefill_groups.Group) -> None:
    """Pages that begin with a prompt end with it; the answers are a page each; resident questions leave nothing."""
    repeats = 3
    assert group.pool_tokens % PAGE_SIZE == 0
    assert group.host_tokens >= max(*group.prompts, 2 * prefill_groups.CHUNK) + PAGE_SIZE
    assert group.host_tokens >= group.pool_tokens + PAGE_SIZE
    if group.questions:
        fillers = -(-group.pool_tokens // prefill_groups.FILLER) * (prefill_groups.FILLER + PAGE_SIZE)
        asked = (2 * repeats + 1) * (prefill_groups.QUESTION + PAGE_SIZE)
        assert group.host_tokens >= prefill_groups.MEMORY + PAGE_SIZE + fillers + asked


def test_groups_of_prefill_are_what_their_names_say() -> None:
    full, quarter, sixteen, long, *quarters, fixed = GROUPS_OF_PREFILL
    assert full.pool_tokens >= prefill_groups.PROMPT + 2 * PAGE_SIZE
    assert quarter.pool_tokens * 4 == prefill_groups.PROMPT
    assert sixteen.pool_tokens * SHAPES["8b"].token_bytes() == 16 * GB
    assert [group.questions for group in (full, quarter, sixteen)] == [False, False, True]
    assert long.prompts == (131_072, 262_144) and long.pool_tokens >= 262_144 + 2 * PAGE_SIZE
    assert [(group.pool_tokens, group.prompts) for group in quarters] == [(32_768, (131_072,)), (65_536, (262_144,))]
    assert fixed.pool_tokens * SHAPES["8b"].token_bytes("fp8_e4m3") == 16 * GB


def test_groups_of_prefill_are_what_was_asked_for() -> None:
    assert prefill_groups.groups(("full", "quarter"), (), ("question",), "auto") == []
    (asked,) = prefill_groups.groups(("full", "16gb"), (), ("question",), "auto")
    assert (asked.name, asked.prompts, asked.questions) == ("16gb", (), True)
    assert asked.context > prefill_groups.MEMORY + prefill_groups.QUESTION


def test_stock_is_asked_for_what_its_pool_holds() -> None:
    stock, lsa = SYSTEMS["stock"], SYSTEMS["lsa"]
    assert [group.of_system(stock).prompts for group in GROUPS_OF_PREFILL] == [
        (131_072,),
        (),
        (),
        (131_072, 262_144),
        (),
        (),
        (131_072,),
    ]
    assert not any(group.of_system(stock).questions for group in GROUPS_OF_PREFILL)
    assert [group.of_system(lsa) for group in GROUPS_OF_PREFILL] == GROUPS_OF_PREFILL
