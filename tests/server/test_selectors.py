"""``sglang-lsa bench selectors`` with the shipped indexer: it keeps a page in running text that is no recent one.

How far it is ahead of Quest takes more prompts than six to say: docs/results/selectors.json, docs/evaluation.md.
"""

from __future__ import annotations

import json
import pathlib
from pydoc_data import topics

import pytest
from rich.console import Console

from sglang_lsa.evaluation.selectors import run

pytestmark = [pytest.mark.server, pytest.mark.slow]
FLAGS = "--chunked-prefill-size 2048 --lsa-device-tokens 32768 --lsa-host-memory-gb 2"


def test_the_shipped_indexer_finds_what_recency_loses(model_path: str, tmp_path: pathlib.Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for number, topic in enumerate(topics.topics.values()):
        (texts / f"{number}.txt").write_text(topic)
    result = run(
        tmp_path,
        Console(quiet=True),
        model=model_path,
        name="smollm2",
        indexer="smollm2-135m-instruct",
        families=["needle"],
        lengths=[3600],
        samples=6,
        texts=texts,
        budgets=[0.07],
        policies=["indexer", "quest", "recency"],
        server_args=FLAGS,
        command="test",
    )
    found = {row["policy"]: row["found"] for row in result["summary"] if row["family"] == "needle"}
    print(found)
    assert found["full"] >= 2 / 6 * 100, "the model must be able to do the task"
    assert found["indexer"] >= found["full"] - 1 / 6 * 100 - 1e-6
    assert found["indexer"] >= max(found["quest"], found["recency"] + 1 / 6 * 100) - 1e-6
    assert json.loads((tmp_path / "selectors.json").read_text()) == [result]
