"""Promise 2: reading every page gives the tokens of stock SGLang, greedy, however the request was scheduled.

The first six layers of the embedded model in float32, where stock's tokens do not depend on what else runs; prompts
that do not fit the device pool are compared in ``test_streamed_prefill``, whole models on a GPU.
"""

from __future__ import annotations

import re

import pytest
from prompts import needle, prose
from serving import TIE, Answer, complete_together, flush_cache, gap_at_first_difference, run_example
from transformers import AutoTokenizer

from sglang_lsa.client import get_requests, savings
from sglang_lsa.server_process import ServerProcess

pytestmark = [pytest.mark.server, pytest.mark.slow]
NEW_TOKENS = 16
SHARED = 896
"""Tokens of the shared prefix: whole pages."""
Prompt = list[int]


def groups(model_path: str) -> list[list[Prompt]]:
    """31 prompts of 50 to 1,900 tokens: batched, in up to four prefill chunks, and over a shared prefix."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)

    def tokens(text: str) -> Prompt:
        return tokenizer(text)["input_ids"]

    def random_words(length: int, seed: int) -> Prompt:
        return tokens(prose(length, seed))[:length]

    batched = ((50, 100, 150, 200, 250, 300, 350), (400, 450, 500), (550, 600, 650), (700, 750), (900, 950))
    shared = random_words(SHARED, 99)
    questions = [shared + tokens(f" {i}")[-1:] + random_words(40 + 7 * i, 200 + i) for i in range(9)]
    long = [tokens(needle(length, 0.3, length).prompt) for length in (1050, 1250, 1450, 1600, 1800)]
    assert max(map(len, long)) < 1900
    return [
        *([random_words(length, length) for length in lengths] for lengths in batched),
        [questions[0]],
        questions[1:],
        *([prompt] for prompt in long),
    ]


def answer_all(
    server: ServerProcess, groups: list[list[Prompt]], custom_params: dict | None = None
) -> list[list[Answer]]:
    """Every group starts from an empty cache, unless it shares the prefix of the one before."""
    answers = []
    prefix: Prompt = []
    for group in groups:
        if group[0][:SHARED] != prefix:
            flush_cache(server)
        prefix = group[0][:SHARED]
        answers.append(complete_together(server, group, [NEW_TOKENS] * len(group), custom_params))
    return answers


@pytest.mark.release
def test_full_budget_equals_stock(stock: ServerProcess, small: ServerProcess, model_path: str) -> None:
    """Budget 1.0 for all prompts; then LSA switched off in the request, for some."""
    everything = groups(model_path)
    reference = answer_all(stock, everything)
    compare(reference, answer_all(small, everything, {"lsa": {"budget": 1.0}}), "budget 1.0")
    some = slice(1, -2)
    compare(reference[some], answer_all(small, everything[some], {"lsa": {"enabled": False}}), "switched off")


def compare(reference: list[list[Answer]], answers: list[list[Answer]], name: str) -> None:
    pairs = [pair for group in zip(reference, answers, strict=True) for pair in zip(*group, strict=True)]
    gaps = {number: gap for number, pair in enumerate(pairs) if (gap := gap_at_first_difference(*pair)) is not None}
    print(f"{name}: {len(pairs) - len(gaps)} of {len(pairs)} equal to stock; gaps where others part: {gaps}")
    assert all(gap < TIE for gap in gaps.values()), "an answer parts from stock's where stock leaves no doubt"
    assert len(gaps) <= 1


def test_throughput_beside_stock(stock: ServerProcess, small: ServerProcess) -> None:
    """``examples/throughput.py`` asks both servers, and says that their pools differ."""
    before = small.get("/lsa/status")["radix"]
    flags = ("--requests", 2, "--words", 1200, "--tokens", 8, "--stock", stock.url)
    printed = run_example("throughput", small, *flags)
    status = small.get("/lsa/status")
    table = re.findall(r"^ *(\S[^\n]*?)((?: +[\d.]+x?){2,3})$", printed, flags=re.M)
    rows = {name: [float(cell.rstrip("x")) for cell in cells.split()] for name, cells in table}
    for name in ("output tokens/s", "TTFT p50 ms", "TTFT p99 ms", "TPOT p50 ms", "TPOT p99 ms"):
        ours, theirs, ratio = rows[name]
        assert ours > 0 and theirs > 0
        assert ratio == pytest.approx(ours / theirs, rel=0.05, abs=0.006)
    assert rows["pool MB"][0] == pytest.approx(status["physical"]["kv_bytes"] / 1e6, abs=1.2)
    assert rows["pool MB"][1] > 2 * rows["pool MB"][0]
    assert "Not a fair comparison" in printed
    assert str(savings(status, get_requests(small.url)["finished"][-2:])) in printed
    asked = status["radix"]["prompt_tokens"] - before["prompt_tokens"]
    assert f"of {asked:,} prompt tokens" in printed
