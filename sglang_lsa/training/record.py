"""``sglang-lsa record``: drives prompts through a server that records them, and keeps a manifest of the recordings."""

from __future__ import annotations

import contextlib
import pathlib
import shlex
import urllib.error
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from queue import SimpleQueue
from typing import Any

from tqdm import tqdm

from sglang_lsa.indexer.heads import retrieval_heads
from sglang_lsa.indexer.manifest import Entry, Manifest
from sglang_lsa.indexer.recording import read_recording
from sglang_lsa.server_process import LSA, ServerFailed, ServerProcess
from sglang_lsa.texts.corpus import Prompt, Tokens, make_prompts

OBSERVE = "--lsa-observe-layers"
PROBES = ("facts", "pairs", "records")
"""Families by which layers are chosen."""
POOL = 2
"""Prompts of the greatest length that the pool of one of several servers takes."""
BYTES = 4
"""Of a number of the KV, at most."""


def record(
    output: pathlib.Path,
    model: str,
    *,
    splits: Sequence[str],
    lengths: Sequence[int],
    each: int,
    families: Sequence[str],
    texts: pathlib.Path | None,
    last: int,
    new_tokens: int,
    layers: int,
    server_args: str,
    first: int = 0,
    held_out: int | None = None,
    servers: int = 1,
) -> int:
    """Record what is not recorded yet.

    Which layers are worth observing is found first, with a few short prompts, unless ``server_args`` say it.

    Args:
        output: folder of recordings and manifest; the server must be able to write it.
        model: path or hub name.
        last: tokens at the end of a prompt that are recorded as if they had been generated.
        new_tokens: tokens that the model generates after each prompt, which are recorded too.
        layers: how many layers to observe.
        first: number of the first prompt of each family and length, see ``make_prompts``.
        held_out: prompts of each family and length in the split ``held-out``; as ``each`` if None.
        servers: record side by side, each with a pool for a few of the longest prompts.

    Returns:
        How many were recorded now.

    Raises:
        ValueError: prompts cannot be made as asked, or the manifest is of something else.
        RuntimeError: the server failed, or a prompt was not recorded.
    """
    from transformers import AutoTokenizer

    if OBSERVE not in server_args:
        chosen = _layers_that_retrieve(output / "probe", model, layers, min(lengths), texts, last, server_args)
        server_args += f" {OBSERVE} {','.join(map(str, chosen))}"
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.model_max_length = 1 << 40  # prompts are cut to length after they were counted
    output.mkdir(parents=True, exist_ok=True)
    manifest = Manifest.open(output, model)
    counts = {"train": each, "held-out": each if held_out is None else held_out}
    wanted = [
        (prompt, tokens)
        for split in splits
        for prompt, tokens in make_prompts(tokenizer, split, lengths, counts[split], families, texts, first)
        if not manifest.has(prompt.name)
    ]
    if not wanted:
        return 0
    count = min(servers, len(wanted))
    with _servers(count, output, model, max(lengths) + new_tokens, server_args) as started:
        idle: SimpleQueue[ServerProcess] = SimpleQueue()
        for server in started:
            idle.put(server)

        def by_an_idle_one(prompt: Prompt, tokens: Tokens) -> Entry:
            server = idle.get()
            try:
                return _record_one(server, output, prompt, tokens, last, new_tokens)
            finally:
                idle.put(server)

        with ThreadPoolExecutor(count) as pool:
            asked = [pool.submit(by_an_idle_one, prompt, tokens) for prompt, tokens in wanted]
            try:
                for done in tqdm(as_completed(asked), total=len(asked), desc="recording", unit="prompt"):
                    manifest.add(done.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return len(wanted)


def _layers_that_retrieve(
    output: pathlib.Path,
    model: str,
    count: int,
    length: int,
    texts: pathlib.Path | None,
    last: int,
    server_args: str,
) -> list[int]:
    """The layers of the heads that look at evidence most; a recording has the attention of all layers."""
    record(
        output,
        model,
        splits=("train",),
        lengths=(length,),
        each=2,
        families=PROBES,
        texts=texts,
        last=last,
        new_tokens=1,
        layers=count,
        server_args=f"{server_args} {OBSERVE} 0",
    )
    heads = retrieval_heads(output, 1 << 16, observed_only=False)
    return sorted(list(dict.fromkeys(layer for layer, _ in heads))[:count])


def _record_one(
    server: ServerProcess, output: pathlib.Path, prompt: Prompt, tokens: Tokens, last: int, new_tokens: int
) -> Entry:
    parameters = {
        "temperature": 0,
        "max_new_tokens": new_tokens,
        "ignore_eos": True,
        "custom_params": {"lsa": {"record": last}},
    }
    body = {"rid": prompt.name, "input_ids": tokens.ids, "sampling_params": parameters}
    try:
        server.post("/generate", body)
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{prompt.name} was refused: {error.read().decode()[:400]}") from None
    except OSError as error:
        raise RuntimeError(f"the server failed at {prompt.name} ({error}):\n{server.log_tail()}") from None
    path = output / f"{prompt.name}.safetensors"
    if not path.is_file():
        raise RuntimeError(f"{prompt.name} was not recorded; the server's log ends with:\n{server.log_tail()}")
    facts, _ = read_recording(path, ())
    return Entry(
        prompt.name,
        prompt.family,
        prompt.split,
        prompt.source,
        facts.prompt_tokens,
        tokens.answer,
        tokens.evidence,
        path.stat().st_size,
    )


@contextlib.contextmanager
def _servers(
    count: int, output: pathlib.Path, model: str, longest: int, server_args: str
) -> Iterator[list[ServerProcess]]:
    """Servers that record; those of several start together, and ask for no more memory than they need."""
    flags: list[Any] = ["--model-path", model, "--lsa-record", output.resolve(), "--skip-server-warmup"]
    flags += ["--context-length", longest + 64]
    if count > 1:
        flags += ["--lsa-device-tokens", POOL * (longest + 64), "--lsa-host-memory-gb", _mirror_gb(model, longest + 64)]
    flags += shlex.split(server_args)
    with contextlib.ExitStack() as stack:
        logs = [output / (f"server-{number}.log" if count > 1 else "server.log") for number in range(count)]
        started = [stack.enter_context(ServerProcess(LSA, list(map(str, flags)), log)) for log in logs]
        try:
            yield [server.wait_until_ready() for server in started]
        except ServerFailed as error:
            raise RuntimeError(str(error)) from None


def _mirror_gb(model: str, longest: int) -> float:
    """Host memory for what one of several servers caches."""
    from transformers import AutoConfig

    from sglang_lsa.patches.models import shape_of

    shape = shape_of(AutoConfig.from_pretrained(model).get_text_config())
    per_token = 2 * shape.num_hidden_layers * shape.kv_heads * shape.head_dim * BYTES
    return round(max(0.1, 2 * POOL * longest * per_token / 1e9), 2)
