"""Results files: what was measured, by which command, on what; the only source of numbers in a model card.

A results file is JSON:

    {
      "command": "python measure.py --length 8192",      what produced the records, to be typed again
      "device": "one core of an AMD EPYC",
      "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
      "records": [
        {
          "model": "tiny-sparse",                         what was measured: a model, its teacher, human text, ...
          "task": "perplexity by length",                 records of one task share a table
          "dataset": "user/novels",                       Hub id, or a name
          "metric": "perplexity",
          "value": 21.5,
          "unit": "nats/token",                           optional
          "settings": {"length": 8192}                    optional: what else the value depends on
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
    """One measured value.

    Args:
        model (`str`): what was measured: a model, its teacher, human text.
        task (`str`): what it was measured by; records of one task share a table.
        dataset (`str`): on which data, a Hub id or a name.
        metric (`str`): name of the value.
        value (`int` or `float`): finite.
        unit (`str`, *optional*): of the value, such as `"MB"`; for ratios and the like there is none.
        settings (`dict`, *optional*): what else the value depends on, such as `{"length": 8192}`; scalars by name.

    Raises:
        ValueError: a value that is missing, not finite or of another type.
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
            raise ValueError(f"a record's settings must be a dict of scalars, got {self.settings!r}")
        for name, value in self.settings.items():
            if check_line("the name of a setting", name) in ("dataset", "metric"):
                raise ValueError(f"a setting cannot be called {name!r}, as the record has that already; rename it")
            if isinstance(value, str):
                check_line(f"the setting {name!r}", value)
            elif not isinstance(value, bool):
                _check_number(f"the setting {name!r}", value)

    @property
    def what(self) -> tuple[Any, ...]:
        """All but the value: no two records may share it."""
        return (self.model, self.task, self.dataset, self.metric, self.unit, *sorted(self.settings.items()))


@dataclass(frozen=True)
class Results:
    """What one file holds.

    Args:
        file (`str`): its name, without folders.
        sha256 (`str`): of its bytes, hexadecimal.
        command (`str`): what produced it.
        device (`str`): on what.
        versions (`dict[str, str]`): of the packages that matter.
        records (`tuple[Record, ...]`): at least one.
    """

    file: str
    sha256: str
    command: str
    device: str
    versions: dict[str, str]
    records: tuple[Record, ...]


def load_results(path: str | os.PathLike) -> Results:
    """Read a results file.

    Raises:
        ValueError: it is not there, not JSON, or does not follow the schema; the message says where.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
        found = json.loads(content)
        head, records = _checked(found)
    except OSError as error:
        raise ValueError(f"no results file can be read at {str(path)!r}: {error.strerror}; measure first") from error
    except ValueError as error:  # what json raises is one, too
        raise ValueError(f"the results file {str(path)!r} cannot back a card: {error}") from error
    return Results(path.name, hashlib.sha256(content).hexdigest(), records=records, **head)


def save_results(
    path: str | os.PathLike, records: Iterable[Record | dict[str, Any]], *, command: str, device: str
) -> None:
    """Write a results file, with the versions of this package, torch and transformers.

    Args:
        path: of the file; its folder must exist.
        records: what was measured.
        command: what produced them, as it must be typed again.
        device: on what they were measured.

    Raises:
        ValueError: anything that `load_results` would not take; nothing is written then.
    """
    from .. import __version__  # not at the top: the package loads this file

    versions = {"whisper_hf": __version__, **{name: version(name) for name in ("torch", "transformers")}}
    rows = [asdict(record) if isinstance(record, Record) else record for record in records]
    results = {"command": command, "device": device, "versions": versions, "records": rows}
    _checked(results)
    Path(path).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def check_line(what: str, value: Any) -> str:
    """Return a text that fits into a table's cell.

    Raises:
        ValueError: it is empty, has several lines or a `|`, or is no text.
    """
    if not isinstance(value, str) or not value.strip() or "|" in value or len(value.splitlines()) != 1:
        raise ValueError(f"{what} must be a line of text without '|', got {value!r}")
    return value


def _check_number(what: str, value: Any) -> None:
    is_finite = math.isfinite(value) if isinstance(value, float) else type(value) is int
    if not is_finite:
        raise ValueError(f"{what} must be a finite number, got {value!r}; measure it again, or leave the record out")


def _checked(found: Any) -> tuple[dict[str, Any], tuple[Record, ...]]:
    """Return the head and the records of what a file holds."""
    _check_names("it", found, required=("command", "device", "versions", "records"))
    head = {"command": found["command"], "device": check_line("the device", found["device"])}
    if not isinstance(head["command"], str) or not head["command"].strip():
        raise ValueError(f"command must be what produced the records, got {head['command']!r}")
    versions = found["versions"]
    if not isinstance(versions, dict) or not versions:
        raise ValueError(f"versions must map packages to their versions, got {versions!r}")
    head["versions"] = {check_line("a package", name): check_line("a version", of) for name, of in versions.items()}
    if not isinstance(found["records"], list) or not found["records"]:
        raise ValueError(f"records must be a list of at least one record, got {found['records']!r}")
    names = [field.name for field in fields(Record)]
    records: dict[tuple[Any, ...], Record] = {}
    for number, entry in enumerate(found["records"]):
        try:
            _check_names("it", entry, required=names[:5], optional=names[5:])
            record = Record(**entry)
        except ValueError as error:
            raise ValueError(f"record {number}: {error}") from error
        if record.what in records:
            raise ValueError(f"record {number} measures the same as another, {record.what}; keep one of them")
        records[record.what] = record
    return head, tuple(records.values())


def _check_names(what: str, found: Any, required: Iterable[str], optional: Iterable[str] = ()) -> None:
    if not isinstance(found, dict):
        raise ValueError(f"{what} must be an object of JSON, got {type(found).__name__}")
    missing = [name for name in required if name not in found]
    unknown = sorted(set(found) - {*required, *optional})
    if missing or unknown:
        raise ValueError(
            f"{what} must have {', '.join(required)}{', and may have ' if optional else ''}{', '.join(optional)}; "
            f"missing: {missing}, unknown: {unknown}"
        )
