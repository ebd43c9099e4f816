"""Configs with absurd or hostile values: a `ValueError` that names field and value, before anything is built."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from whisper_hf import WhisperLMForCausalLM, convert_checkpoint, student_from
from whisper_hf.__main__ import main
from whisper_hf.quantization import quantize

from ..conftest import SIZES, tiny_config, tiny_model

ROPE = {"rope_type": "default", "rope_theta": 1e4}
HOSTILE: list[tuple[str, Any]] = [
    *(("vocab_size", value) for value in (-1, 0, 2**40, "a lot", 120.0, True, None)),
    *(("hidden_size", value) for value in (-32, 2**40)),
    ("intermediate_size", 10**12),
    ("num_hidden_layers", 10**9),
    ("num_attention_heads", 10**9),
    ("num_key_value_heads", -2),
    *(("head_dim", value) for value in (-8, 2**40)),
    *(("max_position_embeddings", value) for value in (0, -1, 2**62)),
    ("num_labels", 10**12),
    *(("rms_norm_eps", value) for value in (math.nan, math.inf, -1.0, 0.0, "1e-5")),
    *(("initializer_range", value) for value in (math.nan, math.inf, -1.0)),
    *(("attention_dropout", value) for value in (math.nan, 1.0, -0.1)),
    *(("rope_theta", {**ROPE, "rope_theta": value}) for value in (0, -1e4, math.nan, math.inf, "1e4", None)),
    *(("factor", {**ROPE, "rope_type": "linear", "factor": value}) for value in (math.nan, -2.0, 0, "8", [8])),
    ("factor", {**ROPE, "rope_type": "yarn"}),
    ("long_factor", {**ROPE, "rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 4, "long_factor": [1.0]}),
    ("rope_type", {**ROPE, "rope_type": "spiral"}),
    ("rope_type", {**ROPE, "rope_type": ["default"]}),
    ("partial_rotary_factor", {**ROPE, "partial_rotary_factor": "x"}),
    ("rope_parameters", [1]),
    *(("eos_token_id", value) for value in (120, [2, 10**6], -2, "</s>", [])),
    *(("pad_token_id", value) for value in (120, -1)),
    ("bos_token_id", 999),
    ("layer_types", ["masked_sparse_attention"] * 10**4),
    *(
        ("layer_types", value)
        for value in ("masked_sparse_attention", ["full_attention", 3], [], [["full_attention"]] * 2)
    ),
    *(("hidden_act", value) for value in ("explode", 3, "__import__")),
    *(("dtype", value) for value in ("float99", "int8", "nn", "os.system", 7)),
    ("block_size", {"block_size": 2**40}),
    ("topk_blocks", {"topk_blocks": 2**62}),
    *(("sparse_attention", value) for value in ("dense", [])),
    *(("contrast_weight", {"contrast_weight": value}) for value in (math.nan, math.inf, "x", None)),
    ("window", {"window": 2**60}),
    ("gem_beta", {"gem_beta": math.inf}),
    *(("quantization_config", value) for value in (3, {"quant_method": ["x"]})),
    ("tie_word_embeddings", "yes"),
]
HOLDERS = {
    "rope_parameters": ("rope_theta", "factor", "long_factor", "rope_type", "partial_rotary_factor"),
    "sparse_attention": ("block_size", "topk_blocks"),
    "diversity": ("contrast_weight", "window", "gem_beta"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A saved tiny model."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_model().save_pretrained(folder)
    return folder


def write(folder: Path, **values: Any) -> None:
    """Change the config of a checkpoint."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


@pytest.mark.parametrize(("field", "value"), HOSTILE, ids=lambda value: repr(value)[:40])
def test_hostile_values_are_named_before_anything_is_built(field, value, folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(WhisperLMForCausalLM, "__init__", None)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    holder = next((holder for holder, fields in HOLDERS.items() if field in fields), field)
    write(tmp_path, **{holder: value})
    for read in (AutoConfig.from_pretrained, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=rf"\b{field}\b.*(must|expected|match any|Missing)|Missing.*{field}"):
            read(tmp_path)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"vocab_size": 2**27}, r"must have the shape \(134217728, 32\), got \(120, 32\)"),
        ({"intermediate_size": 2**23}, r"must have the shape \(32, 8388608\), got \(32, 48\)"),
        ({"num_hidden_layers": 100}, r"lacks \d+ weights"),
    ],
)
def test_sizes_that_the_weights_do_not_have_are_never_allocated(values, words, folder, tmp_path, monkeypatch) -> None:
    """Some would take gigabytes, and only then turn out to be wrong."""
    monkeypatch.setattr(WhisperLMForCausalLM, "_load_pretrained_model", None)
    AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "dense")
    shutil.copytree(folder, tmp_path / "sparse")
    for name in ("sparse", "dense"):
        write(tmp_path / name, **values)
    with pytest.raises(ValueError, match=words):
        AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    with pytest.raises(ValueError, match=words):
        convert_checkpoint(tmp_path / "dense", tmp_path / "target")


@pytest.mark.parametrize(("name", "value"), [("vocab_size", "many"), ("rms_norm_eps", math.nan), ("eos_token_id", 120)])
def test_conversion_refuses_hostile_configs_without_a_traceback(name, value, tmp_path, capsys) -> None:
    AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "dense")
    write(tmp_path / "dense", **{name: value})
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["convert", str(tmp_path / "dense"), str(tmp_path / "target")])
    assert name in capsys.readouterr().err
    assert not (tmp_path / "target").exists()


def test_a_config_nested_without_end_is_refused(tmp_path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "x": ' + "[" * 10**5 + "]" * 10**5 + "}")
    for enter in (convert_checkpoint, lambda *paths: quantize(*paths, "nf4"), lambda source, _: student_from(source)):
        with pytest.raises(ValueError, match=r"config of .*recursion"):
            enter(tmp_path, tmp_path / "target")


def test_sound_values_at_the_edge_are_accepted() -> None:
    yarn = {
        **ROPE,
        "rope_type": "yarn",
        "factor": 1.0,
        "attention_factor": None,
        "original_max_position_embeddings": 512,
    }
    for values in (
        {"eos_token_id": [0, 119], "pad_token_id": None},
        {"initializer_range": 0.0, "attention_dropout": 0},
        {"rope_parameters": yarn},
        {"hidden_act": "gelu_pytorch_tanh", "dtype": "float64"},
        {"sparse_attention": {"topk_blocks": 2**20}, "num_labels": 1},
    ):
        tiny_config(**values)


def test_a_padding_token_of_minus_one_is_none(tmp_path) -> None:
    """As early Llamas have it."""
    AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, pad_token_id=-1)).save_pretrained(tmp_path / "dense")
    convert_checkpoint(tmp_path / "dense", tmp_path / "sparse")
    assert AutoConfig.from_pretrained(tmp_path / "sparse").pad_token_id is None
