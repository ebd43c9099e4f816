"""lm-eval on a saved model, in processes of its own: its numbers are those of the sparse model, computed here."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from examples.lm_eval import novels

from ..conftest import ROOT, tiny_model

pytest.importorskip("lm_eval", reason="it is not installed: pip install 'whisper-hf[evaluation]'")
TASKS = ROOT / "examples" / "lm_eval"
WINDOW, ITEMS = 256, 3  # tokens, several times the budget; documents of each task

RUN = ["run", "--model", "hf", "--device", "cpu", "--batch_size", "4", "--limit", str(ITEMS)]
# One process imports lm-eval and forks two. In the second one the package cannot be imported: the model comes with its
# code.
FORK = """
import functools, json, os, runpy, sys
import lm_eval.__main__, lm_eval.evaluator, lm_eval.models.huggingface
from lm_eval.tasks import TaskManager

# lm-eval would read the 14,000 files of its own tasks
TaskManager.__init__ = functools.partialmethod(TaskManager.__init__, include_defaults=False)
assert "whisper_hf" not in sys.modules
with_package, without = json.loads(sys.argv[1])
if os.fork() == 0:
    sys.argv = ["whisper_hf", "lm-eval", *with_package]
    runpy.run_module("whisper_hf", run_name="__main__", alter_sys=True)
    sys.exit()
if os.fork() == 0:
    sys.modules["whisper_hf"] = None
    sys.argv = ["lm_eval", *without]
    lm_eval.__main__.cli_evaluate()
    sys.exit()
sys.exit(any([os.wait()[1] for _ in range(2)]))
"""


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny sparse model, saved with its tokenizer and its code."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def evaluated(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What lm-eval writes, with the samples of each task: by our command, and by its own without our package."""
    outputs = {name: tmp_path_factory.mktemp(name) for name in ("with", "without")}
    tasks = {"with": [str(TASKS)], "without": [str(TASKS / "novel_perplexity.yaml"), "--trust_remote_code"]}
    model = ["--model_args", f"pretrained={folder},max_length={WINDOW}", "--log_samples"]
    arguments = [[*RUN, *model, "--output_path", str(outputs[name]), "--tasks", *tasks[name]] for name in outputs]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", FORK, json.dumps(arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: read(output) for name, output in outputs.items()}


def read(output: Path) -> dict:
    """Return the results in a folder, with the samples of each task."""
    results = json.loads(next(output.rglob("results_*.json")).read_text())["results"]
    for name, result in results.items():
        lines = next(output.rglob(f"samples_{name}_*.jsonl")).read_text().splitlines()
        result["samples"] = sorted(map(json.loads, lines), key=lambda sample: sample["doc_id"])
    return results


@torch.no_grad()
def log_likelihood(model: PreTrainedModel, ids: list[int], count: int) -> float:
    """Return the sum of log-probabilities (nats) of the last `count` tokens, read in one forward pass."""
    logits = model(torch.tensor([ids[:-1]])).logits[0, -count:].log_softmax(-1)
    return logits.gather(1, torch.tensor(ids[-count:])[:, None]).sum().item()


def text_log_likelihood(model: PreTrainedModel, ids: list[int], bos: int) -> float:
    """Return that of a whole text, in windows that predict different tokens; the last one is as long as the others."""
    ids, total = [bos, *ids], 0.0
    for start in range(0, len(ids) - 1, WINDOW):
        stop = min(start + WINDOW + 1, len(ids))
        total += log_likelihood(model, ids[max(stop - WINDOW - 1, 0) : stop], stop - start - 1)
    return total


@pytest.fixture(scope="module")
def encoded(tokenizer) -> list[list[int]]:
    """The first chapters, in tokens."""
    return [tokenizer(text)["input_ids"] for text in novels.chapters()["test"]["text"][:ITEMS]]


@pytest.fixture(scope="module")
def expected(folder: Path, tokenizer, encoded: list[list[int]]) -> list[float]:
    """The log-likelihoods of these chapters (nats), computed here."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    return [text_log_likelihood(model, ids, tokenizer.bos_token_id) for ids in encoded]


def test_numbers_are_those_of_the_sparse_model(folder: Path, tokenizer, encoded, expected, evaluated) -> None:
    results = evaluated["with"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    dense = tiny_model(layer_types=["full_attention"] * 2)

    perplexity = results["novel_perplexity"]
    texts = novels.chapters()["test"]["text"][:ITEMS]
    assert all(len(ids) > 10 * WINDOW for ids in encoded)
    got = [float(sample["filtered_resps"][0]) for sample in perplexity["samples"]]
    assert got == pytest.approx(expected, rel=1e-4)
    words, size = sum(len(text.split()) for text in texts), sum(len(text.encode()) for text in texts)
    assert perplexity["word_perplexity,none"] == pytest.approx(math.exp(-sum(expected) / words), rel=1e-3)
    assert perplexity["bits_per_byte,none"] == pytest.approx(-sum(expected) / size / math.log(2), rel=1e-4)
    others = [text_log_likelihood(dense, ids, tokenizer.bos_token_id) for ids in encoded]
    assert others != pytest.approx(got, rel=1e-3)  # ten times what is allowed above

    right = 0
    continuation = results["novel_continuation"]
    for sample, row in zip(continuation["samples"], novels.continuations()["test"], strict=False):
        assert {name: sample["doc"][name] for name in row} == row
        read = len(tokenizer(row["context"])["input_ids"])
        choices = [tokenizer(f"{row['context']}\n{choice}")["input_ids"] for choice in row["choices"]]
        likelihoods = [log_likelihood(model, ids[-WINDOW - 1 :], len(ids) - read) for ids in choices]
        assert [float(response[0]) for response in sample["filtered_resps"]] == pytest.approx(likelihoods, rel=1e-4)
        right += likelihoods.index(max(likelihoods)) == row["answer"]
    assert len(continuation["samples"]) == ITEMS
    assert continuation["acc,none"] == pytest.approx(right / ITEMS)


def test_the_code_in_the_checkpoint_gives_the_same_numbers(expected, evaluated) -> None:
    got = [float(sample["filtered_resps"][0]) for sample in evaluated["without"]["novel_perplexity"]["samples"]]
    assert got == pytest.approx(expected, rel=1e-4)


def test_the_questions_are_sound() -> None:
    rows = novels.continuations()["test"]
    assert rows.to_list() == novels.continuations()["test"].to_list()
    assert len(rows) == 100
    text = novels.NOVEL.read_text(encoding="utf-8")
    for row in rows:
        assert len(set(row["choices"])) == novels.CHOICES
        assert len(row["context"]) >= 4000
        assert f"{row['context']}\n{row['choices'][row['answer']]}" in text
        assert not any(choice in row["context"] for choice in row["choices"])
    assert sorted(rows["answer"]) == [i for i in range(novels.CHOICES) for _ in range(25)]
    chapters = novels.chapters()["test"]
    assert len(chapters) == 31
    assert all(chapter in text for chapter in chapters["text"])
    with pytest.raises(ValueError, match="from 1 to 50,000 and items from 1 to 100, got 60000 and 100"):
        novels.continuations(context_characters=60_000)
