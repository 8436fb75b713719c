"""Servers of the tiny DeepSeek-V4, with and without LSA, and what the tests ask them."""

from __future__ import annotations

import os
import pathlib
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from dsv4_model import C4_LAYERS, LAUNCH, TINY, VOCABULARY
from serving import flush_cache

from sglang_lsa.bench.dsv4_shapes import ENVIRONMENT
from sglang_lsa.server_process import ServerProcess

HIDDEN = int(TINY["hidden_size"])
TOP = 20
"""Candidates for each token whose log-probabilities are compared."""
READY_SECONDS = 540


def install_plugin(folder: pathlib.Path) -> str:
    """Make ``dsv4_plugin`` a distribution that SGLang finds; returns what goes on ``PYTHONPATH``."""
    metadata = folder / "dsv4_plugin-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: dsv4_plugin\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[sglang.srt.plugins]\ndsv4_plugin = dsv4_plugin:register\n")
    for name in ("dsv4_plugin.py", "dsv4_scores.py"):
        shutil.copy(pathlib.Path(__file__).with_name(name), folder)
    return str(folder)


def write_retriever(path: pathlib.Path, heads: int = 64, rank: int = 1024) -> pathlib.Path:
    """A drawn checkpoint of FlashMemory's retriever for all layers that have an index."""
    draw, state = torch.Generator().manual_seed(5), {}
    shapes = {"wq_a": (rank, HIDDEN), "wq_b": (heads * 128, rank), "weights_proj": (heads, HIDDEN)}
    for number in range(len(C4_LAYERS)):
        for name, shape in shapes.items():
            weight = torch.randn(shape, generator=draw) * shape[1] ** -0.5
            state[f"retrievers.l{number}.{name}.weight"] = weight.bfloat16()
        state[f"retrievers.l{number}.q_norm_weight"] = torch.ones(rank, dtype=torch.bfloat16)
    torch.save(state, path)
    return path


def start(
    module: str, model: pathlib.Path, plugin: str, flags: Sequence[str], log: pathlib.Path, **environment: str
) -> ServerProcess:
    """A server of ``model`` with the plugin, which reads ``environment``."""
    path = os.pathsep.join(filter(None, (plugin, os.environ.get("PYTHONPATH"))))
    given = {**ENVIRONMENT, "PYTHONPATH": path, **environment}
    arguments = ["--model-path", str(model), *LAUNCH, "--skip-server-warmup", "--mem-fraction-static", "0.5", *flags]
    return ServerProcess(module, arguments, log, given)


class Servers(dict[str, ServerProcess]):
    """By name; one that did not start fails the tests that ask for it, and no others."""

    def __init__(self, started: dict[str, ServerProcess]):
        super().__init__(started)
        self.failed: dict[str, Exception] = {}
        for name, server in started.items():
            try:
                server.wait_until_ready(READY_SECONDS)
            except RuntimeError as error:
                self.failed[name] = error
                del self[name]

    def __missing__(self, name: str) -> ServerProcess:
        raise RuntimeError(f"{name} did not start") from self.failed.get(name)


def random_ids(tokens: int, seed: int) -> list[int]:
    """A prompt, different for every seed."""
    return np.random.default_rng(seed).integers(10, VOCABULARY - 10, tokens).tolist()


@dataclass(frozen=True)
class Said:
    """A greedy answer.

    Attributes:
        tokens: chosen ones.
        chances: for each of them, log-probabilities of the best candidates by token.
        cached: tokens of the prompt that the radix tree had.
        retractions: how often it lost its place and began again with what it had said.
    """

    tokens: tuple[int, ...]
    chances: tuple[dict[int, float], ...]
    cached: int
    retractions: int = 0

    @property
    def finite(self) -> bool:
        return all(np.isfinite(list(best.values())).all() for best in self.chances)

    def since(self, token: int) -> Said:
        """Without the tokens before this one, counted from 0."""
        return Said(self.tokens[token:], self.chances[token:], self.cached, self.retractions)


def ask(server: ServerProcess, prompt: list[int], tokens: int, rid: str | None = None, **lsa: Any) -> Said:
    """Exactly so many tokens. A server without LSA ignores what LSA is asked."""
    return ask_together(server, [prompt], tokens, [rid] if rid else None, [lsa])[0]


def ask_together(
    server: ServerProcess,
    prompts: Sequence[list[int]],
    tokens: int,
    rids: Sequence[str] | None = None,
    lsa: Sequence[dict[str, Any]] | None = None,
) -> list[Said]:
    """Answers to prompts that arrive at the same time."""
    parameters = [
        {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
        | ({"custom_params": {"lsa": asked}} if asked else {})
        for asked in lsa or [{}] * len(prompts)
    ]
    body = {"input_ids": list(prompts), "sampling_params": parameters, "return_logprob": True, "top_logprobs_num": TOP}
    answers = server.post("/generate", body | ({"rid": list(rids)} if rids else {}))
    return [_said(answer["meta_info"]) for answer in answers]


def _said(meta: dict[str, Any]) -> Said:
    best = tuple({token: value for value, token, _ in top} for top in meta["output_top_logprobs"])
    tokens = tuple(token for _, token, _ in meta["output_token_logprobs"])
    return Said(tokens, best, meta["cached_tokens"], meta["num_retractions"])


def on_both(first: ServerProcess, second: ServerProcess, question: Any) -> tuple[Any, Any]:
    """``question(server)`` of two servers at the same time."""
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(question, (first, second))
    return one, other


@dataclass(frozen=True)
class Difference:
    """Between two answers to one prompt.

    Attributes:
        equal: tokens before they part, all of them if they do not.
        of: tokens.
        mean, most: by how much log-probabilities of the same candidates differ, up to and with the token at which the
            answers part.
        gap: how much likelier the first answer's token was to itself there; 0 where they do not part.
    """

    equal: int
    of: int
    mean: float
    most: float
    gap: float

    @classmethod
    def between(cls, expected: Said, seen: Said) -> Difference:
        parted = [a != b for a, b in zip(expected.tokens, seen.tokens, strict=True)]
        equal = parted.index(True) if any(parted) else len(parted)
        apart = [
            abs(value - other[token])
            for one, other in list(zip(expected.chances, seen.chances, strict=True))[: equal + 1]
            for token, value in one.items()
            if token in other
        ]
        if not apart or not np.isfinite(apart).all():
            return cls(equal, len(parted), np.inf, np.inf, np.inf)
        gap = 0.0
        if equal < len(parted):
            chances = expected.chances[equal]
            gap = chances[expected.tokens[equal]] - chances.get(seen.tokens[equal], -np.inf)
        return cls(equal, len(parted), float(np.mean(apart)), float(np.max(apart)), gap)

    def __str__(self) -> str:
        apart = f"apart {self.mean:.1e}, at most {self.most:.1e}, gap {self.gap:.2g}"
        return f"{self.equal:3} of {self.of} tokens equal, {apart}"


@dataclass(frozen=True)
class Noise:
    """How far two answers of SGLang without LSA are from each other: largest mean differences.

    Attributes:
        repeated: the same request again, alone, from an empty cache.
        together: beside other requests, whose company changes the order in which kernels add up.
        ordered: the same request again, where the order of selections is fixed.
    """

    repeated: float
    together: float
    ordered: float

    def check(self, name: str, expected: Said, seen: Said, of: str = "repeated") -> Difference:
        """Print, and see whether two answers differ by no more than twice the noise ``of`` one kind."""
        found, tolerance = Difference.between(expected, seen), self.tolerance(of)
        print(f"{name}: {found}{' (to the bit)' if found.most == 0 else ''}")
        assert seen.finite, f"{name}: log-probabilities that are no numbers"
        assert found.mean <= tolerance, f"{name}: log-probabilities are {found.mean:.2e} apart, noise {tolerance:.2e}"
        # A token may be so much likelier than the one that another order of summation chose in its place.
        assert found.gap <= 20 * tolerance, f"{name}: the answers part where the first one leaves no doubt"
        return found

    def tolerance(self, of: str) -> float:
        """Mean difference that shows nothing."""
        return 2 * float(getattr(self, of)) + 1e-3


def largest(first: list[Said], second: list[Said]) -> float:
    return max(Difference.between(*pair).mean for pair in zip(first, second, strict=True))


def answers(server: ServerProcess, prompts: list[list[int]], tokens: int, **lsa: Any) -> list[Said]:
    """One prompt at a time, from an empty cache."""
    flush_cache(server)
    return [ask(server, prompt, tokens, **lsa) for prompt in prompts]


def check_all(noise: Noise, name: str, expected: list[Said], seen: list[Said], of: str = "repeated") -> None:
    print()
    for number, pair in enumerate(zip(expected, seen, strict=True)):
        noise.check(f"{name}, {number}", *pair, of)
