"""What a benchmark compares: stock SGLang as a user starts it, stock with a backend that is named, and LSA."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sglang_lsa.config import PAGE_SIZE
from sglang_lsa.server_process import LSA

STOCK = "sglang.launch_server"
Row = dict[str, Any]


@dataclass(frozen=True)
class System:
    """A server that is measured.

    Attributes:
        name: for ``--systems``, and in the results.
        module: what ``python -m`` runs.
        flags: beside those that all systems get. Nothing else is said about attention, pages or prefill graphs: what
            a system does by itself is what its users have.
    """

    name: str
    module: str
    flags: tuple[str, ...] = ()

    @property
    def lsa(self) -> bool:
        return self.module == LSA

    def arguments(self, common: Sequence[str], kv_dtype: str, pool_tokens: int, host_gb: float) -> list[str]:
        """Flags of the server, with a device pool of ``pool_tokens``; only LSA has a mirror.

        Args:
            common: what all systems get.
            kv_dtype: as SGLang's ``--kv-cache-dtype`` takes it.
        """
        flags = [*common, *self.flags, "--kv-cache-dtype", kv_dtype]
        if self.lsa:  # of drawn weights no head finds anything
            flags += ["--lsa-calibrate", "never"]
            return [*flags, "--lsa-device-tokens", str(pool_tokens), "--lsa-host-memory-gb", str(host_gb)]
        return [*flags, "--max-total-tokens", str(pool_tokens)]


SYSTEMS = {
    system.name: system
    for system in (
        System("stock", STOCK),
        System("stock-flashinfer", STOCK, ("--attention-backend", "flashinfer")),
        System("lsa", LSA),
        System("lsa-fa3", LSA, ("--attention-backend", "fa3")),
        System("lsa-flashinfer", LSA, ("--attention-backend", "flashinfer")),
        System("lsa-groups", LSA, ("--lsa-config", '{"groups": true}')),
        System("lsa-separate", LSA, ("--lsa-config", '{"groups": false}')),
        System("lsa-paced", LSA, ("--lsa-config", '{"prefill_tokens_per_step": 256}')),
    )
}
DEFAULT_SYSTEMS = ("stock", "stock-flashinfer", "lsa")


def is_lsa(row: Row) -> bool:
    return SYSTEMS[row["system"]].lsa


def kv_name(kv_dtype: str) -> str:
    """The type of KV in the results: SGLang's ``auto`` is that of the shapes that are measured."""
    return {"auto": "bfloat16", "bf16": "bfloat16"}.get(kv_dtype, kv_dtype)


def server_facts(info: dict[str, Any]) -> Row:
    """What a server's ``/server_info`` says about how it attends: SGLang's own choice where none was named."""
    resolved = info | (info.get("internal_states") or [{}])[0]
    both = resolved["attention_backend"]
    return {
        "prefill_backend": resolved.get("prefill_attention_backend") or both,
        "decode_backend": resolved.get("decode_attention_backend") or both,
        "kv_dtype": kv_name(resolved["kv_cache_dtype"]),
        "page_size": resolved["page_size"],
    }


def upgraded(row: Row) -> Row:
    """A row as it is written now: before rows named their backends, all ran with FlashInfer and page size 64."""
    if "prefill_backend" in row:
        return row
    both = {"prefill_backend": "flashinfer", "decode_backend": "flashinfer"}
    return row | {"system": f"{row['system']}-flashinfer", **both, "kv_dtype": "bfloat16", "page_size": PAGE_SIZE}


def backends(row: Row) -> str:
    """For a table: ``fa3``, or ``fa3/flashinfer`` where prefill and decode differ."""
    names = (row["prefill_backend"], row["decode_backend"])
    return names[0] if names[0] == names[1] else "/".join(names)


@dataclass(frozen=True)
class Comparison:
    """A row of LSA, and how many times each stock system's measure it has.

    Attributes:
        row: of LSA.
        ratios: by the name of the stock system.
        rivals: rows of the same arm on the same card, by the name of the stock system; the fastest is first.
    """

    row: Row
    ratios: dict[str, float]
    rivals: dict[str, Row]

    @property
    def fastest(self) -> str:
        return next(iter(self.rivals))

    def facts(self, name: str) -> Row:
        """Columns of the results: the ratio to the fastest stock system, which one that is, and the ratio to each."""
        each = {f"{name}_to_{system}": self.ratios[system] for system in sorted(self.ratios)}
        return {name: self.ratios[self.fastest], f"{name}_to": self.fastest, **each}


def compare(
    rows: Iterable[Row], arm: Sequence[str], seconds: Callable[[Row], float], ratio: Callable[[Row, Row], float]
) -> list[Comparison]:
    """Every LSA row that stock rows of the same arm exist for, with them.

    Args:
        arm: columns in which rows must agree.
        seconds: less is faster.
        ratio: of a stock row and an LSA row.
    """
    rows = list(rows)
    found = []
    for row in filter(is_lsa, rows):
        rivals = [other for other in rows if not is_lsa(other) and all(other[column] == row[column] for column in arm)]
        if rivals:
            rivals.sort(key=seconds)
            ratios = {other["system"]: ratio(other, row) for other in rivals}
            found.append(Comparison(row, ratios, {other["system"]: other for other in rivals}))
    return found


class Failures:
    """Systems whose server did not start or did not answer: the others are measured all the same."""

    def __init__(self, show: Callable[[str], object]):
        self.show = show
        self.found: list[str] = []

    def go_on(self, system: str, what: str, rows: Iterable[Row]) -> Iterator[Row]:
        """``rows`` of a system as they are measured; fewer when a server or a request failed."""
        try:
            yield from rows
        except (RuntimeError, OSError) as error:  # those of urllib are OSErrors
            self.found.append(f"{system} {what}: {error}")
            self.show(f"{system} {what} failed, the others go on")

    def finish(self) -> None:
        """
        Raises:
            RuntimeError: there were any.
        """
        if self.found:
            raise RuntimeError("\n".join(self.found))
