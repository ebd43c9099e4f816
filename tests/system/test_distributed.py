"""`accelerate launch` with the configs of the examples: two processes train as one, and go on in another layout."""

import functools
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import is_deepspeed_available
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from examples.accelerate import convert_checkpoint
from whisper_hf import last_checkpoint

from ..conftest import ROOT, tiny_model
from ..distillation.test_trainer import teacher_model
from ..helpers.distributed_processes import (
    KINDS,
    KINDS_OF,
    SAVED,
    example_command,
    history,
    plain,
    run_example,
    weights,
)
from ..helpers.warm_processes import run_script

CONFIGS = ROOT / "examples" / "accelerate"
LAYOUTS = [layout for layout in KINDS_OF if layout != "deepspeed_zero3" or is_deepspeed_available()]
CHECKPOINT = f"checkpoint-{SAVED}"
CLOSE = {"rtol": 1e-4, "atol": 5e-6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer, paragraphs) -> Path:
    """A folder with a student, two teachers and a text, and one for each layout; some sizes are odd."""
    folder = tmp_path_factory.mktemp("distributed")
    models = folder / "models"
    student = tiny_model(initializer_range=0.1, tie_word_embeddings=True, intermediate_size=49)
    student.save_pretrained(models / "student")
    teacher_model().save_pretrained(models / "teacher")
    tokenizer.save_pretrained(models / "teacher")
    teacher_model(hidden_size=32, vocab_size=121).save_pretrained(models / "narrow teacher")
    (models / "text.txt").write_text("\n".join(paragraphs[:8]), encoding="utf-8")
    for layout in LAYOUTS:
        (folder / layout).mkdir()
    return folder


def launch(layout: str, folder: Path, processes: int) -> None:
    """Start what `distributed_processes.py` does."""
    arguments = ["--config_file", str(CONFIGS / f"{layout}.yaml"), "--num_processes", str(processes)]
    arguments += ["--main_process_port", "0", "--mixed_precision", "no"]
    arguments += ["-m", "tests.helpers.distributed_processes", layout, str(folder / "models"), str(folder / layout)]
    done = run_script("accelerate.commands.launch", arguments, environment={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-5000:]


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, dict[str, Any]]:
    """What two processes found in each layout; the second goes on from a checkpoint of the first."""
    launch("ddp", folder, 2)
    convert_checkpoint.convert(folder / "ddp" / "saved" / CHECKPOINT, folder / "fsdp2" / "from ddp" / CHECKPOINT)
    for layout in LAYOUTS[1:]:
        launch(layout, folder, 2)
    return {layout: json.loads((folder / layout / "found.json").read_text()) for layout in LAYOUTS}


@pytest.fixture(scope="module")
def alone(folder: Path) -> Callable[[str], tuple[dict, dict[str, Tensor], dict]]:
    """A function that trains in one process; returns history, weights and evaluation."""

    @functools.cache
    def train(kind: str) -> tuple[dict, dict[str, Tensor], dict]:
        trainer = KINDS[kind](folder / "models", folder / "alone" / kind, 1)
        trainer.train()
        return history(trainer), weights(trainer), trainer.evaluate() if kind == "distilled" else {}

    return train


def assert_same_weights(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Compare all weights of two models."""
    assert first.keys() == second.keys()
    for name, weight in first.items():
        torch.testing.assert_close(weight, second[name], **CLOSE, msg=lambda message, name=name: f"{name}: {message}")


SAME_ALONE = [
    pytest.param(layout, kind, marks=[] if layout in LAYOUTS else pytest.mark.skip("needs deepspeed"))
    for layout, kinds in KINDS_OF.items()
    for kind in kinds
    if kind != "loops"
]


@pytest.mark.parametrize(("layout", "kind"), SAME_ALONE)
def test_two_processes_train_as_one(layout: str, kind: str, folder: Path, found, alone) -> None:
    """Rows are ragged, micro-batches hold different numbers of tokens, and the head is tied to the embeddings."""
    expected, expected_weights, evaluation = alone(kind)
    shared = found[layout][kind]
    for name, values in expected.items():
        assert shared[name] == pytest.approx(values, rel=1e-4), name
    assert_same_weights(load_file(folder / layout / f"{kind}.safetensors"), expected_weights)
    for name in evaluation.keys() & {"eval_loss", "eval_divergence", "eval_cross_entropy"}:
        assert shared["evaluation"][name] == pytest.approx(evaluation[name], rel=1e-4)


def test_the_precision_of_the_config_trains_alike(found, alone) -> None:
    expected = alone("distilled")[0]["loss"]
    assert found["fsdp2"]["bfloat16"]["loss"] == pytest.approx(expected, rel=5e-3)
    assert found["fsdp2"]["bfloat16"]["loss"] != pytest.approx(expected, rel=1e-5)


def test_sharded_processes_unlearn_loops_as_replicated_ones(folder: Path, found) -> None:
    """What is continued depends on the process, and one waits for the other whose continuations end later."""
    assert found["fsdp2"]["loops"]["grad_norm"] == pytest.approx(found["ddp"]["loops"]["grad_norm"], rel=1e-4)
    plain_norms = found["ddp"]["plain"]["grad_norm"]
    assert found["ddp"]["loops"]["grad_norm"] != pytest.approx(plain_norms, rel=1e-2)
    assert_same_weights(*(load_file(folder / layout / "loops.safetensors") for layout in ("ddp", "fsdp2")))


def test_configs_do_what_they_say(found) -> None:
    """Otherwise all these tests would hold for processes that each train alone."""
    shared = [kind for kinds in found.values() for kind in kinds.values()]
    assert {kind["processes"] for kind in shared} == {2}
    assert {tuple(kind["sharded"]) for kind in found["ddp"].values()} == {(False,)}
    for layout in LAYOUTS[1:]:
        sharded = {name: kind["sharded"] for name, kind in found[layout].items()}
        assert sharded.pop("replicated") == [True, False]
        assert {all(models) for models in sharded.values()} == {True}
    assert {kind["layers"] for kind in found["fsdp2"].values()} == {"FSDPCheckpointWrapper"}
    assert {kind["ram_efficient"] for kind in found["fsdp2"].values()} == {True}


def test_the_distillation_example_shards(folder: Path, found, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    run_example([*example_command(folder / "models", folder / "example", 1), "--use_cpu"])
    single, sharded = (
        json.loads((path / "perplexity_results.json").read_text())
        for path in (folder / "example", folder / "fsdp2" / "example")
    )
    assert sharded["student_after"] == pytest.approx(single["student_after"], rel=1e-4)
    assert sharded["student_after"] < single["student_before"]


# --- checkpoints -----------------------------------------------------------------------------------------------------


def resume_alone(folder: Path, checkpoint: Path) -> dict[str, Tensor]:
    """Go on in one process without FSDP, and return the weights."""
    trainer = plain(folder / "models", folder / "resumed", 1)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return weights(trainer)


def test_a_checkpoint_of_fsdp_goes_on_alone(folder: Path, found, alone) -> None:
    saved, converted = folder / "fsdp2" / "saved" / CHECKPOINT, folder / "converted" / CHECKPOINT
    with pytest.raises(ValueError, match="only supported when using PyTorch FSDP"):
        resume_alone(folder, saved)
    convert_checkpoint.convert(saved, converted)
    assert last_checkpoint(converted.parent) == str(converted)
    assert_same_weights(resume_alone(folder, converted), alone("plain")[1])


def test_a_checkpoint_of_ddp_goes_on_alone_and_under_fsdp(folder: Path, found, alone) -> None:
    _, expected, _ = alone("plain")
    assert_same_weights(resume_alone(folder, folder / "ddp" / "saved" / CHECKPOINT), expected)
    assert_same_weights(load_file(folder / "fsdp2" / "from ddp.safetensors"), expected)


def test_checkpoints_of_two_sharding_processes_go_on_in_one(folder: Path, found, alone) -> None:
    """As one file that the first process writes, and as shards that each writes."""
    for name in ("saved", "saved in shards"):
        assert last_checkpoint(folder / "fsdp2" / name) == str(folder / "fsdp2" / name / "checkpoint-4")
    launch("fsdp2", folder, 1)
    assert_same_weights(load_file(folder / "fsdp2" / "saved.safetensors"), alone("plain")[1])
    assert_same_weights(load_file(folder / "fsdp2" / "saved in shards.safetensors"), alone("distilled")[1])


def test_a_checkpoint_of_fsdp_is_a_model_with_its_code(folder: Path, found) -> None:
    saved = folder / "fsdp2" / "saved" / "checkpoint-4"
    code = {path.stem for path in saved.glob("*.py")}
    classes = json.loads((saved / "config.json").read_text())["auto_map"]
    assert classes["AutoModelForCausalLM"] == "modeling_whisper_lm.WhisperLMForCausalLM"
    assert {name.split(".")[0] for name in classes.values()} <= code
    assert not [name for name in code if "fsdp" in name]
    model = AutoModelForCausalLM.from_pretrained(saved)
    assert_same_weights(dict(model.named_parameters()), load_file(folder / "fsdp2" / "plain.safetensors"))


def test_conversion_refuses_what_it_cannot_convert(folder: Path, found, tmp_path: Path) -> None:
    for checkpoint in (tmp_path / "none", folder / "fsdp2" / "saved in shards" / CHECKPOINT):
        with pytest.raises(ValueError, match=r"expected a checkpoint of a Trainer .* FULL_STATE_DICT"):
            convert_checkpoint.convert(checkpoint, tmp_path / "target")
    shutil.copytree(folder / "ddp" / "saved" / CHECKPOINT, tmp_path / "part")
    state = torch.load(tmp_path / "part" / "optimizer.pt", weights_only=True)
    state["param_groups"][0]["params"].pop()
    torch.save(state, tmp_path / "part" / "optimizer.pt")
    with pytest.raises(ValueError, match=r"expected the optimizer's state of all \d+ parameters"):
        convert_checkpoint.convert(tmp_path / "part", tmp_path / "target")
    assert not (tmp_path / "target").exists()


# --- configs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_configs_name_real_fields(path: Path) -> None:
    """accelerate refuses unknown fields at the top, and ignores those below."""
    config = load_config_from_file(str(path))
    arguments = vars(launch_command_parser().parse_args(["script.py"]))
    for name in ("fsdp_config", "deepspeed_config"):
        assert set(getattr(config, name)) <= set(arguments)
    assert config.num_processes == -1  # to be given
