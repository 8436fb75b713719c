"""Calibration: what watched attention shows, which heads are found, and how results are kept."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import pickle
import types

import pytest
import torch

from sglang_lsa.config import LSAConfig, RequestOptions
from sglang_lsa.engine.observe import observed_layers
from sglang_lsa.indexer import calibrations, untrained
from sglang_lsa.indexer.calibrations import Calibration
from sglang_lsa.indexer.checkpoint import ModelShape
from sglang_lsa.indexer.model import MemoryIndexer, key_runs
from sglang_lsa.indexer.watch import Seen, Sees, Watch
from sglang_lsa.kernels.page_score import to_8_bits
from sglang_lsa.texts.calibration import ON_CPU, ON_GPU, prompts_for

SHAPE = ModelShape(hidden_size=64, num_hidden_layers=3, q_heads=4, kv_heads=2, head_dim=16)
PAGE = 64


def seen(seed: int, good: dict[tuple[int, int], float], pages: int = 32, evidence: tuple[int, ...] = (9, 20)) -> Seen:
    """A prompt in which ``good`` heads tell of evidence and pay that much to it, others tell of pages by lot."""
    generator = torch.Generator().manual_seed(seed)
    told = torch.rand((3, 4, pages), generator=generator) * 0.01
    paid = torch.rand((3, 4, pages), generator=generator) * 0.01
    for (layer, head), mass in good.items():
        told[layer, head, list(evidence)] = mass
        paid[layer, head, list(evidence)] = mass
    return Seen(paid, told, evidence)


def test_watched_attention_is_attention_and_says_where_it_went() -> None:
    tokens, answer = 4 * PAGE + 17, 10
    generator = torch.Generator().manual_seed(1)
    q = torch.randn((tokens, 4, 16), generator=generator)
    k, v = (torch.randn((tokens, 2, 16), generator=generator) for _ in range(2))
    watch = Watch(tokens, answer, (2, 99), Sees(8, 32, 0), quest_layers=(0,), keep=(0,))
    out = watch.attend(0, q, k, v, 0.25)
    keys, values = (part.repeat_interleave(2, dim=1) for part in (k, v))
    logits = torch.einsum("thd,chd->htc", q, keys) * 0.25
    weights = logits.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), float("-inf")).softmax(dim=-1)
    torch.testing.assert_close(out, torch.einsum("htc,chd->thd", weights, values))
    whole = watch.seen()
    assert whole.evidence == (2,) and whole.paid.shape == whole.told.shape == (
        1,
        4,
        4 + 0 + (tokens - answer) // PAGE - 4,
    )
    of_page = weights[:, -answer:, : 4 * PAGE].unflatten(-1, (4, PAGE)).sum(dim=-1).amax(dim=1)
    torch.testing.assert_close(whole.paid[0], of_page)
    assert whole.quest is not None and whole.quest.shape == (whole.paid.shape[2],)
    assert whole.queries[0].shape == (8, 4, 16) and whole.runs[0].shape == (whole.paid.shape[2], 32, 2, 16)


def test_what_is_told_is_what_the_untrained_indexer_scores() -> None:
    """So that weights and threshold that calibration finds are those of the policy that serves."""
    tokens, answer = 6 * PAGE, 5
    generator = torch.Generator().manual_seed(2)
    heads = ((0, 1), (1, 0), (1, 3))
    watch = Watch(tokens, answer, (2,), untrained.SEES)
    parts = [
        (torch.randn((tokens, 4, 16), generator=generator), torch.randn((tokens, 2, 16), generator=generator))
        for _ in range(3)
    ]
    for layer, (q, k) in enumerate(parts):
        k[2 * PAGE - 8 : 2 * PAGE] *= 3  # the end of page 1, which page 2 gets too
        watch.attend(layer, q, k, k, SHAPE.head_dim**-0.5)
    whole = watch.seen()
    found = untrained.Heads(heads, (0.5, 1.0, 1.5), 9.0)
    indexer = untrained.make_indexer(SHAPE, found, [whole])
    begins, pages = tokens - answer, 5
    queries = torch.stack([parts[layer][0][begins - 64 : begins] for layer in (0, 1)], dim=1)
    runs = torch.stack([key_runs(parts[layer][1][: pages * PAGE].unflatten(0, (pages, PAGE))) for layer in (0, 1)], 2)
    with torch.no_grad():
        served = indexer.score_all(indexer.ask(queries), indexer.keys_of_runs(runs))
        by_table = indexer.score(queries, to_8_bits(indexer.keys_of_runs(runs)), torch.arange(pages))
        expected = indexer.combine(whole.told[[0, 1, 1], [1, 0, 3]])
        indexer.config = dataclasses.replace(indexer.config, overlap=0)
        without = indexer.score_all(indexer.ask(queries), indexer.keys_of_runs(runs))
    torch.testing.assert_close(served, expected)
    torch.testing.assert_close(by_table, expected)
    assert expected[2] > 1.5 * without[2]
    own = sum(w * whole.told[layer, head] for (layer, head), w in zip(heads, found.weights, strict=True)) / 3
    before, after = torch.nn.functional.softplus(indexer.neighbour.detach())
    beside = before * torch.nn.functional.pad(own[:-1], (1, 0)) + after * torch.nn.functional.pad(own[1:], (0, 1))
    torch.testing.assert_close(expected, own + beside, atol=1e-6, rtol=1e-4)


def test_heads_that_look_at_evidence_are_found_and_weighed() -> None:
    good = {(0, 2): 0.8, (2, 1): 0.4}
    found = untrained.find_heads([seen(number, good) for number in range(4)])
    assert found.heads == ((0, 2), (2, 1))
    assert found.weights == pytest.approx((4 / 3, 2 / 3))
    assert found.lift > 10


def test_values_that_only_lesser_heads_look_at_are_found_too() -> None:
    """A key has four values; the best eight heads look at the first two of them, four more at the others."""
    evidence, parts = (6, 9, 14, 20), []
    for number in range(4):
        part = seen(number, {}, evidence=evidence)
        for place in range(12):
            page = evidence[place % 2 if place < 8 else 2 + place % 2]
            for shares in (part.told, part.paid):
                shares[place // 4, place % 4, page] = 0.8 if place < 8 else 0.6
        parts.append(part)
    indexer = untrained.make_indexer(SHAPE, untrained.find_heads(parts), parts)
    layers, heads = zip(*indexer.config.heads, strict=True)
    for part in parts:
        best = indexer.combine(part.told[layers, heads]).topk(len(evidence)).indices
        assert sorted(best.tolist()) == list(evidence)


def test_a_head_that_tells_of_evidence_and_does_not_pay_it_is_worth_nothing_beside_one_that_does() -> None:
    parts = [seen(number, {(0, 2): 0.8, (2, 1): 0.8}) for number in range(3)]
    for part in parts:
        part.paid[2, 1] = 0
    assert untrained.find_heads(parts).heads == ((0, 2),)


def test_no_heads_are_found_where_none_look() -> None:
    with pytest.raises(untrained.NothingFound, match="as much as chance"):
        untrained.find_heads([seen(number, {}) for number in range(6)])
    with pytest.raises(untrained.NothingFound, match="none of the prompts"):
        untrained.find_heads([seen(0, {(0, 0): 1.0}, evidence=(0, 31))])  # pages that always stay


def test_the_threshold_keeps_what_it_says() -> None:
    parts = [seen(number, {(0, 2): 0.8, (2, 1): 0.4}) for number in range(4)]
    indexer = untrained.make_indexer(SHAPE, untrained.find_heads(parts), parts)
    assert untrained.TARGET <= indexer.config.coverage <= 1
    tighter, kept = untrained.find_threshold(indexer, parts, 0.5)
    assert tighter >= indexer.config.threshold and kept >= 0.5
    # No higher score keeps as much.
    looser, _ = untrained.find_threshold(indexer, parts, 1.0)
    assert looser <= indexer.config.threshold


def made() -> MemoryIndexer:
    parts = [seen(number, {(0, 2): 0.8, (2, 1): 0.4}) for number in range(2)]
    return untrained.make_indexer(SHAPE, untrained.find_heads(parts), parts)


def test_a_calibration_is_read_as_it_was_written_and_replaced_whole(tmp_path: pathlib.Path) -> None:
    folder, first = tmp_path / "cache" / "key", Calibration(True, 4, 1.5, 20.0)
    assert calibrations.read(folder) is None
    calibrations.write(folder, first, made())
    assert calibrations.read(folder) == first
    assert MemoryIndexer.load(folder).config == made().config
    nothing = Calibration(False, 4, 1.5, 1.1)
    calibrations.write(folder, nothing, None)
    assert calibrations.read(folder) == nothing
    assert [path.name for path in folder.iterdir()] == [calibrations.FACTS]
    assert [path.name for path in folder.parent.iterdir()] == ["key"]


def test_a_calibration_of_another_version_or_a_damaged_one_is_not_used(tmp_path: pathlib.Path) -> None:
    calibrations.write(tmp_path / "key", Calibration(True, 4, 1.5, 20.0, format=calibrations.FORMAT + 1), made())
    with pytest.raises(ValueError, match=f"another version \\(format {calibrations.FORMAT + 1}"):
        calibrations.read(tmp_path / "key")
    calibrations.write(tmp_path / "key", Calibration(True, 4, 1.5, 20.0), made())
    (tmp_path / "key" / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match="does not fit"):
        calibrations.read(tmp_path / "key")
    (tmp_path / "key" / calibrations.FACTS).write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        calibrations.read(tmp_path / "key")


def test_an_interrupted_write_leaves_what_was_there(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, first = tmp_path / "key", Calibration(True, 4, 1.5, 20.0)
    calibrations.write(folder, first, made())
    monkeypatch.setattr(MemoryIndexer, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        calibrations.write(folder, Calibration(True, 9, 9.0, 9.0), made())
    assert calibrations.read(folder) == first
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_a_killed_calibration_is_cleaned_up_a_day_later(tmp_path: pathlib.Path) -> None:
    for name, age in (("old", 2 * calibrations.ABANDONED_S), ("new", 0)):
        (tmp_path / f".partial-{name}").mkdir()
        at = (tmp_path / f".partial-{name}").stat().st_mtime - age
        os.utime(tmp_path / f".partial-{name}", (at, at))
    calibrations.write(tmp_path / "key", Calibration(False, 4, 1.5, 1.0), None)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".partial-new", "key"]


def test_a_folder_that_cannot_be_written_is_an_oserror(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        calibrations.write(tmp_path / "file" / "key", Calibration(False, 4, 1.5, 1.0), None)


def test_a_calibration_belongs_to_weights_shape_and_prompts() -> None:
    weights = [("a", torch.arange(10_000.0)), ("b", torch.ones(3, 5).bfloat16())]
    key = calibrations.key_of(SHAPE, weights, "prompts")
    assert key == calibrations.key_of(SHAPE, weights, "prompts") and len(key) == 24
    trained = [("a", torch.arange(10_000.0) * 1.001), weights[1]]
    others = {
        calibrations.key_of(SHAPE, trained, "prompts"),
        calibrations.key_of(dataclasses.replace(SHAPE, kv_heads=1), weights, "prompts"),
        calibrations.key_of(SHAPE, weights, "others"),
    }
    assert len(others | {key}) == 4


def test_who_calibrates() -> None:
    assert LSAConfig(calibrate="cached").calibrates and LSAConfig(calibrate="always").calibrates
    asked = ({"policy": "quest"}, {"indexer": "smollm2-135m-instruct"}, {"calibrate": "never"}, {"record": "folder"})
    for values in (*asked, {"observe_layers": (1,)}, {"policy": "recency"}):
        assert not LSAConfig(**values).calibrates, values
    with pytest.raises(ValueError, match="calibrate is 'often'"):
        LSAConfig(calibrate="often")


def test_that_nobody_asked_for_a_policy_reaches_the_scheduler_process() -> None:
    assert pickle.loads(pickle.dumps(LSAConfig(calibrate="cached"))).calibrates
    assert not pickle.loads(pickle.dumps(LSAConfig(policy="quest"))).calibrates


def test_a_request_may_ask_for_what_calibration_may_have_found() -> None:
    asked = {"lsa": {"policy": "indexer"}}
    assert RequestOptions.parse(asked, LSAConfig(calibrate="cached")).policy == "indexer"
    with pytest.raises(ValueError, match="use one of quest"):
        RequestOptions.parse(asked, LSAConfig(calibrate="never"))


def test_prompts_fit_device_and_context() -> None:
    assert prompts_for("cpu", 8192) == ON_CPU
    assert prompts_for("cuda", 131_072) == ON_GPU
    assert prompts_for("cuda", 4096).lengths == (2048, 4096)


def test_a_failing_calibration_serves_with_quest(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("sglang")
    from sglang_lsa.patches.calibration import calibrated

    one_rank = types.SimpleNamespace(tp_size=1)
    runner = types.SimpleNamespace(
        model=torch.nn.Linear(2, 2), model_config=None, device="cpu", ps=one_rank, server_args=one_rank
    )
    after = calibrated(LSAConfig(calibrate="cached"), runner)
    assert (after.policy, after.indexer, after.calibrate) == ("quest", None, "never")
    assert "calibration failed" in caplog.text
    assert observed_layers(after, 16)
    sized = calibrated(LSAConfig(calibrate="cached", budget="auto"), runner)
    assert (sized.policy, sized.budget) == ("quest", LSAConfig.budget)
    assert "nothing tells how many pages a set needs: the budget is 0.135 instead of auto" in caplog.text


def test_a_calibrated_indexer_knows_what_its_sets_cover() -> None:
    """So that a budget of auto goes with it."""
    parts = [seen(number, {(0, 2): 0.8, (2, 1): 0.4}) for number in range(4)]
    known = untrained.make_indexer(SHAPE, untrained.find_heads(parts), parts).config.expectation
    assert known is not None and known.source == "the 4 prompts of the calibration at start"
    assert known.covered(0.1) < known.covered(0.9) and 0 < known.pages_for(0.8) < 0.5
    nothing = [dataclasses.replace(part, paid=part.paid * 0) for part in parts]
    assert untrained.make_indexer(SHAPE, untrained.find_heads(parts), nothing).config.expectation is None


def test_the_written_form_is_plain_json(tmp_path: pathlib.Path) -> None:
    calibrations.write(tmp_path / "key", Calibration(True, 4, 1.5, 20.0), made())
    assert json.loads((tmp_path / "key" / calibrations.FACTS).read_text())["found"] is True


def test_random_weights_have_no_heads_that_look() -> None:
    """Queries and keys by lot, through the real attention and scores: as many prompts as a CPU reads."""
    parts = []
    for number in range(4):
        generator = torch.Generator().manual_seed(number)
        watch = Watch(24 * PAGE, 20, (5, 11), untrained.SEES)
        for layer in range(3):
            q = torch.randn((24 * PAGE, 4, 16), generator=generator)
            k = torch.randn((24 * PAGE, 2, 16), generator=generator)
            watch.attend(layer, q, k, k, 0.25)
        parts.append(watch.seen())
    with pytest.raises(untrained.NothingFound) as nothing:
        untrained.find_heads(parts)
    assert 0.5 < nothing.value.lift < untrained.LEAST_LIFT


@pytest.fixture
def start(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    """Starts a server as far as calibration sees it, in a cache folder of its own: passes of the model, which need a
    real server (tests/server/test_calibration.py), are replaced by what they show, and counted."""
    pytest.importorskip("sglang")
    from sglang_lsa.patches import calibration

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    shows, passes = {"good": {(0, 2): 0.8, (2, 1): 0.4}}, []

    def watched(runner: object, prompts: object) -> list[Seen]:
        passes.append(1)
        return [seen(number, shows["good"]) for number in range(4)]

    monkeypatch.setattr(calibration, "watch_prompts", watched)
    monkeypatch.setattr(calibration, "model_shape", lambda runner: SHAPE)
    monkeypatch.setattr(calibration, "calibration_prompts", lambda tokenizer, chosen: [])
    monkeypatch.setattr(calibration, "_tokenizer", lambda server_args: None)
    one_rank = types.SimpleNamespace(tp_size=1)
    runner = types.SimpleNamespace(
        model=torch.nn.Linear(2, 2),
        model_config=types.SimpleNamespace(context_len=8192),
        device="cpu",
        ps=one_rank,
        server_args=one_rank,
    )

    def one(**values: object) -> LSAConfig:
        return calibration.calibrated(LSAConfig(**{"calibrate": "cached", **values}), runner)  # type: ignore[arg-type]

    return types.SimpleNamespace(one=one, passes=passes, shows=shows, runner=runner, cache=tmp_path)


def test_a_second_start_takes_what_the_first_found_unless_told_not_to(start) -> None:
    first = start.one()
    assert first.policy == "indexer" and str(first.indexer).startswith(str(start.cache / "sglang-lsa" / "calibrations"))
    assert start.one() == first and len(start.passes) == 1
    assert start.one(calibrate="always").indexer == first.indexer and len(start.passes) == 2


def test_other_weights_are_calibrated_for_themselves(start) -> None:
    first = start.one()
    start.runner.model.weight.data.add_(1)
    assert start.one().indexer != first.indexer and len(start.passes) == 2


@pytest.mark.parametrize(("name", "value"), [("HEADS", 8), ("SEES", dataclasses.replace(untrained.SEES, overlap=0))])
def test_what_is_made_in_another_way_is_kept_beside(
    start, name: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = start.one()
    monkeypatch.setattr(untrained, name, value)
    assert start.one().indexer != first.indexer and len(start.passes) == 2


def test_a_cache_of_another_version_is_made_again_and_said(start, caplog: pytest.LogCaptureFixture) -> None:
    facts = pathlib.Path(str(start.one().indexer)) / calibrations.FACTS
    facts.write_text(json.dumps({**json.loads(facts.read_text()), "format": 0}))
    assert start.one().policy == "indexer" and len(start.passes) == 2
    assert "is of another version (format 0" in caplog.text
    assert json.loads(facts.read_text())["format"] == calibrations.FORMAT


def test_a_model_that_looks_at_nothing_is_served_with_quest_and_not_asked_again(
    start, caplog: pytest.LogCaptureFixture
) -> None:
    start.shows["good"] = {}
    for _ in range(2):
        after = start.one()
        assert (after.policy, after.indexer, after.calibrates) == ("quest", None, False)
    assert len(start.passes) == 1 and "no heads of this model look at evidence" in caplog.text


def test_where_the_cache_cannot_be_written_a_server_keeps_its_calibration(
    start, caplog: pytest.LogCaptureFixture
) -> None:
    (start.cache / "sglang-lsa").write_text("a file where a folder should be")
    after = start.one()
    assert after.policy == "indexer" and MemoryIndexer.load(str(after.indexer)).config.heads == ((0, 2), (2, 1))
    assert not str(after.indexer).startswith(str(start.cache))
    assert "is not kept for the next start" in caplog.text
