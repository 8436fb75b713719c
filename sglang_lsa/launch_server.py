"""SGLang's server with LSA on: ``python -m sglang_lsa.launch_server --model-path M [SGLang flags] [--lsa-* flags]``."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import pathlib
import sys
from argparse import Namespace
from collections.abc import Iterable, Sequence
from typing import Any

from sglang_lsa.config import LSAConfig
from sglang_lsa.config.command_line import check_command_line, read_command_line
from sglang_lsa.config.flags import config_from_args
from sglang_lsa.config.values import read_json_object
from sglang_lsa.imports import without_collections
from sglang_lsa.indexer.checkpoint import read_checkpoint_config
from sglang_lsa.indexer.expectation import NO_EXPECTATION
from sglang_lsa.patches.automatic import with_calibration
from sglang_lsa.patches.releases import RELEASES

CHOOSING = ("policy", "indexer", "calibrate", "record", "observe-layers")
"""``--lsa`` flags that choose how pages are chosen, and so do keys of these names in what ``--lsa-config`` is given."""
CONFIG = "--lsa-config"


def with_defaults(argv: list[str]) -> list[str]:
    """The arguments that switch LSA on, and name the embedded model when none is named, with the indexer that was
    trained for it unless anything is said of how pages are chosen; what was given comes last, and so wins."""
    defaults = []
    given = {argument.split("=")[0] for argument in argv}
    if given.isdisjoint(("--model", "--config", "-h", "--help")) and not _begins(given, "--model-p"):
        from sglang_lsa.embedded_model import INDEXER_NAME, MODEL_NAME, embedded_model_path

        defaults += ["--model-path", str(embedded_model_path()), "--served-model-name", MODEL_NAME]
        # An override may make another model of it; SGLang takes abbreviated flags, too.
        if not _begins(given, "--json-model") and not any(map(_chooses, given)) and not _config_chooses(argv):
            defaults += ["--lsa-indexer", INDEXER_NAME]
    if not any(argument.startswith("--lsa-") for argument in argv):
        defaults += ["--lsa-budget", str(LSAConfig.budget)]
    return [*defaults, *argv]


def _begins(given: Iterable[str], begin: str) -> bool:
    """Whether one of the flags is, or abbreviates, one that begins so."""
    return any(flag.startswith(begin) for flag in given)


def _chooses(flag: str) -> bool:
    """Whether it is, or abbreviates, such a flag, or abbreviates ``--lsa-config``, which may hold anything."""
    names = [f"--lsa-{name}" for name in CHOOSING]
    return flag.startswith("--lsa-") and flag != CONFIG and any(name.startswith(flag) for name in (CONFIG, *names))


def _config_chooses(argv: Sequence[str]) -> bool:
    """Whether the last configuration, which is the one that counts, has such a key. What cannot be read is refused
    where it is read in earnest."""
    chooses = False
    for place, argument in enumerate(argv):
        flag, equals, value = argument.partition("=")
        if flag == CONFIG:
            with contextlib.suppress(ValueError):
                values = read_json_object(value if equals else "".join(argv[place + 1 : place + 2]))
                chooses = not values.keys().isdisjoint(name.replace("-", "_") for name in CHOOSING)
    return chooses


def check_choice(known: Namespace) -> None:
    """Refuse, before SGLang is imported, an indexer that is none, and a budget of ``auto`` where nothing will tell how
    many pages a set needs. What only the model's configuration shows is left to the server: a file, for example, may be
    a checkpoint for DeepSeek-V4.

    Args:
        known: flags, from :func:`sglang_lsa.config.command_line.read_command_line`, defaults of a server among them.

    Raises:
        ValueError: naming the flag, and what to do.
    """
    config = config_from_args(known)
    if config is None:
        return
    if config.indexer and config.policy == "indexer" and not pathlib.Path(config.indexer).is_file():
        indexer = read_checkpoint_config(config.indexer)
        if config.auto and indexer.expectation is None:
            raise ValueError(f"--lsa-{NO_EXPECTATION}")
    if config.auto and config.may_calibrate:
        release = RELEASES.get(_sglang_version())
        known.device = known.device or ("cuda" if _cuda() else "cpu")
        known.tp_size = int(known.tp_size) if known.tp_size.isdecimal() else 1
        with_calibration(config, known, dense=True, measured=release is None or release.measured)


def _sglang_version() -> str:
    """Of the SGLang that is installed; empty for one that is not, or not as a package: its import tells."""
    try:
        return importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _cuda() -> bool:
    import torch  # two seconds, where nothing else tells

    return torch.cuda.is_available()


def server_arguments(argv: list[str]) -> Any:
    """SGLang's ServerArgs for this command line, resolved and checked, with LSA on; installs the hooks.

    Raises:
        ValueError: LSA or SGLang cannot work with these arguments.
        SystemExit: an argument does not exist or cannot be read; the parser has said which.
    """
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args

    from sglang_lsa.patches.releases import installed
    from sglang_lsa.patches.resolved import proof_of_life
    from sglang_lsa.plugin import install

    load_plugins()
    install()  # does nothing when SGLang found the plugin; raises when it could not be installed
    server_args = prepare_server_args(argv)
    if installed().resolves_late:
        server_args.resolve_once()
    return proof_of_life(server_args)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    try:
        read = check_command_line(argv)
        sys.argv[1:] = with_defaults(argv)
        if read:
            check_choice(read_command_line(sys.argv[1:]))
    except (OSError, ValueError) as error:  # OSError: the indexer's files are no names, or cannot be read
        raise SystemExit(f"sglang-lsa: {error}") from error
    with without_collections():
        from sglang.launch_server import run_server
        from sglang.srt.utils import kill_process_tree

    from sglang_lsa.patches.releases import IncompatibleSGLang

    try:
        server_args = server_arguments(sys.argv[1:])
    except (OSError, ValueError, IncompatibleSGLang) as error:  # OSError: no such model on the hub
        raise SystemExit(f"sglang-lsa: {error}") from error
    try:
        run_server(server_args)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    main()
