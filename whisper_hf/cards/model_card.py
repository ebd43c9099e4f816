"""Write model cards whose settings come from the model and whose numbers come from results files.

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

TEMPLATE = Path(__file__).with_name("template.md")  # model_cards/template.md is a link to this file
MISSING = "-"  # in a cell of a table: not measured
_IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_LANGUAGE = re.compile(r"[a-z]{2,3}|code|multilingual")
_NUMBER = re.compile(r"(?<!\w)\d[\d.,]*")  # not the digits in names such as int8


@dataclass(frozen=True)
class Table:
    """A table of the records of one task, with one column per model.

    Args:
        title: the task.
        caption: what all rows share, such as the dataset.
        markdown: the table, as Markdown.
    """

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
    """Write the card of a model: its settings are read from the model, and measured numbers from results files.

    Args:
        model: a WhisperLM for causal language modeling, quantized or not.
        results: one or more results files (`whisper_hf.cards.results` describes the format). Each task in them becomes
            a table with a column for each model in the files. The values of this model become the card's `model-index`.
        name: name of the model in the results files.
        license: the Hub's identifier of the licence, such as "apache-2.0".
        commands: the commands that made the model, in order, as they are to be typed.
        repo_id: Hub id under which the model will be published; `name` if left out.
        base_model: Hub id or ids of the models from which this one was made.
        language: language code or codes, such as "en".
        datasets: Hub ids of the training data.
        limits: lines for the section on limits. They may repeat a number of the tables or settings, and no other.

    Returns:
        The card, to be saved as `README.md` beside the weights before the folder is pushed.

    Raises:
        ValueError: a model of another kind, a results file that is missing or malformed, two values for one
            measurement, no value of this model, a number in `limits` that no table or setting shows, or metadata that
            the Hub does not accept.
    """
    _check_model(model)
    files = _load(results)
    records = [record for file in files for record in file.records]
    own = [record for record in records if record.model == name]
    if not own:
        models = sorted({record.model for record in records})
        raise ValueError(
            f"no record in the results files is of the model {name!r}; they measure {models}; pass one of these"
        )
    repo_id = name if repo_id is None else repo_id
    bases = _names(base_model or ())
    sources = _names(datasets)
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
    """Return a list of names, also for a single name."""
    return [value] if isinstance(value, str) else list(value)


def _check_model(model: Any) -> None:
    """Raise a `ValueError` for anything but a whole WhisperLM for causal language modeling."""
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
    """Raise a `ValueError` for metadata that the Hub does not accept, or for missing commands."""
    for identifier in identifiers:
        validate_repo_id(identifier)
    if not _IDENTIFIER.fullmatch(license):
        raise ValueError(
            f"license must be an identifier of the Hub such as 'apache-2.0', got {license!r}; see the Hub's list"
        )
    for code in languages:
        if not _LANGUAGE.fullmatch(code):
            raise ValueError(
                f"language must be codes such as 'en', 'code' or 'multilingual', got {code!r}; use ISO 639"
            )
    if not commands or not all(command.strip() for command in commands):
        raise ValueError(f"commands must say how the model was made, got {commands!r}; pass the command lines")


def _load(results: str | os.PathLike | Iterable[str | os.PathLike]) -> list[Results]:
    """Read all results files, and refuse files that share a name or a measurement."""
    paths = [results] if isinstance(results, str | os.PathLike) else list(results)
    if not paths:
        raise ValueError("a card needs at least one results file, got none; write one with save_results")
    files = [load_results(path) for path in paths]
    seen: dict[Any, str] = {}
    for file in files:
        for key in (file.file, *(record.what for record in file.records)):
            if key in seen:
                raise ValueError(f"{key} is in {seen[key]!r} and again in {file.file!r}; pass each only once")
            seen[key] = file.file
    return files


def _settings(model: PreTrainedModel, bases: list[str]) -> list[tuple[str, str]]:
    """Describe the settings of a model as pairs of a name and a value, from its config."""
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
    """Return the quantization settings of a model, with the method first; empty if the model is not quantized."""
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        return {}
    found = config if isinstance(config, dict) else config.to_dict()
    method = str(getattr(found["quant_method"], "value", found["quant_method"]))
    rest = {name: value for name, value in found.items() if not name.startswith("_") and value not in (None, [], {})}
    return {"quant_method": method, **{name: value for name, value in rest.items() if name != "quant_method"}}


def _count(model: PreTrainedModel) -> int:
    """Count the parameters that a model has in full precision; quantized tensors may pack several into one number."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in type(model)(copy.deepcopy(model.config)).parameters())


def _show(value: int | float) -> str:
    """Format a number for reading: with four significant digits, or in full if it is whole or at least 1,000."""
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.4g}"


def _described(record: Record) -> dict[str, str]:
    """Describe, by name, what the value of a record depends on except the model: dataset, metric, settings."""
    metric = f"{record.metric} ({record.unit})" if record.unit else record.metric
    settings = {name: f"{value:,}" if type(value) is int else str(value) for name, value in record.settings.items()}
    return {"dataset": record.dataset, "metric": metric, **settings}


def _table(task: str, records: list[Record], name: str) -> Table:
    """Make the table of a task: a row for each metric and setting, and a column for each model.

    Columns of settings whose value is the same in all rows go into the caption.
    """
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
    """Raise a `ValueError` for a number in the limits that no table or setting of the card shows."""
    texts = [*(f"{table.caption} {table.markdown}" for table in tables), *(value for _, value in settings)]
    backed = {number.rstrip(".,") for text in texts for number in _NUMBER.findall(text)}
    for limit in limits:
        unbacked = [
            found for found in _NUMBER.findall(check_line("a limit", limit)) if found.rstrip(".,") not in backed
        ]
        if unbacked:
            raise ValueError(
                f"the limit {limit!r} has {unbacked}, which no results file backs in this form; add the number to a "
                "results file, or leave it out of the limit"
            )


def _evaluation(record: Record) -> EvalResult:
    """Return a record as an entry of the model-index, the Hub's metadata for measured values."""
    described = _described(record)
    dataset = described.pop("dataset")
    metric = described.pop("metric")
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
