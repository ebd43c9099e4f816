"""The fast paths: the reference's values and gradients over shapes, layouts and adversarial inputs; that they run."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from whisper_hf.model import attention, attention_blockwise, attention_gathered, attention_masks, blockwise_products
from whisper_hf.model.attention_reference import attention_reference
from whisper_hf.model.configuration_whisper_lm import SparseAttentionConfig

from ..conftest import LENGTH, tiny_model, tokens
from ..helpers.attention_cases import LAYOUTS, attend_by_reference, attention_inputs, layout_of

SETTINGS = SparseAttentionConfig(block_size=16, topk_blocks=2, local_blocks=2, sink_blocks=1)


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan() -> Iterator[None]:
    """Poison what is allocated and not written."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def assert_same(query: Tensor, key: Tensor, value: Tensor, layout: Tensor | None, settings=SETTINGS, **close) -> None:
    """Compare output (with and without gradients) and gradients of the fast path with the reference's."""
    upstream, scaling = torch.randn_like(query), query.shape[-1] ** -0.5
    results = []
    for forward in (attention_blockwise.attention_blockwise, attend_by_reference):
        output = forward(query, key, value, layout, scaling, settings)
        results.append([output, *torch.autograd.grad(output, (query, key, value), upstream)])
    for name, got, expected in zip("oqkv", *results, strict=True):
        assert got.dtype == expected.dtype, name
        torch.testing.assert_close(got, expected, **close, msg=lambda text, name=name: f"{name}: {text}")
    with torch.no_grad():
        got = attention_blockwise.attention_blockwise(query, key, value, layout, scaling, settings)
    torch.testing.assert_close(got, results[1][0], **close)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blockwise_matches_reference_in_every_layout(name: str, dtype: torch.dtype) -> None:
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-12}
    assert_same(*attention_inputs(dtype=dtype), layout_of(name), **close)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
def test_blockwise_matches_reference_in_every_head_shape(heads: int, kv_heads: int, head_dim: int) -> None:
    assert_same(*attention_inputs(heads, kv_heads, head_dim), None, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize(("topk", "local", "sink"), [(0, 1, 0), (1, 1, 0), (3, 1, 2), (1, 3, 0), (0, 2, 1)])
@pytest.mark.parametrize("length", [461, 512])
def test_blockwise_matches_reference_at_every_budget(
    block_size: int, topk: int, local: int, sink: int, length: int
) -> None:
    settings = SparseAttentionConfig(block_size, topk, local, sink)
    assert not settings.covers(length)
    assert_same(*attention_inputs(queries=length, keys=length), None, settings, rtol=1e-4, atol=2e-5)


def test_the_covered_beginning_is_left_to_fused_attention_only_in_short_sequences_without_gradients(
    count_calls,
) -> None:
    dense = count_calls(attention_blockwise, "sdpa")
    for length, expected in ((81, 1), (320, 1), (321, 0)):  # the budget is 80 tokens
        tensors = attention_inputs(queries=length, keys=length)
        attention_blockwise.attention_blockwise(*tensors, None, 0.2, SETTINGS)
        assert not dense
        with torch.no_grad():
            attention_blockwise.attention_blockwise(*tensors, None, 0.2, SETTINGS)
        assert len(dense) == expected
        dense.clear()


@pytest.mark.parametrize("queries", [1, 2, 40, 43, 107, 202])
def test_blockwise_matches_reference_behind_a_cache(queries: int) -> None:
    assert_same(*attention_inputs(queries=queries), None, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_error_is_no_worse_than_that_of_sdpa(dtype: torch.dtype) -> None:
    query, key, value = attention_inputs(dtype=dtype)
    mask = attention_masks.explicit_mask(query, key, None, SETTINGS)
    repeated = [states.repeat_interleave(2, dim=1) for states in (key, value)]
    plain = torch.nn.functional.scaled_dot_product_attention(query, *repeated, attn_mask=mask)
    fast = attention_blockwise.attention_blockwise(query, key, value, None, 32**-0.5, SETTINGS)
    exact = attention_reference(query.double(), key.double(), value.double(), mask, 32**-0.5)[0]
    assert fast.dtype == dtype
    assert (fast - exact).abs().mean() <= 1.5 * (plain - exact).abs().mean()


def test_float32_error_is_at_most_one_and_a_half_times_that_of_sdpa() -> None:
    settings = SparseAttentionConfig(64, 8, 4, 1)
    query, key, value = (tensor.detach() for tensor in attention_inputs(8, 2, 64, 2048, 2048))
    mask = attention_masks.explicit_mask(query, key, None, settings)
    repeated = [states.repeat_interleave(4, dim=1) for states in (key, value)]
    plain = torch.nn.functional.scaled_dot_product_attention(query, *repeated, attn_mask=mask)
    fast = attention_blockwise.attention_blockwise(query, key, value, None, 0.125, settings)
    exact = attention_reference(query.double(), key.double(), value.double(), mask, 0.125)[0]
    assert (fast - exact).abs().mean() <= 1.5 * (plain - exact).abs().mean()


# --- numerical safety ------------------------------------------------------------------------------------------------


def test_far_keys_that_tower_above_the_local_ones() -> None:
    """Logits 120 and more above the local ones would overflow the exponential against a local reference."""
    query, key, value = (tensor.detach() for tensor in attention_inputs())
    direction = torch.nn.functional.normalize(torch.ones(32), dim=0)
    query += 12 * direction
    for slot, height in ((20, 60.0), (70, 90.0), (71, 91.0), (100, 300.0)):
        key[:, :, slot] = height * direction
    logits = (query[:, :2] @ key[:, :1].transpose(2, 3)) * 32**-0.5
    assert logits[:, :, 110, 100].min() > logits[:, :, 110, 101:111].max() + 120
    assert_same(*(t.requires_grad_() for t in (query, key, value)), None, rtol=1e-3, atol=1e-4)


def test_what_almost_overflowed_is_forgotten_beside_much_larger_logits() -> None:
    """Local logits are 0, then one of 55, for which the reference stays, then one of 300."""
    query, key, value = (tensor.detach() for tensor in attention_inputs(dtype=torch.float64))
    query.fill_(1.0)
    key.zero_()
    key[:, :, 100], key[:, :, 50] = 55 / 32, 300 / 32
    output = attention_blockwise.attention_blockwise(query, key, value, None, 1.0, SETTINGS)
    for last in (150, 202):
        torch.testing.assert_close(output[:, :, last], value[:, :, 50].repeat_interleave(2, 1), rtol=1e-14, atol=0)


@pytest.mark.parametrize("fill", [0.0, 1.0, -3.0])
def test_equal_keys_tie_everywhere(fill: float) -> None:
    query, key, value = attention_inputs()
    with torch.no_grad():
        key.fill_(fill)
    assert_same(query, key, value, None, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e3, 1e15])
def test_tiny_and_huge_norms(scale: float) -> None:
    query, key, value = (tensor.detach() for tensor in attention_inputs(dtype=torch.float64))
    close = {"rtol": 1e-6, "atol": 1e-9 * max(scale, 1.0)}  # in float64, for rounding grows with the logits
    assert_same(*(t.requires_grad_() for t in (query * scale, key, value)), None, **close)
    query, key, value = (tensor.float().requires_grad_() for tensor in (query * scale, key, value))
    output = attention_blockwise.attention_blockwise(query, key, value, None, 0.2, SETTINGS)
    assert all(tensor.isfinite().all() for tensor in (output, *torch.autograd.grad(output.sum(), (query, key, value))))


def test_reference_is_raised_only_where_needed(count_calls) -> None:
    raised = count_calls(blockwise_products, "_raise_reference")
    query, key, value = (tensor.detach() for tensor in attention_inputs())
    attention_blockwise.attention_blockwise(query, key, value, None, 0.2, SETTINGS)
    assert not raised
    attention_blockwise.attention_blockwise(query * 50, key, value, None, 0.2, SETTINGS)
    assert raised


def test_second_derivative_is_refused() -> None:
    query, key, value = attention_inputs()
    output = attention_blockwise.attention_blockwise(query, key, value, None, 0.2, SETTINGS)
    gradient = torch.autograd.grad(output.sum(), query, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="autograd"):
        gradient.sum().backward()


def test_autocast_changes_nothing_inside() -> None:
    query, key, value = (tensor.detach() for tensor in attention_inputs())
    expected = attention_blockwise.attention_blockwise(query, key, value, None, 0.2, SETTINGS)
    with torch.autocast("cpu", torch.bfloat16):
        got = attention_blockwise.attention_blockwise(query, key, value, None, 0.2, SETTINGS)
        decoded = attention_gathered.attention_gathered(query[:, :, -1:], key, value, None, 0.2, SETTINGS)
    assert torch.equal(got, expected)
    torch.testing.assert_close(decoded, expected[:, :, -1:], rtol=1e-4, atol=1e-5)


# --- decoding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
def test_decode_matches_reference_in_every_layout(name: str) -> None:
    query, key, value = attention_inputs(queries=1)
    layout = layout_of(name)
    results = []
    for forward in (attention_gathered.attention_gathered, attend_by_reference):
        output = forward(query, key, value, layout, 0.2, SETTINGS)
        results.append([output, *torch.autograd.grad(output.sum(), (query, key, value))])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [SETTINGS, SparseAttentionConfig(16, 0, 1, 0), SparseAttentionConfig(16, 3, 1, 2)])
@pytest.mark.parametrize("queries", [1, 5])
def test_decode_matches_reference_at_every_budget(settings: SparseAttentionConfig, queries: int) -> None:
    query, key, value = attention_inputs(queries=queries)
    got = attention_gathered.attention_gathered(query, key, value, None, 0.2, settings)
    torch.testing.assert_close(got, attend_by_reference(query, key, value, None, 0.2, settings), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("offset", [0, 16, 64])
def test_decode_matches_reference_on_a_view_of_a_larger_buffer(offset: int) -> None:
    """Whole blocks are taken from a buffer only where its memory holds them all."""
    query, key, value = (tensor.detach() for tensor in attention_inputs(queries=1, keys=192))
    views = []
    for states in (key, value):
        buffer = torch.full((2, 2, 256, 32), float("nan"))
        buffer[:, :, offset : offset + 192] = states
        views.append(buffer[:, :, offset : offset + 187])
    got = attention_gathered.attention_gathered(query, *views, None, 0.2, SETTINGS)
    expected = attend_by_reference(query, key[:, :, :187], value[:, :, :187], None, 0.2, SETTINGS)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_decode_reads_only_chosen_blocks_and_summaries() -> None:
    """What is not chosen may be anything: with cached means, it is never touched."""
    query, key, value = (tensor.detach() for tensor in attention_inputs(queries=1))
    means = attention_gathered.mean_blocks(key, None, 16)
    expected = attention_gathered.attention_gathered(query, key, value, None, 0.2, SETTINGS, means)
    allowed = attention_masks.explicit_mask(query, key, None, SETTINGS)[:, ::2, 0]  # [B, K, S]
    assert allowed.sum(-1).max() <= 80 < 203
    for states in (key, value):
        states[~allowed] = float("nan")
    assert torch.equal(attention_gathered.attention_gathered(query, key, value, None, 0.2, SETTINGS, means), expected)


# --- in the model ----------------------------------------------------------------------------------------------------


def test_each_path_runs_where_it_should(count_calls) -> None:
    """Training and prefill take the blockwise path, decoding the gathered one, and neither the reference."""
    blockwise, decode = count_calls(attention, "attention_blockwise"), count_calls(attention, "attention_gathered")
    slow = count_calls(attention, "masked_sparse_attention_reference")
    model = tiny_model()
    model.train()(tokens(), labels=tokens()).loss.backward()
    assert (len(blockwise), len(decode)) == (2, 0)
    cache = DynamicCache(config=model.config)
    model.eval()(tokens(), cache=cache)
    assert (len(blockwise), len(decode)) == (4, 0)
    model(tokens()[:, :1], cache=cache)
    assert (len(blockwise), len(decode)) == (4, 2)
    assert not slow


@pytest.mark.parametrize("left", [0, 21])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_cached_means_are_those_of_the_keys(left: int, kind: str) -> None:
    """After prefill, chunks, single tokens, cropping, reordering, repeating and selecting."""
    from transformers import StaticCache

    model = tiny_model().requires_grad_(False)
    config = model.config
    cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config, max_cache_len=LENGTH + left + 40)
    ids = torch.nn.functional.pad(tokens(), (left, 0))
    attention_mask = (ids != 0).long()

    def feed(start: int, end: int, rows: Tensor) -> None:
        shown = attention_mask[rows][:, :end] if left else None
        position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)[rows][:, start:end]
        model(ids[rows][:, start:end], attention_mask=shown, position_ids=position_ids, cache=cache)

    def check(length: int) -> None:
        layer = cache.layers[1]
        complete = (length - left) // 16
        content = layer.keys[:, :, left : left + complete * 16]
        expected = content.unflatten(2, (complete, 16)).mean(3)
        torch.testing.assert_close(layer.block_means[:, :, :complete], expected, rtol=1e-5, atol=1e-6)

    both = torch.tensor([0, 1])
    feed(0, left + 70, both)
    check(left + 70)
    feed(left + 70, left + 101, both)
    for step in range(left + 101, left + 120):
        feed(step, step + 1, both)
    check(left + 120)
    if kind == "dynamic":
        cache.crop(-30)
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 3]))
        feed(left + 90, left + 130, both.flip(0))
        check(left + 130)


def test_dynamic_layer_does_not_copy_its_keys_every_token() -> None:
    model = tiny_model().requires_grad_(False)
    cache = DynamicCache(config=model.config)
    model(tokens(), cache=cache)
    pointers = set()
    for step in range(100):
        model(tokens()[:, step : step + 1], cache=cache)
        pointers.add(cache.layers[0].keys.data_ptr())
    assert len(pointers) == 1
    assert cache.get_seq_length() == LENGTH + 100


def test_a_four_dimensional_mask_stops_the_means_and_decoding_stays_right() -> None:
    model = tiny_model().requires_grad_(False)
    cache = DynamicCache(config=model.config)
    causal = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    model(tokens(1), attention_mask=causal, cache=cache)
    assert cache.layers[0].block_means is None
    step = model(tokens(1)[:, :1], cache=cache).logits
    expected = model(torch.cat([tokens(1), tokens(1)[:, :1]], 1)).logits[:, -1:]
    torch.testing.assert_close(step, expected, rtol=1e-4, atol=1e-5)
