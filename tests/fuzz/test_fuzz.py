"""A few random cases of `python -m tests.fuzz`, with checks of what they cover."""

import importlib.util
from collections.abc import Iterator

import pytest
import torch

from whisper_hf.model.triton_optional import IS_INTERPRETED

from . import __main__ as fuzz
from . import check_attention, check_caches, check_settings

TRITON = {"attention_triton.attend", "attention_triton.differentiate", "triton_decode._decode"}


@pytest.fixture(autouse=True)
def _fresh_counts_and_poisoned_memory() -> Iterator[None]:
    for counter in fuzz.COUNTERS:
        counter.clear()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_attention_matches_reference() -> None:
    fuzz.run("attention", 150, 0)
    seen, calls = check_attention.seen, check_attention.calls
    assert seen["cases"] >= 150
    assert seen["leaves keys out"] > 0.5 * seen["cases"]
    assert min(seen[name] for name in ("bfloat16", "float64", "documents", "queries behind a cache")) > 10
    names = {check_attention.called(*function) for function in check_attention.COUNTED}
    assert names - calls.keys() == TRITON


@pytest.mark.skipif(importlib.util.find_spec("triton") is None or not IS_INTERPRETED, reason="needs an interpreter")
def test_triton_matches_reference() -> None:
    fuzz.run("triton", 3, 0)
    assert check_attention.calls.keys() & TRITON
    assert not check_attention.calls["attention.attention_blockwise"]


def test_caches_match_reference() -> None:
    fuzz.run("caches", 25, 0)
    seen = check_caches.seen
    assert seen["longer than the budget"] > 0.5 * seen["comparisons"]
    assert all(any(family in name for name in seen) for family in check_caches.FAMILIES)
    assert min(seen[name] for name in ("crops", "reorders", "repeats", "selections", "resets")) > 5


def test_settings_work_or_raise() -> None:
    fuzz.run("settings", 80, 0)
    assert min(check_settings.seen[name] for name in ("sparse", "accepted", "refused")) > 10
