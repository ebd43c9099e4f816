"""Model cards carry what was measured and what the config says, and no other number."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2.meta
import pytest
import torch
from huggingface_hub import ModelCard, metadata_load
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from whisper_hf import Int8CpuConfig, WhisperLMModel, model_card
from whisper_hf.cards.model_card import TEMPLATE
from whisper_hf.cards.results import Record, load_results, save_results

from ..conftest import ROOT, SIZES, tiny_config, tiny_model

KNOWN = {"name": "tiny", "license": "apache-2.0", "commands": ["python train.py", "python convert.py"]}
COMMAND, DEVICE = "python measure.py --length 4096", "one core"


def record(value: Any = 21.53721, **changes: Any) -> dict[str, Any]:
    known = {"model": "tiny", "task": "perplexity by length", "dataset": "user/novels", "metric": "perplexity"}
    return {**known, "value": value, **changes}


def lengths(model: str, *values: float) -> list[dict[str, Any]]:
    """Records of one model at growing lengths."""
    return [record(value, model=model, settings={"length": 1024 << i}) for i, value in enumerate(values)]


RECORDS = [
    *lengths("teacher", 20.04931, 19.87654),
    *lengths("tiny", 21.53721, 23.71829),
    record(0.31415926, task="repetition", dataset="user/prompts", metric="seq-rep-4", settings={"decoding": "greedy"}),
    record(0.02718281, task="repetition", dataset="user/prompts", metric="seq-rep-4", model="human text"),
    record(538090408, task="size and speed", dataset="user/novels", metric="weights", unit="bytes"),
    record(6543.21, task="size and speed", dataset="user/novels", metric="prefill", unit="tokens/s"),
]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A results file of a model, its teacher and human text."""
    save_results(tmp_path / "results.json", RECORDS, command=COMMAND, device=DEVICE)
    return tmp_path / "results.json"


@pytest.fixture
def write(results: Path) -> Callable[..., Path]:
    """Return a function that changes the fields of the results file, as no command of ours would."""

    def change(**changes: Any) -> Path:
        kept = {**json.loads(results.read_text()), **changes}
        results.write_text(json.dumps({name: value for name, value in kept.items() if value != "leave out"}))
        return results

    return change


def tables(card: ModelCard) -> list[list[list[str]]]:
    """Return the cells of each table."""
    found = re.findall(r"((?:^\|.*\|\n)+)", card.text, flags=re.MULTILINE)
    return [[line.strip("| ").split(" | ") for line in table.splitlines()] for table in found]


def test_metadata_are_valid_and_survive(results: Path, tmp_path: Path) -> None:
    base, data = "HuggingFaceTB/SmolLM2-135M-Instruct", ["user/novels", "user/more"]
    card = model_card(tiny_model(), results, base_model=base, datasets=data, language=["en", "es"], **KNOWN)
    card.save(tmp_path / "README.md")
    metadata = metadata_load(tmp_path / "README.md")
    assert metadata == ModelCard.load(tmp_path / "README.md").data.to_dict() == card.data.to_dict()
    index = metadata.pop("model-index")
    assert metadata == {
        "license": "apache-2.0",
        "base_model": base,
        "language": ["en", "es"],
        "datasets": data,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["whisper_lm", "sparse-attention"],
    }
    assert [model["name"] for model in index] == ["tiny"]
    metrics = [metric for entry in index[0]["results"] for metric in entry["metrics"]]
    own = [entry for entry in RECORDS if entry["model"] == "tiny"]
    found = [(metric["type"], metric["value"], metric.get("args", {})) for metric in metrics]
    expected = [(entry["metric"], entry["value"], entry.get("settings", {})) for entry in own]
    assert sorted(found, key=str) == sorted(expected, key=str)
    assert len({metric["name"] for metric in metrics}) == len(own)
    assert {entry["task"]["type"] for entry in index[0]["results"]} == {"text-generation"}


def test_tables_put_models_side_by_side(results: Path) -> None:
    by_length, repetition, size = tables(model_card(tiny_model(), results, **KNOWN))
    assert by_length == [
        ["metric", "length", "teacher", "**tiny**"],
        ["---"] * 4,
        ["perplexity", "1,024", "20.05", "21.54"],
        ["perplexity", "2,048", "19.88", "23.72"],
    ]
    assert repetition[0] == ["metric", "decoding", "**tiny**", "human text"]
    assert repetition[2:] == [["seq-rep-4", "greedy", "0.3142", "-"], ["seq-rep-4", "-", "-", "0.02718"]]
    assert size[2:] == [["weights (bytes)", "538,090,408"], ["prefill (tokens/s)", "6,543"]]


def test_every_number_has_a_source(results: Path) -> None:
    """What a card says apart from its settings, commands and file names are these numbers, and no others."""
    text = model_card(tiny_model(), results, **KNOWN).text
    text = re.sub(r"(?s:```.*?```)|^- .*$|^.*sha256.*$", "", text, flags=re.MULTILINE)
    values = {"20.05", "19.88", "21.54", "23.72", "0.3142", "0.02718", "538,090,408", "6,543"}
    settings = {"1,024", "2,048", "4"}  # the last one is that of seq-rep-4
    assert set(re.findall(r"(?<!\w)\d[\d.,]*", text)) == values | settings


def test_files_are_named_with_their_hash(results: Path, tmp_path: Path) -> None:
    more = tmp_path / "more.json"
    save_results(more, [record(7.5, metric="BLEU")], command="python translate.py", device="another machine")
    card = model_card(tiny_model(), [results, more], **KNOWN)
    for path in (results, more):
        assert f"`{path.name}` (sha256 `{hashlib.sha256(path.read_bytes()).hexdigest()}`)" in card.text
    assert f"on {DEVICE} with whisper_hf" in card.text
    for command in (COMMAND, "python translate.py", *KNOWN["commands"]):
        assert f"```bash\n{command}\n```" in card.text
    assert ["BLEU", "-", "-", "7.5"] in tables(card)[0]


def test_settings_are_those_of_the_model(results: Path) -> None:
    model = tiny_model(layer_types=["full_attention", "masked_sparse_attention"], converted_from="qwen3")
    text = model_card(model, results, **KNOWN).text
    assert f"- parameters: {sum(parameter.numel() for parameter in model.parameters()):,}\n" in text
    assert "- sparse layers: 1 of 2\n" in text
    assert "- each token attends to: 48 tokens at most\n- in blocks of: 16 tokens\n" in text
    assert "converted from: `qwen3`" in text
    assert "- quantization: none\n" in text


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), "bnb_4bit_quant_type=nf4"),
        (Int8CpuConfig(), "activation_bits=16"),
    ],
    ids=["nf4", "int8-cpu"],
)
def test_a_quantized_model_says_so(results: Path, tmp_path: Path, config: Any, said: str) -> None:
    full = tiny_model(hidden_size=64, intermediate_size=128)
    full.save_pretrained(tmp_path / "full")
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path / "full", quantization_config=config)
    card = model_card(quantized, results, base_model="user/full", **KNOWN)
    assert said in card.text
    assert f"- parameters: {sum(parameter.numel() for parameter in full.parameters()):,}\n" in card.text
    assert card.data.base_model_relation == "quantized"
    method = config.quant_method if isinstance(config.quant_method, str) else config.quant_method.value
    assert method in card.data.tags
    assert ("trust_remote_code" in card.text) == (method != "int8-cpu")  # whose layers do not travel with the weights


def test_the_template_is_one_file_and_gets_what_it_asks_for(results: Path) -> None:
    source = TEMPLATE.read_text(encoding="utf-8")
    assert (ROOT / "model_cards" / "template.md").read_text(encoding="utf-8") == source
    assert "cards/template.md" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")  # it is part of the package
    asked = jinja2.meta.find_undeclared_variables(jinja2.Environment().parse(source))
    given: set[str] = set()
    original = ModelCard.from_template
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelCard, "from_template", lambda data, **known: given.update(known) or original(data, **known))
        model_card(tiny_model(), results, **KNOWN)
    assert asked <= given | {"card_data", "license"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "21.5", True, [1.0]])
def test_a_value_that_is_no_number_is_refused(write: Callable[..., Path], value: Any) -> None:
    path = write(records=[record(), record(value, metric="other")])
    with pytest.raises(
        ValueError, match=r"record 1: the value of 'other' of 'tiny' must be a finite number, got .*again"
    ):
        model_card(tiny_model(), path, **KNOWN)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"records": []}, r"at least one record, got \[\]"),
        ({"records": [record(), record(22.0)]}, "record 1 measures the same as another"),
        ({"records": [{"model": "tiny"}]}, "record 0.*missing: .*'task', 'dataset', 'metric', 'value'"),
        ({"records": [record(values=3)]}, "unknown: .'values'."),
        ({"records": [record(metric="a | b")]}, r"metric must be a line of text without '\|', got 'a \| b'"),
        ({"records": [record(settings={"length": None})]}, "the setting 'length' must be a finite number, got None"),
        ({"records": [record(settings={"metric": 1})]}, "a setting cannot be called 'metric'"),
        ({"records": [record(unit="")]}, "unit must be a line"),
        ({"command": "leave out"}, "missing: .'command'."),
        ({"command": " "}, "command must be what produced"),
        ({"device": 3}, "the device must be a line of text"),
        ({"versions": {}}, "versions must map packages"),
        ({"note": "x"}, "unknown: .'note'."),
    ],
)
def test_a_wrong_results_file_is_refused(write: Callable[..., Path], changes: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=f"results.json' cannot back a card: .*{error}"):
        load_results(write(**changes))


def test_no_results_no_card(results: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no results file can be read at .*none.json': No such file.*; measure first"):
        model_card(tiny_model(), tmp_path / "none.json", **KNOWN)
    (tmp_path / "torn.json").write_text(results.read_text()[:100])
    with pytest.raises(ValueError, match=r"torn.json' cannot back a card"):
        model_card(tiny_model(), tmp_path / "torn.json", **KNOWN)
    with pytest.raises(ValueError, match="at least one results file"):
        model_card(tiny_model(), [], **KNOWN)
    with pytest.raises(ValueError, match=r"of the model 'mini'; they measure \['human text', 'teacher', 'tiny'\]"):
        model_card(tiny_model(), results, **{**KNOWN, "name": "mini"})


def test_files_may_not_contradict_one_another(results: Path, tmp_path: Path) -> None:
    save_results(tmp_path / "more.json", lengths("tiny", 20.0), command=COMMAND, device=DEVICE)
    with pytest.raises(ValueError, match=r"is in 'results.json' and again in 'more.json'"):
        model_card(tiny_model(), [results, tmp_path / "more.json"], **KNOWN)


def test_prose_may_only_repeat_numbers(results: Path) -> None:
    limits = ["Perplexity rises to 23.72 at 2,048 tokens, in int8 too.", "It sees 48 tokens."]
    assert f"- {limits[0]}\n- {limits[1]}\n" in model_card(tiny_model(), results, limits=limits, **KNOWN).text
    with pytest.raises(ValueError, match=r"has \['35'\], which no results file backs"):
        model_card(tiny_model(), results, limits=["It is 35 % worse than at 1,024 tokens."], **KNOWN)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"license": "Apache 2"}, "license must be an identifier.*got 'Apache 2'"),
        ({"language": "English"}, "language must be codes.*got 'English'"),
        ({"commands": []}, r"commands must say how the model was made, got \[\]"),
        ({"base_model": "runs/my model"}, "runs/my model"),
        ({"datasets": ["a/b/c"]}, "a/b/c"),
    ],
)
def test_wrong_metadata_are_refused(results: Path, changes: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        model_card(tiny_model(), results, **{**KNOWN, **changes})


def test_only_whole_language_models_have_a_card(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    for model in (
        WhisperLMModel(tiny_config()),
        LlamaForCausalLM(LlamaConfig(**SIZES)),
        adapted,
        torch.nn.Linear(1, 1),
    ):
        with pytest.raises(ValueError, match=f"for a WhisperLMForCausalLM, got {type(model).__name__}"):
            model_card(model, results, **KNOWN)
    model = tiny_model()
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0")  # 5.24 asks for one that is not out yet
    model.add_adapter(LoraConfig(target_modules="all-linear"))
    with pytest.raises(ValueError, match="one with an adapter; merge it first"):
        model_card(model, results, **KNOWN)


def test_a_results_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be a finite number"):
        save_results(tmp_path / "new.json", [record(float("nan"))], command=COMMAND, device=DEVICE)
    assert not (tmp_path / "new.json").exists()
    save_results(tmp_path / "new.json", [Record(**record())], command=COMMAND, device=DEVICE)
    loaded = load_results(tmp_path / "new.json")
    assert loaded.records == (Record(**record()),)
    assert loaded.versions["torch"] == torch.__version__
