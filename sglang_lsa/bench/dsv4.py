"""``sglang-lsa bench dsv4``: DeepSeek-V4 in SGLang and with LSA, over prefixes that fill the same bytes of KV."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from rich.console import Console

from sglang_lsa.bench.dsv4_arms import DSV4_ARMS, DSV4_SYSTEMS, MOST, Dsv4Arm
from sglang_lsa.bench.dsv4_measure import Asked, labels, measure
from sglang_lsa.bench.dsv4_report import DSV4, table
from sglang_lsa.bench.dsv4_shapes import DSV4_SHAPES
from sglang_lsa.bench.server_args import same_words
from sglang_lsa.bench.servers import gpu_name
from sglang_lsa.bench.systems import Failures, Row
from sglang_lsa.provenance import commit


def run(
    output: pathlib.Path,
    console: Console,
    *,
    models: Sequence[str],
    weights: str,
    arms: Sequence[str],
    systems: Sequence[str],
    kv_gb: float,
    tokens: int,
    share: int,
    budget: float,
    churns: Sequence[int],
    resume: bool,
    server_args: str,
    command: str,
) -> list[Row]:
    """Measure everything that was asked for, one server for each context of each system; every row is written at once.

    Args:
        churns: in per cent.
        server_args: more arguments of all servers, as one would type them.

    Returns:
        The new rows.

    Raises:
        RuntimeError: there is no GPU, or a server or a request failed; the other systems have been measured.
        ValueError: what was asked for does not fit, or a quotation mark of ``server_args`` has no other.
    """
    typed = same_words(server_args)
    facts = {"gpu": gpu_name(), "commit": commit(), "command": command}
    output.mkdir(parents=True, exist_ok=True)
    done = DSV4.measured(output, resume)
    failures = Failures(console.print)
    rows: list[Row] = []
    with DSV4.drawn(output):
        for model in models:
            parts = tuple(churn / 100 for churn in churns)
            asked = Asked(DSV4_SHAPES[model], weights, kv_gb, tokens, share, budget, parts, typed)
            for sharing in share_servers([DSV4_ARMS[name] for name in arms]):
                for system in (DSV4_SYSTEMS[name] for name in systems):
                    left = [
                        (arm, churn)
                        for arm in sharing
                        for churn in (asked.churns if system.lsa else (None,))
                        if DSV4.identity(labels(asked, arm, system, churn) | facts) not in done
                    ]
                    measured = measure(asked, system, sharing[0], left, output, console) if left else ()
                    for row in failures.go_on(system.name, f"{model} {sharing[0].name}", measured):
                        rows.append(row | facts)
                        DSV4.keep(output, [rows[-1]])
    console.print(table(DSV4.read(output)))
    failures.finish()
    return rows


def share_servers(arms: Sequence[Dsv4Arm]) -> list[tuple[Dsv4Arm, ...]]:
    """Arms of one context, over the same prefixes; the one with the most requests first, for which the server is."""
    contexts = dict.fromkeys(arm.context for arm in arms)
    return [
        tuple(sorted((arm for arm in arms if arm.context == context), key=lambda arm: -(arm.requests or MOST)))
        for context in contexts
    ]
