"""How far the next-token distribution of pruned attention is from full attention's, along full attention's answer.

Full attention answers greedily, and the :data:`TOP` likeliest tokens are written down at every step. Then each arm
decodes *the same answer*: its windows, refreshes and recalls run as in service, but the sampler is made to take the
given tokens (``evaluation/forced.py``), and writes down how likely the arm finds the same tokens. The first token is
left out: the prompt's own pass chooses it, and that reads everything.

Of step ``t``, with ``p`` full attention's and ``q`` the arm's distribution over the vocabulary, ``T`` the :data:`TOP`
likeliest tokens of ``p``, and ``p(R)``, ``q(R)`` the mass of all others::

    KL_t = sum over T of p log(p / q)  +  p(R) log(p(R) / q(R))

That is the divergence between the two after all tokens outside ``T`` are put into one class. Putting together never
adds divergence (the log-sum inequality), so it is a **lower bound** of the divergence over the whole vocabulary, in
nats, and exact where nothing is outside; ``p(R)`` is reported beside it. It needs no right answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sglang_lsa.evaluation.client import Endpoint, EndpointFailed
from sglang_lsa.evaluation.forced import NAME, PROCESSOR, unpacked

TOP = 64
LEAST_REST = 1e-6
"""Masses of the rest below this are taken for this: sums of float32 say no more."""


def divergences(reference: Sequence[str], told: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Of every step the divergence in nats, and the mass of full attention outside the tokens that were compared.

    Args:
        reference, told: packed distributions over the same token ids, step by step, see ``forced.packed``.

    Raises:
        ValueError: a model's logits were no numbers.
    """
    values: list[float] = []
    rests: list[float] = []
    for one, other in zip(reference, told, strict=True):
        (ids, p), (same, q) = unpacked(one), unpacked(other)
        assert (ids == same).all(), "distributions over other tokens"
        p, q = p.astype(np.float64), q.astype(np.float64)
        if not (np.isfinite(p).all() and np.isfinite(q).all()):
            raise ValueError(f"step {len(values)} has log-probabilities that are no numbers")
        rest_p, rest_q = (max(LEAST_REST, 1 - float(np.exp(logs).sum())) for logs in (p, q))
        inside = float((np.exp(p) * (p - q)).sum())
        values.append(max(0.0, inside + rest_p * float(np.log(rest_p / rest_q))))
        rests.append(rest_p)
    return np.array(values), np.array(rests)


async def reference_of(
    server: Endpoint, ids: Sequence[int], new_tokens: int, rid: str, options: dict[str, Any]
) -> dict[str, Any]:
    """Full attention's greedy answer to a prompt: ``tokens``, and ``next``, a packed distribution for each.

    Raises:
        EndpointFailed: the server refused it, or has not written what it should.
    """
    parameters = {"temperature": 0, "max_new_tokens": new_tokens}
    answer = await _ask(server, ids, rid, parameters, options, {"top": TOP})
    tokens, told = answer["output_ids"], answer["meta_info"][NAME]
    for step, (token, text) in enumerate(zip(tokens, told, strict=True)):
        likeliest, logs = unpacked(text)
        if token not in likeliest[logs == logs[0]]:
            raise EndpointFailed(
                f"{server.url}: what {rid} found likely at step {step} is of another step: it was retracted, or SGLang "
                "samples otherwise than it did; give it more room (--together 1), or leave --kl out"
            )
    return {"tokens": tokens, "next": told}


async def along(
    server: Endpoint, ids: Sequence[int], reference: dict[str, Any], rid: str, options: dict[str, Any]
) -> dict[str, Any]:
    """``kl``, mean over the steps after the first; ``kl_outside``, the mean mass that was not told apart; ``kl_steps``.

    Args:
        reference: of :func:`reference_of`.
        options: ``custom_params.lsa`` of the arm.

    Raises:
        EndpointFailed: the server refused it, or did not go along the answer.
    """
    tokens = reference["tokens"]
    if len(tokens) < 2:
        return {"kl": None, "kl_outside": None, "kl_steps": 0}
    parameters = {"temperature": 0, "max_new_tokens": len(tokens), "ignore_eos": True}
    answer = await _ask(server, ids, rid, parameters, options, {"tokens": tokens, "ids": reference["next"]})
    if answer["output_ids"] != tokens:
        raise EndpointFailed(f"{server.url}: {rid} did not go along the answer it was given: see the server's log")
    try:
        values, rests = divergences(reference["next"][1:], answer["meta_info"][NAME][1:])
    except ValueError as error:
        raise EndpointFailed(f"{server.url}: {rid}: {error}: see the server's log") from error
    return {"kl": float(values.mean()), "kl_outside": float(rests.mean()), "kl_steps": len(values)}


async def _ask(
    server: Endpoint,
    ids: Sequence[int],
    rid: str,
    parameters: dict[str, Any],
    options: dict[str, Any],
    asked: dict[str, Any],
) -> dict[str, Any]:
    body = {
        "rid": rid,
        "input_ids": list(ids),
        "sampling_params": {**parameters, "custom_params": {"lsa": options, NAME: asked}},
        "custom_logit_processor": PROCESSOR,
    }
    answer = await server.post("/generate", body)
    written = answer["meta_info"].get(NAME)
    if written is None or len(written) != len(answer["output_ids"]):
        raise EndpointFailed(f"{server.url}: {rid} came back without distributions: see the server's log")
    return answer


def summary(groups: Sequence[Sequence[float]], rng: np.random.Generator, resamples: int) -> tuple[float, float, float]:
    """Mean and 95 % interval, by bootstrap within groups (tasks), each of which weighs the same."""
    means = [float(np.mean(group)) for group in groups]
    drawn = np.mean([rng.choice(np.asarray(group), (resamples, len(group))).mean(axis=1) for group in groups], axis=0)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(np.mean(means)), float(low), float(high)
