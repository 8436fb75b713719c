"""``sglang-lsa record``: drives prompts through a server that records them, and keeps a manifest of the recordings."""

from __future__ import annotations

import contextlib
import http.client
import pathlib
import shlex
import urllib.error
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, as_completed, wait
from itertools import chain, islice
from queue import SimpleQueue
from typing import Any

from tqdm import tqdm

from sglang_lsa.indexer.heads import retrieval_heads
from sglang_lsa.indexer.manifest import Entry, Manifest
from sglang_lsa.indexer.recording import read_recording
from sglang_lsa.server_process import LSA, ServerFailed, ServerProcess
from sglang_lsa.texts.corpus import Prompt, Tokens, make_prompts, name_of
from sglang_lsa.training.pool import pool_flags

OBSERVE = "--lsa-observe-layers"
PROBES = ("facts", "pairs", "records")
"""Families by which layers are chosen."""
AHEAD = 256
"""Prompts that are made while others are recorded, at most: one of 32K tokens takes a megabyte."""
POOL = 2
"""Prompts of the greatest length that the pool of a server takes."""


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
    # What is named twice is recorded once: two servers would write the same file.
    splits, families, lengths = list(dict.fromkeys(splits)), list(dict.fromkeys(families)), sorted(set(lengths))
    made = chain.from_iterable(
        [
            make_prompts(tokenizer, split, lengths, counts[split], families, texts, first, manifest.has)
            for split in splits
        ]
    )
    ahead = list(islice(made, len(families)))  # what cannot be made is told before a server starts
    if not ahead:
        return 0
    left = sum(
        not manifest.has(name_of(split, family, length, number))
        for split in splits
        for family in families
        for length in lengths
        for number in range(first, first + counts[split])
    )
    with (
        _servers(min(servers, left), output, model, max(lengths) + new_tokens, server_args) as started,
        tqdm(total=left, desc="recording", unit="prompt") as progress,
        contextlib.closing(_entries(started, chain(ahead, made), output, last, new_tokens)) as entries,
    ):
        for entry in entries:
            manifest.add(entry)
            progress.update()
    return left


def _entries(
    servers: Sequence[ServerProcess],
    prompts: Iterable[tuple[Prompt, Tokens]],
    output: pathlib.Path,
    last: int,
    new_tokens: int,
) -> Generator[Entry]:
    """Of each prompt, recorded by a server that has nothing else to do, while the next ones are made; servers may
    still be starting."""
    idle: SimpleQueue[ServerProcess] = SimpleQueue()
    for server in servers:
        idle.put(server)

    def by_an_idle_one(prompt: Prompt, tokens: Tokens) -> Entry:
        server = idle.get()
        try:
            return _record_one(server.wait_until_ready(), output, prompt, tokens, last, new_tokens)
        finally:
            idle.put(server)

    pool, asked = ThreadPoolExecutor(len(servers)), set[Future[Entry]]()
    try:
        for prompt, tokens in prompts:
            asked.add(pool.submit(by_an_idle_one, prompt, tokens))
            done, asked = wait(asked, timeout=0 if len(asked) < AHEAD else None, return_when=FIRST_COMPLETED)
            yield from (one.result() for one in done)
        yield from (one.result() for one in as_completed(asked))
    finally:
        # Not waited for where it failed: what servers are at ends with them, and they are stopped next.
        pool.shutdown(wait=False, cancel_futures=True)


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
    except (OSError, http.client.HTTPException) as error:
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
    """Servers that record, which start together, each with a pool for a few prompts."""
    flags: list[Any] = ["--model-path", model, "--lsa-record", output.resolve(), "--skip-server-warmup"]
    flags += ["--context-length", longest + 64, *pool_flags(model, longest + 64, POOL, server_args, count)]
    flags += shlex.split(server_args)
    with contextlib.ExitStack() as stack:
        logs = [output / (f"server-{number}.log" if count > 1 else "server.log") for number in range(count)]
        try:
            yield [stack.enter_context(ServerProcess(LSA, list(map(str, flags)), log)) for log in logs]
        except ServerFailed as error:
            raise RuntimeError(str(error)) from None
