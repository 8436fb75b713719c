"""The report, as tables for people and as one JSON object for programs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sglang_lsa.doctor.findings import NOTE, OK, SKIPPED, TROUBLE, Finding, has_trouble
from sglang_lsa.doctor.machine import GB, Gpu, Host

if TYPE_CHECKING:
    from sglang_lsa.doctor.contexts import Fit
    from sglang_lsa.doctor.server import Server

STYLES = {OK: "green", NOTE: "yellow", TROUBLE: "bold red", SKIPPED: "dim"}
SECTIONS = ("versions", "machine", "kernels", "hooks", "server")


@dataclass(frozen=True)
class Report:
    """All that was found. ``server`` is None when it would not start, ``host`` when it could not be looked at."""

    findings: tuple[Finding, ...]
    gpu: Gpu | None
    host: Host | None
    kernels: str | None
    server: Server | None
    contexts: tuple[Fit, ...]

    @property
    def ok(self) -> bool:
        return not has_trouble(self.findings)


def show(report: Report, console: Console | None = None) -> None:
    """Print the tables."""
    console = console or Console()
    for section in SECTIONS:
        findings = [finding for finding in report.findings if finding.section == section]
        if section == "hooks" and findings and all(finding.status == OK for finding in findings):
            seen = f"all {len(findings)} are as they were when they were checked; --json lists them"
            findings = [Finding(section, "hooks", OK, seen)]
        if findings:
            console.print(findings_table(section, findings))
    if report.server is not None:
        console.print(memory_table(report.server))
        console.print(contexts_table(report))
    troubles = [finding for finding in report.findings if finding.status == TROUBLE]
    if not troubles:
        console.print(Text("No trouble.", style=STYLES[OK]))
        return
    console.print(Text(f"{len(troubles)} trouble{'s' * (len(troubles) > 1)}:", style=STYLES[TROUBLE]))
    for finding in troubles:
        console.print(Text(f"  {finding.name}: {finding.seen}" + (f": {finding.fix}" if finding.fix else "")))


def findings_table(section: str, findings: list[Finding]) -> Table:
    table = Table(title=section, title_justify="left", show_header=False, expand=True)
    table.add_column(ratio=3, overflow="fold")
    table.add_column(width=7)
    table.add_column(ratio=5, overflow="fold")
    for finding in findings:
        told = Text(finding.seen)
        if finding.status != OK:
            told.append(f"\nwhy: {finding.why}" if finding.why else "", style="dim")
            told.append(f"\nfix: {finding.fix}" if finding.fix else "", style="bold")
        name = ".".join(finding.name.split(".")[-2:]) if section == "hooks" else finding.name  # Class.method
        table.add_row(Text(name), Text(finding.status, style=STYLES[finding.status]), told)
    return table


def memory_rows(server: Server) -> list[tuple[str, int, str]]:
    """What takes the device's memory, in bytes, and where each number is from."""
    memory, plan, weights = server.memory, server.plan, server.weights
    pages = plan.physical_tokens // plan.page.page_tokens
    takes = [
        ("weights", weights.bytes, f"{weights.how}: {weights.source}"),
        (f"KV pool, {pages} pages", server.pool_bytes, "planned"),
        *((f"LSA: {name.replace('_', ' ')}", size, "planned") for name, size in plan.overhead.items()),
    ]
    if server.window_bytes:
        takes.append(("sliding window, compression states", server.window_bytes, "as SGLang sizes them"))
    if server.device != "cuda":
        return takes
    left = memory.free_bytes - int(memory.free_bytes * server.static_share)
    return [
        ("GPU memory", memory.total_bytes, memory.how),
        ("free before the model is loaded", memory.free_bytes, memory.how),
        ("left to SGLang: activations, CUDA graphs", left, f"--mem-fraction-static {server.static_share}"),
        *takes,
        ("unused", server.unused_bytes, "planned"),
    ]


def memory_table(server: Server) -> Table:
    title = (
        f"memory plan: {server.name}, {server.dtype} KV of {server.plan.token_bytes:,} bytes a token, "
        f"{server.page_bytes:,} a page of {server.plan.page.page_tokens}"
    )
    if server.ranks > 1:
        title += f"; one of {server.ranks} ranks"
    table = Table(title=title, title_justify="left", expand=True)
    table.add_column("what")
    table.add_column("size", justify="right")
    table.add_column("from", overflow="fold")
    for name, size, source in memory_rows(server):
        table.add_row(name, size_text(size), source)
    table.add_section()
    table.add_row("host memory, free", size_text(server.host.free_bytes), server.host.how)
    mirror = f"host mirror, {server.plan.virtual_tokens // server.plan.page.page_tokens} pages"
    table.add_row(mirror, size_text(server.mirror_bytes), "planned")
    if server.ranks > 1:
        table.add_row(f"host mirrors of {server.ranks} ranks", size_text(server.host_mirror_bytes), "planned")
    return table


def size_text(size: int) -> str:
    """Bytes for people."""
    return f"{size / GB:.2f} GB" if size >= GB // 10 else f"{size / (1 << 20):.1f} MB"


def contexts_table(report: Report) -> Table:
    table = Table(title="contexts that run at the same time, in the same device bytes", title_justify="left")
    for name in ("tokens each", "stock", "LSA", "limited by", "pages read in decode"):
        table.add_column(name, justify="left" if name == "limited by" else "right")
    for context in report.contexts:
        read = f"{context.resident_pages} of {context.pages}"
        if report.server is not None and context.tokens > report.server.context_tokens:
            table.add_row(f"{context.tokens:,}", "-", "-", f"the model, {report.server.context_tokens:,} tokens", "-")
        else:
            table.add_row(f"{context.tokens:,}", str(context.stock), str(context.lsa), context.limit, read)
    return table


def as_json(report: Report) -> dict[str, Any]:
    """Plain JSON values, as :mod:`sglang_lsa.doctor.command` lists them."""
    return {
        "ok": report.ok,
        "findings": [dataclasses.asdict(finding) for finding in report.findings],
        "gpu": report.gpu and dataclasses.asdict(report.gpu),
        "host": report.host and dataclasses.asdict(report.host),
        "kernels": report.kernels,
        "plan": report.server and plan_json(report.server),
        "contexts": [dataclasses.asdict(context) for context in report.contexts],
    }


def plan_json(server: Server) -> dict[str, Any]:
    plan = server.plan
    return {
        "model": server.name,
        "device": server.device,
        "dtype": server.dtype,
        "page_tokens": plan.page.page_tokens,
        "page_bytes": server.page_bytes,
        "token_bytes": plan.token_bytes,
        "context_tokens": server.context_tokens,
        "chunk_tokens": server.chunk_tokens,
        "max_running_requests": server.max_requests,
        "mem_fraction_static": server.static_share,
        "device_memory": dataclasses.asdict(server.memory),
        "host_memory": dataclasses.asdict(server.host),
        "weights": dataclasses.asdict(server.weights),
        "physical_pages": plan.physical_tokens // plan.page.page_tokens,
        "kv_bytes": server.pool_bytes,
        "overhead_bytes": dict(plan.overhead),
        "virtual_pages": plan.virtual_tokens // plan.page.page_tokens,
        "mirror_bytes": server.mirror_bytes,
        "ranks": server.ranks,
        "host_mirror_bytes": server.host_mirror_bytes,
        "budgeted_bytes": server.budgeted_bytes,
        "unused_bytes": server.unused_bytes,
    }
