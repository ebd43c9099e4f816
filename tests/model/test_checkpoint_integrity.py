"""Checkpoints that are damaged, incomplete or contradictory: an error that names the file, never made-up weights."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from whisper_hf import WhisperLMForCausalLM, convert_checkpoint, from_dense, student_from
from whisper_hf.__main__ import main
from whisper_hf.checkpoint_io import has_checksums
from whisper_hf.distillation.teachers import load_teacher
from whisper_hf.model import checksums
from whisper_hf.model.checksums import CHECKSUMS, RENEW, write_checksums
from whisper_hf.quantization import quantize

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
        renew_checksums(folder)

    return damage


def edit_index(edit: Callable[[dict, str], object]) -> Callable[[Path], None]:
    """Return what edits the index of a folder, knowing the name of its first file."""

    def damage(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        edit(index, first_file(folder).name)
        (folder / INDEX).write_text(json.dumps(index))
        renew_checksums(folder)

    return damage


def renew_checksums(folder: Path) -> None:
    """Let the checksums agree with the files, if the folder has checksums."""
    if (folder / CHECKSUMS).exists():
        write_checksums(folder)


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
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["quantize", str(tmp_path / "dense"), str(tmp_path / "target"), "--recipe", "nf4", "--no-comparison"])
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


def test_every_flipped_bit_is_noticed_by_verification(saved, tmp_path, capsys) -> None:
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
                    load_teacher(folder, {"verify_checksums": True})
                capsys.readouterr()
                assert main(["verify", str(folder)]) == 1
                assert f"{file.name}: CHANGED, expected the SHA-256 " in capsys.readouterr().out
            file.write_bytes(contents)
        load_teacher(folder, {"verify_checksums": True})
        assert main(["verify", str(folder)]) == 0


def test_converting_and_quantizing_verify_their_source(saved, tmp_path, capsys) -> None:
    """A changed byte inside a weight, in a source that has checksums."""
    convert_checkpoint(saved["sparse"], tmp_path / "dense", dense=True)
    for name in ("dense", "sparse"):
        folder = tmp_path / name
        if name == "sparse":
            shutil.copytree(saved["sparse"], folder)
        edit_bytes(lambda contents: flip(8 * (len(contents) - 9))(contents))(folder)
    sparse, dense, target = tmp_path / "sparse", tmp_path / "dense", tmp_path / "target"
    for enter in (
        lambda: convert_checkpoint(dense, target),
        lambda: convert_checkpoint(sparse, target, dense=True),
        lambda: quantize(sparse, target, "int8-cpu", text=None),
        lambda: quantize(dense, target, "int8-cpu"),
        lambda: from_dense(dense, verify_checksums=True),
        lambda: AutoModelForCausalLM.from_pretrained(sparse, verify_checksums=True),
        lambda: WhisperLMForCausalLM.from_pretrained(sparse, verify_checksums=True),
    ):
        with pytest.raises(ValueError, match=r"model.safetensors is not the file that was saved: expected the SHA-256"):
            enter()
        assert not target.exists()
    for command in (["convert", str(dense)], ["quantize", str(dense), "--recipe", "nf4"]):
        with pytest.raises(SystemExit, match=r"^2$"):
            main([*command, str(target)])
        assert "is not the file that was saved" in capsys.readouterr().err
        assert not target.exists()
    assert has_checksums(dense)
    assert not has_checksums(dense, use_safetensors=False)  # which lists other files, if any
    for enter in (lambda: AutoModelForCausalLM.from_pretrained(sparse), lambda: load_teacher(dense, None)):
        assert enter().config.num_hidden_layers == 2  # as any other library would load it


@pytest.mark.parametrize("layout", ["sparse", "sparse in shards"])
def test_only_verification_hashes(layout, saved, tmp_path, count_calls, tokenizer) -> None:
    """Each file once, also where a command loads its source twice."""
    folder, dense = saved[layout], tmp_path / "dense"
    convert_checkpoint(folder, dense, dense=True)
    tokenizer.save_pretrained(dense)
    files, dense_files = (list(path.glob("*.safetensors*")) for path in (folder, dense))
    hashed = count_calls(checksums, "digest_file")
    AutoModelForCausalLM.from_pretrained(folder)
    WhisperLMForCausalLM.from_pretrained(folder)
    AutoModelForSequenceClassification.from_pretrained(folder)
    load_teacher(folder, None)
    student_from(folder, layers=[0])
    from_dense(dense)
    assert hashed == []
    for enter, expected in (
        (lambda: AutoModelForCausalLM.from_pretrained(folder, verify_checksums=True), files),
        (lambda: WhisperLMForCausalLM.from_pretrained(folder, verify_checksums=True), files),
        (lambda: AutoModelForSequenceClassification.from_pretrained(folder, verify_checksums=True), files),
        (lambda: load_teacher(folder, {"verify_checksums": True}), files),
        (lambda: from_dense(dense, verify_checksums=True), dense_files),
        (lambda: main(["verify", str(folder)]), files),
        (lambda: convert_checkpoint(dense, tmp_path / "target"), [*dense_files, "of the target"]),
        (lambda: quantize(dense, tmp_path / "compared", "int8-cpu"), [*dense_files, "of the target"]),
        (lambda: quantize(dense, tmp_path / "int8", "int8-cpu", text=None), [*dense_files, "of the target"]),
    ):
        hashed.clear()
        enter()
        assert len(hashed) == len(expected)


def test_the_option_to_verify_does_not_stay_in_the_model(saved, tmp_path) -> None:
    for source, options in (
        (AutoModelForCausalLM, {}),
        (AutoModelForCausalLM, {"trust_remote_code": True}),
        (AutoModelForCausalLM, {"config": tiny_model().config}),
        (AutoModelForSequenceClassification, {}),
        (AutoModel, {}),
        (WhisperLMForCausalLM, {}),
    ):
        model = source.from_pretrained(saved["sparse"], verify_checksums=True, **options)
        assert not hasattr(model.config, "verify_checksums")
        model.save_pretrained(tmp_path)
        assert "verify" not in (tmp_path / "config.json").read_text()


def test_verification_needs_checksums_of_safetensors(saved, tmp_path) -> None:
    shutil.copytree(saved["sparse"], tmp_path / "without")
    (tmp_path / "without" / CHECKSUMS).unlink()
    model = tiny_model()
    for source, options, words in (
        (tmp_path / "without", {}, ["without", "got none", f"`{RENEW}`"]),
        (saved["sparse"], {"use_safetensors": False}, ["use_safetensors=False", "leave out verify_checksums"]),
        (saved["sparse"], {"gguf_file": "model.gguf"}, ["'model.gguf'", "leave out verify_checksums"]),
        (None, {"config": model.config, "state_dict": model.state_dict()}, ["got None", "leave out verify_checksums"]),
    ):
        with pytest.raises(ValueError, match=r"verify_checksums=True (needs|hashes)") as error:
            WhisperLMForCausalLM.from_pretrained(source, verify_checksums=True, **options)
        for word in words:
            assert word in str(error.value)


def test_checksums_are_of_the_last_saving_and_can_be_done_without(tmp_path) -> None:
    model, other = tiny_model(), tiny_model(num_hidden_layers=1)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    other.save_pretrained(tmp_path)
    verified = AutoModelForCausalLM.from_pretrained(tmp_path, verify_checksums=True)
    assert verified.config.num_hidden_layers == 1
    (tmp_path / CHECKSUMS).unlink()
    edit_tensors(spoil(0.5))(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).lm_head.weight.view(-1)[3] == 0.5


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="there is no sha256sum")
@pytest.mark.parametrize("layout", ["sparse", "sparse in shards"])
def test_checksums_are_those_of_sha256sum(layout, saved, tmp_path) -> None:
    """It checks what we write, and the command that our errors recommend writes what we read."""
    folder = tmp_path / "model"
    shutil.copytree(saved[layout], folder)
    subprocess.run(["sha256sum", "--check", "--strict", CHECKSUMS], cwd=folder, check=True, capture_output=True)
    written = (folder / CHECKSUMS).read_text()
    (folder / CHECKSUMS).unlink()
    edit_tensors(spoil(0.5))(folder)
    subprocess.run(RENEW, shell=True, cwd=folder, check=True)
    assert (folder / CHECKSUMS).read_text() != written
    assert len((folder / CHECKSUMS).read_text().splitlines()) == len(written.splitlines())
    loaded = AutoModelForCausalLM.from_pretrained(folder, verify_checksums=True)
    assert (loaded.get_parameter(first_weight(load_file(first_file(folder)))).view(-1)[3] == 0.5).item()


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
