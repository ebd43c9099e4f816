"""The recipes make models on a tiny teacher, go on after an interruption, and what is measured fills a card."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from whisper_hf.results import load_results

from .conftest import ROOT, SIZES

RECIPES = ROOT / "examples" / "recipes"
sys.path.insert(0, str(RECIPES))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: Any) -> Path:
    """A tiny Llama of four layers with a tokenizer that loses nothing."""
    folder = tmp_path_factory.mktemp("teacher")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet)
    backend.train_from_iterator([(ROOT / "README.md").read_text(encoding="utf-8")], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    tokenizer.save_pretrained(folder)
    # bitsandbytes rounds in groups of 64
    sizes = {**SIZES, "vocab_size": 400, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
    config = LlamaConfig(**sizes, max_position_embeddings=4096, tie_word_embeddings=True, dtype=torch.bfloat16)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def run(script: str, *arguments: object) -> str:
    """Run a script of the recipes, and return what it prints."""
    command = [sys.executable, str(RECIPES / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_smoke(teacher: Path, tmp_path: Path) -> None:
    out = tmp_path / "mini"
    common = ["--teacher", teacher, "--max_steps", 3, "--row_tokens", 384, "--save_steps", 1]
    print(run("whisper_lm_mini.py", *common, "--output_dir", out, "--num_hidden_layers", 2, "--recovery_steps", 2, "--baselines"))
    print(sorted(p.name for p in out.iterdir()))
    print(run("whisper_lm_135m.py", *common, "--output_dir", tmp_path / "135", "--trained_blocks", 1))
    short = ["--teacher", teacher, "--lengths", 512, 1024, "--windows", 1, "--prompts", 2]
    print(run("measure.py", out, *short))
    for f in (out / "results").iterdir(): print(f.name, len(load_results(f).records))
    print(run("translation.py", out, "--teacher", teacher, "--steps", 2, "--passages", 2))
    print(run("card.py", out, tmp_path / "card"))
    print((tmp_path / "card" / "README.md").read_text())
