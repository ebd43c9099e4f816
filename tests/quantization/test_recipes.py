"""bitsandbytes unchanged, the recipes and the command on top of it, and adapters merged into the dequantized base."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    GPT2Config,
    LlamaConfig,
    Qwen2Config,
    Trainer,
    TrainingArguments,
)

from whisper_hf import Int8CpuConfig, WhisperLMForCausalLM
from whisper_hf.__main__ import main
from whisper_hf.quantization import (
    RECIPES,
    disable_cpu_repacking,
    merge_adapter,
    quantize,
    quantized_checkpoint,
    recipe,
    recipes,
)
from whisper_hf.quantization.int8_linear import Int8Linear

from ..conftest import LENGTH, SPARSE, tiny_model, tokens

# rows of whole 4-bit blocks; all weights are quantized in blocks of 64
SIZES = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 128, "initializer_range": 0.1}
KINDS = {"int8": Linear8bitLt, "nf4": Linear4bit, "nf4-double": Linear4bit, "int8-cpu": Int8Linear}
KL = {"int8": 0.01, "nf4": 0.2, "nf4-double": 0.2}  # nats per token from full precision, of random weights
LAYERS = 2 * 7
BY_HAND = {
    "int8": BitsAndBytesConfig(load_in_8bit=True),
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "nf4-double": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
}

BITSANDBYTES = list(BY_HAND)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[bool, Path]:
    """Checkpoints of a tiny sparse model with an untied and with a tied head."""
    folders = {tied: tmp_path_factory.mktemp("tied" if tied else "untied") for tied in (False, True)}
    for tied, folder in folders.items():
        tiny_model(**SIZES, tie_word_embeddings=tied).save_pretrained(folder)
    return folders


@pytest.fixture
def folder(folders) -> Path:
    """A checkpoint of a tiny sparse model."""
    return folders[False]


def exact(name: str) -> BitsAndBytesConfig:
    """Return a recipe that computes in the float32 of the tiny models."""
    return recipe(name, torch.float32 if name.startswith("nf4") else None)


def load(folder: Path, config: BitsAndBytesConfig | None = None, **options: Any) -> Any:
    """Load a model for evaluation and whatever may follow, on any CPU: bitsandbytes must leave its weights alone."""
    if config is not None:
        options["quantization_config"] = config
    return AutoModelForCausalLM.from_pretrained(folder, **options)


@torch.no_grad()
def logits(model: Any, ids: Tensor | None = None, **options: Any) -> Tensor:
    """Return logits `[B, T, V]` without gradients, float32."""
    return model.eval()(input_ids=tokens() if ids is None else ids, **options).logits.float()


def kl(expected: Tensor, got: Tensor) -> float:
    """Return the mean divergence in nats per token of logits `[..., V]`."""
    log_p, log_q = expected.log_softmax(-1), got.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BITSANDBYTES)
def test_every_linear_layer_is_quantized_and_nothing_else(folders, name: str, dtype, tied: bool) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders[tied], quantization_config=recipe(name), dtype=dtype)
    assert type(model) is WhisperLMForCausalLM
    linear = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    head = linear.pop("lm_head")
    assert {type(module) for module in linear.values()} == {KINDS[name]}
    assert len(linear) == LAYERS
    stored = torch.int8 if name == "int8" else torch.uint8
    assert {module.weight.dtype for module in linear.values()} == {stored}
    if name != "int8":
        assert {module.weight.quant_state.nested for module in linear.values()} == {name == "nf4-double"}
        assert {module.weight.quant_state.quant_type for module in linear.values()} == {"nf4"}
    assert type(head) is nn.Linear
    assert (head.weight is model.model.embed_tokens.weight) == tied
    others = {path: p for path, p in model.named_parameters() if path.removesuffix(".weight") not in linear}
    assert {p.dtype for p in others.values()} == {dtype}
    assert sum("norm" in path for path in others) == 2 * 4 + 1


@pytest.mark.parametrize("name", BITSANDBYTES)
def test_forward_is_near_full_precision_and_sparse(folder, name: str) -> None:
    model = load(folder, exact(name))
    expected, got = logits(load(folder)), logits(model)
    assert tokens().shape[1] == LENGTH > 3 * (3 * SPARSE["block_size"])  # more than three times the budget
    assert 0 < kl(expected, got) < KL[name]
    assert got.isfinite().all()
    dense = load(folder, exact(name), layer_types=["full_attention"] * 2)
    assert kl(got, logits(dense)) > 2 * kl(expected, got)


@pytest.mark.parametrize("name", BITSANDBYTES)
def test_int8_alone_quantizes_activations(folder, name: str) -> None:
    layer = load(folder, exact(name)).model.layers[0].mlp.up_proj
    weight = functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB) if name == "int8" else None
    if weight is None:
        weight = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    activations = torch.randn(32, 64)
    exactly = activations @ weight.T
    with torch.no_grad():
        error = (layer.eval()(activations) - exactly).norm() / exactly.norm()
    assert 1e-3 < error < 2e-2 if name == "int8" else error < 1e-5


@pytest.mark.parametrize("cache", ["dynamic", "static", "quantized", None])
@pytest.mark.parametrize("name", BITSANDBYTES)
def test_generates_what_the_forward_pass_predicts(folder, name: str, cache: str | None) -> None:
    model = load(folder, exact(name))
    options = {"cache_implementation": cache, "use_cache": cache is not None}
    if cache == "quantized":
        options["cache_config"] = {"backend": "fp8"}
    outputs = model.generate(
        tokens(),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    assert outputs.sequences.shape == (2, LENGTH + 12)
    got, expected = torch.stack(outputs.logits, 1), logits(model, outputs.sequences)[:, LENGTH - 1 : -1]
    if name == "int8" or cache == "quantized":  # rounding of activations or of the cache
        assert kl(expected, got) < (0.3 if cache == "quantized" else KL[name])
    else:
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
        assert torch.equal(outputs.sequences[:, LENGTH:], expected.argmax(-1))


@pytest.mark.parametrize("name", BITSANDBYTES)
def test_left_padding_equals_no_padding(folder, name: str) -> None:
    model = load(folder, exact(name))
    padded = torch.nn.functional.pad(tokens(), (37, 0))
    got = logits(model, padded, attention_mask=(padded != 0).long())[:, 37:]
    if name == "int8":
        assert kl(logits(model), got) < 1e-3
    else:
        torch.testing.assert_close(got, logits(model), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", BITSANDBYTES)
def test_reloaded_logits_are_bitwise_equal(folders, tmp_path, name: str, tied: bool) -> None:
    model = load(folders[tied], exact(name))
    expected = logits(model)
    model.save_pretrained(tmp_path / "first")
    reloaded = load(tmp_path / "first")
    assert type(reloaded.model.layers[0].mlp.up_proj) is KINDS[name]
    assert torch.equal(logits(reloaded), expected)
    # transformers 5.23 cannot save what it loaded quantized but for this option, whatever the family
    reloaded.save_pretrained(tmp_path / "second", save_original_format=False)
    assert torch.equal(logits(load(tmp_path / "second")), expected)


@pytest.mark.parametrize("name", BITSANDBYTES)
def test_without_help_a_new_model_saves_reloads_and_generates(folder, tmp_path, name: str) -> None:
    """No call of ours: what is saved before it is used is right on every CPU."""
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=BY_HAND[name])
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    got = logits(model)
    assert torch.equal(logits(reloaded), got)
    assert kl(logits(load(folder)), got) < KL[name]
    generated = model.generate(tokens(), max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert torch.equal(reloaded.generate(tokens(), max_new_tokens=8, do_sample=False, eos_token_id=None), generated)


@pytest.mark.parametrize("name", BITSANDBYTES)
def test_dequantized_model_is_dense_and_predicts_the_same(folder, name: str) -> None:
    model = load(folder, exact(name))
    expected = logits(model)
    dense = model.dequantize()
    linear = [module for module in dense.modules() if isinstance(module, nn.Linear)]
    assert {type(module) for module in linear} == {nn.Linear}
    assert {module.weight.dtype for module in linear} == {torch.float32}
    if name == "int8":
        assert 0 < kl(expected, logits(dense)) < KL[name]  # what the activations contributed
    else:
        torch.testing.assert_close(logits(dense), expected, rtol=1e-4, atol=1e-4)


def test_a_token_classifier_quantizes_if_told_to_skip_its_head(folder) -> None:
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["score"])
    model = AutoModelForTokenClassification.from_pretrained(folder, quantization_config=config, num_labels=3)
    assert type(model.score) is nn.Linear
    assert type(model.model.layers[0].mlp.up_proj) is Linear8bitLt
    assert model(tokens()).logits.shape == (2, LENGTH, 3)


def lora(model: Any, **options: Any) -> PeftModel:
    """Return a model with a new adapter on all of its linear layers."""
    values = {"task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 32, "target_modules": "all-linear"}
    return get_peft_model(model, LoraConfig(**{**values, **options}))


def gradients(model: Any) -> dict[str, Tensor]:
    """Return the gradients of an adapter."""
    model.zero_grad()
    model.train()(input_ids=tokens(), labels=tokens()).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def trained(folders, tmp_path_factory, paragraphs, tokenizer) -> Callable[[str], tuple[PeftModel, Path]]:
    """Train an adapter with the stock Trainer on a base in a recipe, once each; returns it and its folder."""
    ids = tokenizer(" ".join(paragraphs[:24]))["input_ids"]
    rows = [{"input_ids": ids[i : i + LENGTH], "labels": ids[i : i + LENGTH]} for i in range(0, 24 * LENGTH, LENGTH)]
    done: dict[str, tuple[PeftModel, Path]] = {}

    def train(name: str) -> tuple[PeftModel, Path]:
        if name not in done:
            out = tmp_path_factory.mktemp(name)
            arguments = TrainingArguments(
                output_dir=str(out),
                learning_rate=5e-3,
                lr_scheduler_type="constant",
                per_device_train_batch_size=4,
                max_steps=8,
                logging_steps=1,
                eval_strategy="steps",
                eval_steps=4,
                save_strategy="no",
                report_to="none",
                use_cpu=True,
                disable_tqdm=True,
                seed=0,
            )
            datasets = {"train_dataset": Dataset.from_list(rows[4:]), "eval_dataset": Dataset.from_list(rows[:4])}
            trainer = Trainer(model=lora(load(folders[False], exact(name))), args=arguments, **datasets)
            before = trainer.evaluate()["eval_loss"]
            trainer.train()
            losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
            assert before - 0.1 > losses[-2] > losses[-1] + 0.1
            trainer.save_model()
            done[name] = trainer.model.eval(), out
        return done[name]

    return train


@pytest.mark.parametrize("name", BITSANDBYTES)
def test_stock_trainer_trains_an_adapter(trained, folder, name: str) -> None:
    model, adapter = trained(name)  # asserts that the loss falls, between evaluations too
    assert sum(isinstance(module, KINDS[name]) for module in model.modules()) == LAYERS
    again = PeftModel.from_pretrained(load(folder, exact(name)), adapter)
    assert torch.equal(logits(again), logits(model))
    assert kl(logits(load(folder, exact(name))), logits(model)) > 0.1


@pytest.mark.parametrize("name", BITSANDBYTES)
def test_gradients_after_an_evaluation_are_those_before(folder, name: str) -> None:
    model = lora(load(folder, exact(name)), init_lora_weights=False)
    before = gradients(model)
    logits(model)
    for key, gradient in gradients(model).items():
        assert gradient.abs().max() > 0
        assert torch.equal(gradient, before[key]), key


@pytest.mark.parametrize("name", BITSANDBYTES)
def test_merged_equals_dequantized_base_with_adapter(trained, folder, tmp_path, name: str) -> None:
    model, adapter = trained(name)
    trained_with = logits(model)
    merge_adapter(adapter, tmp_path / "merged", base=folder, recipe=exact(name))
    merged = load(tmp_path / "merged")
    assert type(merged) is WhisperLMForCausalLM
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert {type(module) for module in merged.modules() if isinstance(module, nn.Linear)} == {nn.Linear}
    expected = logits(PeftModel.from_pretrained(load(folder, exact(name)).dequantize(), adapter))
    torch.testing.assert_close(logits(merged), expected, rtol=1e-3, atol=1e-3)

    in_place = PeftModel.from_pretrained(load(folder, exact(name)), adapter).merge_and_unload().dequantize()
    drift = kl(expected, logits(in_place))
    assert kl(expected, logits(merged)) < 1e-6 < 1e-2 * drift

    merge_adapter(model, tmp_path / "live")  # in memory, with the same result
    assert torch.equal(logits(load(tmp_path / "live")), logits(merged))
    assert torch.equal(logits(model), trained_with)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["live", "merged"]


def test_merge_into_a_quantized_checkpoint_carries_its_tokenizer(trained, folder, tokenizer, tmp_path) -> None:
    _, adapter = trained("nf4")
    load(folder, exact("nf4")).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    merge_adapter(adapter, tmp_path / "merged", base=tmp_path / "base")
    merge_adapter(adapter, tmp_path / "same", base=folder, recipe="nf4")
    assert torch.equal(logits(load(tmp_path / "merged")), logits(load(tmp_path / "same")))
    carried = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert carried("a truth")["input_ids"] == tokenizer("a truth")["input_ids"]
    with pytest.raises(ValueError, match=r"quantized already, got recipe='nf4'"):
        merge_adapter(adapter, tmp_path / "twice", base=tmp_path / "base", recipe="nf4")


def test_merge_lowers_what_preparation_for_training_raised(folder, tmp_path) -> None:
    base = load(folder, recipe("nf4-double"), dtype=torch.bfloat16)
    model = lora(prepare_model_for_kbit_training(base), init_lora_weights=False)
    assert model.get_base_model().model.norm.weight.dtype == torch.float32
    merge_adapter(model, tmp_path / "merged")
    merge_adapter(model, tmp_path / "wide", dtype="float32")
    merged, wide = load(tmp_path / "merged"), load(tmp_path / "wide")
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    assert kl(logits(wide), logits(merged)) < 1e-2


def test_merge_refuses_what_it_would_get_wrong(folders, trained, tmp_path) -> None:
    untied, tied = folders[False], folders[True]
    live, adapter = trained("nf4")
    target = tmp_path / "merged"
    with pytest.raises(ValueError, match=r"base .* is not quantized; pass the recipe"):
        merge_adapter(adapter, target, base=untied)
    with pytest.raises(ValueError, match="not quantized; use peft's own merge_and_unload"):
        merge_adapter(lora(load(untied)), target)
    with pytest.raises(ValueError, match="must be one for training, got int8-cpu, which is for inference"):
        merge_adapter(adapter, target, base=untied, recipe="int8-cpu")
    with pytest.raises(ValueError, match="leave out base, recipe"):
        merge_adapter(live, target, recipe="nf4")
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        merge_adapter(untied, target)
    two = lora(load(untied, exact("nf4")))
    two.add_adapter("other", two.peft_config["default"])
    two.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"one active adapter, got \['default', 'other'\]"):
        merge_adapter(two, target)
    head = lora(load(tied, exact("nf4")), target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match=r"share a matrix, got an adapter on \['lm_head'\]"):
        merge_adapter(head, target)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="not an empty folder"):
        merge_adapter(live, tmp_path / "full")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


@pytest.mark.skipif(
    not hasattr(functional, "_convert_weight_packed_for_cpu"), reason="bitsandbytes leaves weights alone"
)
def test_weights_that_were_rearranged_are_refused(folder, tmp_path) -> None:
    """As bitsandbytes does by itself on a CPU with AVX512-BF16; the rearranging itself runs on every CPU."""
    model = lora(load(folder, exact("nf4")))
    weight = model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight
    weight.data, weight.quant_state = functional._convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    with pytest.raises(ValueError, match="got 1 that bitsandbytes rearranged"):
        disable_cpu_repacking(model)
    with pytest.raises(ValueError, match="got 1 that bitsandbytes rearranged"):
        merge_adapter(model, tmp_path / "merged")
    assert not any(tmp_path.iterdir())


def test_recipes_are_standard_config_objects() -> None:
    assert {type(recipe(name)) for name in BITSANDBYTES} == {BitsAndBytesConfig}
    assert recipe("int8-cpu").to_dict() == Int8CpuConfig().to_dict()
    for name, by_hand in BY_HAND.items():
        assert exact(name).to_dict() == by_hand.to_dict()
    double = recipe("nf4-double", torch.float16)
    assert (double.bnb_4bit_use_double_quant, double.bnb_4bit_compute_dtype) == (True, torch.float16)
    assert recipe("nf4").bnb_4bit_compute_dtype == torch.bfloat16
    with pytest.raises(ValueError, match="unknown recipe 'int4'; expected one of int8, nf4, nf4-double, int8-cpu"):
        recipe("int4")
    with pytest.raises(ValueError, match=r"multiplies integers, got compute_dtype=torch\.float32"):
        recipe("int8", torch.float32)


@pytest.mark.parametrize("name", RECIPES)
def test_quantize_writes_a_checkpoint_and_a_report(folder, tokenizer, tmp_path, name: str) -> None:
    model = tiny_model(**{**SIZES, "hidden_size": 512, "intermediate_size": 1024, "head_dim": 64})
    model.generation_config.temperature, model.generation_config.do_sample = 0.5, True
    model.save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    lines: list[str] = []
    report = quantize(tmp_path / "source", tmp_path / "new" / name, name, progress=lines.append)
    target = tmp_path / "new" / name
    assert report == json.loads((target / "quantization.json").read_text())
    assert lines == ["running the source", "quantizing on cpu", "saving", "comparing with the source"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == [name]

    size = report["linear_weights"]
    assert size["layers"] == LAYERS
    assert size["weights"] == 2 * (2 * 512 * 256 + 2 * 512 * 128 + 3 * 512 * 1024)
    assert size["bytes_before"] == 4 * size["weights"]
    assert size["ratio_to_float32"] < {"int8": 0.26, "nf4": 0.15, "nf4-double": 0.14, "int8-cpu": 0.26}[name]
    assert set(report["versions"]) - {"bitsandbytes"} == {"transformers", "torch"}
    assert ("bitsandbytes" in report["versions"]) == (name in BITSANDBYTES)
    assert report["kept"]["model.layers.*.input_layernorm.weight"] == {
        "parameters": 2 * 512,
        "dtype": "float32",
        "bytes": 2 * 512 * 4,
    }
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"} < set(report["kept"])
    assert not any("proj" in key for key in report["kept"])
    high = sum(entry["bytes"] for entry in report["kept"].values())
    assert size["bytes_after"] + high < report["bytes_on_disk"] < size["bytes_after"] + high + 20_000
    assert report["bytes_on_disk"] == (target / "model.safetensors").stat().st_size

    quantized = load(target)
    assert sum(isinstance(module, KINDS[name]) for module in quantized.modules()) == LAYERS
    if name in BITSANDBYTES:
        assert quantized.config.quantization_config.bnb_4bit_compute_dtype == torch.float32
    assert torch.equal(logits(quantized), logits(load(tmp_path / "source", exact(name))))
    assert quantized.generation_config.temperature == 0.5
    assert {"modeling_whisper_lm.py", "configuration_whisper_lm.py"} < {path.name for path in target.glob("*.py")}
    ids = AutoTokenizer.from_pretrained(target)(quantized_checkpoint.SAMPLE, return_tensors="pt")["input_ids"][:, :512]
    full = logits(load(tmp_path / "source"), ids)
    comparison = report["comparison"]
    assert comparison["tokens"] == ids.shape[1] > LENGTH
    assert comparison["kl_nats_per_token"] == pytest.approx(kl(full, logits(quantized, ids)), rel=1e-2)
    assert comparison["max_abs_logit_difference"] == pytest.approx((full - logits(quantized, ids)).abs().max().item())
    assert 0 < comparison["same_likeliest_token"] <= 1


@pytest.mark.parametrize("config_class", [LlamaConfig, GPT2Config, Qwen2Config])
def test_quantize_takes_other_families_configs_and_dtypes(tmp_path, config_class) -> None:
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    source = AutoModelForCausalLM.from_config(config_class(**sizes, **heads, bos_token_id=1, eos_token_id=2))
    source.save_pretrained(tmp_path / "source")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype="float32")
    report = quantize(tmp_path / "source", tmp_path / "fp4", config, dtype="bfloat16")
    assert report["recipe"] == "custom"
    assert report["comparison"] is None  # there is no tokenizer
    assert not list((tmp_path / "fp4").glob("*token*"))
    assert report["linear_weights"]["dtype_before"] == "bfloat16"
    model = load(tmp_path / "fp4")
    assert type(model) is type(source)
    assert model.dtype == torch.bfloat16
    kinds = {module.weight.quant_state.quant_type for module in model.modules() if isinstance(module, Linear4bit)}
    assert kinds == {"fp4"}
    assert kl(logits(source), logits(model)) < 1e-2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"recipe": "int4"}, "unknown recipe 'int4'"),
        ({"recipe": BitsAndBytesConfig()}, "a BitsAndBytesConfig of 4 or 8 bits"),
        ({"recipe": "int8-cpu", "device": "meta"}, "does not run on the device 'meta'"),
        ({"keep": 1.0}, "at least 0 and below 1, got 1.0"),
        ({"keep": 0.1}, "needs a text and a tokenizer, got no tokenizer"),
        ({"keep": 0.1, "text": None}, "got no text"),
        ({"device": "meta"}, "does not run on the device 'meta'"),
        ({"device": "nonsense"}, "does not run on the device 'nonsense'"),
        pytest.param(
            {"device": "cuda"},
            "does not run on the device 'cuda'",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
        ({"dtype": "int32"}, "floating dtype .* got 'int32'"),
        ({"text": "Some text."}, "got no tokenizer"),
        ({"recipe": BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=[""])}, "linear layers, got none"),
    ],
)
def test_quantize_refuses_what_cannot_run(folder, tmp_path, options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        quantize(folder, tmp_path / "target", **{"recipe": "nf4", **options})
    assert not any(tmp_path.iterdir())


def test_quantize_refuses_the_wrong_source_or_target_before_loading(folder, trained, tmp_path, monkeypatch) -> None:
    live, adapter = trained("nf4")
    load(folder, exact("nf4")).save_pretrained(tmp_path / "quantized")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    for source, words in (
        (tmp_path / "quantized", "is quantized already"),
        (adapter, "has an adapter; merge it first"),
        (live.get_base_model(), "got a WhisperLMForCausalLM"),
    ):
        with pytest.raises(ValueError, match=words):
            quantize(source, tmp_path / "target", "int8")
    with pytest.raises(ValueError, match="not an empty folder"):
        quantize(folder, tmp_path / "quantized", "int8")
    monkeypatch.setattr(recipes, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(ImportError, match="pip install -U bitsandbytes"):
        quantize(folder, tmp_path / "target", "int8")
    assert [path.name for path in tmp_path.iterdir()] == ["quantized"]


def test_a_quantization_that_fails_half_way_leaves_nothing(folder, tmp_path, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(quantized_checkpoint, "kept", fail)
    with pytest.raises(OSError, match="no space"):
        quantize(folder, tmp_path / "target", "int8")
    assert not any(tmp_path.iterdir())


def test_command_line(folder, tokenizer, tmp_path_factory, tmp_path, capsys) -> None:
    folder = shutil.copytree(folder, tmp_path_factory.mktemp("source") / "model")
    tokenizer.save_pretrained(folder)
    assert main(["quantize", str(folder), str(tmp_path / "nf4"), "--recipe", "nf4", "--device", "cpu"]) == 0
    written = capsys.readouterr()
    assert [line in written.err.splitlines() for line in ("quantizing on cpu", "saving")] == [True, True]
    assert "linear weights take 0.1" in written.out
    (tmp_path / "text").write_text("It is a truth universally acknowledged", encoding="utf-8")
    (tmp_path / "empty").touch()
    shared = ["--recipe", "int8", "--text", str(tmp_path / "text"), "--device", "cpu"]
    main(["quantize", str(folder), str(tmp_path / "int8"), *shared])
    report = json.loads((tmp_path / "int8" / "quantization.json").read_text())
    assert 5 < report["comparison"]["tokens"] < 50
    assert "inputs will be cast" not in capsys.readouterr().err
    for arguments, words in (
        ([str(tmp_path / "int8"), str(tmp_path / "twice"), *shared], "is quantized already"),
        ([str(folder), str(tmp_path / "int8"), *shared], "not an empty folder"),
        ([str(tmp_path / "missing"), str(tmp_path / "new"), *shared], "missing"),
        ([str(folder), str(tmp_path / "new"), *shared[:2], "--text", str(tmp_path / "empty")], "must have tokens"),
    ):
        with pytest.raises(SystemExit) as error:
            main(["quantize", *arguments])
        assert error.value.code == 2
        assert words in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "int8", "nf4", "text"]


def test_an_untouched_copy_keeps_its_weights(folder) -> None:
    """Copies of quantized models, which merging relies on, are independent."""
    for name in RECIPES:
        model = load(folder, exact(name))
        expected = logits(model)
        copied = copy.deepcopy(model)
        assert torch.equal(logits(copied), expected)
        copied.dequantize()
        assert torch.equal(logits(model), expected)


def test_a_tied_head_cannot_be_quantized(folders, tmp_path) -> None:
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"\['lm_head'\] share their weights"):
        quantize(folders[True], tmp_path / "target", config)
    assert not any(tmp_path.iterdir())
