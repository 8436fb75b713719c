"""``sglang-lsa bench serving``: stock SGLang against LSA; see ``--help`` for what is measured.

Every row says which attention backends its server chose, and its type of KV, page size and card.
"""

from __future__ import annotations

import asyncio
import pathlib
import shlex
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
from rich.console import Console

from sglang_lsa.bench import servers
from sglang_lsa.bench.client import run_together
from sglang_lsa.bench.plateau import Plateau, plateau
from sglang_lsa.bench.report import SERVING, table
from sglang_lsa.bench.server_args import log_path, same_words
from sglang_lsa.bench.servers import DUMMY, gpu_name, ready, warm_up
from sglang_lsa.bench.serving_arms import CONTEXT, Arm, Group, chosen
from sglang_lsa.bench.systems import SYSTEMS, Failures, Row, System, kv_name
from sglang_lsa.memory.pages import pages_spanned
from sglang_lsa.provenance import commit
from sglang_lsa.server_process import ServerProcess


def run(
    output: pathlib.Path,
    console: Console,
    *,
    models: Sequence[str],
    workloads: Sequence[str],
    arms: Sequence[str],
    systems: Sequence[str],
    policies: Sequence[str],
    kv_dtype: str,
    resume: bool,
    tp: int,
    together: bool,
    server_args: str,
    command: str,
) -> list[Row]:
    """Measure everything that was asked for; every row is written at once, so that nothing is lost.

    Args:
        tp: ranks of every server.
        together: start all servers of a pool at once; they are measured one after the other all the same.
        server_args: more arguments of all servers, as one would type them.

    Returns:
        The new rows.

    Raises:
        RuntimeError: there is no GPU, or a server or a request failed; the other systems have been measured.
        ValueError: the machine has too little memory, nothing could be measured, or a quotation mark of
            ``server_args`` has no other.
    """
    typed = same_words(server_args)
    facts = {"gpu": gpu_name(), "commit": commit(), "command": command, "server_args": typed}
    output.mkdir(parents=True, exist_ok=True)
    done = SERVING.measured(output, resume)
    failures = Failures(console.print)
    rows: list[Row] = []
    with SERVING.drawn(output):
        for group in chosen(models, workloads, arms, kv_dtype, tp):
            left = {
                system: [
                    one for one in plan(group, system, policies) if identity(group, system, *one, facts) not in done
                ]
                for system in map(SYSTEMS.__getitem__, systems)
            }
            left = {system: planned for system, planned in left.items() if planned}
            with ExitStack() as stack:
                begun = {
                    system: begin(group, system, planned, typed, output, stack)
                    for system, planned in left.items()
                    if together
                }
                for system, planned in left.items():
                    server = begun.get(system) or begin(group, system, planned, typed, output, stack)
                    for row in failures.go_on(
                        system.name, group.model, measure(server, group, system, planned, console)
                    ):
                        rows.append(row | facts)
                        SERVING.keep(output, [rows[-1]])
                    if not together:  # else all have the same company throughout
                        server.stop()
    console.print(table(SERVING.read(output)))
    failures.finish()
    return rows


def plan(group: Group, system: System, policies: Sequence[str]) -> list[tuple[Arm, str]]:
    """Arms in the order they are measured in, with LSA once per policy."""
    return [(arm, policy) for arm in group.arms for policy in (policies if system.lsa else [""])]


def identity(group: Group, system: System, arm: Arm, policy: str, facts: Row) -> tuple[str, ...]:
    """Of the row that this arm gives."""
    return SERVING.identity(labels(group, system, arm, policy) | facts | {"kv_dtype": kv_name(group.kv_dtype)})


def arguments(group: Group, system: System, model: pathlib.Path) -> list[str]:
    """Of the server that measures the group."""
    largest = group.largest
    flags = ["--model-path", str(model), *DUMMY]
    flags += ["--cuda-graph-max-bs-decode", str(largest), "--max-running-requests", str(largest)]
    flags += ["--context-length", str(CONTEXT), "--stream-interval", "1" if largest == 1 else "4"]
    flags += ["--tp-size", str(group.tp)] if group.tp > 1 else []
    return system.arguments(flags, group.kv_dtype, group.pool_tokens, group.host_gb() if system.lsa else 0)


def begin(
    group: Group,
    system: System,
    planned: Iterable[tuple[Arm, str]],
    server_args: str,
    output: pathlib.Path,
    stack: ExitStack,
) -> ServerProcess:
    """The server that measures these arms of the group, each with its policy; it runs as long as the stack at most."""
    ranks = () if group.tp == 1 else (f"tp{group.tp}",)
    names = (system.name, group.model, f"{group.pool_gb:g}", group.kv_dtype, *ranks)
    log = log_path(output, names, [(arm.name, policy) for arm, policy in planned], server_args)

    def flags(model: pathlib.Path) -> list[str]:
        return [*arguments(group, system, model), *shlex.split(server_args)]

    return servers.begin(system, group.shape, CONTEXT, flags, log, stack)


def measure(
    server: ServerProcess, group: Group, system: System, planned: Iterable[tuple[Arm, str]], console: Console
) -> Iterator[Row]:
    """Run these arms, each with its policy, on a server that has begun."""
    facts = ready(server, f"{system.name} {group.model}", console)
    warm_up(server, group.shape.vocabulary)
    for arm, policy in planned:
        row = run_arm(server, group, arm, system, policy, facts)
        console.print(
            f"  {arm.workload} {arm.batch} x {arm.context} {policy}: {row['running_requests']} running, "
            f"{row['decode_tokens_per_s']:.0f} tokens/s, TPOT {row['tpot_ms_p50']:.2f} ms, "
            f"TTFT {row['ttft_s']:.1f} s, the last {row['ttft_last_s']:.1f}"
        )
        yield row


def labels(group: Group, system: System, arm: Arm, policy: str) -> Row:
    """The columns of a row that say what is measured."""
    return {
        "workload": arm.workload,
        "model": group.model,
        "system": system.name,
        "policy": policy or None,
        "context": arm.context,
        "batch": arm.batch,
        "tp": group.tp,
    }


def run_arm(server: ServerProcess, group: Group, arm: Arm, system: System, policy: str, facts: Row) -> Row:
    """One row of the results.

    Args:
        facts: what the server says about how it attends.
    """
    parameters = {"lsa": {"policy": policy}} if policy else None
    prompts = arm.prompts(group.shape.vocabulary)
    if arm.shared:  # the agents' common memory is there before they come
        asyncio.run(run_together(server.url, [prompts[0][: arm.shared]], 2, parameters))
    before = server.get("/lsa/status") if system.lsa else {}
    streams = asyncio.run(run_together(server.url, prompts, arm.tokens, parameters))
    figures = plateau(streams, skip_tokens=16)
    after = server.get("/lsa/status") if system.lsa else {}
    decode = max(len(stream.tokens) and stream.tokens[-1] for stream in streams)
    row = labels(group, system, arm, policy) | facts
    row |= {
        "running_requests": figures.running,
        "decode_tokens_per_s": figures.tokens_per_s,
        "tpot_ms_p50": figures.percentile(50),
        "tpot_ms_p99": figures.percentile(99),
        "ttft_s": figures.ttft_s,
        "ttft_last_s": figures.ttft_last_s,
        "cached_tokens": int(np.median([stream.cached or 0 for stream in streams if stream.tokens])),
        "kv_pool_bytes": group.pool_tokens * group.token_bytes,
        "kv_gpu_bytes": stock_kv_bytes(group, arm, figures.running, decode, facts["page_size"]),
        "lsa_overhead_gpu_bytes": 0,
        "host_bytes": 0,
    }
    return row | (lsa_figures(before, after, figures, group.tp) if system.lsa else {})


def stock_kv_bytes(group: Group, arm: Arm, running: int, decoded: int, page: int) -> int:
    """KV bytes of all pages, of ``page`` tokens, of the running requests; a shared prefix counted once."""
    own = pages_spanned(arm.context - arm.shared + decoded, page) * running
    return (own + pages_spanned(arm.shared, page)) * page * group.token_bytes


def lsa_figures(before: dict, after: dict, figures: Plateau, ranks: int = 1) -> dict[str, Any]:
    """What the server's status says about one arm.

    Args:
        ranks: of the server. Its status is that of the first; bytes here are of all of them, which copy at the same
            time as many each.
    """
    page_bytes = after["page_bytes"] * ranks
    pages = after["recalls"]["pages"] - before["recalls"]["pages"]
    seconds = after["recalls"]["seconds"] - before["recalls"]["seconds"]
    prefetched, late = (after["recalls"][n] - before["recalls"][n] for n in ("prefetched_pages", "late_pages"))
    busy = {name: after[name] - before[name] for name in ("refresh_host_seconds", "refresh_device_seconds")}
    refreshes = after["refreshes"] - before["refreshes"]
    each = {name: seconds / max(1, refreshes) for name, seconds in busy.items()}
    windows = figures.tokens / after["window"]  # every request is refreshed once a window
    return {
        "kv_gpu_bytes": held_bytes(before, after, page_bytes),
        "lsa_overhead_gpu_bytes": sum(after["physical"]["overhead_bytes"].values()) * ranks,
        "host_bytes": after["host"]["mirror_bytes"] * ranks,
        "recalled_bytes": pages * page_bytes,
        "recall_gbps": pages * page_bytes / seconds / 1e9 if seconds else None,
        "prefetched_bytes": prefetched * page_bytes,
        "recall_hidden_fraction": 1 - late / prefetched if prefetched else None,
        "refreshes": refreshes,
        "refresh_fraction": sum(each.values()) * windows / figures.seconds,
        "refresh_device_fraction": each["refresh_device_seconds"] * windows / figures.seconds,
        "refresh_host_ms": 1000 * each["refresh_host_seconds"],
        "refresh_device_ms": 1000 * each["refresh_device_seconds"],
        "stalls": after["stalls"] - before["stalls"],
        **group_figures(before.get("groups"), after.get("groups")),
    }


def group_figures(before: dict | None, after: dict | None) -> dict[str, float]:
    """What was read for several requests at once in an arm, by step with groups; nothing of a server without them."""
    if before is None or after is None:
        return {}
    seen = {name: after[name] - before[name] for name in ("steps", "saved_reads", "added_reads", "formed")}
    host_ms = 1000 * (after["host_seconds"] - before["host_seconds"]) / max(1, seen["formed"])
    each = {f"group_{name}": seen[name] / max(1, seen["steps"]) for name in ("saved_reads", "added_reads")}
    return {"group_steps": seen["steps"], **each, "group_forms": seen["formed"], "group_form_host_ms": host_ms}


def held_bytes(before: dict, after: dict, page_bytes: int) -> int | None:
    """Device KV that the requests needed while as many decoded as ever did between the two statuses: the mean of the
    server's own samples; None where it took none. Nothing is asked while the arm runs: stock is not asked either."""
    for running in sorted(map(int, after["decoding"]), reverse=True):
        now, then = after["decoding"][str(running)], before["decoding"].get(str(running), {})
        samples, pages = (now[name] - then.get(name, 0) for name in ("samples", "held_pages"))
        if samples:
            return round(pages * page_bytes / samples)
    return None
