"""The port of a server that is about to start is nobody else's."""

from __future__ import annotations

import asyncio
import pathlib
import socket

import pytest

from sglang_lsa.server_process import held_port


def test_a_held_port_is_nobody_elses() -> None:
    """A looked-up port was: the system handed it to others in the half minute until the server listened."""
    with held_port() as held, socket.socket() as other:
        with pytest.raises(OSError, match="in use"):
            other.bind(held.getsockname())
        own_choice = pathlib.Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
        assert held.getsockname()[1] < int(own_choice[0])


def test_held_ports_differ() -> None:
    held = [held_port() for _ in range(50)]
    assert len({each.getsockname() for each in held}) == 50
    for each in held:
        each.close()


def test_a_server_listens_on_a_held_port() -> None:
    """As SGLang's does, with asyncio's own options; the next server of the same test run takes another port."""

    async def scenario() -> bytes:
        async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"here")
            writer.close()

        with held_port() as held:
            server = await asyncio.start_server(greet, *held.getsockname())
            reader, writer = await asyncio.open_connection(*held.getsockname())
            said = await reader.read()
            writer.close()
            server.close()
            return said

    assert asyncio.run(scenario()) == b"here"
