"""What makes up for quantization: layers that stay as they are, and adapters that start as a correction."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from whisper_hf import Int8CpuConfig
from whisper_hf.__main__ import main
from whisper_hf.quantization import (
    compensate,
    layer_divergences,
    most_sensitive,
    quantize,
    quantized_checkpoint,
    recipe,
    sensitivity,
)
from whisper_hf.quantization.report import divergence

from ..conftest import tiny_model, tokens

SIZES = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 128, "initializer_range": 0.1}
LAYERS = 2 * 7
FRAGILE = "model.layers.1.self_attn.v_proj"  # a weight of each row, whose input is zero, dwarfs the rest


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer) -> Path:
    """A checkpoint with a layer that quantization ruins."""
    model = tiny_model(**SIZES)
    model.model.layers[1].input_layernorm.weight.data[0] = 0.0
    model.get_submodule(FRAGILE).weight.data[:, 0] = 30.0
    folder = tmp_path_factory.mktemp("fragile")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def exact(name: str):
    return recipe(name, torch.float32 if name.startswith("nf4") else None)


def load(folder: Path, name: str | None = None) -> PreTrainedModel:
    options = {} if name is None else {"quantization_config": exact(name)}
    return AutoModelForCausalLM.from_pretrained(folder, **options)


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits[0]


@pytest.mark.parametrize("name", ["int8", "nf4", "int8-cpu"])
def test_divergences_are_those_of_models_with_one_quantized_layer(folder, name: str) -> None:
    model, ids = load(folder), tokens()[:1]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = layer_divergences(model, exact(name), ids)
    assert len(found) == LAYERS
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert max(found, key=found.__getitem__) == FRAGILE
    for chosen in (FRAGILE, "model.layers.0.mlp.up_proj"):
        config = exact(name)
        kept = [other for other in found if other != chosen]
        if name == "int8-cpu":
            config.modules_to_not_convert = kept
        else:
            config.llm_int8_skip_modules = ["lm_head", *kept]
        one = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
        assert found[chosen] == pytest.approx(divergence(logits(model, ids), logits(one, ids)), rel=1e-3, abs=1e-7)


def test_what_a_config_keeps_is_not_measured(folder) -> None:
    config = Int8CpuConfig(modules_to_not_convert=["mlp.down_proj"])
    found = layer_divergences(load(folder), config, tokens()[:1])
    assert len(found) == LAYERS - 2
    with pytest.raises(ValueError, match=r"expected nn\.Linear layers to measure, got none"):
        layer_divergences(load(folder), Int8CpuConfig(modules_to_not_convert=[".*proj"]), tokens()[:1])


def test_layers_are_put_back_when_a_measurement_fails(folder, monkeypatch) -> None:
    model = load(folder)
    calls = iter([torch.zeros(4, 8)])
    monkeypatch.setattr(sensitivity, "logits", lambda *_: next(calls))
    with pytest.raises(StopIteration):
        layer_divergences(model, exact("nf4"), tokens()[:1])
    assert {type(module) for name, module in model.named_modules() if name.endswith("proj")} == {nn.Linear}


def test_most_sensitive_per_weight_within_the_share(folder) -> None:
    model = load(folder)
    sizes = {name: module.weight.numel() for name, module in model.named_modules() if name.endswith("_proj")}
    total = sum(sizes.values())
    divergences = dict.fromkeys(sizes, 0.0)
    large, small = "model.layers.0.mlp.up_proj", "model.layers.0.self_attn.k_proj"
    divergences |= {large: 3.0 * sizes[large], small: 2.0 * sizes[small]}
    assert most_sensitive(model, divergences, 0.0) == []
    assert most_sensitive(model, divergences, sizes[small] / total) == [small]  # the larger one does not fit
    assert most_sensitive(model, divergences, (sizes[large] + sizes[small]) / total) == [large, small]
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="at least 0 and below 1"):
            most_sensitive(model, divergences, share)


@pytest.mark.parametrize("name", ["int8", "nf4-double", "int8-cpu"])
def test_quantize_keeps_the_most_sensitive_layers(folder, tmp_path, name: str) -> None:
    plain = quantize(folder, tmp_path / "plain", name)
    report = quantize(folder, tmp_path / "kept", name, keep=0.1)
    assert next(iter(report["sensitive"])) == FRAGILE
    assert plain["sensitive"] == {}
    weights, added = report["linear_weights"]["weights"], report["linear_weights"]["bytes_after"]
    assert weights == plain["linear_weights"]["weights"]
    model = load(tmp_path / "kept")
    kept = [model.get_submodule(path) for path in report["sensitive"]]
    assert {type(module) for module in kept} == {nn.Linear}
    size = sum(module.weight.numel() for module in kept)
    assert 0.05 * weights < size <= 0.1 * weights
    assert plain["linear_weights"]["bytes_after"] < added < plain["linear_weights"]["bytes_after"] + 4 * size
    assert report["comparison"]["kl_nats_per_token"] < 0.5 * plain["comparison"]["kl_nats_per_token"]
    source = load(folder)
    assert torch.equal(kept[0].weight, source.get_submodule(FRAGILE).weight)


def test_command_line_keeps_layers(folder, tmp_path) -> None:
    main(["quantize", str(folder), str(tmp_path / "kept"), "--recipe", "int8-cpu", "--keep", "0.1"])
    assert FRAGILE in json.loads((tmp_path / "kept" / quantized_checkpoint.REPORT).read_text())["sensitive"]


def adapter_on(folder: Path, name: str = "nf4", **options) -> PeftModel:
    settings = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", **options}
    return get_peft_model(load(folder, name), LoraConfig(**settings)).eval()


def test_compensation_is_the_best_of_its_rank(folder) -> None:
    """Against a definition of its own: for no other adapter of the rank is the mean squared error smaller."""
    original, ids = load(folder), tokens()
    adapter = compensate(adapter_on(folder), original, [ids])
    path = "model.layers.0.mlp.down_proj"
    layer, weight = adapter.get_base_model().get_submodule(path), original.get_submodule(path).weight
    inputs: list[Tensor] = []
    handle = original.get_submodule(path).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    logits(original, ids)
    handle.remove()
    scale = inputs[0].flatten(0, 1).square().mean(0).sqrt()
    with torch.no_grad():
        quantized = layer.get_base_layer()(torch.eye(128)).T  # the weights as the layer has them
        correction = layer.get_delta_weight("default")
        error = (weight - quantized) * scale
        left = error - correction * scale
    values = torch.linalg.svdvals(error)
    assert torch.linalg.matrix_rank(correction) == 16
    assert left.norm() ** 2 == pytest.approx(values[16:].square().sum().item(), rel=1e-3)  # Eckart, Young, Mirsky
    assert left.norm() < 0.9 * error.norm()


@pytest.mark.parametrize("name", ["int8", "nf4"])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"r": 96}], ids=["lora", "rslora", "more than there is"])
def test_compensation_brings_predictions_nearer(folder, name: str, options: dict) -> None:
    original, ids = load(folder), tokens()
    adapter = adapter_on(folder, name, **options)
    before = divergence(logits(original, ids[:1]), logits(adapter, ids[:1]))
    assert compensate(adapter, original, [ids]) is adapter
    after = divergence(logits(original, ids[:1]), logits(adapter, ids[:1]))
    assert after < 0.7 * before


def test_compensation_leaves_layers_that_are_not_quantized(folder) -> None:
    config = exact("nf4")
    config.llm_int8_skip_modules = ["lm_head", FRAGILE]
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    adapter = compensate(get_peft_model(model, LoraConfig(target_modules="all-linear")), load(folder), [tokens()])
    changes = {
        name: bool(module.lora_B["default"].weight.any())
        for name, module in adapter.get_base_model().named_modules()
        if hasattr(module, "lora_B")
    }
    assert changes == {name: name != FRAGILE for name in changes}
    assert len(changes) == LAYERS


def test_compensation_refuses_what_it_would_get_wrong(folder) -> None:
    original, ids = load(folder), [tokens()]
    trained = compensate(adapter_on(folder), original, ids)
    other = tiny_model(**{**SIZES, "intermediate_size": 256})
    plain = get_peft_model(load(folder), LoraConfig(target_modules="all-linear"))
    for adapter, model, words in (
        (trained, original, "expected a new adapter"),
        (original, original, "expected a LoRA adapter of peft, got WhisperLMForCausalLM"),
        (plain, original, "on quantized linear layers, got none"),
        (adapter_on(folder, use_dora=True), original, "without DoRA"),
        (adapter_on(folder), other, r"full-precision linear layer model\.layers\.0\.mlp\.gate_proj of shape"),
        (adapter_on(folder), load(folder, "nf4"), "full-precision linear layer"),
        (adapter_on(folder), original.model, "must be a causal language model"),
    ):
        with pytest.raises(ValueError, match=words):
            compensate(adapter, model, ids)
    with pytest.raises(ValueError, match="calibration must hold"):
        compensate(adapter_on(folder), original, [])
