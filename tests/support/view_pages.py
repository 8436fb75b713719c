"""The live view over snapshots that are made up: the real page, routes and events; only the scheduler is missing."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import uvicorn
from fastapi import APIRouter, FastAPI

from sglang_lsa.engine.groups import Group
from sglang_lsa.serve.metrics import COUNTERS, GAUGES
from sglang_lsa.serve.read_together import Membership
from sglang_lsa.serve.view.events import Broadcast
from sglang_lsa.serve.view.routes import add_routes
from sglang_lsa.serve.view.snapshot import (
    ARRIVING,
    CACHED,
    HOST,
    RECALLED,
    RESIDENT,
    SINK,
    describe_group,
    encode,
    pages_per_column,
)
from sglang_lsa.server_process import held_port

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
"""The system's browser; None without one."""
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]


class Crowd:
    """So many requests, each with a set that changes every few updates; awaited, the next snapshot.

    Args:
        groups: places of the requests of each group, which read together what its first member reads, as far as all of
            them reach; None on a server without groups.
    """

    def __init__(self, requests: int, seed: int = 0, groups: list[list[int]] | None = None):
        self.groups = groups
        self.last: dict[str, Any] | None = None
        self.frozen = False
        """The last snapshot is given again."""
        self.rng = np.random.default_rng(seed)
        self.pages = self.rng.integers(40, 900, requests)
        self.states = [self._begin(int(pages)) for pages in self.pages]
        self.updates = 0
        self.values: dict[str, float] = {name.removeprefix("lsa_"): 0 for name in (*GAUGES, *COUNTERS)}

    def _begin(self, pages: int) -> np.ndarray:
        states = np.where(self.rng.random(pages) < 0.1, CACHED, HOST).astype(np.uint8)
        states[self.rng.choice(pages, max(1, pages // 8), replace=False)] = RESIDENT
        states[-4:] = RESIDENT
        states[0] = SINK
        return states

    def _go_on(self, states: np.ndarray) -> np.ndarray:
        read = np.flatnonzero(states[1:-4] >= RESIDENT) + 1
        states[read] = RESIDENT
        states[states == ARRIVING] = HOST
        changed = self.rng.choice(read, max(1, len(read) // 5), replace=False)
        states[changed] = HOST
        new = self.rng.choice(np.flatnonzero(states < RESIDENT), len(changed), replace=False)
        states[new] = RECALLED
        states[self.rng.choice(np.flatnonzero(states == HOST), 2, replace=False)] = ARRIVING
        return np.append(states, np.uint8(RESIDENT)) if self.rng.random() < 0.3 else states

    async def __call__(self) -> str:
        if self.last is None or not self.frozen:
            self.last = self.next()
        return json.dumps(self.last)

    def next(self) -> dict[str, Any]:
        self.updates += 1
        for index in range(self.updates % 3, len(self.states), 3):
            self.states[index] = self._go_on(self.states[index])
        requests = [self._request(index, states) for index, states in enumerate(self.states)]
        groups = None if self.groups is None else [self._group(*numbered) for numbered in enumerate(self.groups)]
        for _, own in groups or ():
            for place, membership in own.items():
                requests[place]["group"] = membership
        context, resident = sum(r["pages"] for r in requests), sum(r["resident"] for r in requests)
        recalled = self.values["recalled_pages"] + sum(r["recalled"] for r in requests) / 3
        self.values |= {
            "device_pages": 2 * resident,
            "device_pages_held": resident,
            "device_pages_cached": resident // 2,
            "promised_pages": 8,
            "host_pages": context,
            "context_pages": context,
            "resident_pages": resident,
            "recalled_pages": recalled,
            "stalls": self.values["stalls"] + int(self.rng.random() < 0.2),
            "group_saved_reads": self.values["group_saved_reads"]
            + 20 * sum(group["chosen"] - group["pages"] for group, _ in groups or ()),
        }
        return {
            "time": time.time(),
            "policy": "quest",
            "budget": 0.135,
            "window": 64,
            "page_tokens": 64,
            "page_bytes": 2 << 20,
            "virtual_pages": 2 * context,
            "virtual_allocated": context,
            "values": dict(self.values),
            "requests": requests,
            "more_requests": 0,
            "groups": groups and [group for group, _ in groups],
            "tree": {"nodes": self._tree(), "more": 0},
        }

    def _request(self, index: int, states: np.ndarray) -> dict[str, Any]:
        column, resident = pages_per_column(len(states)), int((states >= RESIDENT).sum())
        return {
            "rid": f"agent-{index:03d}",
            "row": index + 1,
            "tokens": 64 * len(states) - 30 + self.updates % 30,
            "prompt_tokens": 64 * int(self.pages[index]) - 40,
            "pages": len(states),
            "resident": resident,
            "budget": max(8, round(0.135 * len(states))),
            "window": self.updates // 3,
            "steps_left": 64 - 20 * (self.updates % 3),
            "policy": "quest",
            "phase": "decode",
            "prefill": "in place",
            "coverage": None,
            "stalls": 0,
            "shrunk": 0,
            "recalled": int((states == RECALLED).sum()),
            "column": column,
            "map": encode(states, column),
            "group": None,
        }

    def _group(self, number: int, members: list[int]) -> tuple[dict[str, Any], dict[int, dict[str, int]]]:
        """A group, and the part of each member in it, by the member's place."""
        common = min(len(self.states[place]) for place in members) - 4
        read = [self.states[place][:common] >= RESIDENT for place in members]
        positions = np.flatnonzero(read[0])
        chosen = [int(each[positions].sum()) for each in read]
        group = describe_group(Group(tuple(members), positions, sum(chosen), 0.0))
        parts = {
            place: Membership(
                number,
                len(members),
                len(positions),
                len(positions) - count,
                int((self.states[place] >= RESIDENT).sum()) - count,
            )
            for place, count in zip(members, chosen, strict=True)
        }
        return group, {place: asdict(part) for place, part in parts.items()}

    def _tree(self) -> list[list[float]]:
        nodes: list[list[float]] = [[-1, 120, len(self.states), 40.0, 90, 120]]
        for index in range(len(self.states)):
            parent = 0 if index % 4 else -1
            nodes.append([parent, int(self.pages[index]), 1, float(index % 9), int(self.pages[index]) // 4, 10])
        return nodes


class ViewServer:
    """Serves the live view over what ``ask`` returns; a context manager."""

    def __init__(self, ask: Callable[[], Awaitable[str]], seconds: float = 1.0, most: int = 16):
        self.broadcast = Broadcast(ask, seconds, most)
        app, router = FastAPI(), APIRouter()
        add_routes(router, self.broadcast)
        app.include_router(router)
        held = held_port()
        host, port = held.getsockname()
        self.url = f"http://{host}:{port}"
        config = uvicorn.Config(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=1)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=lambda: asyncio.run(self.server.serve(sockets=[held])), daemon=True)

    def __enter__(self) -> ViewServer:
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *error: object) -> None:
        self.server.should_exit = True
        self.thread.join(10)
