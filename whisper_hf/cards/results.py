"""Read and write results files, which are the only source of numbers in a model card.

A results file says what was measured, by which command and on which device. It is JSON:

    {
      "command": "python measure.py --length 8192",      the command that produced the records
      "device": "one core of an AMD EPYC",
      "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
      "records": [
        {
          "model": "tiny-sparse",                         what was measured: a model, its teacher, human text, ...
          "task": "perplexity by length",                 the records of one task share a table
          "dataset": "user/novels",                       Hub id, or a name
          "metric": "perplexity",
          "value": 21.5,
          "unit": "nats/token",                           optional
          "settings": {"length": 8192}                    optional: anything else that the value depends on
        }
      ]
    }
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

Scalar = str | int | float | bool


@dataclass(frozen=True)
class Record:
    """One measured value, with all that it depends on.

    Args:
        model (`str`): the subject of the measurement, such as a model, its teacher or human text.
        task (`str`): the kind of measurement; the records of one task share a table.
        dataset (`str`): the data, by Hub id or name.
        metric (`str`): name of the measured quantity.
        value (`int` or `float`): the measured value, finite.
        unit (`str`, *optional*): unit of the value, such as `"MB"`; `None` for ratios and other numbers without a unit.
        settings (`dict`, *optional*): anything else that the value depends on, such as `{"length": 8192}`; scalars by
            name.

    Raises:
        ValueError: a field that is empty, of another type or (for numbers) not finite.
    """

    model: str
    task: str
    dataset: str
    metric: str
    value: int | float
    unit: str | None = None
    settings: dict[str, Scalar] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("model", "task", "dataset", "metric"):
            check_line(f"the record's {name}", getattr(self, name))
        if self.unit is not None:
            check_line("the record's unit", self.unit)
        _check_number(f"the value of {self.metric!r} of {self.model!r}", self.value)
        if not isinstance(self.settings, dict):
            raise ValueError(
                f"a record's settings must be a dict of scalars, got {self.settings!r}; leave it out for {{}}"
            )
        for name, value in self.settings.items():
            if check_line("the name of a setting", name) in ("dataset", "metric"):
                raise ValueError(
                    f"a setting cannot be called {name!r}, as the record has this field already; rename it"
                )
            if isinstance(value, str):
                check_line(f"the setting {name!r}", value)
            elif not isinstance(value, bool):
                _check_number(f"the setting {name!r}", value)

    @property
    def what(self) -> tuple[Any, ...]:
        """The identity of a measurement: all fields but the value, which no two records may share."""
        return (self.model, self.task, self.dataset, self.metric, self.unit, *sorted(self.settings.items()))


@dataclass(frozen=True)
class Results:
    """The content of one results file.

    Args:
        file (`str`): name of the file, without folders.
        sha256 (`str`): hash of the file's bytes, hexadecimal.
        command (`str`): the command that produced the records.
        device (`str`): the device on which they were measured.
        versions (`dict[str, str]`): versions of the packages that were used, by package.
        records (`tuple[Record, ...]`): the measured values, at least one.
    """

    file: str
    sha256: str
    command: str
    device: str
    versions: dict[str, str]
    records: tuple[Record, ...]


def load_results(path: str | os.PathLike) -> Results:
    """Read and validate a results file.

    Raises:
        ValueError: a file that does not exist, is not JSON, or does not follow the schema; the message says where.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
        found = json.loads(content)
        head, records = _checked(found)
    except OSError as error:
        raise ValueError(f"no results file can be read at {str(path)!r}: {error.strerror}; measure first") from error
    except ValueError as error:  # the errors of `json` are `ValueError`s too
        raise ValueError(f"the results file {str(path)!r} cannot back a card: {error}") from error
    return Results(path.name, hashlib.sha256(content).hexdigest(), records=records, **head)


def save_results(
    path: str | os.PathLike, records: Iterable[Record | dict[str, Any]], *, command: str, device: str
) -> None:
    """Write a results file, with the versions of this package, torch and transformers.

    Args:
        path: the file to write; its folder must exist.
        records: the measured values, as records or as dicts of their fields.
        command: the command that produced them, as it is to be typed.
        device: the device on which they were measured.

    Raises:
        ValueError: content that `load_results` would refuse; no file is written then.
    """
    versions = {"whisper_hf": version("whisper-hf"), "torch": version("torch"), "transformers": version("transformers")}
    rows = [asdict(record) if isinstance(record, Record) else record for record in records]
    results = {"command": command, "device": device, "versions": versions, "records": rows}
    _checked(results)
    Path(path).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def check_line(what: str, value: Any) -> str:
    """Return a text, after checking that it fits into a cell of a Markdown table.

    Raises:
        ValueError: a value that is not a string, is empty, has several lines or contains `|`.
    """
    if not isinstance(value, str) or not value.strip() or "|" in value or len(value.splitlines()) != 1:
        raise ValueError(f"{what} must be a line of text without '|', got {value!r}; rewrite it")
    return value


def _check_number(what: str, value: Any) -> None:
    """Raise a `ValueError` for a value that is not a finite integer or float."""
    is_finite = math.isfinite(value) if isinstance(value, float) else type(value) is int
    if not is_finite:
        raise ValueError(f"{what} must be a finite number, got {value!r}; measure it again, or leave the record out")


def _checked(found: Any) -> tuple[dict[str, Any], tuple[Record, ...]]:
    """Validate the content of a results file, and return its head (all but the records) and its records."""
    _check_names("the file", found, required=("command", "device", "versions", "records"))
    head = {"command": found["command"], "device": check_line("the device", found["device"])}
    if not isinstance(head["command"], str) or not head["command"].strip():
        raise ValueError(f"command must be what produced the records, got {head['command']!r}; write the command line")
    versions = found["versions"]
    if not isinstance(versions, dict) or not versions:
        raise ValueError(f"versions must map packages to their versions, got {versions!r}; name at least one")
    head["versions"] = {check_line("a package", name): check_line("a version", of) for name, of in versions.items()}
    if not isinstance(found["records"], list) or not found["records"]:
        raise ValueError(f"records must be a list of at least one record, got {found['records']!r}; measure first")
    names = [field.name for field in fields(Record)]
    records: dict[tuple[Any, ...], Record] = {}
    for number, entry in enumerate(found["records"]):
        try:
            _check_names("the record", entry, required=names[:5], optional=names[5:])
            record = Record(**entry)
        except ValueError as error:
            raise ValueError(f"record {number}: {error}") from error
        if record.what in records:
            raise ValueError(f"record {number} measures the same as another, {record.what}; keep only one of the two")
        records[record.what] = record
    return head, tuple(records.values())


def _check_names(what: str, found: Any, required: Iterable[str], optional: Iterable[str] = ()) -> None:
    """Raise a `ValueError` for anything but a dict with all required names, and no unknown ones."""
    if not isinstance(found, dict):
        raise ValueError(f"{what} must be a JSON object, got {type(found).__name__}; write it in {{}}")
    missing = [name for name in required if name not in found]
    unknown = sorted(set(found) - {*required, *optional})
    if missing or unknown:
        may_have = f", and may have {', '.join(optional)}" if optional else ""
        raise ValueError(
            f"{what} must have {', '.join(required)}{may_have}, got missing: {missing}, unknown: {unknown}; "
            "add or remove these"
        )
