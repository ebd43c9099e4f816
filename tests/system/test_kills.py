"""A training that is killed 20 times loses nothing; a full disk costs no more than the checkpoint that did not fit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.trainer_utils import get_last_checkpoint

from whisper_hf import last_checkpoint
from whisper_hf.training.last_checkpoint import checkpoint_fault

from ..conftest import SIZES
from ..helpers.warm_processes import run_script

KILLS, STEPS, ROWS_PER_STEP = 20, 44, 4  # as in kills.py


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tokenizer, paragraphs: list[str]) -> Path:
    """Return the folder in which all has happened: a tokenizer, documents, checkpoints."""
    folder = tmp_path_factory.mktemp("kills")
    tokenizer.save_pretrained(folder)
    for i in range(2):
        rows = [json.dumps({"text": text[: 60 + 31 * n % 400]}) for n, text in enumerate(paragraphs[i::2])]
        (folder / f"{i}.jsonl").write_text("\n".join(rows))
    AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).save_pretrained(folder / "dense")
    done = run_script("tests.helpers.kills", [str(folder)])
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def found(home: Path) -> dict:
    """Return what has been told."""
    return json.loads((home / "result.json").read_text())


def test_kills_lose_and_repeat_no_sample(found: dict) -> None:
    whole, broken = found["whole"]["lineage"], found["broken"]["lineage"]
    assert broken == whole
    assert len(whole) == STEPS < found["broken"]["steps"]
    assert {len(rows) for rows in whole} == {ROWS_PER_STEP}
    rows = [row for step in whole for row in step]
    assert len({*rows}) > 0.9 * len(rows)  # a piece of a long document may be a row in each epoch


def test_kills_change_no_bit_of_the_weights(home: Path) -> None:
    first, second = (load_file(home / name / "model.safetensors") for name in ("whole", "broken"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name].view(torch.int32), second[name].view(torch.int32)) for name in first)


def test_kills_have_struck_everywhere(found: dict, home: Path) -> None:
    """Also while a checkpoint was written: the newest one was half of one then."""
    broken = found["broken"]
    assert broken["in_file"] >= 3
    assert broken["misleading"] >= 3
    assert KILLS > broken["in_save"] > broken["in_file"]
    assert len({*broken["begun"]}) > 5
    assert [path.name for path in (home / "broken").glob("checkpoint-*")] == [f"checkpoint-{STEPS}"]


def cut(path: Path) -> None:
    """Leave the first half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


PARTS = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "config.json"]


@pytest.mark.parametrize("spoil", [cut, Path.unlink], ids=["half", "missing"])
@pytest.mark.parametrize("part", PARTS)
def test_the_last_whole_checkpoint_is_found(part: str, spoil: Callable, home, tmp_path: Path, caplog) -> None:
    good = home / "whole" / f"checkpoint-{STEPS}"
    for step in (9, 78, 100):
        shutil.copytree(good, tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-soon").mkdir()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-100")
    spoil(tmp_path / "checkpoint-100" / part)
    found = last_checkpoint(tmp_path)
    assert found == str(
        tmp_path / ("checkpoint-100" if (spoil, part) == (Path.unlink, "config.json") else "checkpoint-78")
    )


def test_where_no_checkpoint_is_whole_none_is_found(home, tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path / "nowhere") is None
    shutil.copytree(home / "whole" / f"checkpoint-{STEPS}", tmp_path / "checkpoint-3")
    cut(tmp_path / "checkpoint-3" / "optimizer.pt")
    assert last_checkpoint(tmp_path) is None
    assert "optimizer.pt is incomplete" in (checkpoint_fault(tmp_path / "checkpoint-3") or "")


def test_parts_that_processes_write_apart_are_missed(home, tmp_path: Path) -> None:
    """Shards of weights, and the random numbers of each process."""
    folder = shutil.copytree(home / "whole" / f"checkpoint-{STEPS}", tmp_path / "checkpoint-3")
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="40KB")
    (folder / "model.safetensors").unlink()
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    for number in ("0", "1", "2"):
        shutil.copy(folder / "rng_state.pth", folder / f"rng_state_{number}.pth")
    (folder / "rng_state.pth").unlink()
    assert checkpoint_fault(folder) is None
    for path in (shards[1], folder / "rng_state_1.pth"):
        kept = path.read_bytes()
        path.unlink()
        assert checkpoint_fault(folder) is not None
        path.write_bytes(kept)
    assert checkpoint_fault(folder) is None


@pytest.mark.parametrize("folder", ["device", "limit"])
def test_a_full_disk_leaves_the_last_checkpoint(folder: str, found: dict, home: Path) -> None:
    """The optimizer's state goes to a device that is always full, or the weights grow beyond a limit."""
    (error,) = found["errors"][folder]
    assert "could not write to the end of a file" in error
    assert "MB free" in error
    assert get_last_checkpoint(str(home / folder)) == str(home / folder / "checkpoint-6")
    assert last_checkpoint(home / folder) == str(home / folder / "checkpoint-4")
    assert AutoModelForCausalLM.from_pretrained(home / folder / "checkpoint-4").config.model_type == "whisper_lm"


def test_a_full_disk_leaves_nothing_of_a_conversion(found: dict, home: Path) -> None:
    (message,) = found["errors"]["conversion"]
    assert "make room" in message
    assert (home / "dense" / "model.safetensors").stat().st_size > 60_000
    assert not [path.name for path in home.iterdir() if "sparse" in path.name]
