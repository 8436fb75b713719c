"""The comparison of selectors on a server: what counts as found, and the summary. The run itself: tests/server."""

from __future__ import annotations

import json
import pathlib
import random
import re

import numpy as np
import pytest
import torch

from sglang_lsa.config.command_line import read_command_line
from sglang_lsa.config.flags import config_from_args
from sglang_lsa.engine.selection import budget_pages
from sglang_lsa.evaluation import resident
from sglang_lsa.evaluation.calibration import recalls
from sglang_lsa.evaluation.selectors import VALUES, flags, summary, table, write
from sglang_lsa.indexer.watch import Seen
from sglang_lsa.texts.families import EVALUATION, FAMILIES
from sglang_lsa.texts.haystack import Texts


@pytest.mark.parametrize("split", ["train", "held-out"])
@pytest.mark.parametrize("family", sorted(VALUES))
def test_the_values_of_every_family_are_in_its_text(family: str, split: str) -> None:
    made = {**FAMILIES, **EVALUATION}[family](random.Random(0), split, Texts(split), 4000)
    values = re.findall(VALUES[family], made.answer)
    assert values
    assert all(value in made.text for value in values)
    assert not any(value in made.question for value in values)


@pytest.mark.parametrize(
    ("given", "pages", "budgets"),
    [
        pytest.param(flags("m", None, ""), 64, (0.25, 0.135), id="selectors"),
        pytest.param(resident.FLAGS, 104, (0.135, 0.07), id="resident"),
    ],
)
def test_sets_of_two_budgets_are_two(given: list[str], pages: int, budgets: tuple[float, float]) -> None:
    config = config_from_args(read_command_line(given))
    assert config is not None and config.min_context == 1024
    assert len({budget_pages(pages, budget, config.least_pages()) for budget in budgets}) == 2


def test_recall_is_of_the_budgets_that_are_asked_for() -> None:
    scores = np.linspace(1.0, 0.0, 63, dtype=np.float32)
    seen = Seen(torch.zeros(1, 1, 63), torch.zeros(1, 1, 63), evidence=(10, 20))
    rows = recalls(seen, {"arm": scores}, 64 * 64, (0.5, 0.25, 0.1))
    assert [row["recall"] for row in rows] == [1.0, 0.5, 0.0]


def test_arguments_of_the_server_win() -> None:
    given = flags("m", "smollm2-135m-instruct", "--lsa-config '{\"floor_tokens\": 640}' --lsa-min-context 512")
    config = config_from_args(read_command_line(given))
    assert config is not None
    assert (config.floor_tokens, config.min_context, config.indexer) == (640, 512, "smollm2-135m-instruct")


def row(prompt: str, family: str, policy: str, budget: float, found: float) -> dict[str, object]:
    return {"prompt": prompt, "family": family, "policy": policy, "budget": budget, "found": found}


def test_summary_is_paired_with_full_attention() -> None:
    rows = [
        row("a", "facts", "full", 1.0, 1.0),
        row("a", "facts", "quest", 0.07, 0.5),
        row("b", "pairs", "full", 1.0, 0.5),
        row("b", "pairs", "quest", 0.07, 0.5),
    ]
    found = {(r["family"], r["policy"]): r for r in summary(rows)}
    assert found["all", "full"]["found"] == 75.0
    assert found["all", "full"]["delta"] == 0.0
    assert found["all", "quest"]["delta"] == -25.0
    assert (found["all", "quest"]["delta_ci_low"], found["all", "quest"]["delta_ci_high"]) == (-50.0, 0.0)
    assert (found["facts", "quest"]["n"], found["facts", "quest"]["delta"]) == (1, -50.0)
    assert found["pairs", "quest"]["delta"] == 0.0
    assert table(list(found.values())).row_count == len(found)


def test_results_of_the_same_model_are_replaced(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "selectors.json"
    for result in ({"model": "a", "n": 1}, {"model": "b", "n": 2}, {"model": "a", "n": 3}):
        write(path, result)
    assert json.loads(path.read_text()) == [{"model": "b", "n": 2}, {"model": "a", "n": 3}]
