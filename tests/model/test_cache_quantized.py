"""The 8-bit cache: close to exact, half of bfloat16, and read only where a token attends."""

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from whisper_hf.model import attention, attention_gathered
from whisper_hf.model.cache_quantized import QuantizedSparseCache
from whisper_hf.model.int8_rows import dequantize_rows, quantize_rows

from ..conftest import LENGTH, SPARSE, tiny_model, tokens

GREEDY = {"max_new_tokens": 12, "do_sample": False}
INT8 = {"cache_implementation": "quantized", "cache_config": {"backend": "int8"}}


def test_rounding_is_that_of_eight_bits_for_each_row() -> None:
    states = torch.randn(2, 3, 5, 8) * torch.logspace(-4, 3, 5)[:, None]
    states[0, 0, 0] = 0
    packed = quantize_rows(states)
    assert packed.dtype == torch.int8
    assert packed.shape == (2, 3, 5, 10)
    step = states.abs().amax(-1, keepdim=True) / 127
    assert ((dequantize_rows(packed) - states).abs() <= 0.51 * step).all()
    assert (dequantize_rows(packed)[0, 0, 0] == 0).all()
    assert dequantize_rows(packed, torch.bfloat16).dtype == torch.bfloat16
    assert dequantize_rows(states) is states
    huge = torch.tensor([[1e30, -1e30, 0.0], [1e-30, 0.0, -1e-30]])
    torch.testing.assert_close(dequantize_rows(quantize_rows(huge)), huge, rtol=0.01, atol=0)


@pytest.mark.parametrize("padding", [0, 23])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["masked_sparse", "sdpa"])
def test_decoding_stays_close_to_that_from_exact_keys(implementation: str, dtype: torch.dtype, padding: int) -> None:
    model = tiny_model().to(dtype)
    model.set_attn_implementation(implementation)
    ids = torch.nn.functional.pad(tokens(), (padding, 0))
    mask = (ids != 0).long()
    results = []
    for cache in (DynamicCache(config=model.config), QuantizedSparseCache(model.config)):
        pieces = []
        for start, end in [(0, 100), (100, 150), *((i, i + 1) for i in range(150, LENGTH + padding))]:
            with torch.no_grad():
                pieces.append(model(ids[:, start:end], attention_mask=mask[:, :end], cache=cache).logits.float())
        results.append(torch.cat(pieces, 1)[:, padding:].softmax(-1))
    torch.testing.assert_close(results[1][:, : 100 - padding], results[0][:, : 100 - padding])  # the first are exact
    dense = tiny_model(layer_types=["full_attention"] * 2).to(dtype)(ids, attention_mask=mask).logits[:, padding:]
    error = (results[1] - results[0]).abs().sum(-1).mean()
    assert 0 < error < 0.02 + 0.05 * (dtype == torch.bfloat16)
    assert error < 0.2 * (dense.float().softmax(-1) - results[0]).abs().sum(-1).mean()


def test_a_step_unpacks_only_what_it_attends_to(count_calls) -> None:
    model, ids = tiny_model(), tokens()
    cache = QuantizedSparseCache(model.config)
    with torch.no_grad():
        model(ids, cache=cache)
        unpacked = count_calls(attention_gathered, "dequantize_rows")
        everything = count_calls(attention, "dequantize_rows")
        model(ids[:, :1], cache=cache)
    budget = sum(SPARSE[name] for name in ("topk_blocks", "local_blocks", "sink_blocks")) * SPARSE["block_size"]
    assert len(unpacked) == 4  # keys and values of two layers
    assert max(states.shape[2] for states in unpacked) <= budget < LENGTH
    assert not everything


def test_it_is_about_half_of_bfloat16() -> None:
    model = tiny_model(head_dim=64, sparse_attention={**SPARSE, "block_size": 64}).to(torch.bfloat16)
    sizes = []
    for cache in (DynamicCache(config=model.config), QuantizedSparseCache(model.config)):
        with torch.no_grad():
            model(tokens(1, 500), cache=cache)
        sizes.append(sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values)))
    assert sizes[1] <= 0.52 * sizes[0]


@pytest.mark.parametrize("kind", ["greedy", "beams", "sampled", "left-padded"])
def test_generation(kind: str) -> None:
    model, ids = tiny_model(), tokens()
    options = {"beams": {"num_beams": 3}, "sampled": {"do_sample": True, "num_return_sequences": 2}}.get(kind, {})
    mask = torch.ones_like(ids)
    if kind == "left-padded":
        ids[0, :50], mask[0, :50] = 0, 0
    outputs = model.generate(
        ids, attention_mask=mask, **{**GREEDY, **options}, **INT8, return_dict_in_generate=True, output_logits=True
    )
    assert type(outputs.cache).__name__ == "QuantizedSparseCache"
    assert outputs.cache.layers[0].keys.dtype == torch.int8
    written = outputs.sequences
    if kind != "beams":
        shown = torch.cat([mask.repeat_interleave(len(written) // 2, 0), torch.ones_like(written[:, LENGTH:])], 1)
        expected = model(written, attention_mask=shown).logits[:, LENGTH - 1 : -1].softmax(-1)
        assert (torch.stack(outputs.logits, 1).softmax(-1) - expected).abs().sum(-1).mean() < 0.05
    assert torch.equal(written[:, :LENGTH], ids.repeat_interleave(len(written) // 2, 0))


def test_rows_are_cropped_repeated_and_selected() -> None:
    model, ids = tiny_model(), tokens()
    cache = QuantizedSparseCache(model.config)
    with torch.no_grad():
        model(ids, cache=cache)
        expected = model(ids[:, :1], cache=cache).logits
        cache.crop(-1)
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([3, 1, 2, 0]))
        cache.batch_select_indices(torch.tensor([3, 0]))
        torch.testing.assert_close(model(ids[:, :1], cache=cache).logits, expected)


def test_gradients_are_refused() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="a quantized cache has no gradient"):
        model(tokens(), cache=QuantizedSparseCache(model.config))


def test_saved_code_has_it(tmp_path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.generate(tokens(), **GREEDY, **INT8), model.generate(tokens(), **GREEDY, **INT8))
    assert {"cache_quantized.py", "int8_rows.py"} <= {path.name for path in tmp_path.iterdir()}
