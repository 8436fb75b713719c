"""Which windows stay in SGLang's radix tree for models with a sliding window: prefixes are found where they end."""

from __future__ import annotations

import pytest
from swa_server import Server, text

from sglang_lsa.radix_ext.swa_checkpoints import Checkpoints


@pytest.mark.parametrize("chunk", [8192, 65_536, None])
def test_another_question_finds_a_document_to_within_32k_tokens(chunk: int | None) -> None:
    server = Server(256, 128, swa_pages=420, virtual=1000)
    document = text(0, 100_000)
    server.end(server.come("first", [*document, *text(10**6, 77)], chunk))
    server.forget_windows(but=4)
    for number, length in enumerate((100_000, 70_000, 40_000)):
        tokens = [*document[:length], *text((number + 2) * 10**6, 300)]
        hit = len(server.match(tokens).device_indices)
        assert 32_768 <= length - length % 256 <= hit + 32_768 + 256, f"{hit} of {length}"
    server.assert_idle()


def test_short_prompts_leave_a_document_its_checkpoints() -> None:
    """Twice as many of them as there may be checkpoints."""
    server = Server(256, 128, swa_pages=420, virtual=2000)
    document = text(0, 100_000)
    server.end(server.come("first", [*document, *text(10**6, 77)], 8192))
    for number in range(400):
        server.end(server.come(f"short {number}", text((number + 5) * 10**6, 300)))
    assert len(server.tree.checkpoints) == server.tree.checkpoints.most
    hit = len(server.match([*document[:70_000], *text(2 * 10**6, 300)]).device_indices)
    assert hit >= 65_536 - 256, hit
    server.assert_idle()


def test_short_prompts_leave_a_conversation_its_checkpoints() -> None:
    """Whose ends are checkpoints that go first: they stand for none of those that stay."""
    server = Server(256, 128, swa_pages=420, virtual=2000)
    document = text(0, 100_000)
    for end in range(25_000, 100_001, 25_000):
        server.end(server.come(f"turn {end}", [*document[:end], *text(10**6, 77)], 8192))
    for number in range(400):
        server.end(server.come(f"short {number}", text((number + 5) * 10**6, 300)))
    hit = len(server.match([*document[:70_000], *text(2 * 10**6, 300)]).device_indices)
    assert hit >= 32_768 - 256, hit


def test_without_checkpoints_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checkpoints, "spare", lambda self, tokens: None)
    server = Server()
    server.tree.checkpoints.spacing = 64
    server.end(server.come("first", text(0, 640)))
    server.forget_windows(but=1)
    assert len(server.match([*text(0, 600), 5]).device_indices) == 0


def test_windows_of_checkpoints_go_last_but_they_go() -> None:
    server = Server()
    server.tree.checkpoints.spacing = 64
    server.end(server.come("first", text(0, 641)))
    assert len(server.tree.checkpoints) == 10
    server.forget_windows(but=10)
    assert len(server.match([*text(0, 600), 5]).device_indices) == 576
    server.end(server.come("second", text(10**6, 54 * 16)))
    assert len(server.tree.checkpoints) > 10
    server.end(server.come("third", text(2 * 10**6, 62 * 16)))
    server.assert_idle()


def test_no_more_than_half_of_the_windows_are_checkpoints() -> None:
    server = Server(swa_pages=16)
    for number in range(12):
        server.end(server.come(f"r{number}", text(number * 10**6, 20)))
    checkpoints = server.tree.checkpoints
    assert len(checkpoints) == checkpoints.most == 8
    assert len(server.match(text(11 * 10**6, 20)).device_indices) == 16


def test_a_prompt_whose_last_page_is_computed_again_is_found_up_to_it() -> None:
    """A match leaves out the last tokens; where they are in the tree, so does it leave out their page."""
    server = Server()
    server.end(server.come("first", text(0, 160)))
    server.forget_windows(but=2)
    second = server.come("second", text(0, 160))
    assert second.cache_protected_len == 160
    server.end(second)
    server.assert_idle()


def test_a_flush_forgets_checkpoints() -> None:
    server = Server()
    server.end(server.come("first", text(0, 100)))
    assert len(server.tree.checkpoints) == 1
    server.tree.reset()
    server.allocator.clear()
    assert len(server.tree.checkpoints) == 0
    server.assert_idle()
