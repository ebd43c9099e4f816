"""What must hold for every backend, each with sequences several times longer than the budget."""

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, QuantizedCache, StaticCache

from whisper_hf import WhisperLMForCausalLM, from_dense

from ..conftest import LENGTH, SIZES, SPARSE, VOCABULARY, tiny_config, tiny_model, tokens

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
MIXED = ["full_attention", "masked_sparse_attention"]


@pytest.fixture(params=["eager", "sdpa", "masked_sparse"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each attention implementation."""
    return request.param


@pytest.fixture
def model(backend: str) -> WhisperLMForCausalLM:
    """A tiny sparse model on that backend, without graph."""
    return tiny_model(attn_implementation=backend).requires_grad_(False)


def pad(ids: torch.Tensor, left: int, right: int) -> dict[str, torch.Tensor]:
    """Return model inputs with padding around `ids` `[B, T]`."""
    attention_mask = torch.nn.functional.pad(torch.ones_like(ids), (left, right))
    position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    padded = torch.nn.functional.pad(ids, (left, right))
    return {"input_ids": padded, "attention_mask": attention_mask, "position_ids": position_ids}


# --- 2. causal -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("changed", [5, 70, 159])
def test_causal(model: WhisperLMForCausalLM, changed: int, dtype: torch.dtype) -> None:
    model, before = model.to(dtype), tokens()
    after = before.clone()
    after[:, changed] = (before[:, changed] + 1) % VOCABULARY
    first, second = model(before).logits, model(after).logits
    assert torch.equal(first[:, :changed], second[:, :changed])
    assert not torch.equal(first[:, changed], second[:, changed])


def test_causal_gradient(model: WhisperLMForCausalLM) -> None:
    embeds = model.get_input_embeddings()(tokens()).requires_grad_()
    gradient = torch.autograd.grad(model(inputs_embeds=embeds).logits[:, 100].sum(), embeds)[0]
    assert not gradient[:, 101:].any()
    assert gradient[:, 100].any()


# --- 3. dense limit --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dense_limit(backend: str, dtype: torch.dtype) -> None:
    config = LlamaConfig(**SIZES, attn_implementation="sdpa" if backend == "masked_sparse" else backend)
    dense = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    covered = from_dense(dense, {"block_size": 16, "topk_blocks": 8, "local_blocks": 1, "sink_blocks": 1})
    covered.set_attn_implementation(backend)
    assert covered.config.sparse_attention.budget_blocks * 16 == LENGTH
    expected = dense(tokens()).logits
    if backend == "eager":  # theirs rounds the attention weights to float32 or to the inputs' dtype: no worse than that
        got = covered(tokens()).logits
        dense.set_attn_implementation("sdpa")
        truth = dense.double()(tokens()).logits
        assert (got - truth).abs().mean() <= 1.05 * (expected - truth).abs().mean() + 1e-7
    else:
        assert torch.equal(covered(tokens()).logits, expected)
    covered.config.sparse_attention = {"block_size": 16, "topk_blocks": 2, "local_blocks": 1}
    assert (covered(tokens()).logits - expected).abs().max() > 1e-2


def test_selection_of_every_block_equals_dense(backend: str) -> None:
    """One block short of covering: the last token leaves out a block, every earlier one sees all of its past."""
    settings = {"block_size": 16, "topk_blocks": 7, "local_blocks": 1, "sink_blocks": 1}
    sparse = tiny_model(attn_implementation=backend, sparse_attention=settings)
    dense = tiny_model(attn_implementation=backend, layer_types=["full_attention"] * 2)
    first, second = sparse(tokens()).logits, dense(tokens()).logits
    torch.testing.assert_close(first[:, :144], second[:, :144], **CLOSE)
    assert (first[:, 144:] - second[:, 144:]).abs().max() > 1e-4


# --- 4. padding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("left", "right"), [(0, 0), (21, 0), (0, 21), (16, 7), (100, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_padding(model: WhisperLMForCausalLM, left: int, right: int, dtype: torch.dtype) -> None:
    model = model.to(dtype)
    padded = model(**pad(tokens(), left, right)).logits[:, left : left + LENGTH]
    torch.testing.assert_close(padded, model(tokens()).logits, **CLOSE)


def test_packed_documents(model: WhisperLMForCausalLM) -> None:
    lengths = [130, 1, 77, 112]
    documents = [tokens(1, length) for length in lengths]
    position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
    for use_cache in (False, True):
        packed = model(torch.cat(documents, 1), position_ids=position_ids, use_cache=use_cache).logits
        separate = torch.cat([model(document).logits for document in documents], 1)
        torch.testing.assert_close(packed, separate, **CLOSE)


def test_holes_are_as_if_the_tokens_were_not_there(model: WhisperLMForCausalLM) -> None:
    shown = torch.rand(1, LENGTH) > 0.3
    content = tokens(1)[shown][None]
    position_ids = (shown.long().cumsum(-1) - 1).clamp(min=0)
    holed = model(tokens(1), attention_mask=shown.long(), position_ids=position_ids).logits
    assert content.shape[1] > 2 * 48
    torch.testing.assert_close(holed[shown][None], model(content).logits, **CLOSE)


def test_a_mask_of_ones_changes_nothing(model: WhisperLMForCausalLM) -> None:
    assert torch.equal(model(tokens(), attention_mask=torch.ones_like(tokens())).logits, model(tokens()).logits)


# --- 5. cache --------------------------------------------------------------------------------------------------------


def make_cache(kind: str, config, length: int = LENGTH + 8):
    """Build a cache: dynamic or static from the config, or the user's own without one."""
    if kind == "plain":
        return DynamicCache()
    return StaticCache(config, max_cache_len=length) if kind == "static" else DynamicCache(config=config)


@pytest.mark.parametrize("kind", ["plain", "dynamic", "static"])
@pytest.mark.parametrize(
    "chunks", [[1] * LENGTH, [LENGTH - 1, 1], [50, 30, 79, 1]], ids=["tokens", "prefill", "chunks"]
)
@pytest.mark.parametrize("left", [0, 21])
@pytest.mark.parametrize("layer_types", [None, MIXED], ids=["sparse", "mixed"])
def test_cached_equals_full(backend: str, kind: str, chunks: list[int], left: int, layer_types) -> None:
    model = tiny_model(attn_implementation=backend, layer_types=layer_types).requires_grad_(False)
    inputs = pad(tokens(), left, 0)
    expected = model(**inputs).logits[:, left:]
    cache, outputs, end = make_cache(kind, model.config, LENGTH + left + 8), [], 0
    for size in [left + chunks[0], *chunks[1:]] if left else chunks:
        start, end = end, end + size
        attention_mask = inputs["attention_mask"][:, :end] if left else None
        piece = {key: inputs[key][:, start:end] for key in ("input_ids", "position_ids")}
        outputs.append(model(**piece, attention_mask=attention_mask, cache=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(outputs, 1)[:, left:], expected, **CLOSE)


def test_crop_reorder_repeat_and_select(model: WhisperLMForCausalLM) -> None:
    cache = DynamicCache(config=model.config)
    model(tokens(), cache=cache)
    cache.crop(-40)
    assert cache.get_seq_length() == LENGTH - 40
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3]))
    continuation = tokens()[:, -40:].flip(0)
    expected = model(tokens().flip(0)).logits[:, -40:]
    torch.testing.assert_close(model(continuation, cache=cache).logits, expected, **CLOSE)
    cache.reset()
    torch.testing.assert_close(model(tokens(), cache=cache).logits, model(tokens()).logits, **CLOSE)


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let offloading run without an accelerator, whose streams it uses to hide the copies."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch, "Stream", _NoStream)
        monkeypatch.setattr(torch.cuda, "default_stream", lambda _: _NoStream())


@pytest.mark.usefixtures("streams")
def test_offloaded_cache(model: WhisperLMForCausalLM) -> None:
    cache = DynamicCache(config=model.config, offloading=True)
    pieces = [model(tokens()[:, i : i + 40], cache=cache).logits for i in range(0, LENGTH, 40)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(tokens()).logits, **CLOSE)
    generated = model.generate(tokens(), max_new_tokens=4, do_sample=False, cache_implementation="offloaded")
    assert torch.equal(generated, model.generate(tokens(), max_new_tokens=4, do_sample=False))


class _NoStream:
    def __enter__(self) -> "_NoStream":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def wait_stream(self, _: object) -> None:
        pass


def test_quantized_cache_stays_close(model: WhisperLMForCausalLM) -> None:
    dense_view = tiny_config(layer_types=["full_attention"] * 2)
    cache = QuantizedCache("fp8", dense_view)
    model(tokens()[:, :-20], cache=cache)
    pieces = [model(tokens()[:, i : i + 1], cache=cache).logits for i in range(LENGTH - 20, LENGTH)]
    got, expected = torch.cat(pieces, 1).softmax(-1), model(tokens()).logits[:, -20:].softmax(-1)
    assert (got - expected).abs().sum(-1).mean() < 0.1
    dense = tiny_model(layer_types=["full_attention"] * 2)(tokens()).logits[:, -20:].softmax(-1)
    assert (got - expected).abs().sum() < 0.5 * (got - dense).abs().sum()  # far closer to sparse than to dense


# --- 6. deterministic ------------------------------------------------------------------------------------------------


def test_deterministic_and_independent_of_the_batch(model: WhisperLMForCausalLM) -> None:
    first = model(tokens()).logits
    assert torch.equal(model(tokens()).logits, first)
    alone = torch.cat([model(row[None]).logits for row in tokens()])
    torch.testing.assert_close(alone, first, **CLOSE)
    torch.testing.assert_close(model(tokens().flip(0)).logits.flip(0), first, **CLOSE)


def test_budget_is_really_below_the_length() -> None:
    assert 3 * SPARSE["block_size"] * 3 < LENGTH
