"""Arguments of ``sglang-lsa bench`` and its benchmarks."""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from sglang_lsa.bench.systems import DEFAULT_SYSTEMS, SYSTEMS
from sglang_lsa.commands import Commands, add_command, failing
from sglang_lsa.evaluation.parser import add_calibration, add_groups, add_resident, add_selectors

ARMS = ("1k", "32k", "131k", "256k", "shared8", "shared32", "8x40k", "16x16k", "iso60k", "iso131k")
KV_DTYPES = ("auto", "bfloat16", "fp8_e4m3", "fp8_e5m2")


class Several(argparse.Action):
    """Values that blanks or commas separate, each once: of ``among``, or whole numbers where nothing is named."""

    def __init__(self, option_strings: Sequence[str], dest: str, among: Sequence[str] = (), **more: Any):
        super().__init__(option_strings, dest, nargs="+", metavar=more.pop("metavar", "NAME"), **more)
        self.among = among

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        found = list(dict.fromkeys(part for value in values for part in value.split(",")))
        for part in found:
            if part not in self.among if self.among else not (part.isdecimal() and int(part) > 0):
                fix = f"choose from {', '.join(self.among)}" if self.among else "give whole numbers above 0"
                parser.error(f"argument {self.option_strings[0]}: {part!r}: {fix}")
        setattr(namespace, self.dest, found if self.among else [int(part) for part in found])


class Rates(argparse.Action):
    """Numbers above 0 that blanks or commas separate, each once; ``auto`` alone stands for none."""

    def __init__(self, option_strings: Sequence[str], dest: str, auto: bool = False, **more: Any):
        super().__init__(option_strings, dest, nargs="+", **more)
        self.auto = auto

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        parts = [part for value in values for part in value.split(",")]
        if self.auto and parts == ["auto"]:
            return setattr(namespace, self.dest, [])
        for part in parts:
            if not positive(part):
                fix = "give numbers above 0" + (", or auto alone" if self.auto else "")
                parser.error(f"argument {self.option_strings[0]}: {part!r}: {fix}")
        setattr(namespace, self.dest, list(dict.fromkeys(map(float, parts))))


def positive(text: str) -> bool:
    """Whether it is a finite number above 0."""
    try:
        return 0 < float(text) < float("inf")
    except ValueError:
        return False


def add_several(
    command: argparse.ArgumentParser, flag: str, among: Sequence[str], text: str, default: Sequence[str] | None = None
) -> None:
    """A flag that takes some of ``among``; all of them by default."""
    default = list(among if default is None else default)
    what = text + f": of {', '.join(among)}; default: {'all' if default == list(among) else ', '.join(default)}"
    command.add_argument(flag, action=Several, among=among, default=default, help=what)


def add_common(command: argparse.ArgumentParser) -> None:
    """What benchmarks against stock SGLang take."""
    text = (
        "stock is SGLang with what it chooses itself, stock-flashinfer with that backend, lsa with what it chooses "
        "itself, lsa-fa3 and lsa-flashinfer with one backend, lsa-groups with pages that requests share read once, "
        "lsa-separate with pages that each request reads for itself, lsa-paced with prompts that wait for decode steps"
    )
    add_several(command, "--systems", tuple(SYSTEMS), text, DEFAULT_SYSTEMS)
    text = "type of KV of all systems; a pool of so many GB holds more tokens of a smaller type"
    command.add_argument("--kv-cache-dtype", choices=KV_DTYPES, default="auto", dest="kv_dtype", help=text)
    text = "measure only what has no row in the output folder: same card, KV type and system, at whatever commit"
    command.add_argument("--resume", action="store_true", help=text)
    add_rest(command)


def add_rest(command: argparse.ArgumentParser) -> None:
    """What those take whose systems are others."""
    text = "more arguments for all servers; rows with other ones are other rows, not measured by --resume nor compared"
    command.add_argument("--server-args", default="", metavar="'...'", help=text)
    command.add_argument("--output", type=pathlib.Path, default=pathlib.Path("bench-output"), metavar="DIR")


def add_parser(commands: Commands) -> None:
    command = commands.add_parser(
        "bench", help="measure LSA, against stock SGLang on this machine's GPU or against itself"
    )
    kinds = command.add_subparsers(title="benchmarks", metavar="BENCHMARK", required=True)
    against_stock = (add_serving, add_load, add_prefill, add_dsv4)
    for add in (*against_stock, add_resident, add_selectors, add_groups, add_calibration, add_overhead):
        add(kinds)


def add_serving(kinds: Commands) -> None:
    text = (
        "decode speed and requests per GPU, with dummy weights: tpot (one request of 1K to 256K tokens, batches of 8 "
        "and 16), iso (as many contexts of 60K, of 128K with 70b, as fit the same pool), shared (32 agents over one "
        "128K prefix)"
    )
    command = add_command(kinds, "serving", text)
    text = (
        "shapes of Llama; 70b is for two GPUs or more: --tp-size 2 --kv-cache-dtype fp8_e4m3 --server-args "
        "'--quantization fp8'"
    )
    add_several(command, "--models", ("1b", "8b", "70b"), text, ("1b", "8b"))
    add_several(command, "--workloads", ("tpot", "iso", "shared"), "kinds of arms")
    add_several(command, "--arms", ARMS, "prompts, or batches x prompts, among them")
    text = "LSA is measured with each; random changes nearly the whole resident set every window"
    add_several(command, "--policies", ("quest", "random", "recency"), text, ("quest", "random"))
    text = "ranks of every server (tensor parallelism); pools are those of all ranks together; default: 1"
    command.add_argument("--tp-size", type=int, default=1, metavar="N", dest="tp", help=text)
    text = (
        "start the servers of all systems at once and measure one after the other: saves their starts, needs GPU "
        "memory for all of them (--server-args '--mem-fraction-static F') and cores that servers may wait on"
    )
    command.add_argument("--together", action="store_true", help=text)
    add_common(command)
    command.set_defaults(run=run_serving)


@failing("bench", RuntimeError, ValueError)  # no GPU, too little memory, a server or a request that failed
def run_serving(args: argparse.Namespace) -> int:
    from rich.console import Console

    from sglang_lsa.bench.serving import run
    from sglang_lsa.provenance import command_line

    if args.tp < 1:
        raise ValueError(f"--tp-size {args.tp}: use 1 rank or more")
    names = ("models", "workloads", "arms", "systems", "policies", "kv_dtype", "resume", "tp", "together")
    asked = {name: getattr(args, name) for name in (*names, "server_args")}
    run(args.output, Console(width=200), command=command_line(), **asked)
    return 0


def add_load(kinds: Commands) -> None:
    text = (
        "throughput, latencies and goodput while requests arrive by a Poisson process, with dummy weights and the same "
        "pool: agents (questions of 1K tokens over cached memories of 32K to 128K) and documents (new prompts of 8K to "
        "64K), answers of 200 to 800 tokens. Requests, lengths and arrivals are the same for all systems"
    )
    command = add_command(kinds, "load", text)
    text = "shapes of Llama; tiny divides all lengths by 64 and runs on any machine"
    add_several(command, "--models", ("8b", "1b", "tiny"), text, ("8b",))
    add_several(command, "--mixes", ("agents", "documents"), "kinds of traffic")
    text = (
        "requests a second, or auto (the default): stock's saturation is searched first (the rate is doubled until "
        "clearly less is completed than arrives; the most that was completed a second is it), and --times that measured"
    )
    command.add_argument("--rates", action=Rates, auto=True, default=[], metavar="RATE", help=text)
    text = "with --rates auto: multiples of stock's saturation; default: 0.5 1 2"
    command.add_argument("--times", action=Rates, default=[0.5, 1.0, 2.0], metavar="FACTOR", help=text)
    text = "during which requests arrive, at every rate and in every step of the search; default: 60"
    command.add_argument("--seconds", type=float, default=60.0, metavar="S", help=text)
    text = "KV on the device, of all systems; default: 16 for 8b, 4 for 1b, 0.02 for tiny"
    command.add_argument("--pool-gb", type=float, metavar="GB", help=text)
    text = "of the agents; LSA keeps them in host memory (9 GB each on average for 8b); default: 16"
    command.add_argument("--memories", type=int, default=16, metavar="N", help=text)
    text = "requests that a server runs at once; default: 64"
    command.add_argument("--max-running", type=int, default=64, metavar="N", help=text)
    text = "of the objective: most seconds from arrival to first token; default: 5"
    command.add_argument("--ttft", type=float, default=5.0, metavar="S", help=text)
    text = "of the objective: most milliseconds a token on average over an answer; default: 30"
    command.add_argument("--tpot", type=float, default=30.0, metavar="MS", help=text)
    add_common(command)
    command.set_defaults(run=run_load)


@failing("bench", RuntimeError, ValueError)  # no GPU, too little memory, a server that failed, nothing arrives
def run_load(args: argparse.Namespace) -> int:
    from rich.console import Console

    from sglang_lsa.bench.load import run
    from sglang_lsa.bench.load_figures import Objective
    from sglang_lsa.provenance import command_line

    for flag in ("seconds", "pool_gb", "memories", "max_running", "ttft", "tpot"):
        value = getattr(args, flag)
        if value is not None and not positive(str(value)):
            raise ValueError(f"--{flag.replace('_', '-')} {value:g}: use a number above 0")
    names = ("models", "mixes", "systems", "rates", "times", "seconds", "pool_gb", "memories", "max_running")
    asked = {name: getattr(args, name) for name in (*names, "kv_dtype", "resume", "server_args")}
    objective = Objective(args.ttft, args.tpot)
    run(args.output, Console(width=240), objective=objective, command=command_line(), **asked)
    return 0


def add_prefill(kinds: Commands) -> None:
    text = (
        "time to the first token of an 8B shape with dummy weights: a 128K prompt with a pool that holds it and with a "
        "quarter of that, a 400K prompt with 16 GB, and questions about a cached memory of 256K tokens"
    )
    command = add_command(kinds, "prefill", text)
    add_several(command, "--pools", ("full", "quarter", "16gb"), "full holds a prompt, quarter a quarter of it")
    text = "tokens of the new prompts; default: 131072, with the pool of 16 GB 400000"
    command.add_argument("--prompts", action=Several, default=[], metavar="N", help=text)
    add_several(command, "--workloads", ("ttft", "question"), "new prompts, and questions, which the pool 16gb has")
    text = "default: 3; the median counts; a prompt of more than 131072 tokens is measured once"
    command.add_argument("--repeats", type=int, default=3, metavar="N", help=text)
    add_common(command)
    command.set_defaults(run=run_prefill)


@failing("bench", RuntimeError, ValueError)  # no GPU, too little memory, a server or a request that failed
def run_prefill(args: argparse.Namespace) -> int:
    from rich.console import Console

    from sglang_lsa.bench.prefill import run
    from sglang_lsa.provenance import command_line

    names = ("pools", "prompts", "workloads", "systems", "repeats", "kv_dtype", "resume", "server_args")
    run(args.output, Console(width=200), command=command_line(), **{name: getattr(args, name) for name in names})
    return 0


def add_dsv4(kinds: Commands) -> None:
    text = (
        "DeepSeek-V4 with drawn weights: requests and tokens a second over prefixes of 256K, 512K and 1M tokens, which "
        "are put into radix tree and pools without computing them, of stock SGLang (stock, and stock-tuned with a "
        "window pool as small as these requests allow) and of LSA, with the same bytes of KV"
    )
    command = add_command(kinds, "dsv4", text)
    add_several(command, "--models", ("rank", "tiny"), "one rank of 8 of Flash, or 6 layers of it", ("rank",))
    add_several(command, "--arms", ("256k", "512k", "1m", "1x1m"), "contexts; 1x1m is one request alone")
    add_several(command, "--systems", ("stock", "stock-tuned", "lsa"), "servers")
    text = "of the weights; how many bytes are left for KV depends on it"
    command.add_argument("--weights", choices=("bfloat16", "fp8"), default="bfloat16", help=text)
    text = "GB (10^9 bytes) on the device for KV of every kind, of all systems; default: 45"
    command.add_argument("--kv-gb", type=float, default=45.0, metavar="GB", help=text)
    text = "that each request generates; default: 768"
    command.add_argument("--tokens", type=int, default=768, metavar="N", help=text)
    text = "requests over each prefix; default: 1. Host memory bounds distinct prefixes of LSA"
    command.add_argument("--share", type=int, default=1, metavar="N", help=text)
    command.add_argument("--budget", type=float, default=0.1, help="of LSA; default: 0.1")
    text = "per cent of a resident set that every window replaces, of LSA; default: 0 10 30"
    command.add_argument("--churns", nargs="+", type=int, default=[0, 10, 30], metavar="PERCENT", help=text)
    text = "measure only what has no row in the output folder: same card and settings, at whatever commit"
    command.add_argument("--resume", action="store_true", help=text)
    add_rest(command)
    command.set_defaults(run=run_dsv4)


@failing("bench", RuntimeError, ValueError)  # no GPU, too little memory, a server or a request that failed
def run_dsv4(args: argparse.Namespace) -> int:
    from rich.console import Console

    from sglang_lsa.bench.dsv4 import run
    from sglang_lsa.provenance import command_line

    if min(args.tokens, args.share) < 1 or not 0 < args.budget <= 1 or not all(0 <= c <= 100 for c in args.churns):
        raise ValueError(
            f"--tokens {args.tokens}, --share {args.share}, --budget {args.budget:g}, --churns {args.churns}: use 1 "
            "token or more, 1 request or more, a budget in (0, 1], and per cents from 0 to 100"
        )
    names = ("models", "arms", "systems", "weights", "kv_gb", "tokens", "share", "budget", "churns", "resume")
    asked = {name: getattr(args, name) for name in (*names, "server_args")}
    run(args.output, Console(width=200), command=command_line(), **asked)
    return 0


def add_overhead(kinds: Commands) -> None:
    text = (
        "the scheduler's time in LSA per decode step, refresh, finished request, for windows that all begin in one "
        "step, and for requests over one prefix, on any machine (some minutes)"
    )
    command = add_command(kinds, "overhead", text)
    command.add_argument("--requests", nargs="+", type=int, default=[1, 8, 32], metavar="N", help="decoding together")
    command.add_argument("--tokens", nargs="+", type=int, default=[8192, 131072], metavar="N", help="of each request")
    command.add_argument("--output", type=pathlib.Path, metavar="FILE", help="where to write the numbers as JSON")
    command.set_defaults(run=run_overhead)


def run_overhead(args: argparse.Namespace) -> int:
    from rich.console import Console

    from sglang_lsa.bench.overhead import run
    from sglang_lsa.bench.refresh_together import run_shared, run_together

    if min(args.requests) < 1 or min(args.tokens) < 1024:
        print("sglang-lsa bench: use 1 request or more, of 1,024 tokens or more", file=sys.stderr)
        return 1
    console = Console(width=120)
    found = run(console, args.requests, args.tokens)
    found["together"] = run_together(console, args.requests, args.tokens)
    found["shared"] = run_shared(console, args.requests, args.tokens)
    if args.output is not None:
        args.output.write_text(json.dumps(found, indent=1) + "\n")
    return 0
