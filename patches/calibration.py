"""Calibration at the start of a server: the loaded model reads made prompts before its KV pool exists.

Attention of these passes is computed and watched by ``indexer.watch``; SGLang's backends and pools are not there yet.
"""

from __future__ import annotations

import atexit
import dataclasses
import logging
import pathlib
import shutil
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from sglang_lsa.config import AUTO, LSAConfig
from sglang_lsa.indexer import calibrations, untrained
from sglang_lsa.indexer.calibrations import Calibration
from sglang_lsa.indexer.checkpoint import ModelShape, read_checkpoint_config
from sglang_lsa.indexer.model import MemoryIndexer
from sglang_lsa.indexer.watch import Seen, Watch
from sglang_lsa.patches.arguments import tp_size_of
from sglang_lsa.patches.model_guard import attention_layers
from sglang_lsa.texts.calibration import PromptSet, calibration_prompts, prompts_for
from sglang_lsa.texts.corpus import Tokens

logger = logging.getLogger(__name__)


class WatchedAttention:
    """What SGLang's layers see as their attention backend while one prompt is computed."""

    def __init__(self, watch: Watch):
        self.watch = watch

    def forward(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        queries = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        keys = k.view(-1, layer.tp_k_head_num, layer.qk_head_dim)
        values = v.view(-1, layer.tp_v_head_num, layer.v_head_dim)
        return self.watch.attend(layer.layer_id, queries, keys, values, layer.scaling).flatten(1)


def calibrated(config: LSAConfig, runner: Any) -> LSAConfig:
    """The configuration after calibration: with an indexer, or with Quest where none could be made. A server starts
    either way.

    Args:
        runner: SGLang's ModelRunner, its model loaded.
    """
    after = _calibrated(config, runner)
    if config.auto and not after.auto:
        logger.warning(
            "LSA: nothing tells how many pages a set needs: the budget is %s instead of %s", after.budget, AUTO
        )
    return after


def _calibrated(config: LSAConfig, runner: Any) -> LSAConfig:
    fixed = {"budget": LSAConfig.budget} if config.auto else {}
    without = dataclasses.replace(config, policy="quest", calibrate="never", **fixed)  # type: ignore[arg-type]
    if tp_size_of(runner) > 1:
        logger.warning("LSA: heads on %d ranks are not calibrated yet: Quest chooses pages", tp_size_of(runner))
        return without
    try:
        shape, chosen = model_shape(runner), prompts_for(runner.device, runner.model_config.context_len)
        made = repr((chosen, untrained.HEADS, untrained.SEES))
        folder = calibrations.folder_of(calibrations.key_of(shape, runner.model.named_parameters(), made))
        known = None if config.calibrate == "always" else _known(folder)
        if known is None:
            known, folder = _calibrate(runner, shape, chosen, folder)
        else:
            logger.info("LSA: calibrated before: %s", folder)
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        logger.warning("LSA: calibration failed (%s); pages are chosen by Quest's bounds", why, exc_info=config.debug)
        return without
    finally:
        if runner.device == "cuda":
            torch.cuda.empty_cache()  # what is free now becomes the KV pool
    if not known.found:
        logger.warning(
            "LSA: no heads of this model look at evidence (%.1f times as much as chance at best); pages are chosen by "
            "Quest's bounds. Give --lsa-indexer for an indexer that is trained, or --lsa-policy quest not to look",
            known.lift,
        )
        return without
    if read_checkpoint_config(folder).expectation is None:  # its prompts did not tell what sets cover
        config = dataclasses.replace(without, policy=None)
    return dataclasses.replace(config, policy="indexer", indexer=str(folder), calibrate="never")


def model_shape(runner: Any) -> ModelShape:
    """Of the loaded model, by its attention layers.

    Raises:
        ValueError: they are not alike.
    """
    layers = attention_layers(runner.model)
    shapes = {(part.tp_q_head_num, part.tp_k_head_num, part.head_dim, part.v_head_dim) for part in layers}
    if len(shapes) != 1 or [part.layer_id for part in layers] != list(range(len(layers))):
        raise ValueError(f"its {len(layers)} attention layers have shapes {sorted(shapes)}: they must be alike")
    q_heads, kv_heads, head_dim, _ = shapes.pop()
    return ModelShape(runner.model_config.hidden_size, len(layers), q_heads, kv_heads, head_dim)


def _known(folder: pathlib.Path) -> Calibration | None:
    try:
        return calibrations.read(folder)
    except ValueError as error:
        logger.warning("LSA: the calibration in %s; calibrating again", error)
        return None


def _calibrate(
    runner: Any, shape: ModelShape, chosen: PromptSet, folder: pathlib.Path
) -> tuple[Calibration, pathlib.Path]:
    """Calibrate, and keep the result: in the cache, or for this process where that cannot be written."""
    began = time.monotonic()
    prompts = calibration_prompts(_tokenizer(runner.server_args), chosen)
    tokens = sum(len(prompt.ids) for prompt in prompts)
    logger.info(
        "LSA: calibrating with %d prompts of %d tokens; --lsa-calibrate never leaves it out", len(prompts), tokens
    )
    seen = watch_prompts(runner, prompts)
    indexer: MemoryIndexer | None = None
    try:
        found = untrained.find_heads(seen)
        indexer, lift = untrained.make_indexer(shape, found, seen), found.lift
    except untrained.NothingFound as error:
        logger.info("LSA: %s", error)
        lift = error.lift
    result = Calibration(indexer is not None, len(prompts), round(time.monotonic() - began, 1), round(lift, 2))
    logger.info("LSA: calibrated in %.1f s: %s", result.seconds, indexer and indexer.config.heads)
    try:
        calibrations.write(folder, result, indexer)
    except OSError as error:
        logger.warning("LSA: the calibration is not kept for the next start (%s)", error)
        folder = pathlib.Path(tempfile.mkdtemp(prefix="sglang-lsa-")) / folder.name
        atexit.register(shutil.rmtree, folder.parent, ignore_errors=True)
        calibrations.write(folder, result, indexer)
    return result, folder


@torch.no_grad()
def watch_prompts(runner: Any, prompts: Sequence[Tokens]) -> list[Seen]:
    """What the loaded model shows of each prompt."""
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
    from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

    found = []
    for prompt in tqdm(prompts, desc="calibrating", unit="prompt"):
        watch = Watch(
            len(prompt.ids),
            prompt.answer,
            prompt.evidence,
            untrained.SEES,
        )
        ids = torch.tensor(prompt.ids, device=runner.device)
        one = torch.zeros(1, dtype=torch.int64, device=runner.device)
        positions = torch.arange(len(ids), device=runner.device)
        batch = ForwardBatch(
            forward_mode=ForwardMode.EXTEND,
            batch_size=1,
            input_ids=ids,
            req_pool_indices=one,
            seq_lens=one + len(ids),
            out_cache_loc=positions,
            seq_lens_sum=len(ids),
            positions=positions,
        )
        with forward_context(ForwardContext(WatchedAttention(watch))):
            runner.model.model(ids, positions, batch)
        found.append(watch.seen())
    return found


def _tokenizer(server_args: Any) -> Any:
    from sglang.srt.utils.hf_transformers.tokenizer import get_tokenizer

    tokenizer = get_tokenizer(
        server_args.tokenizer_path or server_args.model_path,
        trust_remote_code=server_args.trust_remote_code,
        tokenizer_revision=server_args.revision,
    )
    tokenizer.model_max_length = 1 << 40  # prompts are cut to length after they were counted
    return tokenizer
