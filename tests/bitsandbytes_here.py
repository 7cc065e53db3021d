"""Whether bitsandbytes can be tested."""

from __future__ import annotations

import importlib.util

import pytest

NEEDS_BITSANDBYTES = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="the optional extra bitsandbytes is not installed"
)
