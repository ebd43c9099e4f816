"""The README stays true: its snippets run, its test command is the one that CI runs, its links point somewhere."""

import re
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from .conftest import ROOT, SIZES

README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
STAND_INS = {"HuggingFaceTB/SmolLM2-135M-Instruct": LlamaConfig(**SIZES), "Qwen/Qwen3-0.6B": Qwen3Config(**SIZES)}


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_snippets_run(snippet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer) -> None:
    """Hub ids are replaced by tiny local checkpoints."""
    monkeypatch.chdir(tmp_path)
    for hub_id, config in STAND_INS.items():
        if hub_id in snippet:
            AutoModelForCausalLM.from_config(config).save_pretrained("local")
            tokenizer.save_pretrained("local")
            snippet = snippet.replace(hub_id, "local")
    exec(compile(snippet, "README.md", "exec"), {})


def test_every_hub_id_has_a_stand_in() -> None:
    named = set(re.findall(r'"([\w-]+/[\w.-]+)"', "".join(SNIPPETS)))
    assert named == set(STAND_INS)


def test_ci_runs_the_test_command() -> None:
    command = next(line for line in README.splitlines() if line.endswith("pytest"))
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


def test_files_named_exist() -> None:
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", README):
        assert (ROOT / link).exists(), link
    for name in re.findall(r"(?:examples|tests|model_cards)/[\w./-]*\w", README):
        assert (ROOT / name).exists(), name
