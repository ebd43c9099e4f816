"""Dense checkpoints to WhisperLM and back: the same bits, the same logits, all or nothing."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from whisper_hf import WhisperLMForCausalLM, conversion, convert_checkpoint, from_dense, to_dense
from whisper_hf.__main__ import main

from .conftest import LENGTH, SIZES, SPARSE, tiny_model, tokens

DENSE_SIZES = {**SIZES, "max_position_embeddings": 512, "pad_token_id": 0, "eos_token_id": 2}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
DENSE = {
    "llama": LlamaConfig(**DENSE_SIZES, tie_word_embeddings=True, rope_parameters=LLAMA3),
    "llama with biases": LlamaConfig(**DENSE_SIZES, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**DENSE_SIZES, sliding_window=None, head_dim=16),
    "mistral with an idle window": MistralConfig(**DENSE_SIZES, sliding_window=512),
    "qwen2": Qwen2Config(**DENSE_SIZES),
    "qwen3": Qwen3Config(**DENSE_SIZES, head_dim=16, tie_word_embeddings=True),
}


def dense_model(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return a dense model with random weights, biases and norms included."""
    model = AutoModelForCausalLM.from_config(DENSE[name], dtype=dtype).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)
    model.generation_config = GenerationConfig(max_new_tokens=7, do_sample=True, temperature=0.5, eos_token_id=[2, 3])
    return model


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_lossless(name: str, dtype: torch.dtype) -> None:
    dense = dense_model(name, dtype)
    sparse = from_dense(dense)
    back = to_dense(sparse)
    assert type(sparse) is WhisperLMForCausalLM
    assert type(back) is type(dense)
    assert sparse.dtype == back.dtype == dtype
    assert not sparse.training
    expected = dense(tokens()).logits
    assert torch.equal(sparse(tokens()).logits, expected)
    assert torch.equal(back(tokens()).logits, expected)
    assert list(back.state_dict()) == list(dense.state_dict())
    for key, tensor in dense.state_dict().items():
        assert torch.equal(back.state_dict()[key], tensor), key
    if dense.config.tie_word_embeddings:
        assert sparse.lm_head.weight is sparse.model.embed_tokens.weight
    assert back.generation_config.to_dict() == sparse.generation_config.to_dict() == dense.generation_config.to_dict()
    ignored = {"architectures", "sliding_window", "head_dim"}
    before, after = ({k: v for k, v in c.to_dict().items() if k not in ignored} for c in (dense.config, back.config))
    assert after == before


def test_the_copy_does_not_share_weights() -> None:
    dense = dense_model("llama")
    expected = dense(tokens()).logits
    sparse = from_dense(dense)
    for parameter in sparse.parameters():
        parameter.data.zero_()
    assert torch.equal(dense(tokens()).logits, expected)


def test_budget_is_set_and_matters() -> None:
    dense = dense_model("qwen3")
    sparse = from_dense(dense, SPARSE)
    assert sparse.config.sparse_attention.block_size == 16
    assert (sparse(tokens()).logits - dense(tokens()).logits).abs().max() > 1e-2
    assert torch.equal(to_dense(sparse)(tokens()).logits, dense(tokens()).logits)


def test_folder_with_shards_tokenizer_and_generation_config(tmp_path, tokenizer) -> None:
    dense = dense_model("llama", torch.bfloat16)
    dense.save_pretrained(tmp_path / "dense", max_shard_size="10KB")
    tokenizer.save_pretrained(tmp_path / "dense")
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 1
    convert_checkpoint(tmp_path / "dense", tmp_path / "new" / "sparse", SPARSE, max_shard_size="10KB")
    assert len(list((tmp_path / "new" / "sparse").glob("*.safetensors"))) > 1
    sparse = AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "sparse")
    assert type(sparse) is WhisperLMForCausalLM
    assert sparse.dtype == torch.bfloat16
    assert sparse.generation_config.eos_token_id == [2, 3]
    assert torch.equal(sparse(tokens()).logits, from_dense(dense, SPARSE)(tokens()).logits)
    text = "It is a truth universally acknowledged"
    carried = AutoTokenizer.from_pretrained(tmp_path / "new" / "sparse")
    assert carried(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert carried.chat_template == tokenizer.chat_template

    convert_checkpoint(tmp_path / "new" / "sparse", tmp_path / "back", dense=True)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert type(back) is type(dense)
    assert torch.equal(back(tokens()).logits, dense(tokens()).logits)
    assert from_dense(tmp_path / "dense", dtype=torch.float32).dtype == torch.float32


def test_command_line(tmp_path, capsys) -> None:
    dense_model("llama").save_pretrained(tmp_path / "dense")
    dense, sparse, back = (str(tmp_path / name) for name in ("dense", "sparse", "back"))
    sizes = ["--block-size", "64", "--topk-blocks", "5", "--local-blocks", "3", "--sink-blocks", "0"]
    assert main(["convert", dense, sparse, *sizes, "--max-shard-size", "10KB"]) == 0
    assert capsys.readouterr().out == f"converted {dense} to {sparse}\n"
    converted = AutoModelForCausalLM.from_pretrained(sparse)
    settings = converted.config.sparse_attention
    assert (settings.block_size, settings.topk_blocks, settings.local_blocks, settings.sink_blocks) == (64, 5, 3, 0)
    assert len(list((tmp_path / "sparse").glob("*.safetensors"))) > 1
    assert main(["convert", sparse, back, "--to-dense"]) == 0
    loaded = [AutoModelForCausalLM.from_pretrained(folder) for folder in (dense, back)]
    assert torch.equal(loaded[0](tokens()).logits, loaded[1](tokens()).logits)
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["convert", dense, sparse])
    assert "not an empty folder" in capsys.readouterr().err


def test_a_conversion_that_fails_half_way_leaves_nothing(tmp_path, monkeypatch) -> None:
    dense_model("llama").save_pretrained(tmp_path / "dense")

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(conversion, "save_tokenizer", fail)
    with pytest.raises(OSError, match="no space"):
        convert_checkpoint(tmp_path / "dense", tmp_path / "sparse")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (GPT2Config(vocab_size=9, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1), ["gpt2", "llama"]),
        (MistralConfig(**DENSE_SIZES, sliding_window=100), ["sliding_window=100", "masked_sparse"]),
        (
            Qwen2Config(**DENSE_SIZES, use_sliding_window=True, sliding_window=64, max_window_layers=1),
            ["sliding_window=64", "None"],
        ),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_what_cannot_be_represented_is_refused(config, words: list[str], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "dense")
    for source in (model, tmp_path / "dense"):
        with pytest.raises(ValueError, match="cannot convert") as error:
            from_dense(source)
        assert all(word in str(error.value) for word in words)
    with pytest.raises(ValueError, match="cannot convert"):
        convert_checkpoint(tmp_path / "dense", tmp_path / "sparse")
    assert not (tmp_path / "sparse").exists()


def test_loading_options_for_a_loaded_model_are_refused() -> None:
    with pytest.raises(ValueError, match=r"takes no \['dtype'\]"):
        from_dense(dense_model("llama"), dtype=torch.bfloat16)


def test_quantized_weights_are_refused() -> None:
    dense = dense_model("llama")
    dense.config.quantization_config = BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(ValueError, match=r"quantized.*dequantize"):
        from_dense(dense)


def test_to_dense_without_origin_finds_a_family_or_says_why_not() -> None:
    expected = {"use_qk_norm": "qwen3", "plain": "llama"}
    for switch, family in expected.items():
        model = tiny_model(use_qk_norm=switch == "use_qk_norm", sparse_attention={"topk_blocks": 16})
        dense = to_dense(model)
        assert dense.config.model_type == family
        torch.testing.assert_close(dense(tokens()).logits, model(tokens()).logits)
        assert tokens().shape[1] == LENGTH
    qwen2 = tiny_model(use_qk_norm=False, attention_bias=True, attention_out_bias=False)
    assert to_dense(qwen2).config.model_type == "qwen2"
    with pytest.raises(ValueError, match=r"mlp_bias=True"):
        to_dense(tiny_model(mlp_bias=True))
    with pytest.raises(ValueError, match=r"use_qk_norm=True"):
        to_dense(tiny_model(), family="llama")
    with pytest.raises(ValueError, match=r"unknown family 'gpt2'"):
        to_dense(tiny_model(), family="gpt2")
    with pytest.raises(ValueError, match=r"to_dense takes a WhisperLMForCausalLM"):
        to_dense(dense_model("llama"))
