"""Make every table, number and picture of README and docs that is of a measurement, from docs/results/*.json.

python scripts/figures.py          # write them
python scripts/figures.py --check  # fail if they are not what would be written

* Pictures, with the digest of what they show; ``serving.csv``, ``prefill.csv``; ``quality*.md``.
* ``runs.json``: which command, on which machine, at which commit, made how many rows of a file.
* Tables between marks in a page.
* Numbers of README and pages: ``docs/promises.md`` says which row each is of. A number that a new result changes is
  rounded as the old one was, there and in the page.

Of no file here: ``results/depth-*.png``, which ``sglang-lsa eval`` draws from every answer, and ``view.png``, which is
what a browser shows.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import re
import runpy
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import dsv4_tables
import group_load_tables
import quality_larger_tables
import quality_tables
import result_pictures
import result_runs
from result_pictures import Picture, draw, stamp_of

from sglang_lsa.bench.prefill_report import PREFILL
from sglang_lsa.bench.report import SERVING
from sglang_lsa.evaluation.summary import write_markdown

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
PROMISES = ROOT / "docs" / "promises.md"
NUMBER = re.compile(r"(?<![\w.,-])\d+(?:,\d{3})*(?:\.\d+)?(?!\d|[.,]\d)")
ROW = re.compile(r"([\w.-]+\.json) ([^:]*): ([\w-]+) = (\S+)")
"""File, ``key=value`` pairs that find one row, field, its value as the page prints it."""
TABLE = re.compile(r"(<!-- scripts/figures.py writes (\w+) -->\n\n)(?:(?!<!-- ).)*(<!-- to here -->)", re.DOTALL)
FILES = ("", "-60", "-fp8", "-calibrated", "-heads", "-widen", "-copies", "-smollm2", "-smollm2-calibrated")
LARGER = ("", "-kl", "-arms", "-curve")
QUALITY = (*(f"quality{name}" for name in FILES), *(f"quality-1.5b{name}" for name in LARGER))
"""Files of ``sglang-lsa eval``, without their endings."""


class Stale(Exception):
    """A page and its results do not fit together; the message says where."""


# --- results ---------------------------------------------------------------------------------------------------------


@functools.cache
def content_of(file: str) -> Any:
    return json.loads((RESULTS / file).read_text())


def rows_of(file: str) -> list[dict[str, Any]]:
    """Rows of a result file. Of ``demo.json``: its phases and speeds, and the whole."""
    content = content_of(file)
    if isinstance(content, list):
        return content
    if "phases" in content:
        return [{**content, "tokens": sum(answer["prompt_tokens"] for answer in content["full_attention"])}] + [
            {**row, "right": sum(answer["right"] for answer in row["answers"]), **(row["busiest"] or {})}
            if "answers" in row
            else {**row, "tpot_ms": row["tpot"] * 1e3}
            for row in (*content["phases"], *content["speed"])
        ]
    return content["rows"]


def looked_up(file: str, where: str) -> list[dict[str, Any]]:
    """Rows with these ``key=value`` pairs, in which ``_`` stands for a space."""
    wanted = dict(pair.split("=", 1) for pair in where.split())
    return [
        row
        for row in rows_of(file)
        if all(str(row.get(key)).replace(" ", "_") == value for key, value in wanted.items())
    ]


def value_of(proof: re.Match[str]) -> float:
    """The value that a proof names.

    Raises:
        Stale: no row, or more than one.
    """
    file, where, field, _ = proof.groups()
    rows = looked_up(file, where)
    if len(rows) != 1:
        raise Stale(f"docs/promises.md: {len(rows)} rows of {file} have {where}: name one")
    return rows[0][field]


def rounded(value: float, like: str) -> str:
    """As many decimals as ``like``; that itself where it is one of the two roundings of a half."""
    decimals = len(like.partition(".")[2])
    if abs(value - float(like.replace(",", ""))) <= 0.5 * 10**-decimals + 1e-9:
        return like
    return f"{value:,.{decimals}f}"


# --- numbers of pages ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """One line of ``docs/promises.md``: what a page says, and the tests and rows behind it."""

    page: pathlib.Path
    quote: str
    proofs: tuple[str, ...]
    line: str


def claims() -> list[Claim]:
    found, page = [], ROOT / "README.md"
    for line in PROMISES.read_text().splitlines():
        if heading := re.match(r"## .*\]\((\S+)\)", line):
            page = (PROMISES.parent / heading[1]).resolve()
        elif line.startswith("| ") and not line.startswith(("| ---", "| the page", "| the README")):
            quote, proofs = line.strip("| ").split(" | ")
            found.append(Claim(page, quote, tuple(re.findall(r"`([^`]+)`", proofs)), line))
    return found


def plain(text: str) -> str:
    """Markdown as it reads: links by their text, no emphasis, one space between words."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return " ".join(re.sub(r"\*+(?=\S)|(?<=\S)\*+", "", text).split())


def blocks(text: str) -> list[str]:
    """Paragraphs, items of lists and rows of tables, without code and headings, still in Markdown."""
    text = re.sub(r"^```.*?^```|^\|[^\n]*\n\| ---[^\n]*$", "", text, flags=re.M | re.S)
    text = re.sub(r"^(?=\* |\|)", "\n", text, flags=re.M)
    return [part.strip() for part in text.split("\n\n") if part.strip() and not part.lstrip().startswith("#")]


def pages() -> dict[pathlib.Path, str]:
    """README, pages and the page of promises, with the numbers that the results have now; the runs.

    Raises:
        Stale: a quote stands nowhere, or a row is missing.
    """
    texts = {path: path.read_text() for path in {claim.page for claim in claims()} | {PROMISES}}
    for claim in claims():
        proofs = [proof for text in claim.proofs if (proof := ROW.fullmatch(text))]
        if not proofs:
            continue
        places = [block for block in blocks(texts[claim.page]) if plain(claim.quote) in plain(block)]
        if not places:
            raise Stale(f"{claim.page.name} does not say: {claim.quote}")
        news = [rounded(value_of(proof), proof[4]) for proof in proofs]
        olds = [proof[4] for proof in proofs]
        for place in places:
            texts[claim.page] = texts[claim.page].replace(place, _replaced(place, olds, news))
        line = claim.line
        for proof, new in zip(proofs, news, strict=True):
            line = line.replace(f"`{proof[0]}`", f"`{proof[0].removesuffix(proof[4])}{new}`")
        texts[PROMISES] = texts[PROMISES].replace(claim.line, line)
    made = tables()
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        text = texts.get(path, path.read_text())
        texts[path] = TABLE.sub(lambda found: f"{found[1]}{made[found[2]]}\n\n{found[3]}", text)
    texts[RESULTS / "runs.json"] = "[\n" + ",\n".join(json.dumps(run) for run in result_runs.of(RESULTS)) + "\n]\n"
    return texts


def _replaced(block: str, olds: list[str], news: list[str]) -> str:
    """The block with each of its numbers that is an old one as the new one."""
    left = list(zip(olds, news, strict=True))

    def one(number: re.Match[str]) -> str:
        pair = next((pair for pair in left if pair[0] == number[0]), (number[0], number[0]))
        if pair in left:
            left.remove(pair)
        return pair[1]

    return NUMBER.sub(one, block)


def ablation(hardware: str, without: Sequence[str] = ()) -> str:
    """Of ``docs/results/ablation.py``, of one machine. ``without``: settings that are not shown."""
    rows = [row for row in rows_of("ablation.json") if row["hardware"] == hardware]
    table = runpy.run_path(str(RESULTS / "ablation.py"))["table"]
    return table([row for row in rows if not set(without) & set(row["changed"])]).strip()


def tables() -> dict[str, str]:
    """Those that stand between marks in a page, by name."""
    quality, larger = rows_of("quality.json"), rows_of("quality-1.5b.json")
    return {
        "runs": result_runs.table(result_runs.of(RESULTS)),
        "ruler_60": quality_tables.ruler_60(rows_of("quality-60.json")),
        "ruler": quality_tables.ruler(quality),
        "fp8": quality_tables.fp8(rows_of("quality-fp8.json")),
        "calibrated": quality_tables.calibrated(rows_of("quality-calibrated.json")),
        "differences": quality_tables.differences(quality),
        "larger": quality_larger_tables.averages(larger),
        "larger_tasks": quality_larger_tables.tasks(larger),
        "larger_kl": quality_larger_tables.kl(rows_of("quality-1.5b-kl.json")),
        "larger_arms": quality_larger_tables.arms(rows_of("quality-1.5b-arms.json")),
        "larger_curve": quality_larger_tables.curve(rows_of("quality-1.5b-curve.json")),
        "larger_memory": quality_larger_tables.memory(larger),
        "calibrations": quality_larger_tables.calibrations(rows_of("quality-heads.json")),
        "smallest_calibrated": quality_larger_tables.smallest(rows_of("quality-smollm2-calibrated.json")),
        "qmsum": quality_larger_tables.qmsum(larger),
        "copies": quality_larger_tables.copies(rows_of("quality-copies.json")),
        "widen": quality_larger_tables.widen(larger, rows_of("quality-widen.json")),
        "ablation_gpu": ablation("H100"),
        "ablation_cpu": ablation("2 CPU cores", without=("seed", "steps", "loss")),
        "kv": quality_tables.kv(quality),
        "memory": quality_tables.memory(quality),
        "mrcr": quality_tables.mrcr(quality),
        "passage": quality_tables.passage(quality),
        "dsv4": dsv4_tables.speed(rows_of("dsv4.json")),
        "group_answers": group_load_tables.group_answers(rows_of("group-quality.json")),
        "load": group_load_tables.load(rows_of("load.json"), "agents"),
        "load_paced": group_load_tables.load(rows_of("load-paced.json"), "documents", "documents by turns"),
        "load_documents": group_load_tables.load(rows_of("load.json"), "documents"),
    }


# --- pictures and files ----------------------------------------------------------------------------------------------


def pictures() -> dict[pathlib.Path, Picture]:
    return result_pictures.of(ROOT / "docs", rows_of, content_of("demo.json"))


def files() -> dict[pathlib.Path, str]:
    """Results as their benchmarks write them now, and what these make of them."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for results in (SERVING, PREFILL):
            (folder / f"{results.name}.json").write_text((RESULTS / f"{results.name}.json").read_text())
            results.keep(folder, [])
        for quality in QUALITY:
            write_markdown(folder / f"{quality}.md", rows_of(f"{quality}.json"))
        made = [path for path in folder.iterdir() if path.suffix in (".json", ".csv", ".md")]
        return {RESULTS / path.name: path.read_bytes().decode() for path in made}


def settle(texts: dict[pathlib.Path, str], check: bool) -> list[pathlib.Path]:
    """Write what is not there yet, or only say so."""
    stale = [path for path, text in texts.items() if not path.exists() or path.read_bytes().decode() != text]
    if not check:
        for path in stale:
            path.write_bytes(texts[path].encode())
        content_of.cache_clear()
    return stale


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    try:
        stale = settle(files(), check) + settle(pages(), check)  # rows of earlier versions are brought up to date first
    except Stale as error:
        print(f"figures.py: {error}", file=sys.stderr)
        return 1
    drawn = {path: picture for path, picture in pictures().items() if stamp_of(path) != picture.stamp}
    if not check:
        for path, picture in drawn.items():
            draw(path, picture)
    for path in (*stale, *drawn):
        print(path.relative_to(ROOT), "is not what the results say: run python scripts/figures.py" if check else "")
    return int(check and bool(stale or drawn))


if __name__ == "__main__":
    sys.exit(main())
