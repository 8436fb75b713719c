"""What a soak does besides asking: re-used ids, retractions, other configurations, several answers, wrong options."""

from __future__ import annotations

import json
import random
import threading
import urllib.error
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from soak import Soak

from sglang_lsa.server_process import ServerProcess

WRONG: tuple[Any, ...] = (
    0.3,
    "0.3",
    [1, 2],
    {"buget": 0.3},
    {"budget": -1},
    {"budget": "much"},
    {"policy": "oracle"},
    {"sets": "1:2"},
    {"sets": 7},
    {"watch": [3, -1]},
    {"dense_steps": -1},
    {"prompt_lookup": 10**9},
    {"widen": 10**9},
    {"prefill": "lazy"},
    {"enabled": "no"},
    {"enabled": False, "sets": "999:9:1,2"},
)
"""Values of ``custom_params.lsa``."""
WRONG_EVERY = 60 / 50
"""Seconds between two of them."""

CONFIGURATIONS: tuple[dict[str, Any], ...] = (
    {"budget": 0.3},
    {"budget": 0.08, "policy": "recency"},
    {"policy": "random"},
    {"policy": "quest", "dense_steps": 6},
    {"dense_steps": 0, "prompt_lookup": 4},
    {"widen": 4},
    {"prefill_tokens_per_step": 64},
    {"prefill_tokens_per_step": 16, "policy": "quest"},
    {"prefill_burst_tokens": 0},
    {"prefill_tokens_per_step": 0},
)
"""Changes under load. None of them makes a prompt of the soak impossible, nor what it reads approximate."""


class WrongOptions(AbstractContextManager["WrongOptions"]):
    """Asks for something impossible, 50 times a minute, until it is left.

    Attributes:
        answers: HTTP status of each answer.
    """

    def __init__(self, server: ServerProcess, seed: int):
        self.server, self.rng = server, random.Random(seed)
        self.answers: list[int] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> WrongOptions:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self.answers.append(self._ask(self.rng.choice(WRONG)))
            if self._done.wait(WRONG_EVERY):
                return

    def _ask(self, options: Any) -> int:
        sampling = {"max_new_tokens": 4, "custom_params": {"lsa": options}}
        try:
            self.server.post("/generate", {"text": "Hello", "sampling_params": sampling})
            return 200
        except urllib.error.HTTPError as error:
            return error.code


def retract_all(soak: Soak) -> None:
    """Whoever runs loses its place, wherever it is, and begins again with what it has said."""
    for path, content in (("/pause_generation", {"mode": "retract"}), ("/continue_generation", {})):
        soak.server.post(path, content, parse=False)


def change_configuration(soak: Soak, chance: float) -> str:
    """Another configuration for the requests that come from now on."""
    soak.server.post("/lsa/config", CONFIGURATIONS[int(chance * len(CONFIGURATIONS))])
    return "changed"


def use_an_id_again(soak: Soak, number: int, chance: float, hang_up: Any, content: Any) -> str:
    """Hang up, and ask something else by the same name at once, while the scheduler may still run the first.

    Args:
        hang_up: starts a stream by a name and leaves it.
        content: the body of another request by a name.
    """
    rid = f"again-{number:05}"
    hang_up(rid, int(chance * 500))
    try:
        answer = soak.server.post("/generate", content(rid))
    except urllib.error.HTTPError as error:  # SGLang: the first is still there, or was aborted by this name
        assert error.code in (400, 499, 503), error.read()
        return "again refused"
    ended = answer["meta_info"]["finish_reason"]["type"]
    return "again aborted" if ended == "abort" else "again answered"


def several_answers(soak: Soak, content: dict[str, Any]) -> list[dict[str, Any]]:
    """Two greedy answers to one prompt; each child is a request of its own."""
    content = json.loads(json.dumps(content))
    content["sampling_params"]["n"] = 2
    content.pop("rid", None)
    return soak.server.post("/generate", content)
