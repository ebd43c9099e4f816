"""The config: what is accepted, what is refused and with which words, and that it survives a round trip."""

import copy

import pytest
from transformers import AutoConfig, PreTrainedConfig

from whisper_hf import SparseAttentionConfig, WhisperLMConfig

from ..conftest import tiny_config


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"sparse_attention": {"topk_blocks": -1}}, ["topk_blocks", "-1", "at least 0"]),
        ({"sparse_attention": {"block_size": 48}}, ["block_size", "48", "power of two", "32", "64"]),
        ({"sparse_attention": {"block_size": 8}}, ["block_size", "8", "at least 16"]),
        ({"sparse_attention": {"local_blocks": 0}}, ["local_blocks", "0", "at least 1"]),
        ({"sparse_attention": {"sink_blocks": True}}, ["sink_blocks", "True", "integer"]),
        ({"sparse_attention": {"topk_blocks": 2.0}}, ["topk_blocks", "2.0", "integer"]),
        ({"sparse_attention": {"top_k": 2}}, ["top_k", "topk_blocks"]),
        ({"num_attention_heads": 9, "num_key_value_heads": 2}, ["num_key_value_heads", "2", "[1, 3, 9]"]),
        ({"num_key_value_heads": 0}, ["num_key_value_heads", "0"]),
        ({"hidden_size": 100, "num_attention_heads": 9}, ["hidden_size", "100", "9", "head_dim"]),
        ({"head_dim": 15}, ["head_dim", "even", "15"]),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, ["partial_rotary_factor", "0.5"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers", "0"]),
        ({"num_hidden_layers": 2, "layer_types": ["full_attention"]}, ["layer_types", "2", "1 names"]),
        (
            {"num_hidden_layers": 1, "layer_types": ["linear_attention"]},
            ["layer_types", "linear_attention", "masked_sp"],
        ),
    ],
)
def test_bad_value_is_named_with_the_remedy(values: dict, words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"must|has no|holds|not a multiple") as error:
        WhisperLMConfig(**values)
    for word in words:
        assert word in str(error.value)


def test_wrong_type_raises_at_construction_and_at_assignment() -> None:
    with pytest.raises(Exception, match="hidden_size"):
        WhisperLMConfig(hidden_size="wide")
    config = WhisperLMConfig()
    with pytest.raises(Exception, match="num_hidden_layers"):
        config.num_hidden_layers = "many"


def test_bad_assignment_is_found_before_it_is_saved(tmp_path) -> None:
    config = tiny_config()
    config.num_key_value_heads = 3
    with pytest.raises(Exception, match="num_key_value_heads"):
        config.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_defaults() -> None:
    config = WhisperLMConfig()
    assert config.sparse_attention == SparseAttentionConfig(32, 32, 16, 2)
    assert config.layer_types == ["masked_sparse_attention"] * config.num_hidden_layers
    assert config.head_dim == 64
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}


def test_round_trip_through_json_and_copy(tmp_path) -> None:
    config = tiny_config(layer_types=["full_attention", "masked_sparse_attention"], attention_bias=True)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is WhisperLMConfig
    assert loaded.to_dict() == {**config.to_dict(), "_name_or_path": loaded._name_or_path}
    assert loaded.sparse_attention == config.sparse_attention
    assert copy.deepcopy(config).to_dict() == config.to_dict()


def test_transformers_alone_reads_what_is_saved_for_sparse_layers(tmp_path) -> None:
    tiny_config().save_pretrained(tmp_path)
    assert PreTrainedConfig.from_pretrained(tmp_path).vocab_size == tiny_config().vocab_size  # as `AutoTokenizer` does
    assert WhisperLMConfig.from_pretrained(tmp_path).layer_types == tiny_config().layer_types
    mixed = tiny_config(layer_types=["full_attention", *tiny_config().layer_types[1:]])
    mixed.save_pretrained(tmp_path)
    assert WhisperLMConfig.from_pretrained(tmp_path).layer_types == mixed.layer_types


def test_covers_counts_whole_blocks() -> None:
    settings = SparseAttentionConfig(block_size=16, topk_blocks=2, local_blocks=1, sink_blocks=1)
    assert settings.covers(64)
    assert not settings.covers(65)
