"""The command: look at everything, plan the server, report.

``--json`` prints one object::

    {"ok": bool,                      false with any trouble; the exit status is then 1
     "findings": [{"section", "name", "status": "ok" | "note" | "trouble" | "skipped", "seen", "why", "fix"}],
     "gpu": null | {"name", "total_bytes", "free_bytes", "driver", "cuda", "capability"},     measured on this machine
     "host": {"free_bytes", "total_bytes", "memlock_bytes": null | int, "shm_bytes": null | int}, likewise
     "kernels": null | "triton" | "interpreted" | "reference",
     "plan": null | {                 null when the server would not start; a finding says why
         "model", "device", "dtype", "page_tokens", "page_bytes", "token_bytes", "context_tokens", "chunk_tokens",
         "max_running_requests", "mem_fraction_static",
         "device_memory": {"total_bytes", "free_bytes", "how"}, "host_memory": {"free_bytes", "how"},
         "weights": {"bytes", "how", "source"},
         "physical_pages", "kv_bytes", "overhead_bytes": {...},        as in /lsa/status under "physical"
         "virtual_pages", "mirror_bytes",                              as in /lsa/status under "virtual" and "host"
         "ranks", "host_mirror_bytes",                                 sizes are of one rank, but this and the host's
         "budgeted_bytes", "unused_bytes"},                            of the device, for KV and LSA's buffers
     "contexts": [{"tokens", "pages", "resident_pages", "stock", "lsa", "limit"}]}

``how`` is ``measured`` (on this machine, or from files), ``assumed`` (from ``--gpu-memory-gb`` or
``--free-host-memory-gb``) or ``computed`` (from the model's shape).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from sglang_lsa.config import add_cli_args, config_from_args
from sglang_lsa.doctor.findings import NOTE, OK, SKIPPED, TROUBLE, Finding, has_trouble
from sglang_lsa.doctor.hooks import hook_findings
from sglang_lsa.doctor.kernels import kernel_findings
from sglang_lsa.doctor.machine import GB, Gpu, Host, gpu_here, host_findings, host_here
from sglang_lsa.doctor.report import Report, as_json, show
from sglang_lsa.doctor.versions import version_findings

if TYPE_CHECKING:
    from sglang_lsa.doctor.contexts import Fit
    from sglang_lsa.doctor.server import Server

SECTION = "server"


class WrongUsage(ValueError):
    """A flag that no machine and no model could make right."""


def from_arguments(args: argparse.Namespace, server_flags: Sequence[str]) -> int:
    """Run the command.

    Args:
        args: the doctor's own flags.
        server_flags: all others, which are the server's.

    Returns:
        0 if all is well, 1 with trouble, 2 for wrong usage (SGLang's parser exits with that itself).
    """
    try:
        check_usage(args, server_flags)
    except ValueError as error:
        print(f"sglang-lsa doctor: {error}", file=sys.stderr)
        return 2
    with _quiet():
        report = examine(args, server_flags)
    if args.json:
        print(json.dumps(as_json(report), indent=1))
    else:
        show(report)
    return 0 if report.ok else 1


def check_usage(args: argparse.Namespace, server_flags: Sequence[str]) -> None:
    """Refuse what is wrong in itself, before anything is looked at; LSA's flags by the server's own checks.

    Raises:
        ValueError: the first problem.
    """
    for flag, value in (
        ("--gpu-memory-gb", args.gpu_memory_gb),
        ("--free-host-memory-gb", args.free_host_memory_gb),
    ):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise WrongUsage(f"{flag} {value} is no size: use a number of GB above 0")
    if args.gpu_memory_gb is not None and args.gpu_memory_gb < 1:
        raise WrongUsage(f"--gpu-memory-gb {args.gpu_memory_gb} is no GPU: use 1 or more")
    for tokens in args.context_tokens or ():
        if tokens < 1:
            raise WrongUsage(f"--context-tokens {tokens} is no length: use 1 or more")
    parser = argparse.ArgumentParser(prog="sglang-lsa doctor", add_help=False)
    add_cli_args(parser)
    parser.add_argument("--device")
    given, _ = parser.parse_known_args(list(server_flags))
    config_from_args(given)
    if args.gpu_memory_gb is not None and given.device not in (None, "cuda"):
        raise WrongUsage(f"--gpu-memory-gb plans for a GPU, --device {given.device} is none: leave one of the two out")


def examine(args: argparse.Namespace, server_flags: Sequence[str]) -> Report:
    """Look at everything; what goes wrong is a finding."""
    gpu, gpu_finding = gpu_here()
    findings = version_findings(on_gpu=gpu is not None or args.gpu_memory_gb is not None)
    mode, kernels = kernel_findings()
    hooks = hook_findings()
    server: Server | None = None
    contexts: tuple[Fit, ...] = ()
    made_by = "it is made by the server's own code"
    if mode is None or has_trouble(hooks):
        found = [Finding(SECTION, "memory plan", SKIPPED, "not made", made_by, "see above")]
    else:
        try:
            server, contexts, found = _server(args, server_flags, gpu)
        except ImportError as error:
            seen = f"not made ({error})"
            found = [Finding(SECTION, "memory plan", TROUBLE, seen, made_by, "see the versions above")]
    host, about_host = _host(server)
    return Report((*findings, gpu_finding, *about_host, *kernels, *hooks, *found), gpu, host, mode, server, contexts)


def _host(server: Server | None) -> tuple[Host | None, list[Finding]]:
    try:
        host = host_here()
    except ImportError as error:
        return None, [
            Finding("machine", "host memory", TROUBLE, f"cannot be measured ({error})", "", "see the versions")
        ]
    mirror, pinned = (server.host_mirror_bytes, server.device == "cuda") if server is not None else (None, False)
    return host, host_findings(host, mirror, pinned)


def _server(
    args: argparse.Namespace, server_flags: Sequence[str], gpu: Gpu | None
) -> tuple[Server | None, tuple[Fit, ...], list[Finding]]:
    """The server that the flags would start, how many contexts it runs, and what is to be said about both."""
    from sglang_lsa.doctor.server import Assumed, plan_server, resolve
    from sglang_lsa.patches.compatibility import Unsupported
    from sglang_lsa.patches.models import seen_after_load

    assumed = Assumed(_bytes(args.gpu_memory_gb), _bytes(args.free_host_memory_gb))
    why = "the server would refuse to start"
    step = "arguments"
    try:
        server_args = resolve(server_flags, assumed)
        step = "memory plan"
        server = plan_server(server_args, gpu, assumed)
    except Unsupported as error:
        return None, (), [Finding(SECTION, step, TROUBLE, problem, why) for problem in error.problems]
    except SystemExit as error:
        if isinstance(error.code, int):  # SGLang's parser has said what is wrong
            raise
        return None, (), [Finding(SECTION, step, TROUBLE, str(error), why)]
    except Exception as error:
        seen = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        return None, (), [Finding(SECTION, step, TROUBLE, seen, why)]
    found = [Finding(SECTION, "arguments", OK, f"{server.name} on {server.device}"), *plan_findings(server)]
    why = "the server looks at a model once more when it is loaded"
    found += [Finding(SECTION, "model", NOTE, seen, why) for seen in seen_after_load(server_args)]
    asked = args.context_tokens
    lengths = asked or sorted({max(1, server.context_tokens // part) for part in (4, 2, 1)})
    contexts = tuple(server.fit(tokens) for tokens in lengths)
    for context in contexts:
        problem = context_finding(server, context, asked is not None)
        found += [problem] if problem is not None else []
    return server, contexts, found


def plan_findings(server: Server) -> list[Finding]:
    """Whether the host holds what was planned, and its mirror what the device has room for."""
    from sglang_lsa.engine.sizing import round_up_gb

    plan, sized = server.plan, server.config.device_tokens or server.config.device_memory_gb
    name = "memory plan"
    seen = f"{plan.physical_tokens} tokens of KV on the device, {plan.virtual_tokens} in the host mirror"
    if server.device != "cuda":
        needed = server.weights.bytes + server.pool_bytes + server.overhead_bytes + server.mirror_bytes
        needed *= server.ranks
        if needed <= server.host.free_bytes:
            return [Finding(SECTION, name, OK, seen)]
        seen = f"a CPU server of {needed / GB:.2f} GB, {server.host.free_bytes / GB:.2f} GB are free"
        why = "model, device pool and host mirror share the host's memory; it would run out"
        return [Finding(SECTION, name, TROUBLE, seen, why, "lower --lsa-host-memory-gb or --lsa-device-tokens")]
    if sized or plan.virtual_tokens >= server.budgeted_tokens:
        return [Finding(SECTION, name, OK, seen)]
    why = f"the device has room for {server.budgeted_tokens} tokens: with a larger mirror the pool would be larger"
    mirror = round_up_gb((server.budgeted_tokens * plan.token_bytes + server.page_bytes) * server.ranks)
    fix = f"--lsa-host-memory-gb {mirror}, if the host has it"
    return [Finding(SECTION, name, NOTE, seen, why, fix)]


def context_finding(server: Server, context: Fit, asked: bool) -> Finding | None:
    """What is wrong with contexts of this length; trouble only if they were asked for."""
    from sglang_lsa.doctor.contexts import HOST
    from sglang_lsa.engine.sizing import round_up_gb

    name, status, plan = f"contexts of {context.tokens}", TROUBLE if asked else NOTE, server.plan
    if context.tokens > server.context_tokens:
        why = f"the model takes {server.context_tokens} at most"
        fix = "ask for shorter ones, or raise --context-length if the model can do that"
        return Finding(SECTION, name, status, "longer than the model takes", why, fix)
    if context.lsa > 0:
        return None
    if context.limit == HOST:
        needed = round_up_gb((context.pages + 1) * server.page_bytes * server.ranks)
        why = f"the host mirror holds {plan.virtual_tokens} tokens, and a context must be there whole"
        return Finding(SECTION, name, status, "none fits", why, f"--lsa-host-memory-gb {needed} or more")
    why = f"they read all of their pages, and the device pool holds {plan.physical_tokens} tokens"
    fix = "a budget below 1 and a policy other than full, or a larger device pool"
    return Finding(SECTION, name, status, "none fits", why, fix)


def _bytes(gigabytes: float | None) -> int | None:
    return None if gigabytes is None else int(gigabytes * GB)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What libraries print goes to stderr, so that stdout has nothing but the report; their warnings go nowhere."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
