"""What a causal language model inside transformers offers, ours offers too."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DynamicCache,
)
from transformers.loss.loss_utils import ForCausalLMLoss

from whisper_hf import WhisperLMConfig, WhisperLMForCausalLM, WhisperLMModel

from ..conftest import LENGTH, VOCABULARY, tiny_config, tiny_model, tokens


def test_masked_sparse_is_the_default_and_a_reload_stays_sparse(tmp_path, model, input_ids) -> None:
    assert model.config._attn_implementation == "masked_sparse"
    model.save_pretrained(tmp_path)
    for implementation in (None, "sdpa", "eager"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=implementation)
        assert type(loaded) is WhisperLMForCausalLM
        torch.testing.assert_close(loaded(input_ids).logits, model(input_ids).logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(input_ids).logits, model(input_ids).logits)


def test_auto_classes_and_heads(tmp_path, input_ids) -> None:
    config = tiny_config(num_labels=3)
    assert type(AutoModel.from_config(config)) is WhisperLMModel
    for auto_class, shape in (
        (AutoModelForSequenceClassification, (2, 3)),
        (AutoModelForTokenClassification, (2, LENGTH, 3)),
    ):
        model = auto_class.from_config(config).eval()
        labels = torch.zeros(shape[:-1], dtype=torch.long)
        outputs = model(input_ids, labels=labels)
        assert outputs.logits.shape == shape
        outputs.loss.backward()
        model.save_pretrained(tmp_path)
        assert torch.equal(auto_class.from_pretrained(tmp_path)(input_ids).logits, outputs.logits)


def test_gradient_checkpointing_changes_no_gradient(input_ids) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(input_ids, labels=input_ids, use_cache=False).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_logits_to_keep(model, input_ids) -> None:
    logits, last = model(input_ids).logits, model(input_ids, logits_to_keep=1).logits
    # to the bit what the head makes of that row; of one among others a CPU may make a last bit more or less
    assert torch.equal(last, model.lm_head(model.model(input_ids).last_hidden_state[:, -1:]))
    torch.testing.assert_close(last, logits[:, -1:])
    chosen = torch.tensor([3, 77, 150])
    torch.testing.assert_close(model(input_ids, logits_to_keep=chosen).logits, logits[:, chosen])


def test_inputs_embeds_match_input_ids(model, input_ids) -> None:
    embeds = model.get_input_embeddings()(input_ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(input_ids).logits)
    for inputs in ({}, {"input_ids": input_ids, "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(**inputs)


def test_hidden_states_and_cache_are_returned_on_request(model, input_ids) -> None:
    outputs = model(input_ids, output_hidden_states=True, use_cache=True)
    assert [states.shape for states in outputs.hidden_states] == [(2, LENGTH, 32)] * 3
    assert isinstance(outputs.cache, DynamicCache)
    assert model(input_ids, use_cache=False).cache is None
    assert isinstance(model(input_ids, return_dict=False), tuple)


def test_loss_is_that_of_transformers_with_its_keywords(model, input_ids) -> None:
    logits = model(input_ids).logits
    labels = input_ids.clone()
    labels[0, :50] = -100
    assert torch.equal(model(input_ids, labels=labels).loss, ForCausalLMLoss(logits, labels, VOCABULARY))
    counted = model(input_ids, labels=labels, num_items_in_batch=torch.tensor(1000)).loss
    assert torch.equal(counted, ForCausalLMLoss(logits, labels, VOCABULARY, num_items_in_batch=torch.tensor(1000)))
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    given = model(input_ids, labels=labels, shift_labels=shifted).loss
    torch.testing.assert_close(given, model(input_ids, labels=labels).loss)


@pytest.mark.parametrize(
    "rope_parameters",
    [
        {"rope_type": "default", "rope_theta": 5e5},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
        {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64},
        {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 4,
            "long_factor": [2.0] * 4,
            "original_max_position_embeddings": 64,
            "factor": 8.0,
        },
    ],
    ids=lambda parameters: parameters["rope_type"],
)
def test_every_rope_type_matches_llama(rope_parameters: dict, input_ids) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from whisper_hf import from_dense

    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = LlamaConfig(
        **sizes,
        num_hidden_layers=1,
        rope_parameters=rope_parameters,
        initializer_range=0.2,
        max_position_embeddings=512,
    )
    dense = LlamaForCausalLM(config).eval()
    assert torch.equal(from_dense(dense)(input_ids).logits, dense(input_ids).logits)


def test_tied_embeddings_and_biases(tmp_path, input_ids) -> None:
    switches = {"attention_bias": True, "attention_out_bias": False, "mlp_bias": True, "use_qk_norm": False}
    model = tiny_model(tie_word_embeddings=True, **switches)
    names = {name for name, _ in model.named_parameters()}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {"model.layers.0.self_attn.q_proj.bias", "model.layers.0.mlp.down_proj.bias"} <= names
    assert not any("o_proj.bias" in name or ("_norm.weight" in name and "self_attn" in name) for name in names)
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(input_ids).logits, model(input_ids).logits)


def test_meta_device_initialisation_and_materialisation(tmp_path, model, input_ids) -> None:
    with torch.device("meta"):
        empty = WhisperLMForCausalLM(tiny_config())
    assert all(parameter.is_meta for parameter in empty.parameters())
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = WhisperLMForCausalLM.from_pretrained(tmp_path, device_map="cpu", dtype=torch.float32)
    assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)


@pytest.mark.parametrize("backend", ["eager", "sdpa", "masked_sparse"])
def test_shapes_can_be_had_on_the_meta_device(backend: str) -> None:
    with torch.device("meta"):
        empty = WhisperLMForCausalLM(tiny_config(attn_implementation=backend))
    assert empty(tokens().to("meta")).logits.shape == (2, LENGTH, VOCABULARY)


def test_parallel_plans_name_modules_that_exist(model) -> None:
    names = {name for name, _ in model.named_modules()}
    for pattern in model.tp_plan:
        assert pattern.replace("*", "0") in names, pattern
    for pattern in model.pp_plan:
        assert pattern in names | {f"model.{pattern}"}, pattern
    assert {"embed_tokens", "layers", "norm"} == set(WhisperLMConfig.base_model_pp_plan)
    for name, module in model.model.named_modules():
        styles = [style for pattern, style in model.model.tp_plan.items() if re.match(pattern, name)]
        if isinstance(module, torch.nn.Linear):
            assert len(styles) == 1, name
            assert styles[0] in ("colwise", "rowwise"), name


def test_a_checkpoint_and_its_layers_say_what_other_software_asks(tmp_path, model) -> None:
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert {"AutoConfig", "AutoModel", "AutoModelForCausalLM"} <= set(saved["auto_map"])
    assert saved["architectures"] == ["WhisperLMForCausalLM"]
    assert model.is_backend_compatible()
    assert model.supports_pp_plan
    assert model.base_model_prefix == "model"
    weights = {name.removeprefix("model.") for name in load_file(tmp_path / "model.safetensors")} - {"lm_head.weight"}
    assert weights == set(model.model.state_dict())
    attention = model.model.layers[1].self_attn
    assert attention.layer_idx == 1
    assert attention.is_causal
    assert isinstance(attention.scaling, float)


@pytest.mark.parametrize("backend", ["eager", "sdpa", "masked_sparse"])
def test_compile_full_graph(backend: str, input_ids) -> None:
    model = tiny_model(attn_implementation=backend, num_hidden_layers=1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    mask = torch.ones_like(input_ids)
    mask[0, :19] = 0
    for attention_mask in (None, mask):
        expected = model(input_ids, attention_mask=attention_mask, labels=input_ids)
        got = compiled(input_ids, attention_mask=attention_mask, labels=input_ids)
        torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-5)
        got.loss.backward()
    torch._dynamo.reset()


def test_compile_static_cache_decode() -> None:
    model = tiny_model(num_hidden_layers=1)
    options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static", "eos_token_id": None}
    expected = model.generate(tokens(), **options)
    model.forward = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    assert torch.equal(model.generate(tokens(), **options), expected)
    torch._dynamo.reset()


def test_export(model, input_ids) -> None:
    exported = torch.export.export(model, (input_ids,), {"use_cache": False}, strict=False)
    got = exported.module()(input_ids, use_cache=False).logits
    torch.testing.assert_close(got, model(input_ids).logits, rtol=1e-4, atol=1e-5)
