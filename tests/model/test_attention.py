"""The attention functions: exact in value and gradient, dense where the budget covers, loud where they cannot."""

from functools import partial

import pytest
import torch
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    Gemma2Config,
    GptOssConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from whisper_hf import to_dense
from whisper_hf.model import attention, attention_masks, attention_reference
from whisper_hf.model.attention import masked_sparse_attention_forward
from whisper_hf.model.attention_reference import eager_attention_forward, masked_sparse_attention_reference
from whisper_hf.model.configuration_whisper_lm import SparseAttentionConfig

from ..conftest import LENGTH, SIZES, SPARSE, VOCABULARY, tiny_model, tokens
from ..helpers.attention_cases import attention_inputs

BACKENDS = ["eager", "sdpa", "masked_sparse"]
WHERE_SELECTED = {
    "masked_sparse": (attention, "attention_blockwise"),
    "eager": (attention_reference, "selected_keys"),
    "sdpa": (attention_masks, "selected_keys"),
}


inputs_of = partial(attention_inputs, head_dim=16, queries=LENGTH, keys=LENGTH)


def module_with(settings: dict | None = SPARSE, **attributes: object) -> torch.nn.Module:
    """Return a stand-in for an attention layer of four query and two key-value heads."""
    module = torch.nn.Module()
    module.config = AutoConfig.for_model("qwen3", sparse_attention=settings)
    module.num_key_value_groups = 2
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padded", [False, True])
def test_backend_matches_reference_in_value_and_gradient(backend: str, padded: bool) -> None:
    """Every backend's error against float64 is no worse than three times that of SDPA on the same inputs."""
    inputs = inputs_of()
    shown = torch.ones(2, LENGTH, dtype=torch.bool)
    shown[0, : 29 if padded else 0] = False
    layout = attention_masks.masked_sparse_mask(2, LENGTH, LENGTH, attention_mask=shown)
    settings = SparseAttentionConfig(**SPARSE)
    allowed = attention_masks.explicit_mask(inputs[0], inputs[1], layout, settings)
    upstream = torch.randn(2, LENGTH, 4, 16)

    def run(forward, tensors):
        output = forward(*tensors)
        return [output, *torch.autograd.grad(output, tensors, upstream.to(output.dtype))]

    def oracle(query, key, value):
        return masked_sparse_attention_reference(query, key, value, layout, 0.25, settings)[0].transpose(1, 2)

    def sdpa(query, key, value):
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module_with(), query, key, value, allowed, scaling=0.25)[0]

    def tested(query, key, value):
        if backend == "masked_sparse":
            return masked_sparse_attention_forward(module_with(), query, key, value, layout, scaling=0.25)[0]
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(backend, eager_attention_forward)
        return interface(module_with(), query, key, value, allowed, scaling=0.25)[0]

    exact = run(oracle, [tensor.detach().double().requires_grad_() for tensor in inputs])
    for name, truth, plain, got in zip("oqkv", exact, run(sdpa, inputs), run(tested, inputs), strict=True):
        bound = 3 * (plain.double() - truth).abs().max() + 1e-7
        assert (got.double() - truth).abs().max() <= bound, name
    assert allowed.sum(-1).max() <= 48 < LENGTH


@pytest.mark.parametrize("backend", BACKENDS)
def test_model_gives_the_same_logits_and_gradients_on_every_backend(backend: str) -> None:
    results = {}
    for implementation in ("eager", backend):
        model = tiny_model(attn_implementation=implementation)
        assert model.config._attn_implementation == implementation
        loss = model(tokens(), labels=tokens()).loss
        loss.backward()
        results[implementation] = [loss, *(p.grad for p in model.parameters())]
    torch.testing.assert_close(results[backend], results["eager"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    inputs = inputs_of(dtype=dtype)
    output, _ = masked_sparse_attention_forward(module_with(), *inputs, None, scaling=0.25)
    exact, _ = masked_sparse_attention_forward(module_with(), *(t.double() for t in inputs), None, scaling=0.25)
    assert output.dtype == dtype
    torch.testing.assert_close(output, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_covering_budget_is_plain_sdpa_without_selection(backend: str, count_calls) -> None:
    selections = count_calls(*WHERE_SELECTED[backend])
    sparse = tiny_model(attn_implementation=backend)
    covered = tiny_model(attn_implementation=backend, sparse_attention={"block_size": 16, "topk_blocks": 99})
    dense = tiny_model(attn_implementation=backend, layer_types=["full_attention"] * 2)
    assert torch.equal(covered(tokens()).logits, dense(tokens()).logits)
    assert not selections
    assert (sparse(tokens()).logits - dense(tokens()).logits).abs().max() > 1e-3
    assert len(selections) == 2


def test_rows_without_any_visible_key_are_zero_and_have_no_gradient() -> None:
    inputs = inputs_of()
    shown = torch.zeros(2, LENGTH, dtype=torch.bool)
    shown[1] = True
    layout = attention_masks.masked_sparse_mask(2, LENGTH, LENGTH, attention_mask=shown)
    for settings in (SPARSE, {"topk_blocks": 99}):
        output, _ = masked_sparse_attention_forward(module_with(settings), *inputs, layout, scaling=0.25)
        gradients = torch.autograd.grad(output.sum(), inputs)
        assert not output[0].any()
        assert all(gradient.isfinite().all() and not gradient[0].any() for gradient in gradients)
        assert output[1].abs().min() > 0


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e3, 1e18])
def test_adversarial_magnitudes_stay_finite(scale: float) -> None:
    query, key, value = (tensor.detach() for tensor in inputs_of())
    key[:, :, 20] *= 120
    output, _ = masked_sparse_attention_forward(module_with(), query * scale, key, value, None, scaling=0.25)
    assert output.isfinite().all()


def test_float_and_bool_four_dimensional_masks_go_through_the_reference() -> None:
    model, ids = tiny_model(), tokens()
    attention_mask = torch.ones_like(ids)
    attention_mask[0, :31] = 0
    position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    expected = model(ids, attention_mask=attention_mask, position_ids=position_ids).logits
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril() & attention_mask[:, None, None].bool()
    additive = torch.zeros(causal.shape).masked_fill(~causal, torch.finfo(torch.float32).min)
    for mask in (causal, additive, additive.clamp(min=-1e9)):
        for backend in BACKENDS:
            model.set_attn_implementation(backend)
            logits = model(ids, attention_mask=mask, position_ids=position_ids).logits
            torch.testing.assert_close(logits[0, 31:], expected[0, 31:], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(logits[1], expected[1], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="no position bias"):
        model(ids, attention_mask=additive - 0.5 * causal)
    with pytest.raises(ValueError, match="bool or additive"):
        model(ids, attention_mask=causal.long())
    with pytest.raises(ValueError, match=r"\[batch, keys\]"):
        model(ids, attention_mask=attention_mask[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_output_attentions_are_the_weights_used(backend: str) -> None:
    model = tiny_model(attn_implementation=backend)
    plain = model(tokens()).logits
    outputs = model(tokens(), output_attentions=True)
    if backend == "sdpa":  # transformers' own function has no weights to give
        assert outputs.attentions == ()
        return
    torch.testing.assert_close(outputs.logits, plain)
    assert [weights.shape for weights in outputs.attentions] == [(2, 4, LENGTH, LENGTH)] * 2
    torch.testing.assert_close(outputs.attentions[0].sum(-1), torch.ones(2, 4, LENGTH))
    assert (outputs.attentions[0] > 0).sum(-1).max() <= 48


# --- on other causal language models ---------------------------------------------------------------------------------


def foreign_model(**overrides: object) -> torch.nn.Module:
    """Return a tiny Qwen3 with wide random weights."""
    config = Qwen3Config(**SIZES, head_dim=8, **overrides)
    return AutoModelForCausalLM.from_config(config).eval()


def test_foreign_model_runs_sparse_and_reads_the_same_settings(tmp_path, count_calls) -> None:
    foreign_model().save_pretrained(tmp_path)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path)
    sparse = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="masked_sparse")
    torch.testing.assert_close(sparse(tokens()).logits, dense(tokens()).logits)  # 1,600 tokens by default
    selections = count_calls(attention, "attention_blockwise")
    sparse.config.sparse_attention = SPARSE
    expected = sparse(tokens()).logits
    assert len(selections) == 2
    assert (expected - dense(tokens()).logits).abs().max() > 1e-3

    padding = torch.zeros(2, 21, dtype=torch.long)
    attention_mask = torch.cat([padding, torch.ones_like(tokens())], 1)
    padded = sparse(torch.cat([padding, tokens()], 1), attention_mask=attention_mask).logits
    sparse.config.sparse_attention = {"unknown": 1}
    with pytest.raises(ValueError, match="unknown"):
        sparse(tokens())
    sparse.config.sparse_attention = SPARSE
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    padded = sparse(torch.cat([padding, tokens()], 1), attention_mask=attention_mask, position_ids=positions).logits
    torch.testing.assert_close(padded[:, 21:], expected, rtol=1e-4, atol=1e-5)
    packed = sparse(tokens().reshape(1, -1), position_ids=torch.arange(LENGTH).repeat(2)[None], use_cache=False).logits
    torch.testing.assert_close(packed.view_as(expected), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt", "gemma3_text", "phi3", "cohere2", "olmo2", "qwen3_moe"])
def test_many_families_run_sparse(family: str, count_calls) -> None:
    config = AutoConfig.for_model(family)
    sizes = {
        **{"vocab_size": VOCABULARY, "hidden_size": 32, "n_embd": 32, "word_embed_proj_dim": 32, "head_dim": 8},
        **{"num_hidden_layers": 2, "n_layer": 2, "num_attention_heads": 4, "n_head": 4, "num_key_value_heads": 2},
        **{
            "intermediate_size": 48,
            "ffn_dim": 48,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 16,
        },
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2},
    }
    for name, value in sizes.items():
        if hasattr(config, name):
            setattr(config, name, value)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = (
            ["sliding_attention", "full_attention"] if "sliding_attention" in config.layer_types else None
        )
    model = AutoModelForCausalLM.from_config(config).eval()
    attention_mask = torch.ones_like(tokens())
    attention_mask[0, :21] = 0
    expected = model(tokens(), attention_mask=attention_mask).logits
    model.set_attn_implementation("masked_sparse")
    covered = model(tokens(), attention_mask=attention_mask).logits
    torch.testing.assert_close(covered[0, 21:], expected[0, 21:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(covered[1], expected[1], rtol=1e-4, atol=1e-4)
    selections = count_calls(attention, "attention_blockwise")
    model.config.sparse_attention = SPARSE
    sparse = model(tokens(), attention_mask=attention_mask).logits
    assert len(selections) == (1 if getattr(config, "layer_types", None) else 2)
    torch.testing.assert_close(sparse[1, :48], expected[1, :48], rtol=1e-4, atol=1e-4)
    assert (sparse[1, 48:] - expected[1, 48:]).abs().max() > 1e-4


@pytest.mark.parametrize("family", ["bloom", "mpt"])
def test_model_with_an_attention_of_its_own_is_refused(family: str) -> None:
    config = AutoConfig.for_model(family, vocab_size=VOCABULARY, hidden_size=32, n_embd=32, n_layer=1, n_head=4)
    config.rotary_dim = 8
    model = AutoModelForCausalLM.from_config(config, attn_implementation="masked_sparse")
    with pytest.raises(ValueError, match=r"attention interface.*eager"):
        model(tokens())


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_foreign_model_generates_sparsely(cache: str) -> None:
    model = foreign_model()
    model.set_attn_implementation("masked_sparse")
    model.config.sparse_attention = SPARSE
    generated = model.generate(tokens(), max_new_tokens=8, do_sample=False, cache_implementation=cache)
    for length in range(LENGTH, LENGTH + 8):
        expected = model(generated[:, :length]).logits[:, -1].argmax(-1)
        assert torch.equal(generated[:, length], expected)


def test_sliding_layers_get_exactly_their_window(count_calls) -> None:
    options = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 0}
    model = foreign_model(**options)
    attention_mask = torch.ones_like(tokens())
    attention_mask[0, :40] = 0
    expected = model(tokens(), attention_mask=attention_mask).logits
    selections = count_calls(attention, "sparse_attention")
    model.set_attn_implementation("masked_sparse")
    model.config.sparse_attention = SPARSE
    logits = model(tokens(), attention_mask=attention_mask).logits
    torch.testing.assert_close(logits[0, 40:], expected[0, 40:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits[1], expected[1], rtol=1e-4, atol=1e-5)
    assert not selections
    kwargs = {"max_new_tokens": 8, "do_sample": False}
    sparse = model.generate(tokens(), attention_mask=attention_mask, **kwargs)
    model.set_attn_implementation("sdpa")
    assert torch.equal(sparse, model.generate(tokens(), attention_mask=attention_mask, **kwargs))


def test_what_cannot_be_honoured_is_refused_with_the_remedy() -> None:
    sizes = {**SIZES, "attn_implementation": "masked_sparse"}
    softcapped = AutoModelForCausalLM.from_config(Gemma2Config(**sizes, head_dim=8))
    with pytest.raises(ValueError, match=r"softcapping.*eager"):
        softcapped(tokens())
    sinks = AutoModelForCausalLM.from_config(GptOssConfig(**sizes, head_dim=8, num_local_experts=2))
    with pytest.raises(ValueError, match=r"sinks.*eager"):
        sinks(tokens())
    bert = BertModel(BertConfig(**{k: v for k, v in sizes.items() if k != "num_key_value_heads"}))
    with pytest.raises(ValueError, match=r"causal.*sdpa"):
        bert(tokens())
    dropout = tiny_model(attention_dropout=0.1).train()
    with pytest.raises(ValueError, match=r"dropout=0.1.*attention_dropout = 0.0"):
        dropout(tokens())
    for backend in BACKENDS:
        with pytest.raises(ValueError, match=r"is_causal=False"):
            tiny_model(attn_implementation=backend)(tokens(), is_causal=False)


def test_eager_and_sdpa_apply_attention_dropout_in_training() -> None:
    for backend in ("eager", "sdpa"):
        model = tiny_model(attention_dropout=0.5, attn_implementation=backend)
        evaluated = model(tokens()).logits
        assert torch.equal(model(tokens()).logits, evaluated)
        assert not torch.equal(model.train()(tokens()).logits, evaluated)


@pytest.mark.parametrize("layer_type", ["masked_sparse_attention", "full_attention"])
@pytest.mark.parametrize("name", ["vllm", "flash_attention_2", "flex_attention", "paged|eager", "nonsense"])
def test_dense_implementations_are_refused(name: str, layer_type: str) -> None:
    with pytest.raises(ValueError, match=r"not supported.*masked_sparse.*whisper_hf\.to_dense\(model\)"):
        tiny_model(layer_types=[layer_type] * 2, attn_implementation=name)


def test_vllm_is_told_to_convert(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It registers a dense attention under its name, and asks for that in the config of a checkpoint."""
    monkeypatch.setitem(AttentionInterface._global_mapping, "vllm", eager_attention_forward)
    tiny_model().save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config._attn_implementation = "vllm"
    remedy = r"whisper_hf\.to_dense\(model\)"
    for positions in (config.max_position_embeddings, 48):  # also where no text is longer than the budget
        config.max_position_embeddings = positions
        with pytest.raises(ValueError, match=remedy):
            AutoModel.from_config(config)
    with pytest.raises(ValueError, match=remedy):
        tiny_model().set_attn_implementation("vllm")
    with pytest.raises(ValueError, match=remedy):
        tiny_model(layer_types=["full_attention", "masked_sparse_attention"], attn_implementation="vllm")
    assert type(to_dense(tiny_model())) is Qwen3ForCausalLM  # vLLM has its own implementation of this class
