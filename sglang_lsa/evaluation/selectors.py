"""``sglang-lsa bench selectors``: how many of the asked values are in the answers, by who chooses the pages."""

from __future__ import annotations

import json
import pathlib
import re
import shlex
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from sglang_lsa.evaluation.paired import against_full, shown
from sglang_lsa.provenance import commit
from sglang_lsa.server_process import LSA, ServerProcess
from sglang_lsa.texts.corpus import Prompt, Tokens, make_prompts

FULL = "full"
VALUES = {
    "needle": r"\d{7}",
    "facts": r"\d{7}",
    "filler": r"\d{7}",
    "pairs": r'": "([0-9a-f]{8})"',
    "records": r"tracking (\d+)",
}
"""What of a family's answer must be found, as a pattern."""


def run(
    output: pathlib.Path,
    console: Console,
    *,
    model: str,
    name: str,
    indexer: str | None,
    families: Sequence[str],
    lengths: Sequence[int],
    samples: int,
    texts: pathlib.Path | None,
    budgets: Sequence[float],
    policies: Sequence[str],
    server_args: str,
    command: str,
) -> dict[str, Any]:
    """Ask held-out questions about contexts under full attention and under each policy at each budget.

    Args:
        model: path or hub name.
        name: of the model, in the results.
        indexer: checkpoint folder; needed for the policy ``indexer``.
        samples: prompts of each family and length.
        texts: folder of the haystacks; None for Python's library.

    Returns:
        What is added to ``selectors.json``: a row for each prompt, policy and budget with the share of ``found``
        values, and the summary.

    Raises:
        RuntimeError: the server or a request failed.
        ValueError: prompts cannot be made as asked.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.model_max_length = 1 << 40
    prompts = list(make_prompts(tokenizer, "held-out", lengths, samples, families, texts))
    arms = [(FULL, 1.0), *((policy, budget) for policy in policies for budget in budgets)]
    rows = []
    with (
        tempfile.TemporaryDirectory() as folder,
        ServerProcess(LSA, flags(model, indexer, server_args), pathlib.Path(folder) / "server.log") as server,
    ):
        server.wait_until_ready()
        for prompt, tokens in tqdm(prompts, desc="questions", unit="prompt"):
            rows += _ask_all(server, tokenizer, prompt, tokens, arms)
    result: dict[str, Any] = {
        "model": name,
        "commit": commit(),
        "command": command,
        "summary": summary(rows),
        "rows": rows,
    }
    output.mkdir(parents=True, exist_ok=True)
    write(output / "selectors.json", result)
    console.print(table(result["summary"]))
    return result


def flags(model: str, indexer: str | None, server_args: str) -> list[str]:
    """Of the server, whose sets the budgets alone bound: with the floor of short contexts they would not differ."""
    found = ["--model-path", model, "--skip-server-warmup", "--lsa-min-context", "1024"]
    found += ["--lsa-config", '{"floor_tokens": 0}', *shlex.split(server_args)]
    return found if indexer is None else [*found, "--lsa-indexer", indexer]


def write(path: pathlib.Path, result: dict[str, Any]) -> None:
    """Add to the results in ``path``; an earlier one of the same model is replaced."""
    earlier = json.loads(path.read_text()) if path.exists() else []
    kept = [other for other in earlier if other["model"] != result["model"]]
    path.write_text(json.dumps([*kept, result], indent=1) + "\n")


def _ask_all(
    server: ServerProcess, tokenizer: Any, prompt: Prompt, tokens: Tokens, arms: Sequence[tuple[str, float]]
) -> list[dict[str, Any]]:
    """Full attention first, so that the others find the context in the radix tree; then those, together."""
    values = re.findall(VALUES[prompt.family], prompt.answer)
    question = tokens.ids[: len(tokens.ids) - tokens.answer]

    def ask(arm: tuple[str, float]) -> dict[str, Any]:
        policy, budget = arm
        options = {"policy": policy} if policy == FULL else {"policy": policy, "budget": budget}
        parameters = {"temperature": 0, "max_new_tokens": tokens.answer + 24, "custom_params": {"lsa": options}}
        answer = server.post("/generate", {"input_ids": question, "sampling_params": parameters})["text"]
        return {
            "prompt": prompt.name,
            "family": prompt.family,
            "tokens": len(question),
            "policy": policy,
            "budget": budget,
            "found": sum(value in answer for value in values) / len(values),
            "answer": answer,
        }

    with ThreadPoolExecutor(len(arms)) as pool:
        return [ask(arms[0]), *pool.map(ask, arms[1:])]


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each policy and budget, over all prompts and by family: the found share in points of 100, and its difference
    to full attention on the same prompts with a 95 % interval (bootstrap over prompts)."""
    rng = np.random.default_rng(0)
    found = []
    for family in ("all", *dict.fromkeys(row["family"] for row in rows)):
        members = [row for row in rows if family in ("all", row["family"])]
        full = {row["prompt"]: row["found"] for row in members if row["policy"] == FULL}
        for policy, budget in dict.fromkeys((row["policy"], row["budget"]) for row in members):
            own = [row for row in members if (row["policy"], row["budget"]) == (policy, budget)]
            delta = np.array([row["found"] - full[row["prompt"]] for row in own]) * 100
            found.append(
                {
                    "family": family,
                    "policy": policy,
                    "budget": budget,
                    "n": len(own),
                    "found": float(np.mean([row["found"] for row in own]) * 100),
                    **against_full(delta, rng),
                }
            )
    return found


def table(found: Sequence[dict[str, Any]]) -> Table:
    """The summary, to read."""
    answers = Table(
        "family", "policy", "budget", "prompts", "found", "against full", "95 %", title="asked values in answers"
    )
    for row in found:
        cells = (f"{row['budget']:.1%}", str(row["n"]), f"{row['found']:.1f}", *shown(row))
        answers.add_row(row["family"], row["policy"], *cells)
    return answers
