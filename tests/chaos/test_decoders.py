"""Every decoder accepts or raises what it may, on any bytes; longer runs: `./tools/fuzz`."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chaos.decoders import DECODERS, try_one


@pytest.mark.slow
@pytest.mark.timeout(90)  # all of it is computing, so a busy machine stretches it
@pytest.mark.parametrize("name", DECODERS)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_any_bytes(name: str, seed: int) -> None:
    try_one(name, random.Random(seed))


def test_good_bytes_are_accepted() -> None:
    """The samples are what they should be, or the rest proves little."""
    for name, decoder in DECODERS.items():
        if decoder.samples and name not in {"journal", "sparse index", "csv", "json lines"}:
            decoder.decode(decoder.samples[0])
