"""What a server with LSA saved, by its own word: for programs that ask one, like those in ``examples/``."""

from __future__ import annotations

import dataclasses
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


class NoServer(RuntimeError):
    """Nobody answers at a URL, or somebody without LSA; the message says what to start."""


def get_status(url: str, timeout: float = 60) -> dict[str, Any]:
    """The ``/lsa/status`` of the server at ``url``; its contents are described in ``sglang_lsa.serve.status``.

    Raises:
        NoServer: nothing listens there, or it is not a server with LSA.
    """
    status = get_json(url, "/lsa/status", timeout)
    if not isinstance(status, dict) or "page_bytes" not in status:
        raise NoServer(f"{url}/lsa/status is not what a server with LSA says: give the --url of one")
    return status


def get_requests(url: str, rid: str | None = None, timeout: float = 60) -> dict[str, Any]:
    """The ``/lsa/requests`` of the server at ``url``: ``finished`` and ``running`` ones, the newest last.

    Args:
        rid: all that is known of the requests of this name, their sets included
            (``sglang_lsa.serve.one_request.formatted``); None: a few numbers of those that run and of the last 64 that
            finished.

    Raises:
        NoServer: nothing listens there, or it is not a server with LSA.
    """
    query = "" if rid is None else "?" + urllib.parse.urlencode({"rid": rid})
    told = get_json(url, "/lsa/requests" + query, timeout)
    if not isinstance(told, dict) or "finished" not in told:
        raise NoServer(f"{url}/lsa/requests is not what a server with LSA says: give the --url of one")
    return told


def get_finished(url: str, rids: Sequence[str]) -> list[dict[str, Any]]:
    """What the server at ``url`` says of requests that just finished, in a few numbers each.

    Raises:
        NoServer: as :func:`get_status`.
        ValueError: it does not know one of them.
    """
    return last_stays(get_requests(url)["finished"], rids)


def engine_requests(engine: Any, rid: str | None = None) -> dict[str, Any]:
    """:func:`get_requests` for an ``sgl.Engine(lsa_config=...)``, which listens nowhere.

    The counters of ``/lsa/status`` are in ``engine.get_server_info()["internal_states"][0]["lsa"]``.
    """
    from sglang_lsa.patches.http_routes import ask, together

    asking = ask(engine.tokenizer_manager, requests=True, named=rid)
    return together(engine.loop.run_until_complete(asking))


def last_stays(finished: Sequence[dict[str, Any]], rids: Sequence[str]) -> list[dict[str, Any]]:
    """Those of ``finished`` that are named ``rids``; of a retracted one, there for each of its stays, the last.

    Raises:
        ValueError: one is not there.
    """
    shown = {entry["rid"]: entry for entry in finished}
    missing = [rid for rid in rids if rid not in shown]
    if missing:
        raise ValueError(
            f"request {missing[0]!r} is not among the {len(shown)} finished ones that the server shows: "
            "ask soon after a request, for 64 requests at most"
        )
    return [shown[rid] for rid in rids]


def get_json(url: str, path: str, timeout: float = 60) -> Any:
    """JSON answer of a GET request.

    Raises:
        NoServer: as :func:`get_status`.
    """
    start = "start one with: python -m sglang_lsa.launch_server --port 30000"
    try:
        with urllib.request.urlopen(url.rstrip("/") + path, timeout=timeout) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise NoServer(f"{url}{path} answers HTTP {error.code}, so this is no server with LSA: {start}") from None
    except (OSError, ValueError) as error:  # nothing there, no URL, or no JSON
        reason = getattr(error, "reason", error)
        raise NoServer(f"no server answers at {url} ({reason}): {start}") from None


@dataclass(frozen=True)
class Savings:
    """Device memory that requests needed at their last decode step, and what full attention needs for them.

    Pages that several of the requests share are counted for each; :func:`work` counts them once.

    Attributes:
        requests: how many.
        context_pages: of all their tokens.
        resident_pages: that their last decode step read.
        prompt_tokens: in their prompts.
        cached_tokens: of these, found in the radix tree and not computed again.
        page_bytes: of the KV of one page.
        key_bytes: that LSA keeps on the device for every page of a context, resident or not.
    """

    requests: int
    context_pages: int
    resident_pages: int
    prompt_tokens: int
    cached_tokens: int
    page_bytes: int
    key_bytes: float

    @property
    def full_bytes(self) -> int:
        """Of the KV of all pages: what full attention needs on the device."""
        return self.context_pages * self.page_bytes

    @property
    def device_bytes(self) -> int:
        """Of the KV of resident pages, and of the keys of all pages."""
        return round(self.resident_pages * self.page_bytes + self.context_pages * self.key_bytes)

    @property
    def share(self) -> float:
        """Device bytes as a share of what full attention needs."""
        return self.device_bytes / self.full_bytes if self.full_bytes else 1.0

    def __add__(self, other: Savings) -> Savings:
        """Of both, on the same server."""
        counts = ("requests", "context_pages", "resident_pages", "prompt_tokens", "cached_tokens")
        return dataclasses.replace(self, **{name: getattr(self, name) + getattr(other, name) for name in counts})

    def __str__(self) -> str:
        return (
            f"{self.resident_pages} of {self.context_pages} pages resident: "
            f"{self.device_bytes / 1e6:.1f} MB on the device instead of {self.full_bytes / 1e6:.1f} ({self.share:.1%})"
        )


def savings(status: dict[str, Any], found: Sequence[dict[str, Any]]) -> Savings:
    """What LSA saved for these finished requests.

    Args:
        status: of the server, taken at any time.
        found: entries of :func:`get_finished`.
    """
    overhead = status["physical"]["overhead_bytes"]
    return Savings(
        requests=len(found),
        context_pages=sum(entry["context_pages"] for entry in found),
        resident_pages=sum(entry["resident_pages"] for entry in found),
        prompt_tokens=sum(entry["prompt_tokens"] for entry in found),
        cached_tokens=sum(entry["cached_tokens"] for entry in found),
        page_bytes=status["page_bytes"],
        key_bytes=(overhead["page_keys"] + overhead.get("indexer", 0)) / (status["virtual"]["pages"] + 1),
    )


@dataclass(frozen=True)
class Work:
    """What a server did between two statuses, for everybody who asked it; shared pages are counted once.

    Attributes:
        stored_pages: copied from the device to the host, once for all requests that share them.
        stored_bytes: of their KV.
        recalled_pages: copied from the host to the device.
        prompt_tokens: of the prompts that came in.
        hit_tokens: of these, found in the radix tree and not computed again.
    """

    stored_pages: int
    stored_bytes: int
    recalled_pages: int
    prompt_tokens: int
    hit_tokens: int

    @property
    def hit_share(self) -> float:
        return self.hit_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    def __str__(self) -> str:
        return (
            f"{self.hit_tokens:,} of {self.prompt_tokens:,} prompt tokens were found in the radix tree "
            f"({self.hit_share:.0%}); {self.stored_pages} pages were copied to the host "
            f"({self.stored_bytes / 1e6:.1f} MB), {self.recalled_pages} back"
        )


def work(before: dict[str, Any], after: dict[str, Any]) -> Work:
    """What the server did between two of its statuses.

    Raises:
        ValueError: ``after`` has counted less than ``before``: the server was started anew in between.
    """
    done = Work(
        stored_pages=after["stores"]["pages"] - before["stores"]["pages"],
        stored_bytes=after["stores"]["bytes"] - before["stores"]["bytes"],
        recalled_pages=after["recalls"]["pages"] - before["recalls"]["pages"],
        prompt_tokens=after["radix"]["prompt_tokens"] - before["radix"]["prompt_tokens"],
        hit_tokens=after["radix"]["hit_tokens"] - before["radix"]["hit_tokens"],
    )
    if min(done.stored_pages, done.recalled_pages, done.prompt_tokens) < 0:
        raise ValueError("the server counted less after than before: it was started anew, so nothing can be compared")
    return done


def pool_bytes(url: str) -> int:
    """Bytes of the device pool of any SGLang server, with LSA or without, as it reports them (in steps of 1 MiB).

    Raises:
        NoServer: nothing listens there, or it is not SGLang.
    """
    info = get_json(url, "/server_info")
    try:
        return round(info["internal_states"][0]["memory_usage"]["kvcache"] * 2**30)
    except (KeyError, IndexError, TypeError):
        raise NoServer(f"{url}/server_info does not say how large its KV pool is: give the --url of SGLang") from None
