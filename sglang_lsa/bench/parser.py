"""Arguments of ``sglang-lsa bench`` and its benchmarks."""

from __future__ import annotations

import argparse
import pathlib
import sys

from sglang_lsa.commands import Commands, add_command, failing
from sglang_lsa.evaluation.parser import add_resident, add_selectors


def add_parser(commands: Commands) -> None:
    command = commands.add_parser(
        "bench", help="measure LSA, against stock SGLang on this machine's GPU or against itself"
    )
    kinds = command.add_subparsers(title="benchmarks", metavar="BENCHMARK", required=True)
    for add in (add_serving, add_prefill, add_resident, add_selectors, add_overhead):
        add(kinds)


def add_serving(kinds: Commands) -> None:
    text = (
        "decode speed and requests per GPU, with dummy weights: tpot (one request of 1K to 256K tokens, batches of 8 "
        "and 16), iso (as many 60K contexts as fit the same pool), shared (32 agents over one 128K prefix)"
    )
    command = add_command(kinds, "serving", text)
    command.add_argument("--models", nargs="+", choices=("1b", "8b"), default=["1b", "8b"])
    workloads = ("tpot", "iso", "shared")
    command.add_argument("--workloads", nargs="+", choices=workloads, default=list(workloads))
    command.add_argument("--systems", nargs="+", choices=("stock", "lsa"), default=["stock", "lsa"])
    command.add_argument(
        "--policies",
        nargs="+",
        choices=("quest", "random", "recency"),
        default=["quest", "random"],
        help="LSA is measured with each; random changes nearly the whole resident set every window",
    )
    command.add_argument("--server-args", default="", metavar="'...'", help="more arguments for both servers")
    command.add_argument("--output", type=pathlib.Path, default=pathlib.Path("bench-output"), metavar="DIR")
    command.set_defaults(run=run_serving)


@failing("bench", RuntimeError, ValueError)  # no GPU, too little memory, a server or a request that failed
def run_serving(args: argparse.Namespace) -> int:
    from rich.console import Console

    from sglang_lsa.bench.serving import run
    from sglang_lsa.provenance import command_line

    run(
        args.output,
        Console(width=160),
        models=args.models,
        workloads=args.workloads,
        systems=args.systems,
        policies=args.policies,
        server_args=args.server_args,
        command=command_line(),
    )
    return 0


def add_prefill(kinds: Commands) -> None:
    text = (
        "time to the first token of an 8B shape with dummy weights: a 128K prompt with a pool that holds it and with a "
        "quarter of that, a 400K prompt with 16 GB, and questions about a cached memory of 256K tokens"
    )
    command = add_command(kinds, "prefill", text)
    command.add_argument("--pools", nargs="+", choices=("full", "quarter", "16gb"), default=["full", "quarter", "16gb"])
    kinds_of_prompt = ("ttft", "question")
    command.add_argument("--workloads", nargs="+", choices=kinds_of_prompt, default=list(kinds_of_prompt))
    command.add_argument("--repeats", type=int, default=3, metavar="N", help="default: 3; the median counts")
    command.add_argument("--server-args", default="", metavar="'...'", help="more arguments for both servers")
    command.add_argument("--output", type=pathlib.Path, default=pathlib.Path("bench-output"), metavar="DIR")
    command.set_defaults(run=run_prefill)


@failing("bench", RuntimeError, ValueError)  # no GPU, too little memory, a server or a request that failed
def run_prefill(args: argparse.Namespace) -> int:
    from rich.console import Console

    from sglang_lsa.bench.prefill import run
    from sglang_lsa.provenance import command_line

    options = {name: getattr(args, name) for name in ("pools", "workloads", "repeats", "server_args")}
    run(args.output, Console(width=160), command=command_line(), **options)
    return 0


def add_overhead(kinds: Commands) -> None:
    text = "the scheduler's time in LSA per decode step, refresh and finished request, on any machine (half a minute)"
    command = add_command(kinds, "overhead", text)
    command.add_argument("--requests", nargs="+", type=int, default=[1, 8, 32], metavar="N", help="decoding together")
    command.add_argument("--tokens", nargs="+", type=int, default=[8192, 131072], metavar="N", help="of each request")
    command.add_argument("--output", type=pathlib.Path, metavar="FILE", help="where to write the numbers as JSON")
    command.set_defaults(run=run_overhead)


def run_overhead(args: argparse.Namespace) -> int:
    from rich.console import Console

    from sglang_lsa.bench.overhead import run

    if min(args.requests) < 1 or min(args.tokens) < 1024:
        print("sglang-lsa bench: use 1 request or more, of 1,024 tokens or more", file=sys.stderr)
        return 1
    run(Console(width=120), args.requests, args.tokens, args.output)
    return 0
