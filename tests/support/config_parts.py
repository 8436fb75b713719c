"""Configurations as tests write and parse them."""

from __future__ import annotations

import argparse

from sglang_lsa.config import (
    LSAConfig,
    add_cli_args,
    config_from_args,
)


def parse(*flags: str) -> LSAConfig | None:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_cli_args(parser)
    return config_from_args(parser.parse_args(flags))
