"""An indexer for your own model, end to end: record what it attends to, train, measure, serve with it, ask.

    python examples/train_indexer.py                              # embedded model, tiny: shows the way, trains little
    python examples/train_indexer.py --model MODEL --lengths 4096 8192 16384 --each 12 --steps 600 --families \\
        text facts filler pairs records copying values lines chains

The second is what a useful indexer takes, on a GPU (see docs/indexer.md). Every command is printed before it runs, so
that you can go on by hand; what is recorded already is not recorded again. With --texts DIR it is text of your own.
"""

from __future__ import annotations

import argparse
import pathlib
import shlex
import subprocess
import sys

from sglang_lsa.cli import main as sglang_lsa
from sglang_lsa.embedded_model import embedded_model_path
from sglang_lsa.server_process import LSA, ServerFailed, ServerProcess


def run(*arguments: object) -> None:
    """Show a command and do what it does; ends this program if it fails."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ sglang-lsa {shlex.join(words)}", flush=True)
    if code := sglang_lsa(words):
        raise SystemExit(code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="PATH", help="path or hub name; default: the embedded model")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("indexer-output"), metavar="DIR")
    parser.add_argument("--families", nargs="+", default=["facts", "records"], help="kinds of prompts to record")
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048], help="of prompts, in tokens; default: 2048")
    parser.add_argument("--each", type=int, default=2, help="prompts per kind and length; default: 2")
    parser.add_argument("--texts", type=pathlib.Path, metavar="DIR", help="text files to record over")
    parser.add_argument("--steps", type=int, default=60, help="of training; default: 60")
    parser.add_argument("--ask-tokens", type=int, default=3000, help="of the document asked about; default: 3000")
    parser.add_argument("--server-args", default="", metavar="'...'", help="more arguments for every server")
    args = parser.parse_args()
    model = args.model or str(embedded_model_path())
    recordings, indexer = args.output / "recordings", args.output / "indexer"
    texts = ["--texts", args.texts] if args.texts else []

    run(
        *("record", "--model", model, "--output", recordings, "--families", *args.families),
        *("--lengths", *args.lengths, "--each", args.each, *texts, f"--server-args={args.server_args}"),
    )
    run("train", recordings, "--output", indexer, "--steps", args.steps)
    run("recall", recordings, "--indexer", indexer, "--output", args.output / "recall.json")

    flags = ["--model-path", model, "--lsa-indexer", str(indexer), "--lsa-min-context", "1024"]
    flags += ["--lsa-config", '{"floor_tokens": 0}']  # or all budgets have the same set of so short a context
    flags += shlex.split(args.server_args)
    print(f"\n$ python -m sglang_lsa.launch_server {shlex.join(flags)} &", flush=True)
    with ServerProcess(LSA, flags, args.output / "server.log") as server:
        try:
            server.wait_until_ready()
        except ServerFailed as error:
            raise SystemExit(f"train_indexer.py: {error}") from None
        ask = [str(pathlib.Path(__file__).with_name("compare_budgets.py")), "--url", server.url]
        ask += ["--tokens", str(args.ask_tokens)]
        print(f"\n$ python {shlex.join(ask)}", flush=True)
        raise SystemExit(subprocess.run([sys.executable, *ask]).returncode)


if __name__ == "__main__":
    main()
