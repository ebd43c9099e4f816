"""The quickstart runs from end to end on a tiny model, and refuses what cannot work without leaving anything behind."""

import json
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig

from examples import quickstart

from ..conftest import VOCABULARY
from ..helpers.warm_processes import run_script


@pytest.fixture
def checkpoint(tmp_path: Path, tokenizer) -> Path:
    """A tiny Llama with a tokenizer."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=2048)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def test_runs_from_end_to_end(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "result"
    line = ["--model", str(checkpoint), "--output", str(output), "--steps", "3", "--context", "1500"]
    done = run_script(Path(quickstart.__file__), line)
    assert done.returncode == 0, done.stderr
    assert "largest difference of logits on 512 tokens: 0.0e+00; same greedy tokens: True" in done.stdout
    assert "bit for bit: True" in done.stdout
    assert "Traceback" not in done.stderr
    numbers = json.loads((output / "quickstart.json").read_text())
    before, after = (numbers[name]["perplexity within the budget"] for name in ("sparse", "fine-tuned"))
    assert after < before == numbers["dense"]["perplexity within the budget"]
    assert numbers["sparse"]["perplexity beyond the budget"] != numbers["dense"]["perplexity beyond the budget"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--context", 800], "must exceed the sparse budget"),
        (["--minutes", 0], "--minutes must be a positive number"),
        (["--output", "/dev/null/x"], "--output must be a folder"),
        (["--model", "/no/such/folder"], "cannot use the folder"),
        (["--context", 9999], "must be at most the model's 2048 positions"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_leaves_nothing(
    arguments: list, words: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    defaults = {"--model": checkpoint, "--output": tmp_path / "result", "--steps": 1}
    given = {**defaults, **dict(zip(arguments[::2], arguments[1::2], strict=True))}
    command = ["quickstart.py", *(str(item) for pair in given.items() for item in pair)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match=r"^(2$|quickstart\.py: )") as stopped:  # status or message
        quickstart.main()
    assert words in capsys.readouterr().err + str(stopped.value)
    assert not (tmp_path / "result").exists()
