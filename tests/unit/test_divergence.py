"""Next-token distributions: what is forced and written inside the sampler, and what is made of it."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from release import RELEASE

from sglang_lsa.evaluation.divergence import LEAST_REST, TOP, divergences, summary
from sglang_lsa.evaluation.forced import NAME, PROCESSOR, Forced, packed, unpacked
from sglang_lsa.evaluation.summary import markdown, summarise


def prefilled(chunk: int = 4, prompt: int = 4) -> SimpleNamespace:
    """What the sampler sees of a request whose last pass read its prompt up to there."""
    request = SimpleNamespace(customized_info=None, full_untruncated_fill_ids=list(range(prompt)))
    return goes_up_to(request, chunk)


def goes_up_to(request: SimpleNamespace, chunk: int) -> SimpleNamespace:
    """The same request with another last pass, as the installed SGLang notes it."""
    vars(request).update({"extend_end": chunk} if RELEASE.checkpoints else {"extend_range": SimpleNamespace(end=chunk)})
    return request


def decode(logits: torch.Tensor, asked: dict[str, Any]) -> tuple[list[int], list[str]]:
    """Greedy decode of one request whose steps have these logits ``[steps, vocabulary]``, in a batch with another."""
    request, other = (prefilled() for _ in range(2))
    params = [{NAME: {"top": 3}, "__req__": other}, {NAME: asked, "__req__": request}]
    tokens = []
    for step in logits:
        both = torch.stack((torch.zeros_like(step), step.clone()))
        tokens.append(int(Forced()(both, params)[1].argmax()))
    return tokens, request.customized_info[NAME]


def exact(p: torch.Tensor, q: torch.Tensor) -> np.ndarray:
    log_p, log_q = (torch.log_softmax(logits.double(), dim=-1) for logits in (p, q))
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1).numpy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_answer_is_forced_and_the_same_tokens_are_told(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    p, q = (torch.randn(5, 300).mul(4).to(dtype) for _ in range(2))
    tokens, reference = decode(p, {"top": TOP})
    assert tokens == p.argmax(dim=-1).tolist(), "nothing is forced where the reference is made"
    forced, told = decode(q, {"tokens": tokens, "ids": reference})
    assert forced == tokens and forced != q.argmax(dim=-1).tolist()
    for one, other, of_p, of_q in zip(reference, told, p, q, strict=True):
        (ids, in_p), (same, in_q) = unpacked(one), unpacked(other)
        assert len(ids) == TOP and (ids == same).all()
        assert in_p[0] == in_p.max() and ids[0] == of_p.argmax()
        for logits, written in ((of_p, in_p), (of_q, in_q)):
            expected = torch.log_softmax(logits.float(), -1)[torch.from_numpy(ids.astype(np.int64))].numpy()
            np.testing.assert_array_equal(written, expected)


@pytest.mark.parametrize("asked", [{"top": 8}, {"tokens": [7], "ids": [packed(np.arange(8), np.zeros(8))]}], ids=str)
def test_chunks_in_the_middle_of_a_prompt_are_no_steps(asked: dict[str, Any]) -> None:
    """SGLang samples after each of them, and throws the token away."""
    request, logits = prefilled(2), torch.randn(1, 100)
    plain = logits.clone()
    assert (Forced()(logits, [{NAME: asked, "__req__": request}]) == plain).all()
    assert not request.customized_info
    goes_up_to(request, 4)
    Forced()(logits, [{NAME: asked, "__req__": request}])
    assert len(request.customized_info[NAME]) == 1


def test_logits_that_are_no_numbers_are_no_agreement() -> None:
    p = torch.randn(3, 100)
    tokens, reference = decode(p, {"top": 8})
    _, told = decode(torch.full_like(p, torch.nan), {"tokens": tokens, "ids": reference})
    with pytest.raises(ValueError, match="step 0 has log-probabilities that are no numbers"):
        divergences(reference, told)


def test_a_step_after_the_end_is_not_forced_and_not_told() -> None:
    p = torch.randn(3, 100)
    tokens, reference = decode(p, {"top": 8})
    _, told = decode(p, {"tokens": tokens[:2], "ids": reference[:2]})
    assert told[:2] == reference[:2] and told[2] == ""


@pytest.mark.parametrize("vocabulary", [TOP, 100, 5000])
def test_the_divergence_is_a_lower_bound_and_exact_where_nothing_is_outside(vocabulary: int) -> None:
    torch.manual_seed(vocabulary)
    p = torch.randn(20, vocabulary) * 3
    q = p + torch.randn_like(p)
    tokens, reference = decode(p, {"top": TOP})
    _, told = decode(q, {"tokens": tokens, "ids": reference})
    values, outside = divergences(reference, told)
    true = exact(p, q)
    assert (values <= true + 1e-5).all() and (values > 0).all()
    if vocabulary == TOP:
        np.testing.assert_allclose(values, true, atol=1e-5)
        assert (outside <= 2 * LEAST_REST).all()
    else:
        kept = p.softmax(-1).topk(TOP, dim=-1).values.sum(dim=-1)
        np.testing.assert_allclose(outside, (1 - kept).numpy(), atol=1e-5)
        assert (values > 0.5 * true * (1 - outside)).all(), "most of it is seen"


def test_the_same_distribution_is_exactly_0_away() -> None:
    p = torch.randn(20, 5000) * 2
    tokens, reference = decode(p, {"top": TOP})
    _, told = decode(p, {"tokens": tokens, "ids": reference})
    assert (divergences(reference, told)[0] == 0.0).all()


def test_texts_keep_every_bit() -> None:
    ids, logs = np.array([0, 151_935], np.int32), np.array([-0.1, -87.3], np.float32)
    back = unpacked(packed(ids, logs))
    assert (back[0] == ids).all() and (back[1] == logs).all()


def test_the_server_imports_the_processor_by_name() -> None:
    import json

    data = bytes.fromhex(json.loads(PROCESSOR)["callable"])
    assert pickle.loads(data) is Forced and len(data) < 100, "a name, no code"


def test_intervals_weigh_tasks_alike() -> None:
    mean, low, high = summary([[1.0, 1.0, 1.0, 1.0], [3.0]], np.random.default_rng(0), 1000)
    assert (mean, low, high) == (2.0, 2.0, 2.0)
    mean, low, high = summary([[0.0, 1.0] * 10], np.random.default_rng(0), 1000)
    assert mean == 0.5 and 0.2 < low < 0.4 and 0.6 < high < 0.8


def row(task: str, sample: int, arm: str, kl: float | None, score: float | None = 1.0) -> dict[str, Any]:
    return {
        "model": "m", "suite": "s", "task": task, "length": 4096, "sample": f"{task}-{sample}", "turn": 0, "label": arm,
        "arm": arm, "budget": 1.0 if arm == "full" else 0.1, "score": score, "averaged": True, "kl": kl,
        "kl_outside": 0.01, "evidence_kept": 0.5, "footprint": 0.1,
    }  # fmt: skip


def test_every_row_and_table_has_the_divergence_with_its_interval() -> None:
    rows = [row("t", n, arm, kl * n) for n in (1, 2, 3) for arm, kl in (("full", 0.0), ("lsa", 0.1))]
    rows += [row("u", n, arm, kl, None) for n in (1, 2) for arm, kl in (("full", 0.0), ("lsa", 0.3))]
    found = {(r["task"], r["arm"]): r for r in summarise(rows)}
    assert found["t", "lsa"]["kl"] == pytest.approx(0.2) and found["t", "full"]["kl"] == 0.0
    assert 0.1 <= found["t", "lsa"]["kl_ci_low"] < 0.2 < found["t", "lsa"]["kl_ci_high"] <= 0.3 + 1e-9
    assert found["t", "lsa"]["kl_outside"] == 0.01
    assert found["u", "lsa"]["kl"] == 0.3 and found["u", "lsa"]["accuracy"] is None
    assert found["average", "lsa"]["kl"] == pytest.approx(0.2)
    text = markdown(list(found.values()))
    assert "KL 0.2000 (0.1" in text and "evidence 50% (n 2); KL 0.3000 (0.3000 to 0.3000)" in text
    without = summarise([r | {"kl": None} for r in rows])
    assert all(r["kl"] is None for r in without) and "KL" not in markdown(without)


def test_divergences_are_of_the_same_questions_under_every_arm() -> None:
    """One arm lacks a question's, as an earlier run leaves it, and another one's answer was of one token."""
    known = {
        ("full", 3): 0.0,
        ("lsa", 1): 5.0,
        ("lsa", 3): 0.1,
        ("quest", 1): 7.0,
        ("quest", 2): 7.0,
        ("quest", 3): 0.2,
    }
    rows = [row("t", n, arm, known.get((arm, n))) for n in (1, 2, 3) for arm in ("full", "lsa", "quest")]
    rows += [row("t", n, "window", None) for n in (1, 2, 3)]
    found = {r["arm"]: r for r in summarise(rows)}
    assert {arm: r["kl"] for arm, r in found.items()} == {"full": 0.0, "lsa": 0.1, "quest": 0.2, "window": None}
    assert {arm: r["kl_n"] for arm, r in found.items()} == {"full": 1, "lsa": 1, "quest": 1, "window": 0}
    assert all(r["n"] == 3 and r["accuracy"] == 100 for r in found.values()), "answers count all the same"
    assert "KL 0.1000 (0.1000 to 0.1000, n 1)" in markdown(list(found.values()))
    evidence = [row("t", 3, "evidence", 0.0)]
    assert {r["arm"]: r["kl_n"] for r in summarise(rows + evidence)}["lsa"] == 1
