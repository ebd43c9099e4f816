"""`examples/pretrain.py` makes a tokenizer and a model from files, goes on where it stopped, and measures exactly."""

import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from examples import pretrain
from whisper_hf import packed_rows

from ..conftest import LENGTH, ROOT, SPARSE
from ..helpers.warm_processes import run_script

MODEL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
MODEL |= {"num_key_value_heads": 1, "initializer_range": 0.05}


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory, paragraphs: list[str]) -> Path:
    """A text file of six chapters."""
    path = tmp_path_factory.mktemp("book") / "book.txt"
    chapters = ["\n".join([f"CHAPTER {i}", *paragraphs[4 * i : 4 * i + 4]]) for i in range(6)]
    path.write_text("\n".join(chapters) + "\n", encoding="utf-8")
    return path


def arguments(book: Path, output: Path, steps: int, *more: object) -> list[str]:
    """Return a command line for a run of seconds, with rows several times longer than the budget."""
    line = ["--train_data", book, "--eval_data", book, "--output_dir", output, "--max_steps", steps, "--use_cpu"]
    line += ["--model", json.dumps(MODEL), "--sparse_attention", json.dumps(SPARSE), "--row_tokens", LENGTH]
    line += ["--vocab_size", 400, "--shuffled", 4, "--eval_documents", 2, "--new_tokens", 8, "--disable_tqdm", True]
    line += ["--save_steps", 2, "--logging_steps", 1, "--lr_scheduler_type", "constant", "--learning_rate", 0.01]
    return [str(item) for item in (*line, "--warmup_steps", 0, "--resume_from_checkpoint", "last", *more)]


def run(monkeypatch: pytest.MonkeyPatch, line: list[str]) -> None:
    """Run the example in this process."""
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *line])
    pretrain.main()


def weights(folder: Path) -> torch.Tensor:
    """Return all weights of a saved model."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    return torch.cat([parameter.flatten() for parameter in model.parameters()])


def test_pretrains_resumes_and_saves(book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Two steps by the command, two more from there: bit by bit what four steps at once give."""
    script, halves, whole = ROOT / "examples" / "pretrain.py", tmp_path / "halves", tmp_path / "whole"
    done = run_script(script, arguments(book, halves, 2, "--diversity", "{}"))
    assert done.returncode == 0, done.stderr[-2000:]
    monkeypatch.setattr(pretrain, "train_tokenizer", None)  # there is one
    run(monkeypatch, arguments(book, halves, 4, "--diversity", "{}"))
    monkeypatch.undo()
    capsys.readouterr()
    run(monkeypatch, arguments(book, whole, 4, "--diversity", "{}", "--tokenizer", halves / "tokenizer"))
    assert torch.equal(weights(halves), weights(whole))

    found = json.loads((whole / "perplexity_results.json").read_text())
    assert found["after"] < 0.9 * found["before"]
    printed = capsys.readouterr().out
    assert re.search(rf"^after +{found['after']:.2f}$", printed, re.MULTILINE)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(halves), AutoTokenizer.from_pretrained(halves)
    assert (model.config.vocab_size, len(tokenizer)) == (400, 400)
    assert model.config.sparse_attention.budget_blocks == 3
    assert model.config.diversity.contrast_weight > 0
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.decode(tokenizer("Ünseen ∑ text\n")["input_ids"]) == "Ünseen ∑ text\n"

    text = book.read_text(encoding="utf-8")
    first, second = (text.index(f"CHAPTER {i}") for i in (1, 2))
    rows = packed_rows([text[:first], text[first:second]], tokenizer, LENGTH)
    total = count = 0.0
    for row in rows:
        predicted = int((row["labels"][1:] != -100).sum())
        with torch.no_grad():  # with gradients, the loss is more than cross-entropy
            total += model(**{name: value[None] for name, value in row.items()}).loss.item() * predicted
        count += predicted
    assert math.exp(total / count) == pytest.approx(found["after"], rel=1e-4)
    assert "on 2 held-out documents" in printed
    assert re.search(r"\n\nCHAPTER 1\n[^|]+ \|\| .", printed)  # what was written begins as a chapter


def test_all_kinds_of_files_are_read(book: Path, tmp_path: Path) -> None:
    """Chapters are cut and nothing is left out; a pattern stands for many files."""
    text = book.read_text(encoding="utf-8")
    script = pretrain.ScriptArguments()
    cut = [row["text"] for row in pretrain.read([str(book)], "train", script)]
    assert [part.split("\n")[0] for part in cut] == [f"CHAPTER {i}" for i in range(6)]
    assert "".join(cut) == text
    whole = pretrain.ScriptArguments(cut_before="")
    assert [row["text"] for row in pretrain.read([str(book)], "train", whole)] == [text]
    for i, kind in enumerate(("json", "parquet")):
        for part in range(2):
            getattr(Dataset.from_dict({"body": cut[part::2]}), f"to_{kind}")(tmp_path / f"{part}{i}.{kind}")
        rows = pretrain.read([str(tmp_path / f"*{i}.{kind}")], "train", script)
        assert [row["body"] for row in rows] == [*cut[::2], *cut[1::2]]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            ["--train_data", "/no/such/file.txt"],
            "the data must be files that exist, or one Hub data set, got /no/such/file.txt",
        ),
        (["--train_data", str(ROOT / "LICENSE")], "files must all be of one kind among .txt"),
        (["--train_data", str(ROOT / "pyproject.toml"), "--tokenizer", "x"], "pyproject.toml"),
        (["--model", '{"hidden": 3'], "delimiter"),
        (["--sparse_attention", '{"size": 16}'], "size"),
        (["--text_column", "body"], "--text_column must be one of text, got body"),
        (["--row_tokens", "1"], "row_tokens must be at least 2, got 1"),
        (["--max_steps", "-1"], "max_steps must say how long"),
        (["--train_sampling_strategy", "random"], "because rows are packed one after the other, got 'random'"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(more: list[str], words: str, book: Path, tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, arguments(book, tmp_path / "out", 2, *more))
    message = str(caught.value)
    assert message.startswith("pretrain.py: ")
    assert words in message
    assert "\n" not in message


def test_defaults_stream_the_novels(tmp_path: Path) -> None:
    """The first chapters, each a document; nothing is trained."""
    script = pretrain.ScriptArguments()
    documents = pretrain.read(script.train_data, script.train_split, script)
    texts = [*pretrain.texts_of(documents, script, 200)]
    assert sum(text.lower().startswith("chapter ") for text in texts) == 55 + 61 + 50
    assert {**pretrain.DEFAULTS}.keys() <= TrainingArguments.__dataclass_fields__.keys()
