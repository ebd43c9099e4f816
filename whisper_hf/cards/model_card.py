"""Model cards whose numbers come from results files.

card = model_card(model, "results.json", name="tiny-sparse", license="apache-2.0", commands="python train.py")
card.save(folder / "README.md")  # and push the folder
"""

import copy
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel

from ..model.configuration_whisper_lm import MASKED_SPARSE_ATTENTION, WhisperLMConfig
from ..quantization.int8_linear import METHOD
from .results import Record, Results, check_line, load_results

TEMPLATE = Path(__file__).with_name("template.md")  # to which model_cards/template.md is a link
MISSING = "-"
_IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_LANGUAGE = re.compile(r"[a-z]{2,3}|code|multilingual")
_NUMBER = re.compile(r"(?<!\w)\d[\d.,]*")  # but not those of names such as int8


@dataclass(frozen=True)
class Table:
    """The records of one task: models beside one another."""

    title: str
    caption: str
    markdown: str


def model_card(
    model: PreTrainedModel,
    results: str | os.PathLike | Iterable[str | os.PathLike],
    *,
    name: str,
    license: str,
    commands: str | Sequence[str],
    repo_id: str | None = None,
    base_model: str | list[str] | None = None,
    language: str | list[str] = "en",
    datasets: str | Sequence[str] = (),
    limits: Sequence[str] = (),
) -> ModelCard:
    """Write the card of a model; settings are read from the model, and measured numbers from files.

    Args:
        model: a WhisperLM for causal language modeling, quantized or not.
        results: one or more results files (`whisper_hf.cards.results` describes them). Each task in them becomes a
            table, in which every model of the files has a column; the values of this model become the card's
            `model-index`.
        name: of the model, as it is called in the files.
        license: the Hub's identifier, such as "apache-2.0".
        commands: what made the model, in order, to be typed again.
        repo_id: where the model will be found; its name if left out.
        base_model: Hub id or ids of what it was made from.
        language: code or codes, such as "en".
        datasets: Hub ids of what it was trained on.
        limits: lines for the section on limits. They may repeat a number of the tables or settings, and no other.

    Returns:
        The card, to be saved as `README.md` beside the weights before the folder is pushed.

    Raises:
        ValueError: another model, a results file that is missing or wrong, two values for one measurement, no value of
            this model, a number without a source, or metadata that the Hub does not know.
    """
    _check_model(model)
    files = _load(results)
    records = [record for file in files for record in file.records]
    own = [record for record in records if record.model == name]
    if not own:
        models = sorted({record.model for record in records})
        raise ValueError(f"no record in the results files is of the model {name!r}; they measure {models}")
    repo_id = name if repo_id is None else repo_id
    bases, sources = _names(base_model or ()), _names(datasets)
    _check_metadata(license, _names(language), _names(commands), [repo_id, *bases, *sources])
    tables = [_table(task, records, name) for task in dict.fromkeys(record.task for record in records)]
    settings = _settings(model, bases)
    _check_backed(limits, tables, settings)

    method = _quantization(model).get("quant_method")
    data = ModelCardData(
        license=license,
        language=language,
        base_model=base_model,
        base_model_relation="quantized" if bases and method else None,
        datasets=sources or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[WhisperLMConfig.model_type, "sparse-attention", *([method] if method else [])],
        model_name=name,
        eval_results=[_evaluation(record) for record in own],
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        repo_id=repo_id,
        settings=settings,
        needs_package=method == METHOD,
        commands=_names(commands),
        tables=tables,
        files=files,
        limits=limits,
    )


def _names(value: str | Iterable[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _check_model(model: Any) -> None:
    config = getattr(model, "config", None)
    is_whisper_lm = getattr(config, "model_type", None) == WhisperLMConfig.model_type
    if not isinstance(model, PreTrainedModel) or not is_whisper_lm or not type(model).__name__.endswith("ForCausalLM"):
        raise ValueError(
            f"a card is written for a WhisperLMForCausalLM, got {type(model).__name__}; merge adapters first, and "
            "convert dense models"
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError("a card is written for a whole model, got one with an adapter; merge it first")


def _check_metadata(license: str, languages: list[str], commands: list[str], identifiers: list[str]) -> None:
    for identifier in identifiers:
        validate_repo_id(identifier)
    if not _IDENTIFIER.fullmatch(license):
        raise ValueError(f"license must be an identifier of the Hub such as 'apache-2.0', got {license!r}")
    for code in languages:
        if not _LANGUAGE.fullmatch(code):
            raise ValueError(f"language must be codes such as 'en', 'code' or 'multilingual', got {code!r}")
    if not commands or not all(command.strip() for command in commands):
        raise ValueError(f"commands must say how the model was made, got {commands!r}")


def _load(results: str | os.PathLike | Iterable[str | os.PathLike]) -> list[Results]:
    """Read all files, and see to it that they do not contradict one another."""
    paths = [results] if isinstance(results, str | os.PathLike) else list(results)
    if not paths:
        raise ValueError("a card needs at least one results file, got none")
    files = [load_results(path) for path in paths]
    seen: dict[Any, str] = {}
    for file in files:
        for key in (file.file, *(record.what for record in file.records)):
            if key in seen:
                raise ValueError(f"{key} is in {seen[key]!r} and again in {file.file!r}; name each once")
            seen[key] = file.file
    return files


def _settings(model: PreTrainedModel, bases: list[str]) -> list[tuple[str, str]]:
    """Describe a model by its config: pairs of a name and a value."""
    config, sparse = model.config, model.config.sparse_attention
    layers = config.layer_types.count(MASKED_SPARSE_ATTENTION)
    shown = [("made from", ", ".join(f"`{base}`" for base in bases))] if bases else []
    if config.converted_from:
        shown.append(("dense family that it was converted from", f"`{config.converted_from}`"))
    shown += [
        ("parameters", _show(_count(model))),
        ("positions", f"up to {_show(config.max_position_embeddings)} tokens"),
        ("sparse layers", f"{_show(layers)} of {_show(config.num_hidden_layers)}"),
        ("each token attends to", f"{_show(sparse.budget_blocks * sparse.block_size)} tokens at most"),
        ("in blocks of", f"{_show(sparse.block_size)} tokens"),
        ("chosen blocks, by content", _show(sparse.topk_blocks)),
        ("most recent blocks", _show(sparse.local_blocks)),
        ("first blocks", _show(sparse.sink_blocks)),
    ]
    quantization = [f"`{name}={value}`" for name, value in _quantization(model).items()]
    dtype = str(model.dtype).removeprefix("torch.")
    return [*shown, ("quantization", ", ".join(quantization) or "none"), ("dtype of the rest", f"`{dtype}`")]


def _quantization(model: PreTrainedModel) -> dict[str, Any]:
    """Return what a quantized model's config says, the method first; empty if it is not quantized."""
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        return {}
    found = config if isinstance(config, dict) else config.to_dict()
    method = str(getattr(found["quant_method"], "value", found["quant_method"]))
    rest = {name: value for name, value in found.items() if not name.startswith("_") and value not in (None, [], {})}
    return {"quant_method": method, **{name: value for name, value in rest.items() if name != "quant_method"}}


def _count(model: PreTrainedModel) -> int:
    """Count the parameters that the model has in full precision; quantized ones are packed."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in type(model)(copy.deepcopy(model.config)).parameters())


def _show(value: int | float) -> str:
    """Write a number for people: four digits, or whole numbers in full."""
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.4g}"


def _described(record: Record) -> dict[str, str]:
    """Return what a value depends on, apart from the model, and exactly."""
    metric = f"{record.metric} ({record.unit})" if record.unit else record.metric
    settings = {name: f"{value:,}" if type(value) is int else str(value) for name, value in record.settings.items()}
    return {"dataset": record.dataset, "metric": metric, **settings}


def _table(task: str, records: list[Record], name: str) -> Table:
    """Lay out the records of a task: a row for each metric and setting, a column for each model."""
    records = [record for record in records if record.task == task]
    models = list(dict.fromkeys(record.model for record in records))
    rows: dict[tuple[Any, ...], tuple[dict[str, str], dict[str, str]]] = {}
    for record in records:
        _, cells = rows.setdefault(record.what[1:], (_described(record), {}))
        cells[record.model] = _show(record.value)
    keys = list(dict.fromkeys(key for described, _ in rows.values() for key in described))
    values = {key: {described.get(key, MISSING) for described, _ in rows.values()} for key in keys}
    columns = [key for key in keys if key == "metric" or len(values[key]) > 1]
    caption = "; ".join(f"{key}: {next(iter(values[key]))}" for key in keys if key not in columns)
    lines = [[*columns, *(f"**{model}**" if model == name else model for model in models)]]
    lines.append(["---"] * len(lines[0]))
    for described, cells in rows.values():
        lines.append([*(described.get(key, MISSING) for key in columns), *(cells.get(of, MISSING) for of in models)])
    return Table(task, caption, "\n".join(f"| {' | '.join(line)} |" for line in lines))


def _check_backed(limits: Sequence[str], tables: list[Table], settings: list[tuple[str, str]]) -> None:
    """Refuse a number in prose that the card does not show elsewhere."""
    texts = [*(f"{table.caption} {table.markdown}" for table in tables), *(value for _, value in settings)]
    backed = {number.rstrip(".,") for text in texts for number in _NUMBER.findall(text)}
    for limit in limits:
        unbacked = [
            found for found in _NUMBER.findall(check_line("a limit", limit)) if found.rstrip(".,") not in backed
        ]
        if unbacked:
            raise ValueError(
                f"the limit {limit!r} has {unbacked}, which no results file backs in this form; "
                "put it into one, or say it without the number"
            )


def _evaluation(record: Record) -> EvalResult:
    """Turn a record into an entry of the model-index."""
    described = _described(record)
    dataset, metric = described.pop("dataset"), described.pop("metric")
    settings = [f"{name} {value}" for name, value in described.items()]
    return EvalResult(
        task_type="text-generation",
        task_name="Text Generation",
        dataset_type=dataset,
        dataset_name=dataset,
        metric_type=record.metric,
        metric_name=", ".join([f"{record.task}: {metric}", *settings]),
        metric_value=record.value,
        metric_args=record.settings or None,
    )
