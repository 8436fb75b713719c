"""The command ``sglang-lsa``: one function per subcommand."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from urllib.parse import urlsplit

from sglang_lsa import SGLANG_VERSION, __version__
from sglang_lsa.embedded_model import MODEL_NAME, EmbeddedModelError, embedded_model_path
from sglang_lsa.training.settings import LOSS_NAMES, TrainSettings

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Returns:
        0 if it did what it is for, 1 if it failed, 130 after Ctrl-C; wrong usage exits with 2.
    """
    parser = argparse.ArgumentParser(prog="sglang-lsa", description="Lookahead Sparse Attention for SGLang")
    parser.add_argument("--version", action="version", version=f"sglang-lsa {__version__} (SGLang {SGLANG_VERSION})")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in COMMANDS:
        add(commands)
    args, more = parser.parse_known_args(argv)
    if more and not getattr(args, "server_flags", False):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    args.more = more
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _exit)
    try:
        return int(args.run(args))
    except EmbeddedModelError as error:
        print(f"sglang-lsa: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("sglang-lsa: interrupted", file=sys.stderr)
        return INTERRUPTED


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "compare LSA with stock SGLang on hidden facts, on any machine (about 5 minutes on 2 CPU cores)"
    command = commands.add_parser("demo", help=text, description=text[0].upper() + text[1:])
    command.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path("demo-output"), metavar="DIR", help="default: demo-output"
    )
    command.set_defaults(run=_demo)


def _demo(args: argparse.Namespace) -> int:
    from sglang_lsa.demo.report import make_console
    from sglang_lsa.demo.run import run
    from sglang_lsa.demo.servers import DemoFailed

    try:
        return 0 if run(args.output, make_console()) else 1
    except DemoFailed as error:
        print(f"sglang-lsa demo: {error}", file=sys.stderr)
        return 1


def _add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = (
        "whether a server with these flags would start here, what it would hold in which memory, and how many contexts "
        "it would run; loads nothing (about 20 seconds)"
    )
    command = commands.add_parser(
        "doctor",
        help=text,
        description=text[0].upper() + text[1:],
        epilog="All other flags are the server's: --model-path (default: the embedded model), --lsa-*, SGLang's own. "
        "Exit status: 0 all is well, 1 trouble, 2 wrong usage.",
        allow_abbrev=False,  # the server's flags could begin with one of ours
    )
    command.add_argument(
        "--context-tokens",
        nargs="+",
        type=int,
        metavar="N",
        help="how many contexts of so many tokens, prompt and answer, run at the same time; it is trouble if none does",
    )
    command.add_argument(
        "--gpu-memory-gb", type=float, metavar="G", help="plan for a GPU of this size, which need not be here"
    )
    command.add_argument(
        "--free-host-memory-gb", type=float, metavar="G", help="plan for a host with so much free memory, likewise"
    )
    command.add_argument("--json", action="store_true", help="print one JSON object, and nothing else, on stdout")
    command.set_defaults(run=_doctor, server_flags=True)


def _doctor(args: argparse.Namespace) -> int:
    from sglang_lsa.doctor.command import from_arguments

    return from_arguments(args, args.more)


def _add_model(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = f"print the folder of the embedded model, {MODEL_NAME}; prepares it the first time"
    command = commands.add_parser("model", help=text, description=text[0].upper() + text[1:])
    command.set_defaults(run=_model)


def _model(args: argparse.Namespace) -> int:
    print(embedded_model_path())
    return 0


def _add_view(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "show the live view of a server that wants its API key: the page asks for it, and this command passes it on"
    command = commands.add_parser("view", help=text, description=text[0].upper() + text[1:])
    command.add_argument("server", type=_address, metavar="URL", help="of the server, such as http://host:30000")
    command.add_argument("--port", type=int, default=0, help="on this machine; default: any that is free")
    command.set_defaults(run=_view)


def _address(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise argparse.ArgumentTypeError(f"{text!r} is no address of a server: write http://host:port")
    return text


def _view(args: argparse.Namespace) -> int:
    import asyncio

    from sglang_lsa.serve.view.forward import serve

    try:
        asyncio.run(serve(args.server, args.port, lambda address: print(f"Open {address}", flush=True)))
    except OSError as error:
        print(f"sglang-lsa view: port {args.port}: {error.strerror}: choose another --port", file=sys.stderr)
        return 1
    return 0


def _add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "bench", help="measure LSA, against stock SGLang on this machine's GPU or against itself"
    )
    kinds = command.add_subparsers(title="benchmarks", metavar="BENCHMARK", required=True)
    text = (
        "decode speed and requests per GPU, with dummy weights: tpot (one request of 1K to 256K tokens, batches of 8 "
        "and 16), iso (as many 60K contexts as fit the same pool), shared (32 agents over one 128K prefix)"
    )
    serving = kinds.add_parser("serving", help=text, description=text[0].upper() + text[1:])
    serving.add_argument("--models", nargs="+", choices=("1b", "8b"), default=["1b", "8b"])
    workloads = ("tpot", "iso", "shared")
    serving.add_argument("--workloads", nargs="+", choices=workloads, default=list(workloads))
    serving.add_argument("--systems", nargs="+", choices=("stock", "lsa"), default=["stock", "lsa"])
    serving.add_argument(
        "--policies",
        nargs="+",
        choices=("quest", "random", "recency"),
        default=["quest", "random"],
        help="LSA is measured with each; random changes nearly the whole resident set every window",
    )
    serving.add_argument("--server-args", default="", metavar="'...'", help="more arguments for both servers")
    serving.add_argument("--output", type=pathlib.Path, default=pathlib.Path("bench-output"), metavar="DIR")
    serving.set_defaults(run=_bench_serving)
    text = (
        "time to the first token of an 8B shape with dummy weights: a 128K prompt with a pool that holds it and with a "
        "quarter of that, a 400K prompt with 16 GB, and questions about a cached memory of 256K tokens"
    )
    prefill = kinds.add_parser("prefill", help=text, description=text[0].upper() + text[1:])
    prefill.add_argument("--pools", nargs="+", choices=("full", "quarter", "16gb"), default=["full", "quarter", "16gb"])
    kinds_of_prompt = ("ttft", "question")
    prefill.add_argument("--workloads", nargs="+", choices=kinds_of_prompt, default=list(kinds_of_prompt))
    prefill.add_argument("--repeats", type=int, default=3, metavar="N", help="default: 3; the median counts")
    prefill.add_argument("--server-args", default="", metavar="'...'", help="more arguments for both servers")
    prefill.add_argument("--output", type=pathlib.Path, default=pathlib.Path("bench-output"), metavar="DIR")
    prefill.set_defaults(run=_bench_prefill)
    text = (
        "answers about cached documents that a question reads exactly or by a resident set, with the embedded model, "
        "on any machine (about 15 minutes on 2 CPU cores)"
    )
    resident = kinds.add_parser("resident", help=text, description=text[0].upper() + text[1:])
    resident.add_argument("--samples", type=int, default=20, metavar="N", help="documents; default: 20")
    resident.add_argument("--output", type=pathlib.Path, default=pathlib.Path("bench-output"), metavar="DIR")
    resident.set_defaults(run=_bench_resident)
    text = (
        "answers to held-out questions about long contexts, under full attention and under each policy at the same "
        "budgets; any model that the server takes"
    )
    selectors = kinds.add_parser("selectors", help=text, description=text[0].upper() + text[1:])
    policies = ("indexer", "quest", "recency", "random")
    families = ("needle", "facts", "filler", "pairs", "records")
    selectors.add_argument("--model", metavar="PATH", help="path or hub name; default: the embedded model")
    selectors.add_argument("--name", metavar="NAME", help="of the model, in the results; default: as given")
    selectors.add_argument("--indexer", metavar="DIR", help="for the policy indexer")
    selectors.add_argument("--families", nargs="+", choices=families, default=list(families))
    selectors.add_argument("--lengths", nargs="+", type=int, default=[4096], metavar="N", help="tokens; default: 4096")
    selectors.add_argument("--samples", type=int, default=10, metavar="N", help="prompts of each family and length")
    selectors.add_argument("--budgets", nargs="+", type=float, default=[0.135, 0.07], metavar="SHARE")
    selectors.add_argument("--policies", nargs="+", choices=policies, default=list(policies))
    selectors.add_argument("--server-args", default="", metavar="'...'", help="more arguments for the server")
    selectors.add_argument("--texts", type=pathlib.Path, metavar="DIR", help="text files; default: Python's library")
    selectors.add_argument("--output", type=pathlib.Path, default=pathlib.Path("bench-output"), metavar="DIR")
    selectors.set_defaults(run=_bench_selectors)
    text = "the scheduler's time in LSA per decode step, refresh and finished request, on any machine (half a minute)"
    overhead = kinds.add_parser("overhead", help=text, description=text[0].upper() + text[1:])
    overhead.add_argument("--requests", nargs="+", type=int, default=[1, 8, 32], metavar="N", help="decoding together")
    overhead.add_argument("--tokens", nargs="+", type=int, default=[8192, 131072], metavar="N", help="of each request")
    overhead.add_argument("--output", type=pathlib.Path, metavar="FILE", help="where to write the numbers as JSON")
    overhead.set_defaults(run=_bench_overhead)


def _bench_serving(args: argparse.Namespace) -> int:
    from rich.console import Console

    from sglang_lsa.bench.serving import command_line, run

    try:
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
    except (RuntimeError, ValueError) as error:  # no GPU, too little memory, a server or a request that failed
        print(f"sglang-lsa bench: {error}", file=sys.stderr)
        return 1
    return 0


def _bench_prefill(args: argparse.Namespace) -> int:
    from rich.console import Console

    from sglang_lsa.bench.prefill import run
    from sglang_lsa.bench.serving import command_line

    options = {name: getattr(args, name) for name in ("pools", "workloads", "repeats", "server_args")}
    try:
        run(args.output, Console(width=160), command=command_line(), **options)
    except (RuntimeError, ValueError) as error:  # no GPU, too little memory, a server or a request that failed
        print(f"sglang-lsa bench: {error}", file=sys.stderr)
        return 1
    return 0


def _bench_resident(args: argparse.Namespace) -> int:
    from rich.console import Console

    from sglang_lsa.bench.resident import run
    from sglang_lsa.bench.serving import command_line

    try:
        run(args.output, Console(width=120), samples=args.samples, command=command_line())
    except (RuntimeError, ValueError) as error:  # the server or a request failed
        print(f"sglang-lsa bench: {error}", file=sys.stderr)
        return 1
    return 0


def _bench_selectors(args: argparse.Namespace) -> int:
    from rich.console import Console

    from sglang_lsa.bench.selectors import run
    from sglang_lsa.bench.serving import command_line

    model = args.model or str(embedded_model_path())
    names = ("indexer", "families", "lengths", "samples", "texts", "budgets", "policies", "server_args")
    options = {name: getattr(args, name) for name in names}
    if args.indexer is None:
        options["policies"] = [policy for policy in args.policies if policy != "indexer"]
    name = args.name or args.model or MODEL_NAME
    try:
        run(args.output, Console(width=120), model=model, name=name, command=command_line(), **options)
    except (RuntimeError, ValueError, OSError) as error:  # the server or a request failed, or prompts cannot be made
        print(f"sglang-lsa bench: {error}", file=sys.stderr)
        return 1
    return 0


def _bench_overhead(args: argparse.Namespace) -> int:
    from rich.console import Console

    from sglang_lsa.bench.overhead import run

    if min(args.requests) < 1 or min(args.tokens) < 1024:
        print("sglang-lsa bench: use 1 request or more, of 1,024 tokens or more", file=sys.stderr)
        return 1
    run(Console(width=120), args.requests, args.tokens, args.output)
    return 0


def _add_record(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "record what a memory indexer is trained on: drives prompts through a server, with full attention"
    command = commands.add_parser("record", help=text, description=text[0].upper() + text[1:])
    families = ("text", "facts", "filler", "pairs", "records", "copying", "values", "lines", "chains")
    splits = ("train", "held-out")
    command.add_argument("--model", metavar="PATH", help="path or hub name; default: the embedded model")
    command.add_argument("--output", type=pathlib.Path, default=pathlib.Path("recordings"), metavar="DIR")
    command.add_argument("--splits", nargs="+", choices=splits, default=list(splits))
    command.add_argument("--families", nargs="+", choices=families, default=list(families), help="kinds of prompts")
    command.add_argument("--lengths", nargs="+", type=int, default=[4096], metavar="N", help="tokens; default: 4096")
    command.add_argument("--each", type=int, default=4, metavar="N", help="prompts per family and length; default: 4")
    command.add_argument(
        "--texts",
        type=pathlib.Path,
        metavar="DIR",
        help="your own text files; default: Python's library",
    )
    command.add_argument(
        "--last", type=int, default=512, metavar="N", help="last tokens of a prompt that are predicted; default: 512"
    )
    command.add_argument(
        "--new-tokens", type=int, default=16, metavar="N", help="tokens to generate after each prompt; default: 16"
    )
    command.add_argument(
        "--layers",
        type=int,
        default=4,
        metavar="N",
        help="layers to observe, those whose heads look at evidence most; default: 4",
    )
    command.add_argument("--server-args", default="", metavar="'...'", help="more arguments for the server")
    command.set_defaults(run=_record)


def _record(args: argparse.Namespace) -> int:
    from sglang_lsa.training.record import record

    names = ("splits", "families", "lengths", "each", "texts", "last", "new_tokens", "layers", "server_args")
    try:
        count = record(
            args.output, args.model or str(embedded_model_path()), **{name: getattr(args, name) for name in names}
        )
    except (RuntimeError, ValueError) as error:  # the server failed, or prompts cannot be made as asked
        print(f"sglang-lsa record: {error}", file=sys.stderr)
        return 1
    print(f"{count} prompts recorded; all recordings are in {args.output}")
    return 0


def _add_eval(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = (
        "accuracy on long-context tasks by who chooses the pages, paired with full attention on the same prompts; "
        "starts a server, or asks a running one"
    )
    command = commands.add_parser("eval", help=text, description=text[0].upper() + text[1:])
    command.add_argument("--model", metavar="PATH", help="path or hub name; default: the embedded model")
    command.add_argument("--name", metavar="NAME", help="of the model, in the results; default: as given")
    command.add_argument("--indexer", metavar="DIR", help="for the arm lsa: a folder, or the name of a shipped one")
    command.add_argument("--url", metavar="URL", help="a running server of ours; default: one is started")
    command.add_argument(
        "--endpoint",
        action="append",
        default=[],
        metavar="NAME=URL",
        help="another OpenAI-compatible server of the same model, as one more arm; can be given more than once",
    )
    command.add_argument("--api-key", metavar="KEY", help="of these servers")
    suites = ("ruler", "scbench", "mrcr", "nolima", "longgen")
    command.add_argument("--suites", nargs="*", choices=suites, default=["ruler"], help="default: ruler")
    command.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="some tasks only; default: all")
    command.add_argument("--lengths", nargs="+", type=int, default=[4096], metavar="N", help="tokens; default: 4096")
    command.add_argument("--samples", type=int, default=10, metavar="N", help="of each task and length; default: 10")
    arms = ("lsa", "quest", "window", "recency", "random", "evidence")
    usual = "default: all but evidence, and lsa only with --indexer or --url"
    command.add_argument("--arms", nargs="+", choices=arms, help=usual)
    command.add_argument("--budgets", nargs="+", type=float, default=[0.135], metavar="SHARE", help="default: 0.135")
    command.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="NAME=JSON",
        help="the arm lsa with options of a request, as one more arm, lsa_NAME; can be given more than once",
    )
    command.add_argument("--apart", action="store_true", help="the first arm also without sharing of prefixes")
    command.add_argument("--texts", type=pathlib.Path, metavar="DIR", help="running text; default: speeches")
    command.add_argument(
        "--qa", type=pathlib.Path, metavar="DIR", help="squad.json, hotpotqa.json for ruler's qa_1, qa_2"
    )
    command.add_argument("--longbench-v2", type=pathlib.Path, metavar="FILE", help="its published data.json")
    command.add_argument("--longmemeval", type=pathlib.Path, metavar="FILE", help="a published file of it")
    command.add_argument("--bfcl", type=pathlib.Path, metavar="DIR", help="folder of the package bfcl-eval: its memory")
    command.add_argument(
        "--tau2", type=pathlib.Path, metavar="DIR", help="folder of the package inspect_evals: its bank's handbook"
    )
    command.add_argument("--together", type=int, default=4, metavar="N", help="samples at a time; default: 4")
    command.add_argument("--seconds", type=float, default=float("inf"), metavar="S", help="begin none after that time")
    command.add_argument("--server-args", default="", metavar="'...'", help="more arguments for the server")
    command.add_argument("--output", type=pathlib.Path, default=pathlib.Path("eval-output"), metavar="DIR")
    command.set_defaults(run=_eval)


def _eval(args: argparse.Namespace) -> int:
    from sglang_lsa.evaluation.command import from_arguments

    try:
        from_arguments(args)
    except (RuntimeError, ValueError, OSError) as error:  # a bad argument or file, a server or a request that failed
        print(f"sglang-lsa eval: {error}", file=sys.stderr)
        return 1
    return 0


def _add_train(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "train a memory indexer from recordings, without loading the model (needs the extra: sglang-lsa[train])"
    command = commands.add_parser("train", help=text, description=text[0].upper() + text[1:])
    command.add_argument("data", type=pathlib.Path, metavar="RECORDINGS", help="folder written by sglang-lsa record")
    command.add_argument("--output", type=pathlib.Path, default=pathlib.Path("indexer"), metavar="DIR")
    command.add_argument("--device", metavar="DEVICE", help="cpu or cuda; default: cuda where there is one")
    for field in dataclasses.fields(TrainSettings):
        kind = type(field.default)
        command.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=kind,
            default=field.default,
            choices=LOSS_NAMES if field.name == "loss" else None,
            metavar=None if field.name == "loss" else kind.__name__.upper(),
            help=f"{field.metadata['help']}; default: {field.default}",
        )
    command.set_defaults(run=_train)


def _train(args: argparse.Namespace) -> int:
    if not _can_train("train"):
        return 1
    from rich.console import Console

    from sglang_lsa.training.train import train

    try:
        settings = TrainSettings(**{f.name: getattr(args, f.name) for f in dataclasses.fields(TrainSettings)})
        train(args.data, args.output, settings, _device(args), Console(width=120))
    except ValueError as error:  # settings, or recordings that cannot be used
        print(f"sglang-lsa train: {error}", file=sys.stderr)
        return 1
    return 0


def _add_recall(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "measure which pages an indexer and others keep, on held-out recordings (needs the extra: sglang-lsa[train])"
    command = commands.add_parser("recall", help=text, description=text[0].upper() + text[1:])
    command.add_argument("data", type=pathlib.Path, metavar="RECORDINGS", help="folder written by sglang-lsa record")
    command.add_argument("--indexer", type=pathlib.Path, required=True, metavar="DIR", help="from sglang-lsa train")
    command.add_argument("--name", metavar="NAME", help="of the model, in the results; default: as recorded")
    command.add_argument("--golden", type=float, default=TrainSettings.golden, metavar="SHARE")
    command.add_argument("--output", type=pathlib.Path, metavar="FILE.json", help="results are added to this file")
    command.add_argument("--device", metavar="DEVICE", help="cpu or cuda; default: cuda where there is one")
    command.set_defaults(run=_recall)


def _recall(args: argparse.Namespace) -> int:
    if not _can_train("recall"):
        return 1
    from rich.console import Console

    from sglang_lsa.training.results import measure_indexer

    try:
        measure_indexer(
            args.data, args.indexer, args.golden, _device(args), Console(width=120), name=args.name, output=args.output
        )
    except ValueError as error:  # recordings or an indexer that cannot be used
        print(f"sglang-lsa recall: {error}", file=sys.stderr)
        return 1
    return 0


def _can_train(command: str) -> bool:
    try:
        import sentence_transformers  # noqa: F401
    except ImportError:
        print(f"sglang-lsa {command}: needs more packages: pip install 'sglang-lsa[train]'", file=sys.stderr)
        return False
    return True


def _device(args: argparse.Namespace) -> str:
    import torch

    return str(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))


COMMANDS: tuple[Callable[[argparse._SubParsersAction[argparse.ArgumentParser]], None], ...] = (
    _add_demo,
    _add_doctor,
    _add_bench,
    _add_record,
    _add_train,
    _add_eval,
    _add_recall,
    _add_model,
    _add_view,
)


def _exit(number: int, frame: FrameType | None) -> None:
    """End like after an exception, so that servers are stopped."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
