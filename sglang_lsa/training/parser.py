"""Arguments of ``sglang-lsa record``, ``train`` and ``recall``."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import pathlib
import sys

from sglang_lsa.commands import Commands, add_command, failing
from sglang_lsa.embedded_model import embedded_model_path
from sglang_lsa.training.settings import LOSS_NAMES, TrainSettings


def add_record(commands: Commands) -> None:
    text = "record what a memory indexer is trained on: drives prompts through a server, with full attention"
    command = add_command(commands, "record", text)
    families = ("text", "facts", "filler", "pairs", "records", "copying", "values", "lines", "chains")
    splits = ("train", "held-out")
    command.add_argument("--model", metavar="PATH", help="path or hub name; default: the embedded model")
    command.add_argument("--output", type=pathlib.Path, default=pathlib.Path("recordings"), metavar="DIR")
    command.add_argument("--splits", nargs="+", choices=splits, default=list(splits))
    command.add_argument("--families", nargs="+", choices=families, default=list(families), help="kinds of prompts")
    command.add_argument("--lengths", nargs="+", type=int, default=[4096], metavar="N", help="tokens; default: 4096")
    command.add_argument("--each", type=int, default=4, metavar="N", help="prompts per family and length; default: 4")
    command.add_argument(
        "--first",
        type=int,
        default=0,
        metavar="N",
        help="number of the first prompt per family and length, for others than those recorded before; default: 0",
    )
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
    command.add_argument(
        "--held-out", type=int, metavar="N", help="prompts per family and length that are held out; default: as --each"
    )
    command.add_argument(
        "--servers",
        type=int,
        default=1,
        metavar="N",
        help="that record side by side on the same device: recording is bound by the host; default: 1",
    )
    command.add_argument("--server-args", default="", metavar="'...'", help="more arguments for every server")
    command.set_defaults(run=run_record)


@failing("record", RuntimeError, ValueError)  # the server failed, or prompts cannot be made as asked
def run_record(args: argparse.Namespace) -> int:
    from sglang_lsa.training.record import record

    if args.servers < 1:
        raise ValueError(f"--servers {args.servers} is too small: use 1 or more")
    names = ("splits", "families", "lengths", "each", "held_out", "texts", "last", "new_tokens", "layers", "first")
    given = {name: getattr(args, name) for name in (*names, "server_args", "servers")}
    count = record(args.output, args.model or str(embedded_model_path()), **given)
    print(f"{count} prompts recorded; all recordings are in {args.output}")
    return 0


def add_train(commands: Commands) -> None:
    text = "train a memory indexer from recordings, without loading the model (needs the extra: sglang-lsa[train])"
    command = add_command(commands, "train", text)
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
    command.set_defaults(run=run_train)


@failing("train", ValueError)  # settings, or recordings that cannot be used
def run_train(args: argparse.Namespace) -> int:
    if not can_train("train", args.data):
        return 1
    from rich.console import Console

    from sglang_lsa.training.train import train

    settings = TrainSettings(**{f.name: getattr(args, f.name) for f in dataclasses.fields(TrainSettings)})
    train(args.data, args.output, settings, device_of(args), Console(width=120))
    return 0


def add_recall(commands: Commands) -> None:
    text = "measure which pages an indexer and others keep, on held-out recordings (needs the extra: sglang-lsa[train])"
    command = add_command(commands, "recall", text)
    command.add_argument("data", type=pathlib.Path, metavar="RECORDINGS", help="folder written by sglang-lsa record")
    command.add_argument("--indexer", type=pathlib.Path, required=True, metavar="DIR", help="from sglang-lsa train")
    command.add_argument("--name", metavar="NAME", help="of the model, in the results; default: as recorded")
    command.add_argument("--golden", type=float, default=TrainSettings.golden, metavar="SHARE")
    command.add_argument("--output", type=pathlib.Path, metavar="FILE.json", help="results are added to this file")
    command.add_argument(
        "--targets",
        nargs="+",
        type=float,
        metavar="SHARE",
        help="instead: what sets of a budget of auto cover with these targets, beside sets of --budgets",
    )
    command.add_argument("--budgets", nargs="+", type=float, default=[0.05, 0.1, 0.135], metavar="SHARE")
    command.add_argument("--device", metavar="DEVICE", help="cpu or cuda; default: cuda where there is one")
    command.set_defaults(run=run_recall)


@failing("recall", ValueError)  # recordings or an indexer that cannot be used
def run_recall(args: argparse.Namespace) -> int:
    if not can_train("recall", args.data):
        return 1
    from rich.console import Console

    from sglang_lsa.training.results import measure_indexer, measure_set_sizes

    if args.targets:
        sizes = (args.budgets, args.targets, args.golden, device_of(args), Console(width=120), args.output)
        measure_set_sizes(args.data, args.indexer, *sizes)
        return 0
    measure_indexer(
        args.data, args.indexer, args.golden, device_of(args), Console(width=120), name=args.name, output=args.output
    )
    return 0


def add_calibrate(commands: Commands) -> None:
    text = "measure what sets of a trained indexer cover, for a budget of auto (needs the extra: sglang-lsa[train])"
    command = add_command(commands, "calibrate", text)
    command.add_argument("data", type=pathlib.Path, metavar="RECORDINGS", help="that it was not trained on")
    command.add_argument(
        "--indexer", type=pathlib.Path, required=True, metavar="DIR", help="its config.json is written"
    )
    command.add_argument("--split", choices=("train", "held-out"), default="train", help="default: train")
    command.add_argument("--golden", type=float, default=TrainSettings.golden, metavar="SHARE")
    command.add_argument("--device", metavar="DEVICE", help="cpu or cuda; default: cuda where there is one")
    command.set_defaults(run=run_calibrate)


@failing("calibrate", ValueError, OSError)  # recordings or an indexer that cannot be used, or written
def run_calibrate(args: argparse.Namespace) -> int:
    if not can_train("calibrate", args.data):
        return 1
    from rich.console import Console

    from sglang_lsa.training.results import calibrate_indexer

    calibrate_indexer(args.data, args.indexer, args.split, args.golden, device_of(args), Console(width=120))
    return 0


def can_train(command: str, recordings: pathlib.Path | None = None) -> bool:
    """Whether the packages of the extra are here; says what to install if not.

    Raises:
        BadRecording: there are no recordings, which is said before those packages are imported for seconds.
    """
    if importlib.util.find_spec("sentence_transformers") is None:
        print(f"sglang-lsa {command}: needs more packages: pip install 'sglang-lsa[train]'", file=sys.stderr)
        return False
    if recordings is not None:
        from sglang_lsa.indexer.manifest import Manifest

        Manifest.open(recordings)
    return True


def device_of(args: argparse.Namespace) -> str:
    """The one asked for, else cuda where there is one."""
    import torch

    return str(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
