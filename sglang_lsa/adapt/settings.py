"""How large a run of ``sglang-lsa adapt`` is; its flags are these fields. Imports nothing large."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

FAMILIES = ("text", "facts", "filler", "pairs", "records", "copying", "values", "lines", "chains")
TASKS = ("niah_single_2", "niah_multikey_1", "niah_multivalue", "vt")


def _setting(default: Any, metavar: str, help: str) -> Any:
    return field(default=default, metadata={"metavar": metavar, "help": help})


@dataclass(frozen=True)
class Settings:
    """What is recorded, trained and asked.

    The defaults are meant to take at most a quarter of an hour on one data-center GPU for models of 0.5B to 1.5B.
    That is an estimate: on one H200 four servers recorded 494 prompts of a 1.5B model in 236 s, and 600 steps of
    training on 432 of them would have taken about 190 s.

    Raises:
        ValueError: a value is impossible.
    """

    lengths: tuple[int, ...] = _setting((4096, 8192, 16384), "N", "tokens of the prompts to record")
    each: int = _setting(8, "N", "prompts to train on of every family and length; a quarter as many are held out")
    families: tuple[str, ...] = _setting(FAMILIES, "NAME", "kinds of prompts to record")
    steps: int = _setting(600, "N", "of training, at most")
    tasks: tuple[str, ...] = _setting(TASKS, "TASK", "tasks of RULER to compare answers on")
    eval_lengths: tuple[int, ...] = _setting((4096, 16384), "N", "tokens of their prompts")
    samples: int = _setting(10, "N", "questions of every task and length")
    budget: float = _setting(0.1, "SHARE", "of a context's pages that answers may read")

    def __post_init__(self) -> None:
        for name, least in (("each", 1), ("steps", 1), ("samples", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} {getattr(self, name)} is too small: use {least} or more")
        for name, least in (("lengths", 512), ("eval_lengths", 1024)):
            flag = f"--{name.replace('_', '-')}"
            if not getattr(self, name):
                raise ValueError(f"{flag} is empty: give some")
            if min(getattr(self, name)) < least:
                raise ValueError(f"{flag} {min(getattr(self, name))} is too short: use {least} or more")
        for name, known in (("families", FAMILIES), ("tasks", ())):
            if not getattr(self, name):
                raise ValueError(f"--{name} is empty: give some")
            for value in getattr(self, name):
                if known and value not in known:
                    raise ValueError(f"--{name} {value}: there is no such one: use some of {', '.join(known)}")
        if not {"facts", "filler", "pairs", "records", "values", "lines", "chains"} & set(self.families):
            raise ValueError("--families: add one that asks for something, such as facts: heads are found by answers")
        if not 0 < self.budget <= 1:
            raise ValueError(f"--budget {self.budget} is out of range: use a share of a context's pages in (0, 1]")

    @property
    def held_out(self) -> int:
        """Prompts of every family and length that are held out."""
        return max(1, self.each // 4)

    @property
    def prompts(self) -> int:
        """To record, without the few that choose layers."""
        return len(self.families) * len(self.lengths) * (self.each + self.held_out)
