"""Strict defaults for every test: one thread, no network. Warnings are errors (pyproject.toml)."""

from __future__ import annotations

import os
import socket
from typing import Any

# Before torch is imported anywhere, and inherited by the processes that tests start.
os.environ.update(
    OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false"
)

import pytest
from hypothesis import settings

# A slow machine is no failure; everything else stays as hypothesis chose it (it is deterministic where CI is set).
settings.register_profile("patient", settings(), deadline=None)
settings.load_profile("patient")

_LOCAL = ("127.", "localhost", "::1", "0.0.0.0")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse connections that leave this machine; a test that needs one is a mistake."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        if isinstance(address, tuple) and not str(address[0]).startswith(_LOCAL):
            raise AssertionError(f"a test tried to reach {address[0]}; tests run without a network")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)
