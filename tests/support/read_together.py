"""What the tests of groups ask servers, and steps of a batch in groups without one."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from serving import Answer, answer_tokens, generate

from sglang_lsa.attend.plan_copies import PlanCopies
from sglang_lsa.attend.together import ReadTogether
from sglang_lsa.attend.torch_native import attend_part
from sglang_lsa.config import PAGE_SIZE
from sglang_lsa.engine.grouping import Grouping
from sglang_lsa.engine.groups import Group
from sglang_lsa.engine.step import DECODE, IDLE, Step, captured
from sglang_lsa.kernels.merge_shared import merge_shared
from sglang_lsa.memory.resident_table import ResidentTable
from sglang_lsa.server_process import ServerProcess

# --- servers ---------------------------------------------------------------------------------------------------------

MEMORY_PAGES = 46
AGENTS = 4


def prompts(seed: int = 0) -> list[list[int]]:
    """Random token ids: a memory of whole pages, and a question of its own for each agent."""
    draw = np.random.default_rng(seed)
    memory = draw.integers(1000, 40_000, MEMORY_PAGES * PAGE_SIZE).tolist()
    return [[*memory, *draw.integers(1000, 40_000, 70 + 9 * agent).tolist()] for agent in range(AGENTS)]


def named(prompt: list[int], positions: Sequence[int] | None = None) -> dict[str, Any]:
    """Options that read these pages of a prompt from its first decode step on, and its tail; all pages by default."""
    tail = len(prompt) // PAGE_SIZE
    positions = range(tail) if positions is None else positions
    return {"sets": f"{len(prompt) + 1}:{tail}:{','.join(map(str, positions))}"}


def ask_together(server: ServerProcess, asked: Sequence[tuple[list[int], dict[str, Any]]], tokens: int) -> list[Answer]:
    """Greedy answers to prompts that arrive at the same time, each with options of its own."""
    body = {
        "input_ids": [prompt for prompt, _ in asked],
        "sampling_params": [
            {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True, "custom_params": {"lsa": options}}
            for _, options in asked
        ],
        "return_logprob": True,
        "top_logprobs_num": 5,
    }
    return [answer_tokens(answer["meta_info"]) for answer in server.post("/generate", body)]


def grouped(server: ServerProcess) -> dict[str, float]:
    """What the server's status says of groups."""
    return server.get("/lsa/status")["groups"]


def abort(server: ServerProcess, rid: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("POST", "/abort_request", json.dumps({"rid": rid}), {"Content-Type": "application/json"})
    connection.getresponse().read()
    connection.close()


def leave_one_by_one(server: ServerProcess, texts: Sequence[str], tokens: int, **options: Any) -> None:
    """Of agents in one group, one is aborted, one ends early, and the others go on to their end, in groups.

    Raises:
        AssertionError: they were never in a group, or those that are left are not.
    """
    counts = [tokens // 2, *[tokens] * (len(texts) - 1)]
    with ThreadPoolExecutor(len(texts)) as pool:
        answers = [
            pool.submit(generate, server, text, count, f"agent-{agent}", **options)
            for agent, (text, count) in enumerate(zip(texts, counts, strict=True))
        ]
        seen = 0.0
        while seen < len(texts):
            assert not any(answer.done() for answer in answers), f"at most {seen:.0f} were seen in groups"
            seen = max(seen, grouped(server)["requests"])
        abort(server, f"agent-{len(texts) - 1}")
        left = grouped(server)["requests"]
        while left != len(texts) - 1 and not answers[1].done():
            left = grouped(server)["requests"]
        steps = grouped(server)["steps"]
        ends = [answer.result()["meta_info"]["finish_reason"]["type"] for answer in answers]
    assert ends == [*["length"] * (len(texts) - 1), "abort"], ends
    assert grouped(server)["steps"] > steps, "those that were left did not go on in groups"


# --- steps -----------------------------------------------------------------------------------------------------------

POOL = 12
"""Pages that groups can read."""
HEADS = 4, 2, 64
"""Query heads, key heads, head_dim."""
WORKSPACE = {"cpu": 0, "cuda": 256 << 20}
"""Bytes, by device."""
OWN = 30
"""Tokens that each request reads by itself."""


def grouping_of(groups: list[tuple[tuple[int, ...], list[int]]], batch: int) -> Grouping:
    """Groups of a batch: the members of each, and the physical pages that they read together."""
    order = np.array([place for members, _ in groups for place in members], dtype=np.int64)
    places = np.full(batch, -1, dtype=np.int64)
    places[order] = np.arange(len(order))
    formed = tuple(Group(members, np.arange(len(pages)), 0, 0.0) for members, pages in groups)
    pages = tuple(np.array(pages, dtype=np.int64) for _, pages in groups)
    return Grouping(formed, pages, order, places, ResidentTable(batch + 1, 4, PAGE_SIZE))


class AtOnce:
    """An event where copies are made when they are asked for."""

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


def copies_on(device: torch.device) -> PlanCopies:
    """Of plans for this device."""
    return PlanCopies() if device.type == "cuda" else PlanCopies(AtOnce)


class Steps:
    """An attention backend's part of decode steps in groups: planned, then one layer; CUDA graphs, where there are any.

    Args:
        wrapper: makes FlashInfer's wrapper, or what stands in for it.
        tolerance: of an output that is compared with attention to all that a request reads, in float64.
    """

    def __init__(self, wrapper: Callable[..., Any], device: str, dtype: torch.dtype, tolerance: float):
        self.device, self.dtype, self.tolerance = torch.device(device), dtype, tolerance
        ledger = SimpleNamespace(physical_pages=POOL)
        pager = SimpleNamespace(page=PAGE_SIZE, ledger=ledger, device=self.device)
        groups = SimpleNamespace(planning_bytes=0)
        self.lsa: Any = SimpleNamespace(pager=pager, step=IDLE, table=SimpleNamespace(rows=5), groups=groups)
        workspace = torch.zeros(WORKSPACE[self.device.type], dtype=torch.uint8, device=self.device)
        self.together = ReadTogether(self.lsa, wrapper, workspace, HEADS, (dtype, dtype), copies_on(self.device))
        draw = torch.Generator().manual_seed(0)
        self.own = [torch.randn((64, OWN, *HEADS[1:]), generator=draw).to(dtype) for _ in range(2)]
        """Keys and values that requests read by themselves."""
        pool = [torch.randn(((POOL + 1) * PAGE_SIZE, *HEADS[1:]), generator=draw).to(dtype) for _ in range(2)]
        self.here = pool
        self.pool = tuple(part.to(self.device) for part in pool)
        self.graphs: dict[tuple[int, bool], Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {}
        """By batch size, and by whether they read in groups."""

    def layer(self, q: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        """Attention of ``q``, of which ``out`` and ``lse`` are the part over own tokens; changes ``out``."""
        if self.together.reads is not None:
            part, part_lse = self.together.attend(q, self.pool, sm_scale=0.25)
            merge_shared(out, lse, part, part_lse, self.together.places[: len(q)])
        return out

    def capture(self, *batches: int) -> None:
        """As SGLang: outside a pass, the largest first, and of each size the one that reads in groups."""
        self.together.reserve(max(batches))
        for batch in batches:
            for self.lsa.step in captured(batch, groups=True):
                self.together.plan(batch, graph=True)
                assert (self.together.reads is not None) == self.lsa.step.reads_together
                self.graphs[batch, self.lsa.step.reads_together] = self._captured(batch)
        self.lsa.step = IDLE

    def _captured(self, batch: int) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
        shapes = (batch, HEADS[0], HEADS[2]), (batch, HEADS[0], HEADS[2]), (batch, HEADS[0])
        static = [torch.zeros(shape, dtype=self.dtype, device=self.device) for shape in shapes[:2]]
        static.append(torch.zeros(shapes[2], device=self.device))
        self.layer(*static)
        if self.device.type == "cpu":
            return partial(self._replayed, self.together.reads)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.layer(*static)

        def replay(*given: torch.Tensor) -> torch.Tensor:
            for buffer, value in zip(static, given, strict=True):
                buffer.copy_(value)
            graph.replay()
            return static[1]

        return replay

    def _replayed(self, reads: Any, *given: torch.Tensor) -> torch.Tensor:
        """What stands in for a CUDA graph: calls as when it was captured, which must be those that are planned."""
        assert self.together.reads is reads, "another graph was planned"
        return self.layer(*given)

    def run(self, grouping: Grouping | None, real: int, padded: int, graph: bool) -> None:
        """One decode step of ``real`` requests.

        Raises:
            AssertionError: one of them is not given attention to its own tokens and to what its group reads.
        """
        self.lsa.step = Step(kind=DECODE, grouping=grouping)
        self.together.plan(padded, graph)
        q = torch.randn((padded, HEADS[0], HEADS[2]), generator=torch.Generator().manual_seed(real)).to(self.dtype)
        keys, values = self.own
        states = [attend_part(q[i : i + 1], keys[i], values[i], 0.25) for i in range(padded)]
        given = [q, *(torch.cat(parts).contiguous() for parts in zip(*states, strict=True))]
        given = [part.to(self.device) for part in given]
        out = (self.graphs[padded, self.lsa.step.reads_together] if graph else self.layer)(*given).cpu()
        for place in range(real):
            read = [part[place] for part in self.own]
            for group, pages in zip(grouping.groups, grouping.pages, strict=True) if grouping else ():
                if place in group.members:
                    slots = (torch.from_numpy(pages)[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE)).flatten()
                    read = [torch.cat((own, pool[slots])) for own, pool in zip(read, self.here, strict=True)]
            torch.testing.assert_close(out[place].double(), _naive(q[place], *read), rtol=0, atol=self.tolerance)


def _naive(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Attention of one query to all keys, in float64: ``[q_heads, head_dim]``."""
    repeats = HEADS[0] // HEADS[1]
    keys, values = (part.double().repeat_interleave(repeats, dim=1) for part in (keys, values))
    weights = torch.softmax(torch.einsum("hd,nhd->hn", q.double(), keys) * 0.25, dim=1)
    return torch.einsum("hn,nhd->hd", weights, values)


ONE = [((0, 2, 3), [4, 9, 1])]
TWO = [((0, 4), [7]), ((1, 2), [2, 3])]


def in_turns(steps: Steps) -> None:
    """Groups that come, change, and go; graphs of several sizes, with padding, by turns, and steps without one."""
    one, two = grouping_of(ONE, 5), grouping_of(TWO, 5)
    for grouping in (None, one, two, None):
        steps.run(grouping, 5, 5, graph=False)
    steps.capture(8, 6, 2, 1)
    for grouping, padded, graph in (
        (None, 6, True),
        (one, 6, True),
        (two, 6, True),
        (two, 8, True),
        (two, 5, False),
        (two, 8, True),
        (None, 8, True),
        (one, 8, True),
        (None, 6, True),
    ):
        steps.run(grouping, 5, padded, graph)
    pair = grouping_of([((0, 1), [3])], 2)
    steps.run(pair, 2, 2, graph=True)
    steps.run(None, 1, 1, graph=True)
    assert steps.together.reads is None, "one request is read as it always was"
