"""Checkpoints that are damaged, incomplete or contradictory: an error that names the file, never made-up weights."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from whisper_hf import convert_checkpoint, student_from
from whisper_hf.distillation.teachers import load_teacher
from whisper_hf.model.checkpoint_integrity import CHECKSUMS
from whisper_hf.quantization import quantize
from whisper_hf.quantization.__main__ import main as quantization_command

from ..conftest import SIZES, tiny_model, tokens

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Path]:
    """Return folders of a WhisperLM and of a Llama, each in one file and in many."""
    root = tmp_path_factory.mktemp("saved")
    models = {"sparse": tiny_model(), "dense": AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))}
    for name, model in models.items():
        model.save_pretrained(root / name)
        model.save_pretrained(root / f"{name} in shards", max_shard_size="10KB")
    return {folder.name: folder for folder in root.iterdir()}


def edit_tensors(edit: Callable[[dict], object]) -> Callable[[Path], None]:
    """Return what edits the tensors of a folder's first file, and then lets the checksums agree."""

    def damage(folder: Path) -> None:
        file = first_file(folder)
        tensors = load_file(file)
        edit(tensors)
        save_file(tensors, file, {"format": "pt"})
        (folder / CHECKSUMS).unlink(missing_ok=True)

    return damage


def edit_index(edit: Callable[[dict, str], object]) -> Callable[[Path], None]:
    """Return what edits the index of a folder, knowing the name of its first file."""

    def damage(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        edit(index, first_file(folder).name)
        (folder / INDEX).write_text(json.dumps(index))
        (folder / CHECKSUMS).unlink(missing_ok=True)

    return damage


def edit_bytes(edit: Callable[[bytearray], object]) -> Callable[[Path], None]:
    """Return what edits the bytes of a folder's first file."""

    def damage(folder: Path) -> None:
        contents = bytearray(first_file(folder).read_bytes())
        edit(contents)
        first_file(folder).write_bytes(contents)

    return damage


def first_file(folder: Path) -> Path:
    """Return the first file of weights."""
    return min(folder.glob("*.safetensors"))


def first_weight(tensors: dict[str, torch.Tensor]) -> str:
    """Return the name of a weight in the first file."""
    return min(tensors)


def without(weight_map: dict[str, str], file: str) -> dict[str, str]:
    """Leave out a file."""
    return {weight: other for weight, other in weight_map.items() if other != file}


def flip(bit: int) -> Callable[[bytearray], None]:
    """Return what flips a bit."""

    def edit(contents: bytearray) -> None:
        contents[bit // 8] ^= 1 << bit % 8

    return edit


def shorten(tensors: dict[str, torch.Tensor]) -> None:
    """Take the last row off a weight."""
    tensors[first_weight(tensors)] = tensors[first_weight(tensors)][:-1].clone()


def spoil(number: float) -> Callable[[dict[str, torch.Tensor]], None]:
    """Return what puts a number into a weight."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[first_weight(tensors)].view(-1)[3] = number

    return edit


def to_integers(tensors: dict[str, torch.Tensor]) -> None:
    """Declare a weight's bits to be integers."""
    tensors[first_weight(tensors)] = tensors[first_weight(tensors)].view(torch.int32)


ONE_FILE = {
    "empty": (edit_bytes(bytearray.clear), ["model.safetensors", "whole", "header too small"]),
    "truncated": (edit_bytes(lambda contents: contents.__delitem__(slice(-1, None))), ["whole", "not fully covered"]),
    "longer": (edit_bytes(lambda contents: contents.append(0)), ["whole", "not fully covered"]),
    "flipped in the length": (edit_bytes(flip(3)), ["whole", "header"]),
    "flipped in the header": (edit_bytes(flip(8 * 20)), ["whole", "header"]),
    "without a weight": (
        edit_tensors(lambda tensors: tensors.pop(first_weight(tensors))),
        ["lacks 1 weights", "lm_head.weight", "output_loading_info"],
    ),
    "of another shape": (edit_tensors(shorten), ["lm_head.weight", "(120, 32)", "(119, 32)", "config.json"]),
}
SHARDS = {
    "without a shard": (lambda folder: first_file(folder).unlink(), ["model-00001-of", "No such file"]),
    "index names a missing weight": (
        edit_index(lambda index, file: index["weight_map"].update(extra=file)),
        ["must hold extra", "index"],
    ),
    "index names no weight of a shard": (
        edit_index(lambda index, file: index.update(weight_map=without(index["weight_map"], file))),
        ["lacks 1 weights", "model.embed_tokens.weight"],
    ),
    "index is cut": (
        lambda folder: (folder / INDEX).write_text((folder / INDEX).read_text()[:99]),
        ["must be JSON", "weight_map"],
    ),
    "index is a list": (lambda folder: (folder / INDEX).write_text("[1]"), ["must be JSON", "weight_map", "TypeError"]),
    "index is deep": (lambda folder: (folder / INDEX).write_text("[" * 10**5), ["must be JSON", "RecursionError"]),
    "index leads up": (
        edit_index(lambda index, file: index["weight_map"].update({"lm_head.weight": f"../other/{file}"})),
        ["its own folder", "'../other/model-00001", "do not use"],
    ),
    "index leads up inside": (
        edit_index(lambda index, file: index["weight_map"].update({"lm_head.weight": f"a/../../other/{file}"})),
        ["its own folder", "'a/../../other/model-00001"],
    ),
    "index leads up with backslashes": (
        edit_index(lambda index, file: index["weight_map"].update({"lm_head.weight": f"..\\{file}"})),
        ["its own folder", "model-00001"],
    ),
    "index is absolute": (
        edit_index(lambda index, file: index["weight_map"].update({"lm_head.weight": f"/etc/{file}"})),
        ["its own folder", "'/etc/model-00001"],
    ),
    "index has a drive": (
        edit_index(lambda index, file: index["weight_map"].update({"lm_head.weight": f"C:{file}"})),
        ["its own folder", "'C:model-00001"],
    ),
    "index names a number": (
        edit_index(lambda index, file: index["weight_map"].update({"lm_head.weight": 3})),
        ["must be JSON", "weight_map"],
    ),
}
CASES = [
    (layout, name, *case) for layout, cases in (("", ONE_FILE), (" in shards", SHARDS)) for name, case in cases.items()
]


@pytest.mark.parametrize(("layout", "name", "damage", "words"), CASES, ids=[case[1] for case in CASES])
def test_damage_is_named_by_loading_converting_and_quantizing(layout, name, damage, words, saved, tmp_path) -> None:
    for kind in ("sparse", "dense"):
        shutil.copytree(saved[kind + layout], tmp_path / kind)
        damage(tmp_path / kind)
    sparse, dense, target = tmp_path / "sparse", tmp_path / "dense", tmp_path / "target"
    entries: dict[str, Callable[[], object]] = {
        "load": lambda: AutoModelForCausalLM.from_pretrained(sparse),
        "convert": lambda: convert_checkpoint(dense, target),
        "convert back": lambda: convert_checkpoint(sparse, target, dense=True),
        "quantize": lambda: quantize(dense, target, "int8-cpu", text=None),
        "teach": lambda: load_teacher(dense, None),
        "cut": lambda: student_from(dense, layers=[0]),
    }
    for entry, enter in entries.items():
        with pytest.raises(ValueError, match=r"must|lacks|do not fit") as error:
            enter()
        for word in words:
            assert word.replace("lm_head", "") in str(error.value), entry
        assert not target.exists(), entry


def test_commands_say_it_without_a_traceback(saved, tmp_path, capsys) -> None:
    shutil.copytree(saved["dense"], tmp_path / "dense")
    edit_tensors(shorten)(tmp_path / "dense")
    with pytest.raises(SystemExit):
        quantization_command([str(tmp_path / "dense"), str(tmp_path / "target"), "--recipe", "nf4", "--no-comparison"])
    assert "do not fit its config: lm_head.weight must have the shape (120, 32)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("edit", "words"),
    [(spoil(torch.nan), "1 that are not finite"), (spoil(-torch.inf), "1 that are not finite"), (to_integers, "int32")],
    ids=["nan", "inf", "integers"],
)
def test_numbers_that_are_none_are_not_converted_or_quantized(edit, words, saved, tmp_path) -> None:
    shutil.copytree(saved["dense"], tmp_path / "dense")
    edit_tensors(edit)(tmp_path / "dense")
    for enter in (convert_checkpoint, lambda *paths: quantize(*paths, "nf4", text=None)):
        with pytest.raises(ValueError, match=f"lm_head.weight of torch.*{words}"):
            enter(tmp_path / "dense", tmp_path / "target")
        assert not (tmp_path / "target").exists()


def test_every_flipped_bit_is_noticed(saved, tmp_path) -> None:
    """In header, weights and index, whether the folder was written by saving, converting or quantizing."""
    convert_checkpoint(saved["sparse"], tmp_path / "dense", dense=True)
    quantize(saved["sparse"], tmp_path / "int8", "int8-cpu", text=None)
    shutil.copytree(saved["sparse in shards"], tmp_path / "shards")
    for folder in (tmp_path / "dense", tmp_path / "int8", tmp_path / "shards"):
        for file in (first_file(folder), max(folder.glob("model.*"))):
            contents = file.read_bytes()
            spread = torch.linspace(0, 8 * len(contents) - 1, 12, dtype=torch.float64).long().tolist()
            for bit in [*spread, 8 * 7 + 7]:
                changed = bytearray(contents)
                flip(bit)(changed)
                file.write_bytes(changed)
                with pytest.raises(ValueError, match=r"is not the file that was saved|must"):
                    load_teacher(folder, None)
            file.write_bytes(contents)
        load_teacher(folder, None)


def test_checksums_are_of_the_last_saving_and_can_be_done_without(tmp_path) -> None:
    model, other = tiny_model(), tiny_model(num_hidden_layers=1)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    other.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.num_hidden_layers == 1
    edit_tensors(spoil(0.5))(tmp_path)  # removes them
    assert AutoModelForCausalLM.from_pretrained(tmp_path).lm_head.weight.view(-1)[3] == 0.5


def test_symbolic_links_are_followed(saved, tmp_path) -> None:
    """The cache of the Hub consists of them."""
    shutil.copytree(saved["sparse"], tmp_path / "linked")
    first_file(tmp_path / "linked").rename(tmp_path / "elsewhere")
    (tmp_path / "linked" / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "linked")
    assert torch.equal(loaded(tokens()).logits, tiny_model()(tokens()).logits)


def test_what_a_task_adds_may_be_new_and_the_decoder_may_not(saved, tmp_path) -> None:
    classifier = AutoModelForSequenceClassification.from_pretrained(saved["sparse"], num_labels=3)
    assert classifier.score.weight.shape[0] == 3
    AutoModel.from_pretrained(saved["sparse"]).save_pretrained(tmp_path / "decoder")
    with pytest.raises(ValueError, match=r"lacks 1 weights of a model of its config, such as lm_head.weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "decoder")
    _, found = AutoModelForCausalLM.from_pretrained(tmp_path / "decoder", output_loading_info=True)
    assert found["missing_keys"] == {"lm_head.weight"}  # whoever asks is told
    resized = AutoModelForCausalLM.from_pretrained(saved["sparse"], vocab_size=99, ignore_mismatched_sizes=True)
    assert resized.lm_head.weight.shape[0] == 99  # asked for in so many words
