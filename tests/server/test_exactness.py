"""Promise 2: reading every page gives the tokens of stock SGLang, greedy, however the request was scheduled."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from prompts import needle, prose
from serving import Answer, complete, differs_at_a_tie, flush

from sglang_lsa.server_process import ServerProcess

pytestmark = [pytest.mark.server, pytest.mark.slow]
NEW_TOKENS = 16


def prompts() -> list[str]:
    """31 prompts of 50 to 7,000 tokens; some share long prefixes, the longest take four prefill chunks."""
    short = [prose(tokens, seed) for seed, tokens in enumerate(range(50, 850, 50))]
    medium = [needle(tokens, 0.3, tokens).prompt for tokens in (1200, 1500, 1900, 2300)]
    shared = [prose(900, 99) + f"\n\nQuestion {i}: " + prose(20 + 7 * i, 200 + i) for i in range(8)]
    long = [needle(3400, 0.5, 1).prompt, needle(4700, 0.7, 2).prompt, needle(6900, 0.8, 4).prompt]
    return short + medium + shared + long


def complete_all(server: ServerProcess, prompts: list[str], custom_params: dict | None, parallel: int) -> list[Answer]:
    with ThreadPoolExecutor(parallel) as pool:
        return list(pool.map(lambda prompt: complete(server, prompt, NEW_TOKENS, custom_params), prompts))


def test_full_budget_equals_stock(stock: ServerProcess, lsa: ServerProcess) -> None:
    """Four at a time with budget 1.0; then, from an empty cache, some of them with LSA switched off."""
    reference = complete_all(stock, prompts(), None, parallel=4)
    stock.stop()
    compare(reference, complete_all(lsa, prompts(), {"lsa": {"budget": 1.0}}, parallel=4), "budget 1.0")
    flush(lsa)
    some = slice(0, None, 4)
    switched_off = complete_all(lsa, prompts()[some], {"lsa": {"enabled": False}}, parallel=4)
    compare(reference[some], switched_off, "switched off")


def compare(reference: list[Answer], answers: list[Answer], name: str) -> None:
    ties = sum(differs_at_a_tie(*pair) for pair in zip(reference, answers, strict=True))
    print(f"{name}: {len(reference) - ties} of {len(reference)} equal to stock, {ties} differ at a tie")
    assert ties <= len(reference) // 4
