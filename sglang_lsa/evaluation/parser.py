"""Arguments of ``sglang-lsa eval``."""

from __future__ import annotations

import argparse
import pathlib

from sglang_lsa.commands import Commands, add_command, failing


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
    command.set_defaults(run=run_eval)


@failing("eval", RuntimeError, ValueError, OSError)  # a bad argument or file, a server or a request that failed
def run_eval(args: argparse.Namespace) -> int:
    from sglang_lsa.evaluation.command import from_arguments

    from_arguments(args)
    return 0
