"""What ``sglang-lsa bench load`` measures of one model: mixes at rates, on servers with the same pool."""

from __future__ import annotations

import pathlib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field

from sglang_lsa.bench.load_figures import Objective
from sglang_lsa.bench.load_mix import Mix
from sglang_lsa.bench.load_report import LOAD
from sglang_lsa.bench.servers import DUMMY
from sglang_lsa.bench.serving_arms import Group
from sglang_lsa.bench.systems import SYSTEMS, Row, System, kv_name
from sglang_lsa.config import PAGE_SIZE
from sglang_lsa.memory.pages import align_up

SEARCHED = SYSTEMS["stock"]
"""Whose saturation the rates are multiples of."""


@dataclass(frozen=True)
class Plan:
    """Everything that is measured of one model.

    Attributes:
        group: model and pool; its ``room`` is how many requests a server runs at once.
        rates: requests a second; none: ``times`` the saturation of :data:`SEARCHED`.
        seconds: during which requests arrive, at each rate.
        gpu: what it is measured on.
        server_args: more arguments of all servers, as one would type them. Rows with others are other rows.
        done: identities of the rows that need not be measured again.
        saturations: of :data:`SEARCHED`, by mix, as far as they are known; filled when one is found.
    """

    group: Group
    mixes: tuple[Mix, ...]
    systems: tuple[System, ...]
    rates: tuple[float, ...]
    times: tuple[float, ...]
    seconds: float
    objective: Objective
    gpu: str
    server_args: str = ""
    done: frozenset[tuple[str, ...]] = frozenset()
    saturations: dict[str, float] = field(default_factory=dict)

    @property
    def vocabulary(self) -> int:
        return self.group.shape.vocabulary

    @property
    def context(self) -> int:
        """Tokens of the longest text, with some to spare."""
        return align_up(max(mix.longest for mix in self.mixes) + PAGE_SIZE, PAGE_SIZE)

    def unknown(self, mix: Mix) -> bool:
        """Whether its rates depend on a saturation that was not found yet."""
        return not self.rates and mix.name not in self.saturations

    def rates_of(self, mix: Mix) -> list[float]:
        """Requests a second."""
        if self.rates:
            return list(self.rates)
        return [float(f"{self.saturations[mix.name] * times:.3g}") for times in self.times]

    def left(self, system: System, mix: Mix) -> list[float]:
        """Rates at which the system is to be measured, and of which no row is there."""
        if system not in self.systems:
            return []
        return [rate for rate in self.rates_of(mix) if LOAD.identity(self.labels(system, mix, rate)) not in self.done]

    def turns(self) -> list[tuple[System, list[Mix]]]:
        """Systems in the order they are started in, with their mixes; the one whose saturation is searched goes first,
        asked for or not. Systems with nothing left are left out."""
        searched = [mix for mix in self.mixes if self.unknown(mix)]
        systems = [SEARCHED, *(one for one in self.systems if one != SEARCHED)] if searched else list(self.systems)
        found = [(one, [mix for mix in self.mixes if mix in searched or self.left(one, mix)]) for one in systems]
        return [(system, mixes) for system, mixes in found if mixes and (system in self.systems or system == SEARCHED)]

    def labels(self, system: System, mix: Mix, rate: float) -> Row:
        """The columns of a row that say what is measured."""
        return {
            "model": self.group.model,
            "mix": mix.name,
            "memories": mix.memories,
            "pool_gb": self.group.pool_gb,
            "kv_dtype": kv_name(self.group.kv_dtype),
            "max_running": self.group.room,
            "rate_per_s": rate,
            "stock_saturation_per_s": self.saturations.get(mix.name),
            "seconds": self.seconds,
            "objective_ttft_s": self.objective.ttft_s,
            "objective_tpot_ms": self.objective.tpot_ms,
            "system": system.name,
            "gpu": self.gpu,
            "server_args": self.server_args,
        }

    def remember(self, rows: Sequence[Row]) -> None:
        """Take saturations from the rows of a run that was cut: they would not be found again to the digit."""
        for mix in self.mixes:
            same = self.labels(SEARCHED, mix, 0.0)
            for name in ("rate_per_s", "stock_saturation_per_s", "system"):
                del same[name]
            for row in rows:
                if row["stock_saturation_per_s"] and all(row[name] == value for name, value in same.items()):
                    self.saturations[mix.name] = row["stock_saturation_per_s"]

    def mirror_tokens(self) -> int:
        """That LSA keeps on the host: all memories, and as many requests as run at once."""
        return max(
            sum(mix.memory_lengths) + self.group.room * (mix.own[1] + mix.answer[1] + PAGE_SIZE) for mix in self.mixes
        )

    def mirror_gb(self) -> float:
        """As far as this machine has memory for it.

        Raises:
            ValueError: it has too little for a mirror of the pool.
        """
        return self.group.mirror_gb(self.mirror_tokens(), "choose a smaller --pool-gb")

    def arguments(self, system: System, model: pathlib.Path) -> list[str]:
        """Of the server that measures it."""
        flags = ["--model-path", str(model), *DUMMY, "--context-length", str(self.context)]
        flags += ["--cuda-graph-max-bs-decode", str(self.group.room), "--max-running-requests", str(self.group.room)]
        # Every token is sent when it is there, and once.
        flags += ["--stream-interval", "1", "--incremental-streaming-output"]
        mirror = self.mirror_gb() if system.lsa else 0
        flags = system.arguments(flags, self.group.kv_dtype, self.group.pool_tokens, mirror)
        return [*flags, *shlex.split(self.server_args)]
