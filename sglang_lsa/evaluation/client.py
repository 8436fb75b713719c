"""Asks an OpenAI-compatible endpoint for completions of token ids, and notes when the answer's tokens came."""

from __future__ import annotations

import urllib.parse
from dataclasses import dataclass
from typing import Any

import aiohttp

from sglang_lsa.streaming import RequestFailed, Stream, encoded, follow


class EndpointFailed(RuntimeError):
    """The endpoint refused or dropped a request."""


@dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes:
        seconds: from sending the request to its first piece, and to its last one.
        cached: tokens of the prompt that the endpoint had already; None: it does not say (SGLang does with
            ``--enable-cache-report``).
    """

    text: str
    tokens: int
    seconds: tuple[float, float]
    cached: int | None


class Endpoint:
    """One server.

    Args:
        url: base address, without ``/v1``.
        model: name it serves; asked for if None.
        api_key: sent as a bearer token.
    """

    def __init__(self, session: aiohttp.ClientSession, url: str, model: str | None = None, api_key: str | None = None):
        self.session, self.url, self.model = session, url.rstrip("/"), model
        self.headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    async def get(self, path: str) -> Any:
        """JSON of a GET request.

        Raises:
            EndpointFailed: it is not there or says no.
        """
        try:
            async with self.session.get(self.url + path, headers=self.headers) as answer:
                if answer.status != 200:
                    raise EndpointFailed(f"GET {self.url}{path}: HTTP {answer.status}: {(await answer.text())[:300]}")
                return await answer.json(content_type=None)
        except aiohttp.ClientError as error:
            raise EndpointFailed(f"GET {self.url}{path}: {error!r}: is the server running?") from error

    async def status(self) -> dict[str, Any] | None:
        """``/lsa/status``, or None from a server that is none of ours."""
        try:
            async with self.session.get(self.url + "/lsa/status", headers=self.headers) as answer:
                return await answer.json(content_type=None) if answer.status == 200 else None
        except aiohttp.ClientError as error:
            raise EndpointFailed(f"GET {self.url}/lsa/status: {error!r}: is the server running?") from error

    async def finished(self, rid: str) -> dict[str, Any] | None:
        """What a server with LSA knows of the request of this name that finished last, or None if of none."""
        found = await self.get("/lsa/requests?" + urllib.parse.urlencode({"rid": rid}))
        return found["finished"][-1] if found["finished"] else None

    async def post(self, path: str, body: dict[str, Any]) -> Any:
        """JSON of a POST request.

        Raises:
            EndpointFailed: it is not there or says no.
        """
        try:
            async with self.session.post(self.url + path, json=body, headers=self.headers) as answer:
                if answer.status != 200:
                    raise EndpointFailed(f"POST {self.url}{path}: HTTP {answer.status}: {(await answer.text())[:300]}")
                return await answer.json(content_type=None)
        except aiohttp.ClientError as error:
            raise EndpointFailed(f"POST {self.url}{path}: {error!r}: is the server running?") from error

    async def complete(
        self,
        ids: tuple[int, ...],
        new_tokens: int,
        rid: str | None = None,
        options: dict[str, Any] | None = None,
        salt: str | None = None,
    ) -> Answer:
        """The greedy continuation of a prompt.

        Args:
            options: ``custom_params.lsa``; None sends nothing that only SGLang knows.
            salt: keeps the request from sharing a prefix with requests of another one.

        Raises:
            EndpointFailed: the endpoint refused or dropped the request.
        """
        if self.model is None:
            self.model = (await self.get("/v1/models"))["data"][0]["id"]
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": list(ids),
            "max_tokens": new_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if options is not None:
            body |= {"rid": rid, "custom_params": {"lsa": options}} | ({"cache_salt": salt} if salt else {})
        sent = encoded(body)
        stream = Stream()
        try:
            await follow(self.session, self.url + "/v1/completions", sent, stream, self.headers)
        except RequestFailed as error:
            raise EndpointFailed(f"{self.url}: {error}") from error
        except (aiohttp.ClientError, ValueError, KeyError) as error:
            raise EndpointFailed(f"{self.url} failed in the middle of an answer: {error!r}") from error
        if not stream.usage:
            raise EndpointFailed(f"{self.url}: an answer ended early, without usage: see the server's log")
        first, last = (stream.times[each] - stream.sent for each in (0, -1))
        return Answer(stream.text, stream.count, (first, last), stream.cached)
