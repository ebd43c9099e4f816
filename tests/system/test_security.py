"""A checkpoint is data: its code runs only when it is trusted, pickles are not loaded, and licences are known."""

import json
import pickle
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from jinja2.exceptions import SecurityError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Trainer, TrainingArguments

from whisper_hf import DistillationConfig, DistillationTrainer, convert_checkpoint, from_dense, serving, student_from
from whisper_hf.__main__ import main
from whisper_hf.distillation import StoredSignals, write_signals
from whisper_hf.quantization import quantize

from ..conftest import ROOT, SIZES, tiny_model, tokens

CODE = "from pathlib import Path\nPath({marker!r}).touch()\nraise RuntimeError('this code ran')\n"
CLASSES = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
ALWAYS = {*CLASSES, "quantize", "quantize command", "serve", "student_from", "cache-signals command", "distil"}


@pytest.fixture
def marker(tmp_path) -> Path:
    """A file that exists once foreign code has run."""
    return tmp_path / "ran"


@pytest.fixture
def no_answer(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Whoever asks on the terminal is told no, and recorded."""
    questions: list[str] = []

    def answer(question: str = "") -> str:
        questions.append(question)
        return "n"

    monkeypatch.setattr("builtins.input", answer)
    return questions


def hostile(folder: Path, marker: Path, tokenizer, model_type: str) -> Path:
    """Write a checkpoint whose code leaves a mark, under the name of a model that is known or is not."""
    model = tiny_model() if model_type == "whisper_lm" else AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in folder.glob("*.py"):
        file.write_text(CODE.format(marker=str(marker)))
    (folder / "evil.py").write_text(CODE.format(marker=str(marker)))
    auto_map = dict.fromkeys(CLASSES, "evil.Evil") | {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    for name in ("config.json", "tokenizer_config.json"):
        contents = json.loads((folder / name).read_text())
        contents |= {"auto_map": auto_map}
        if name == "config.json":
            contents |= {"model_type": model_type}
        elif model_type == "evil_lm":
            contents |= {"tokenizer_class": "Evil"}
        (folder / name).write_text(json.dumps(contents))
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(CODE.format(marker=str(marker)))
    return folder


def entries(folder: Path, target: Path) -> dict[str, Callable[[], object]]:
    """Return everything that opens a checkpoint."""
    target.mkdir()
    (target / "text.txt").write_text("It is a truth universally acknowledged")
    cache = [
        "--teacher",
        str(folder),
        "--dataset",
        str(target / "text.txt"),
        "--output",
        str(target / "e"),
        "--top-k",
        "4",
    ]
    rows = Dataset.from_dict({"input_ids": tokens().tolist(), "labels": tokens().tolist()})
    settings = DistillationConfig(str(target), use_cpu=True, report_to="none")
    return {
        "AutoConfig": lambda: AutoConfig.from_pretrained(folder),
        "AutoTokenizer": lambda: AutoTokenizer.from_pretrained(folder),
        "AutoModelForCausalLM": lambda: AutoModelForCausalLM.from_pretrained(folder),
        "from_dense": lambda: from_dense(folder),
        "convert_checkpoint": lambda: convert_checkpoint(folder, target / "a"),
        "convert_checkpoint back": lambda: convert_checkpoint(folder, target / "b", dense=True),
        "quantize": lambda: quantize(folder, target / "c", "int8-cpu", text=None),
        "convert command": lambda: main(["convert", str(folder), str(target / "f")]),
        "quantize command": lambda: main(["quantize", str(folder), str(target / "d"), "--recipe", "int8-cpu"]),
        "serve": lambda: serving.ModelManager(device="cpu", force_model=str(folder)).load_model_and_processor(
            str(folder)
        ),
        "student_from": lambda: student_from(folder, layers=[0]),
        "cache-signals command": lambda: main(["cache-signals", *cache]),
        "distil": lambda: DistillationTrainer(tiny_model(), str(folder), settings, train_dataset=rows),
    }


@pytest.mark.parametrize(
    ("model_type", "opened_as_data"),
    [
        ("whisper_lm", {*ALWAYS, "convert_checkpoint back"}),
        ("llama", {*ALWAYS, "from_dense", "convert_checkpoint", "convert command"}),
        ("evil_lm", set()),
    ],
)
def test_code_of_a_checkpoint_never_runs_untrusted(
    model_type, opened_as_data, marker, tokenizer, tmp_path, no_answer
) -> None:
    """What the plugin or transformers knows is opened as the data it is; for the rest, only `Auto*` and `serve` ask."""
    folder = hostile(tmp_path / "hostile", marker, tokenizer, model_type)
    opened, asking = set(), set()
    for name, enter in entries(folder, tmp_path / "target").items():
        no_answer.clear()
        try:
            enter()
            opened.add(name)
        except (ValueError, OSError, SystemExit):
            pass
        asking |= {name} if no_answer else set()
        assert not marker.exists(), name
    assert opened == opened_as_data
    assert asking <= {*CLASSES, "serve"}
    if model_type == "evil_lm":
        with pytest.raises(RuntimeError, match="this code ran"):
            AutoConfig.from_pretrained(folder, trust_remote_code=True)
        assert marker.exists()


def test_nor_where_the_plugin_is_not_imported(marker, tokenizer, tmp_path) -> None:
    folder = hostile(tmp_path / "hostile", marker, tokenizer, "whisper_lm")
    code = """
import sys, transformers
for name in ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"):
    try:
        getattr(transformers, name).from_pretrained(sys.argv[1])
    except (ValueError, OSError) as error:
        print(name, "refused", "trust_remote_code" in str(error))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=True
    )
    assert "AutoConfig refused True\n" in done.stdout
    assert "AutoModelForCausalLM refused True\n" in done.stdout
    assert not marker.exists()


def test_chat_templates_are_sandboxed(tokenizer) -> None:
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(SecurityError):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], chat_template=template, tokenize=False)


class Payload:
    """Leaves a mark when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.touch, (self.marker,)


class Unpickled(list):
    """Names of what pickles have asked for, while it listens."""

    listening = False

    def __call__(self, event: str, arguments: tuple) -> None:
        """Take note of an audit event."""
        if self.listening and event == "pickle.find_class":
            self.append(arguments)


UNPICKLED = Unpickled()


@pytest.fixture
def unpickled() -> Iterator[Unpickled]:
    """Listen to Python's own audit events; a hook cannot be removed, so there is one for all tests."""
    if not hasattr(sys, "_whisper_hf_listens"):
        sys.addaudithook(UNPICKLED)
        sys._whisper_hf_listens = True
    UNPICKLED.clear()
    UNPICKLED.listening = True
    yield UNPICKLED
    UNPICKLED.listening = False


def train(folder: Path, resume: bool = False) -> None:
    """Train a tiny model for two steps, or go on for two more."""
    rows = Dataset.from_dict({"input_ids": tokens(4).tolist(), "labels": tokens(4).tolist()})
    settings = {"save_steps": 2, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    args = TrainingArguments(str(folder), max_steps=4 if resume else 2, **settings)
    Trainer(tiny_model(), args, train_dataset=rows).train(resume_from_checkpoint=resume)


def test_no_pickle_is_loaded_on_any_way(unpickled, marker, tokenizer, tmp_path) -> None:
    """The listener hears a pickle that is loaded; hostile ones lie wherever one might be looked for."""
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists()
    assert ("pathlib", "Path.touch") in unpickled
    marker.unlink()
    unpickled.clear()

    dense, target = tmp_path / "dense", tmp_path / "target"
    AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).save_pretrained(dense)
    tokenizer.save_pretrained(dense)
    for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.bin", "tokenizer.pkl"):
        torch.save(Payload(marker), dense / name)
    convert_checkpoint(dense, target / "sparse")
    AutoModelForCausalLM.from_pretrained(target / "sparse").generate(tokens(1), max_new_tokens=2)
    quantize(dense, target / "int8", "int8-cpu")
    student_from(dense, layers=[0])
    rows = Dataset.from_dict({"input_ids": tokens().tolist(), "labels": tokens().tolist()})
    write_signals(from_dense(dense), rows, target / "signals", count=4, progress=False)
    settings = DistillationConfig(str(target / "run"), max_steps=1, use_cpu=True, report_to="none", disable_tqdm=True)
    for teacher in (dense, target / "signals"):
        DistillationTrainer(tiny_model(), str(teacher), settings, train_dataset=rows).train()
    train(target / "run")
    train(target / "run", resume=True)
    assert unpickled == []
    assert not marker.exists()


@pytest.mark.parametrize("pickled", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_a_pickle_in_the_place_of_safetensors_is_refused(pickled, marker, unpickled, tmp_path) -> None:
    for name, model in {
        "sparse": tiny_model(),
        "dense": AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)),
    }.items():
        model.save_pretrained(tmp_path / name)
        (tmp_path / name / "model.safetensors").unlink()
        torch.save(Payload(marker), tmp_path / name / "pytorch_model.bin")
        if pickled.endswith("json"):
            (tmp_path / name / "pytorch_model.bin").rename(tmp_path / name / "part.bin")
            index = {"metadata": {}, "weight_map": {"lm_head.weight": "part.bin"}}
            (tmp_path / name / pickled).write_text(json.dumps(index))
    for enter in (
        lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "sparse"),
        lambda: convert_checkpoint(tmp_path / "dense", tmp_path / "target"),
        lambda: quantize(tmp_path / "dense", tmp_path / "target", "int8-cpu", text=None),
    ):
        with pytest.raises(ValueError, match=rf"must hold safetensors, got {pickled}, a pickle, which could run code"):
            enter()
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", use_safetensors=False)
    assert unpickled == []
    assert not marker.exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_hostile_training_checkpoint_does_not_run(name, marker, unpickled, tmp_path) -> None:
    train(tmp_path / "run")
    torch.save(Payload(marker), tmp_path / "run" / "checkpoint-2" / name)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        train(tmp_path / "run", resume=True)
    assert unpickled == []
    assert not marker.exists()


def test_damaged_signals_are_named(tmp_path) -> None:
    rows = Dataset.from_dict({"input_ids": tokens().tolist(), "labels": tokens().tolist()})
    write_signals(tiny_model(), rows, tmp_path / "whole", count=4, progress=False)
    StoredSignals(tmp_path / "whole")
    arrow = next((tmp_path / "whole" / "part-000000").glob("*.arrow")).relative_to(tmp_path / "whole")

    def flip(file: Path) -> None:
        contents = bytearray(file.read_bytes())
        contents[len(contents) // 2] ^= 1
        file.write_bytes(contents)

    def cut(file: Path) -> None:
        (file.parent / "SHA256SUMS").unlink()  # as in folders from before there were any
        file.write_bytes(file.read_bytes()[:100])

    for damaged, damage, words in (
        (arrow, flip, "is not the file that was saved"),
        (arrow, cut, "must be a data set of stored signals"),
        (arrow.with_name("state.json"), lambda file: file.write_text("{"), "must be a data set of stored signals"),
        (Path("signals.json"), lambda file: file.write_text("[]"), "must describe stored signals"),
        (
            Path("signals.json"),
            lambda file: file.write_text('{"version": 1, "evil": 2}'),
            "must describe stored signals",
        ),
    ):
        folder = tmp_path / f"damaged-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(tmp_path / "whole", folder)
        damage(folder / damaged)
        with pytest.raises(ValueError, match=words):
            StoredSignals(folder)


LICENCES = {
    "Apache": r"apache",
    "MIT": r"\bmit\b",
    "BSD": r"bsd",
    "PSF": r"python software|psf|matplotlib",
    "MPL": r"mpl",
}
LICENCES |= {"GPL": r"gpl|general public"}


def licences(text: str) -> set[str]:
    """Return the families of licences that a text names."""
    return {name for name, pattern in LICENCES.items() if re.search(pattern, text, flags=re.IGNORECASE)}


DIRECT_DEPENDENCIES = {  # the packages that they depend on belong to them
    "torch": "BSD-3-Clause, parts Apache-2.0, MIT, BSL-1.0",
    "transformers": "Apache-2.0",
    "accelerate": "Apache-2.0",
    "peft": "Apache-2.0",
    "bitsandbytes": "MIT",
    "datasets": "Apache-2.0",
    "gguf": "MIT",
    "tabulate": "MIT",
    "matplotlib": "PSF",
    "sacrebleu": "Apache-2.0",
    "lm-eval": "MIT",
    "mauve-text": "GPL-3.0",  # imported only where it is asked for
    "pytest": "MIT",
    "pytest-timeout": "MIT",
    "pytest-xdist": "MIT",
    "parameterized": "BSD-2-Clause",
    "hypothesis": "MPL-2.0",
    "ruff": "MIT",
    "mypy": "MIT",
    "triton": "MIT",
}


def test_the_licence_of_every_direct_dependency_is_known_and_only_one_is_gpl() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = project["dependencies"]
    optional = [line for lines in project["optional-dependencies"].values() for line in lines]
    rows = DIRECT_DEPENDENCIES
    named = {re.match(r"[\w-]+", line)[0] for line in (*required, *optional)}
    assert set(rows) == named - {project["name"]}
    assert [name for name in rows if "GPL" in licences(rows[name])] == ["mauve-text"]
    for line in (*required, *optional):
        name = re.match(r"[\w-]+", line)[0]
        if name == project["name"]:
            continue
        assert licences(rows[name]), name
        assert line in optional or "GPL" not in licences(rows[name]), name
        try:
            found = metadata(name)
        except PackageNotFoundError:  # the only one that no environment needs
            assert name == "mauve-text"
            continue
        stated = found.get("License-Expression") or " ".join(
            [
                (found.get("License") or "").split("\n")[0],
                *(c for c in found.get_all("Classifier", []) if "License" in c),
            ]
        )
        assert licences(stated) <= licences(rows[name]), (name, stated)
