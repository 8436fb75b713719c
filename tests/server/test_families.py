"""Families of models as SGLang runs them, against the same weights in transformers: read whole, streamed, and pruned.

Nothing of the reference is SGLang's or ours, so that a wrong scale, norm, rotation or bias of a family shows, and so
does a page that was read and should not have been: what a pruned answer read is masked in the reference, too.
"""

from __future__ import annotations

import pathlib

import numpy as np
import pytest
import torch
from families import FAMILIES, TINY, Answered, Reference, ask, random_prompt, write_model
from serving import assert_idle, finished_request
from soak import NARROW

from sglang_lsa.server_process import LSA, ServerProcess

pytestmark = pytest.mark.server
QUICK = ("qwen3",)
"""That with norms of queries and keys stands for all where time is short."""
FLAGS = ["--dtype", "float32", "--skip-tokenizer-init", "--skip-server-warmup", "--chunked-prefill-size", "512"]
FLAGS += ["--lsa-device-tokens", "2048", "--lsa-host-memory-gb", "0.1", "--lsa-min-context", "256", "--lsa-debug"]
FLAGS += ["--lsa-window", "16", *NARROW]
WHOLE, STREAMED = 1300, 3000
"""Tokens of prompts that fit the device pool, and do not."""
TOLERANCE = 1e-4
"""Of logarithmic probabilities: sums of float32 in another order."""


def apart(reference: torch.Tensor, text: list[int], seen: np.ndarray) -> float:
    """How far the server's log-probabilities of a text are from the reference's, at most."""
    known = reference[:-1].gather(1, torch.tensor(text[1:])[:, None])[:, 0].numpy()
    return float(np.abs(known - seen).max())


def likeliest(reference: torch.Tensor, answer: Answered) -> list[int]:
    """The greedy answer that the reference gives after the same text."""
    return reference[-1 - len(answer.tokens) : -1].argmax(-1).tolist()


@pytest.mark.parametrize(
    "family", [family if family in QUICK else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES]
)
def test_a_family_is_what_transformers_says(family: str, tmp_path: pathlib.Path) -> None:
    folder = write_model(tmp_path / "model", family, TINY, torch.float32)
    with ServerProcess(LSA, ["--model-path", folder, *FLAGS], tmp_path / "log") as server:
        reference = Reference(folder)
        server.wait_until_ready()
        prompt = random_prompt(WHOLE, 1)
        full = ask(server, prompt, 24, budget=1.0)
        expected = reference.read([*prompt, *full.tokens])
        assert full.tokens == likeliest(expected, full)
        assert apart(expected, [*prompt, *full.tokens], full.chances) < TOLERANCE

        prompt = random_prompt(STREAMED, 2)
        pruned = ask(server, prompt, 48, "pruned", budget=0.135)
        text = [*prompt, *pruned.tokens]
        told = finished_request(server, "pruned")
        expected = reference.read(text, told["sets"])
        assert pruned.tokens == likeliest(expected, pruned)
        assert apart(expected, text, pruned.chances) < TOLERANCE
        assert apart(reference.read(text), text, pruned.chances) > 0.1, "what it did not read makes no difference"
        assert told["prefill"] == "streamed"
        assert told["resident_pages"] < told["context_pages"] / 4
        assert len(told["sets"].split(";")) >= 3
        assert server.get("/lsa/status")["recalls"]["pages"] > 0
        assert_idle(server)
