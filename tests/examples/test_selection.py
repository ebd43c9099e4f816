"""The benchmark of selection measures what the package does, and runs to its end."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from examples.benchmarks import selection
from whisper_hf import SparseAttentionConfig, masked_sparse_attention_forward


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_scores_by_heads_are_those_of_the_package(kv_heads: int) -> None:
    settings = SparseAttentionConfig(block_size=16, topk_blocks=3, local_blocks=2, sink_blocks=1)
    selection.LAB = selection.Lab("heads", settings)
    query = torch.randn(1, 4, 300, 16)
    key, value = torch.randn(1, kv_heads, 300, 16), torch.randn(1, kv_heads, 300, 16)
    output, _ = selection.attend(nn.Module(), query, key, value, scaling=0.25)
    layer = nn.Module()
    layer.config = LlamaConfig()
    expected, _ = masked_sparse_attention_forward(
        layer, query, key, value, None, scaling=0.25, sparse_attention=settings
    )
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    assert 0.2 < selection.LAB.recalled / selection.LAB.seen < 0.9


def test_oracle_recalls_most(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = torch.randn(1, 4, 512, 16), torch.randn(1, 2, 512, 16), torch.randn(1, 2, 512, 16)
    recall = {}
    for way in selection.WAYS[1:-1]:
        selection.use(way, 256)
        selection.attend(nn.Module(), query, key, value, scaling=1.0)
        assert selection.LAB.settings.budget_blocks * selection.LAB.settings.block_size == 256
        recall[way] = selection.LAB.recalled / selection.LAB.seen
    selection.use("default", 256)
    assert (selection.LAB.score, selection.LAB.settings) == ("heads", SparseAttentionConfig())
    assert recall["oracle, 16"] > recall["oracle, 32"] > recall["oracle, 64"]
    for size in (16, 32, 64):
        assert recall[f"oracle, {size}"] > max(recall[f"{score}, {size}"] for score in selection.SCORES)
    assert recall[selection.LOCAL] < min(found for way, found in recall.items() if way != selection.LOCAL)


def test_runs_to_its_end(tmp_path: Path, tokenizer, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("It is a truth universally acknowledged. " * 400)
    monkeypatch.setattr(selection, "LENGTH_OF_COST", 1024)
    arguments = ["--model", str(tmp_path / "model"), "--text", str(tmp_path / "text.txt"), "--length", "1024"]
    arguments += ["--budget", "256", "--only", "dense", "local, 64", "oracle, 64", "heads, 32"]
    monkeypatch.setattr(sys, "argv", ["selection.py", *arguments, "--output", str(tmp_path / "out.json")])
    selection.main()
    results = json.loads((tmp_path / "out.json").read_text())
    assert list(results["perplexity"]["text"]) == ["dense", "local, 64", "oracle, 64", "heads, 32"]
    assert list(results["cost"]) == ["heads, 64", "heads, 32", "heads, 16"]
    assert 0 < results["cost"]["heads, 32"]["share"] < 1
    assert "| closed" in capsys.readouterr().out
    monkeypatch.setattr(selection, "measure_perplexity", None)  # what the file holds is not measured again
    selection.main()
