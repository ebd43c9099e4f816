"""Check that each random value of `sparse_attention` either works or raises a `ValueError`."""

import math
from collections import Counter
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import strategies as st

from whisper_hf import SparseAttentionConfig, WhisperLMConfig
from whisper_hf.model.attention import masked_sparse_attention_forward
from whisper_hf.model.attention_reference import masked_sparse_attention_reference

LENGTH = 150
LEAST = {"block_size": 16, "topk_blocks": 0, "local_blocks": 1, "sink_blocks": 0}
MOST = 2**20
ANYTHING = st.one_of(
    st.integers(-3, 40),
    st.sampled_from([MOST, MOST + 1, 2 * MOST, 2**70, -(2**70), 16.0, math.nan, math.inf]),
    st.sampled_from(["16", True, False, None, [16], {}]),
)
SIZES = st.sampled_from([16, 16, 32, 64, MOST])
COUNTS = {name: st.one_of(st.integers(LEAST[name], 3), st.just(MOST)) for name in LEAST if name != "block_size"}
FEW = {name: st.integers(LEAST[name], 2) for name in COUNTS}
VALUES = st.one_of(
    st.fixed_dictionaries({}, optional={"block_size": SIZES, **COUNTS}),
    st.fixed_dictionaries({"block_size": st.just(16), **FEW}),
    st.dictionaries(st.sampled_from([*LEAST, "top_k", "blocks"]), ANYTHING, max_size=4),
    ANYTHING,
)
seen: Counter[str] = Counter()


def is_valid(value: Any) -> bool:
    """Return whether a value is valid by the documentation: integers within bounds, and blocks of a power of two."""
    if value is None:
        return True
    if not isinstance(value, dict) or not value.keys() <= LEAST.keys():
        return False
    if not all(type(number) is int and LEAST[name] <= number <= MOST for name, number in value.items()):
        return False
    return value.get("block_size", 16).bit_count() == 1


def check(value: Any) -> None:
    """Compute attention with a value as the setting of a model, and compare it with the reference.

    Raises:
        AssertionError: a valid value does not give the reference's output, or an invalid one raises no `ValueError`.
    """
    layer = SimpleNamespace(config=SimpleNamespace(sparse_attention=value), num_key_value_groups=2)
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randint(-3, 4, (1, heads, LENGTH, 8), generator=generator).double() for heads in (4, 2))
    try:
        output, _ = masked_sparse_attention_forward(layer, query, key, key, None, scaling=0.25)
    except ValueError:
        assert not is_valid(value), f"{value!r} is refused"
        assert not isinstance(value, dict) or _is_refused(value), f"{value!r} is accepted in a config"
        seen["refused"] += 1
        return
    assert is_valid(value), f"{value!r} is accepted"
    settings = SparseAttentionConfig.from_value(value)
    assert WhisperLMConfig(sparse_attention=value).sparse_attention == settings
    expected, _ = masked_sparse_attention_reference(query, key, key, None, 0.25, settings)
    torch.testing.assert_close(output.transpose(1, 2), expected, rtol=1e-12, atol=1e-12)
    seen["accepted"] += 1
    seen["sparse"] += not settings.covers(LENGTH)


def _is_refused(value: dict) -> bool:
    try:
        WhisperLMConfig(sparse_attention=value)
    except ValueError:
        return True
    return False
