"""The testbed that ships with the library: drawings, six targets and a twin; the demonstration needs no network.

It was built by `unmemorize testbed diffusion` with its default settings and seed 0, weights stored in float16; the
models "general" and "injected" are left out to keep it small.
"""

from __future__ import annotations

from pathlib import Path

from unmemorize.testbeds.diffusion import Testbed, load_testbed


def shipped_testbed() -> Testbed:
    """Return the shipped testbed; it has the models "memorized" and "twin"."""
    return load_testbed(Path(__file__).parent / "shipped_data")
