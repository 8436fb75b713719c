"""What can be known to fail is said before any work begins: the model, the folder, the disk."""

from __future__ import annotations

import hashlib
import pathlib
import shutil
import tempfile
from typing import Any

from sglang_lsa.adapt.settings import Settings
from sglang_lsa.config import PAGE_SIZE, RECORDED_POSITIONS, RUNS, LSAConfig
from sglang_lsa.evaluation.suites.ruler import TASKS
from sglang_lsa.indexer.checkpoint import ModelShape
from sglang_lsa.indexer.recording import BLOCK
from sglang_lsa.training.pool import gpus_of

LAST, NEW_TOKENS, LAYERS = 512, 16, 4
"""Of ``sglang-lsa record``: tokens of a prompt that are predicted, tokens generated, layers observed."""
BLOCK_BYTES = 1 << 24
"""Of a file that are read at a time."""
SERVERS, SERVER_BYTES = 4, 8 << 30
"""That record side by side at most, and device memory of one beside twice its weights."""


def model_folder(model: str) -> pathlib.Path:
    """Where a model's files are; nothing is downloaded.

    Raises:
        ValueError: they are not on this machine.
    """
    path = pathlib.Path(model)
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"--model {model} is a file: give a folder with config.json and safetensors")
    try:
        from huggingface_hub import snapshot_download

        return pathlib.Path(snapshot_download(model, local_files_only=True))
    except (OSError, ValueError) as error:
        why = str(error).splitlines()[0][:200]
        raise ValueError(
            f"--model {model}: is no folder, and no model on this machine ({why}): give a folder, or fetch it first "
            f"with hf download {model}"
        ) from None


def require_model(model: str, settings: Settings) -> ModelShape:
    """The model's shape.

    Raises:
        ValueError: there is no such model here, LSA cannot serve it, or it cannot read what is to be recorded.
    """
    folder = model_folder(model)
    for name, patterns in (("config.json", ("config.json",)), ("weights", ("*.safetensors", "*.bin"))):
        if not any(list(folder.glob(pattern)) for pattern in patterns):
            raise ValueError(f"--model {folder}: has no {name}: give a whole Hugging Face model")
    from sglang.srt.configs.model_config import ModelConfig
    from transformers import AutoTokenizer

    from sglang_lsa.patches.architectures import is_deepseek_v4
    from sglang_lsa.patches.models import model_problems, shape_of

    try:
        config: Any = ModelConfig(str(folder))
        AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # whatever transformers and SGLang raise of a folder that is no model
        raise ValueError(
            f"--model {folder} cannot be read ({type(error).__name__}: {str(error)[:200]}): give a whole Hugging "
            "Face model"
        ) from None
    if is_deepseek_v4(config):
        raise ValueError(f"--model {folder} has an index of its own: serve it as it is, with --lsa-policy native")
    if problems := model_problems(config, LSAConfig()):
        raise ValueError("; ".join(problems))
    longest = max(*settings.lengths, *settings.eval_lengths)
    most = config.hf_text_config.max_position_embeddings
    if longest > most - NEW_TOKENS:
        raise ValueError(
            f"--lengths and --eval-lengths ask for {longest} tokens, and {folder} was made for {most}: use at most "
            f"{most - 256}"
        )
    if unknown := [task for task in settings.tasks if task not in TASKS]:
        raise ValueError(f"--tasks {unknown[0]}: there is no such task: use some of {', '.join(TASKS)}")
    return shape_of(config.hf_text_config)


def fingerprint(model: str) -> str:
    """Of a model's configuration and weights, all of them: seconds for models of 1.5B."""
    digest = hashlib.sha256()
    folder = model_folder(model)
    digest.update((folder / "config.json").read_bytes())
    for path in sorted((*folder.glob("*.safetensors"), *folder.glob("*.bin"))):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()


def servers_that_fit(model: str, server_args: str = "") -> int:
    """How many servers record side by side: each waits for its host more than for its device; one without a GPU.

    The ranks of every server are on the same GPUs, each with its part of the weights: the fullest of them decides.

    Raises:
        ValueError: ``server_args`` cannot be read.
    """
    import torch

    gpus = gpus_of(server_args)
    if not torch.cuda.is_available() or gpus[-1] >= torch.cuda.device_count():  # which a server refuses
        return 1
    free = min(torch.cuda.mem_get_info(gpu)[0] for gpu in gpus)
    folder = model_folder(model)
    files = list(folder.glob("*.safetensors")) or list(folder.glob("*.bin"))  # some folders have both; one is read
    weights = sum(path.stat().st_size for path in files) // len(gpus)
    return max(1, min(SERVERS, free // (2 * weights + SERVER_BYTES)))


def recorded_bytes(shape: ModelShape, settings: Settings) -> int:
    """Of all recordings, and of one in the writing; see ``indexer/recording.py`` for what they hold."""
    per_length = []
    for length in settings.lengths:
        tokens, pages = length + NEW_TOKENS, -(-(length + NEW_TOKENS) // PAGE_SIZE)
        queries = (LAST + NEW_TOKENS + RECORDED_POSITIONS) * LAYERS * shape.q_heads * shape.head_dim * 2
        runs = pages * RUNS * LAYERS * shape.kv_heads * shape.head_dim * 2
        blocks = -(-(LAST + NEW_TOKENS) // BLOCK) + 1
        mass = blocks * shape.num_hidden_layers * shape.q_heads * pages * 2
        per_length.append(queries + runs + mass + blocks * pages * 4 + tokens * 4)
    of_one_each = len(settings.families) * sum(per_length)
    return of_one_each * (settings.each + settings.held_out) + max(per_length) + 9 * min(per_length)


def require_disk(output: pathlib.Path, needed: int) -> None:
    """Make the folder, and see that it takes files and so many bytes.

    Raises:
        ValueError: it does not.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise ValueError(f"--output {output} cannot be written ({error.strerror}): use another folder") from None
    free = shutil.disk_usage(output).free
    if free < needed:
        raise ValueError(
            f"--output {output} has {free / 1e9:.2f} GB free, and recordings take up to {needed / 1e9:.2f} GB: free "
            "some, use another folder, or a smaller --each or --lengths"
        )
