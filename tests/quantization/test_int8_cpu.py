import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    StaticCache,
    Trainer,
)

from whisper_hf.quantization import Int8CpuConfig, int8_cpu, int8_linear
from whisper_hf.quantization.int8_linear import Int8Linear, quantize_weight

from ..conftest import LENGTH, SIZES, SPARSE, tiny_model, tokens
from ..helpers.warm_processes import run_script

pytestmark = pytest.mark.skipif(
    int8_linear.ENGINE not in torch.backends.quantized.supported_engines, reason="this torch has no fbgemm"
)
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "whisper_lm": tiny_model,
    "whisper_lm-tied": lambda: tiny_model(tie_word_embeddings=True),
    "whisper_lm-biases": lambda: tiny_model(attention_bias=True, mlp_bias=True),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, pad_token_id=0)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, pad_token_id=0)),
}


def reference(layer: Int8Linear, inputs: Tensor) -> Tensor:
    """What the layer stands for, `[..., I] -> [..., O]`: its weights in full precision and unrounded activations."""
    bias = None if layer.bias is None else layer.bias.double()
    return nn.functional.linear(inputs.double(), layer.dequantized_weight(torch.float64), bias)


def linear(inputs: int = 96, outputs: int = 40, bits: int = 16, bias: bool = True) -> Int8Linear:
    return Int8Linear.from_linear(nn.Linear(inputs, outputs, bias=bias), bits)


@pytest.fixture
def save(tmp_path: Path) -> Callable[[PreTrainedModel], Path]:
    def to_folder(model: PreTrainedModel) -> Path:
        for parameter in model.parameters():
            parameter.data.normal_(std=0.2) if parameter.ndim == 1 else None  # biases and norms that matter
        model.save_pretrained(tmp_path / "full")
        return tmp_path / "full"

    return to_folder


@pytest.fixture
def source(save: Callable[[PreTrainedModel], Path]) -> Path:
    """A checkpoint of a tiny sparse model."""
    return save(tiny_model())


@pytest.fixture
def covered(save: Callable[[PreTrainedModel], Path]) -> Path:
    """A checkpoint of the same model with a budget for all tokens, so that no rounding changes which are chosen."""
    return save(tiny_model(sparse_attention={**SPARSE, "topk_blocks": LENGTH}))


def load(source: Path, **options: object) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(source, quantization_config=Int8CpuConfig(**options))


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(input_ids=tokens(), use_cache=False).logits


def test_weights_are_rounded_by_channel() -> None:
    weight = torch.randn(5, 7) * torch.tensor([1e-3, 1.0, 1e3, 0.0, 1.0])[:, None]
    integers, scale = quantize_weight(weight)
    assert integers.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert integers.abs().amax(1).tolist() == [127, 127, 127, 0, 127]
    assert ((integers * scale[:, None] - weight).abs() <= scale[:, None] * 0.5001).all()
    with pytest.raises(ValueError, match=r"must be finite, got NaN or infinity in a matrix of shape \(5, 7\)"):
        quantize_weight(weight / 0)


def largest_digit() -> int:
    return 127 if int8_linear._saturates() else 255


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("rows", [1, 3, 200])
@pytest.mark.parametrize("narrow", [False, True])
def test_error_is_bounded_by_the_rounding_of_activations(
    bits: int, rows: int, narrow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if narrow:
        monkeypatch.setattr(int8_linear, "_saturates", lambda: True)
    layer = linear(bits=bits)
    inputs = torch.randn(rows, 96) * torch.logspace(-3, 3, rows)[:, None] + 0.3
    difference = (layer(inputs) - reference(layer, inputs)).abs()
    levels = largest_digit() ** (bits // 8)
    step = (inputs.amax(1) - inputs.amin(1).clamp_max(0)).clamp_min(0)[:, None] / levels
    # half a step, a whole one where the ends of a row are clamped to the grid on which zero lies, and float32
    bound = step * layer.dequantized_weight().abs().sum(1) * (1.0 if bits == 8 else 0.51)
    assert (difference <= bound + 1e-6 * (1 + inputs.abs().amax(1, keepdim=True))).all()
    assert difference.max() > 0


@pytest.mark.parametrize("bits", [8, 16])
def test_product_matches_integer_arithmetic(bits: int) -> None:
    layer = linear(bits=bits, bias=False)
    digits = torch.randint(0, largest_digit() + 1, (7, 96))
    digits[:, 0], digits[:, 1] = 0, largest_digit()
    # zero has the digit 100, the step is 1/8: exact in float32, and rests of a second digit are 0
    product = layer((digits - 100) / 8)
    exact = (digits - 100) @ layer.int8_weight().long().T
    expected = exact.double() / 8 * layer.weight_scale.double()
    torch.testing.assert_close(product.double(), expected, rtol=1e-5, atol=1e-4)


def test_single_row_matches_torch_dynamic_quantization() -> None:
    layer, inputs = linear(bits=8, bias=False), torch.randn(1, 96)
    rounded = torch.quantize_per_tensor_dynamic(inputs, torch.quint8, int8_linear._saturates())
    exact = (rounded.int_repr().long() - rounded.q_zero_point()) @ layer.int8_weight().long().T
    expected = (exact * rounded.q_scale()).float() * layer.weight_scale
    torch.testing.assert_close(layer(inputs), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [8, 16])
def test_rows_do_not_depend_on_one_another(bits: int) -> None:
    layer, inputs = linear(bits=bits), torch.randn(150, 96)
    inputs[5] *= 1e4
    product = layer(inputs)
    assert torch.equal(layer(inputs[3:9]), product[3:9])
    if bits == 16:
        assert torch.equal(layer(inputs[7:8]), product[7:8])
    torch.testing.assert_close(layer(inputs[7:8]), product[7:8], rtol=0, atol=0.05)


@pytest.mark.parametrize("bits", [8, 16])
def test_constant_and_missing_rows(bits: int) -> None:
    layer = linear(bits=bits)
    for value in (0.0, 3.0, -3.0):
        inputs = torch.full((2, 96), value)
        torch.testing.assert_close(layer(inputs), reference(layer, inputs).float(), rtol=1e-4, atol=1e-4)
    assert layer(torch.zeros(2, 0, 96)).shape == (2, 0, 40)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_input_dtypes(dtype: torch.dtype) -> None:
    layer, inputs = linear(), torch.randn(2, 5, 96)
    product = layer(inputs.to(dtype))
    assert product.dtype == dtype
    assert product.shape == (2, 5, 40)
    coarse = {"rtol": 1.6e-2, "atol": 2.5e-4} if int8_linear._saturates() else {}  # two digits of 7 bits, not of 8
    torch.testing.assert_close(product, reference(layer, inputs.to(dtype)).to(dtype), **coarse)
    assert torch.equal(layer(inputs.transpose(0, 1)), layer(inputs).transpose(0, 1))


@pytest.mark.parametrize("bits", [8, 16])
def test_large_digits_do_not_saturate(bits: int) -> None:
    layer = linear(64, 32, bits=bits, bias=False)
    layer.weight = nn.Parameter(torch.full((32, 64), 127, dtype=torch.int8), requires_grad=False)
    inputs = torch.full((2, 64), 255.0)
    inputs[:, 0] = 0
    torch.testing.assert_close(layer(inputs), reference(layer, inputs).float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_bad_rows_spoil_no_others(bits: int, bad: float) -> None:
    layer, inputs = linear(bits=bits), torch.randn(4, 96)
    good = layer(inputs)
    inputs[2, 5] = bad
    product = layer(inputs)
    assert torch.equal(product[[0, 1, 3]], good[[0, 1, 3]])
    assert not product[2].isfinite().any()
    assert not layer(inputs[2:3]).isfinite().any()


def test_memory_holds_weights_once() -> None:
    layer = linear(512, 256, bias=False)
    integers = layer.weight.clone()
    layer(torch.randn(1, 512))
    assert layer.weight.is_meta
    assert torch.equal(layer.int8_weight(), integers)
    assert torch.equal(layer.state_dict()["weight"], integers)
    assert sum(tensor.nbytes for tensor in layer.state_dict().values()) <= 0.27 * 4 * integers.numel()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), nn.Module.cpu])
def test_copies_compute_the_same(duplicate: Callable[[Int8Linear], Int8Linear]) -> None:
    layer, inputs = linear(), torch.randn(3, 96)
    before = layer(inputs)
    other = duplicate(layer)
    assert not other.weight.is_meta
    assert torch.equal(other(inputs), before)
    assert torch.equal(layer(inputs), before)


def test_new_weights_are_packed_anew() -> None:
    inputs = torch.randn(3, 96)
    layer, other = linear(), linear()
    layer(inputs)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(inputs), other(inputs))
    layer.weight = nn.Parameter(-other.int8_weight(), requires_grad=False)
    layer.bias = None
    torch.testing.assert_close(layer(inputs), -(other(inputs) - other.bias))
    before = layer(inputs)
    layer.weight_scale.mul_(2)
    torch.testing.assert_close(layer(inputs), 2 * before)
    layer.weight_scale = nn.Parameter(layer.weight_scale / 2, requires_grad=False)
    assert torch.equal(layer(inputs), before)


def test_layers_packed_in_inference_mode_can_be_changed() -> None:
    layer, other, inputs = linear(), linear(), torch.randn(3, 96)
    with torch.inference_mode():
        layer(inputs)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(inputs), other(inputs))


def test_casts_leave_scales() -> None:
    layer = linear()
    scale = layer.weight_scale.clone()
    layer.to(torch.bfloat16)
    assert layer.bias.dtype == torch.bfloat16
    assert torch.equal(layer.weight_scale, scale)


def test_engine_is_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.backends.quantized.engine
    layer, inputs = linear(), torch.randn(1, 96)
    products = []
    try:
        for engine in ("onednn", "x86", "fbgemm"):
            if engine in torch.backends.quantized.supported_engines:
                torch.backends.quantized.engine = engine
                products.append(copy.deepcopy(layer)(inputs))
                assert torch.backends.quantized.engine == engine
                assert torch.equal(layer(inputs), products[0])
    finally:
        torch.backends.quantized.engine = before


def test_layer_refuses_what_it_cannot_do() -> None:
    layer, inputs = linear(), torch.randn(1, 96)
    with pytest.raises(ValueError, match="runs on the CPU alone, got a tensor on meta; the recipes 'int8'"):
        layer(inputs.to("meta"))
    with pytest.raises(ValueError, match="for inference, got an input that needs a gradient"):
        layer(inputs.requires_grad_())
    with torch.no_grad():
        layer(inputs)
    with pytest.raises(ValueError, match="needs its weights on the CPU, got meta"):
        linear().to("meta")(torch.randn(1, 96))
    with pytest.raises(ValueError, match=r"weight must be int8 with a scale, got torch.float32"):
        layer.load_state_dict(nn.Linear(96, 40).state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation_bits": 4}, "activation_bits must be 8 or 16, got 4"),
        ({"quantize_head": "yes"}, "quantize_head must be True or False, got 'yes'"),
        ({"modules_to_not_convert": "lm_head"}, "must be a list of names, got 'lm_head'"),
        ({"quant_method": "int8"}, "method 'int8-cpu', got quant_method='int8'"),
    ],
)
def test_config_refuses(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Int8CpuConfig(**options)


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_models_are_the_same(
    family: str, head: bool, save: Callable[[PreTrainedModel], Path], tmp_path: Path
) -> None:
    full = FAMILIES[family]().eval()
    folder = save(full)
    model = load(folder, quantize_head=head)
    names = {name for name, module in full.named_modules() if isinstance(module, nn.Linear)}
    converted = {name for name, module in model.named_modules() if isinstance(module, Int8Linear)}
    assert converted == (names if head else names - {"lm_head"})
    assert model.get_input_embeddings().weight.dtype == torch.float32
    before = logits(model)
    scale = logits(full).std()
    assert (before - logits(full)).std() < 0.05 * scale

    model.save_pretrained(tmp_path / "quantized")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    assert torch.equal(logits(again), before)
    assert torch.equal(logits(model), before)
    again.save_pretrained(tmp_path / "again")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("quantized", "again")]
    assert files[0] == files[1]
    assert again.config.quantization_config.quantize_head == head


FRESH = """
import sys, torch
{before}
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code={trust})
torch.save(model(torch.load(sys.argv[2]), use_cache=False).logits, sys.argv[3])
"""


def test_fresh_processes(source: Path, tmp_path: Path) -> None:
    """With the plugin the logits are the same; without it, what would be read as floats is refused."""
    model = load(source)
    model.save_pretrained(tmp_path / "quantized")
    torch.save(tokens(), tmp_path / "ids.pt")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    arguments = [str(tmp_path / name) for name in ("quantized", "ids.pt", "logits.pt")]

    script = tmp_path / "load.py"
    script.write_text(FRESH.format(before="import whisper_hf", trust=False))
    done = run_script(script, arguments, environment)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(model))
    code = FRESH.format(before="sys.modules['whisper_hf'] = None", trust=True)
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "ValueError: the checkpoint is quantized by 'int8-cpu'" in done.stderr
    assert "comes with `import whisper_hf`" in done.stderr


def test_one_digit_is_close_too(covered: Path) -> None:
    exact = logits(load(covered).dequantize())  # the same weights, activations as they are
    difference = {bits: (logits(load(covered, activation_bits=bits)) - exact).std() for bits in (8, 16)}
    assert 10 * difference[16] < difference[8] < 0.1 * exact.std()


def test_untied_head(save: Callable[[PreTrainedModel], Path]) -> None:
    model = load(save(tiny_model(tie_word_embeddings=True)), quantize_head=True)
    embedding = model.get_input_embeddings().weight
    expected, scale = quantize_weight(embedding)
    assert torch.equal(model.lm_head.int8_weight(), expected)
    assert torch.equal(model.lm_head.weight_scale, scale)
    model.tie_weights()
    assert isinstance(model.lm_head, Int8Linear)
    assert model.config.tie_word_embeddings is False


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generates_with_left_padding(source: Path, cache: str) -> None:
    model = load(source)
    ids = tokens(2, LENGTH)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "cache_implementation": cache}
    alone = model.generate(ids[1:, 40:], **options)[0, -6:]
    padded = ids.clone()
    padded[1, :40] = 0
    mask = (padded != 0).long()
    together = model.generate(padded, attention_mask=mask, **options)[1, -6:]
    assert together.tolist() == alone.tolist()


def test_sparse_decoding_with_a_static_cache_object(source: Path) -> None:
    model = load(source)
    ids = tokens(1, LENGTH)
    cache = StaticCache(config=model.config, max_cache_len=LENGTH + 8)
    kept = model.generate(ids, cache=cache, max_new_tokens=4, do_sample=False)
    assert kept.tolist() == model.generate(ids, max_new_tokens=4, do_sample=False).tolist()


def test_bfloat16_model(source: Path) -> None:
    config = Int8CpuConfig()
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=torch.bfloat16)
    full = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert model.model.layers[0].mlp.up_proj.weight_scale.dtype == torch.float32
    assert logits(model).dtype == torch.bfloat16
    assert (logits(model).float() - logits(full).float()).std() < 0.1 * logits(full).float().std()


def test_dequantized_model(covered: Path) -> None:
    model = load(covered)
    before = logits(model)
    dense = model.dequantize()
    assert not any(isinstance(module, Int8Linear) for module in dense.modules())
    assert not hasattr(dense.config, "quantization_config")
    torch.testing.assert_close(logits(dense), before, rtol=0, atol=1e-2 * before.std().item())
    assert all(parameter.requires_grad for parameter in dense.parameters())


def test_more_can_be_kept(source: Path) -> None:
    model = load(source, modules_to_not_convert=["down_proj", r"model\.layers\.0"])
    converted = [name for name, module in model.named_modules() if isinstance(module, Int8Linear)]
    assert converted
    assert all(name.startswith("model.layers.1") and not name.endswith("down_proj") for name in converted)


def test_classifier_keeps_its_new_head(source: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(source, quantization_config=Int8CpuConfig())
    assert type(model.score) is nn.Linear
    assert isinstance(model.model.layers[0].mlp.up_proj, Int8Linear)


def test_model_cannot_be_trained(source: Path, tmp_path: Path) -> None:
    model = load(source)
    assert not model(input_ids=tokens()).logits.requires_grad  # without no_grad
    with pytest.raises(ValueError, match="fine-tuning on purely quantized models"):
        Trainer(model)
    model.get_input_embeddings().weight.requires_grad_()
    with pytest.raises(ValueError, match="for inference, got an input that needs a gradient"):
        model(input_ids=tokens())


def test_bad_sources(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"runs on the CPU alone, got a device_map with \['cuda:0'\]; the recipes"):
        AutoModelForCausalLM.from_pretrained(source, quantization_config=Int8CpuConfig(), device_map="cuda:0")
    mapped = {"model": "cpu", "lm_head": "disk"}
    with pytest.raises(ValueError, match=r"got a device_map with \['disk'\]"):
        AutoModelForCausalLM.from_pretrained(source, quantization_config=Int8CpuConfig(), device_map=mapped)
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match=r"nn.Linear layers, got none in GPT2LMHeadModel outside \['lm_head'"):
        load(tmp_path / "gpt2")
    monkeypatch.setattr(int8_cpu, "ENGINE", "none")
    with pytest.raises(ValueError, match=r"needs a torch with none, as for x86, got \["):
        load(source)


def test_sources_that_are_quantized_already(source: Path, tmp_path: Path) -> None:
    model = load(source)
    model.save_pretrained(tmp_path / "quantized")
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        again = load(tmp_path / "quantized", quantize_head=True)
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(ValueError, match="quantized with Int8CpuConfig but you are passing a BitsAndBytesConfig"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "quantized", quantization_config=BitsAndBytesConfig(load_in_8bit=True)
        )


def test_other_sizes_are_refused(source: Path, tmp_path: Path) -> None:
    load(source).save_pretrained(tmp_path / "quantized")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", intermediate_size=64)
    with pytest.raises(RuntimeError, match=r"do not fit its config: .*mlp"):
        AutoModelForCausalLM.from_pretrained(source, intermediate_size=64, quantization_config=Int8CpuConfig())


def test_devices_that_mean_the_cpu(source: Path) -> None:
    for device_map in ("auto", "cpu", {"": "cpu"}):
        model = AutoModelForCausalLM.from_pretrained(source, quantization_config=Int8CpuConfig(), device_map=device_map)
        assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
