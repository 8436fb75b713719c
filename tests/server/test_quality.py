"""Paired on the same prompts: quest keeps what full attention finds; recency and random at the same budget do not."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from prompts import Needle, needle

from sglang_lsa.server_process import ServerProcess

pytestmark = [pytest.mark.server, pytest.mark.slow]
SAMPLES = 8
TOKENS = 3000
ARMS = ("full", "quest", "recency", "random")


def test_quest_finds_needles_that_recency_and_random_miss(whole: ServerProcess) -> None:
    """Depths run from the end to the start, so that every prompt shares its filler with the one before."""
    right = dict.fromkeys(ARMS, 0)
    lost = 0
    for i in range(SAMPLES):
        sample = needle(TOKENS, 1 - (i + 0.5) / SAMPLES, seed=1000 + i)
        found = {"full": finds(whole, sample, "full")}
        with ThreadPoolExecutor(len(ARMS)) as pool:
            found |= zip(
                ARMS[1:], pool.map(lambda arm, sample=sample: finds(whole, sample, arm), ARMS[1:]), strict=True
            )
        for arm in ARMS:
            right[arm] += found[arm]
        lost += found["full"] and not found["quest"]
        print(f"depth {sample.depth:.3f}: {found}")
    print(f"right of {SAMPLES}: {right}; lost by quest: {lost}")
    assert right["full"] >= SAMPLES * 0.7, "the model must be able to do the task"
    assert lost <= 1
    assert right["full"] - right["quest"] <= 1
    assert right["recency"] <= right["full"] // 2
    assert right["random"] <= right["full"] // 2


def finds(server: ServerProcess, sample: Needle, arm: str) -> bool:
    """Whether the answer under policy ``arm`` names the hidden number."""
    answer = server.post(
        "/v1/chat/completions",
        {
            "model": "smollm2",
            "messages": sample.messages(),
            "temperature": 0,
            "max_tokens": 28,
            "custom_params": {"lsa": {"policy": arm, "budget": 0.135}},
        },
    )
    return sample.answer in answer["choices"][0]["message"]["content"]
