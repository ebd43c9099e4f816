"""Import transformers' own common tests from the source distribution of the installed version.

The installed package does not contain transformers' `tests/`. The source distribution on PyPI contains only the files
at the top of that folder. This file downloads and unpacks it once per version, into `HF_HOME/whisper_hf`, and imports
its files as a package. The few modules that they import from subfolders are replaced by the classes below.
"""

import importlib
import subprocess
import sys
import tarfile
import tempfile
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import transformers
from huggingface_hub import constants

PACKAGE = "transformers_common_tests"


class SourcesUnavailableError(RuntimeError):
    """An error for test sources of transformers that cannot be downloaded or stored; the message says why."""


class ExportTesterMixin:
    """A replacement for the mixin of `tests/exporters/test_export.py` (export to other formats), without tests."""


class GenerationTesterMixin:
    """A replacement for the mixin of `tests/generation/test_utils.py` (`generate`), without tests."""


# A replacement for the table in `tests/utils/test_configuration_utils.py`: the common fields of a config with values
# other than the defaults, for a test that all of them reach the config.
CONFIG_COMMON_KWARGS: dict[str, Any] = {
    "architectures": ["SomeModel"],
    "chunk_size_feed_forward": 7,
    "dtype": "float16",
    "id2label": {0: "only"},
    "label2id": {"only": 0},
    "output_attentions": True,
    "output_hidden_states": True,
    "problem_type": "regression",
    "return_dict": False,
}

STAND_INS: dict[str, dict[str, Any]] = {
    "exporters.test_export": {"ExportTesterMixin": ExportTesterMixin},
    "generation.test_utils": {"GenerationTesterMixin": GenerationTesterMixin},
    "utils.test_configuration_utils": {"config_common_kwargs": CONFIG_COMMON_KWARGS},
}


def import_common_tests(*names: str) -> list[ModuleType]:
    """Import files of transformers' `tests/` by name, after downloading them if needed.

    Raises:
        SourcesUnavailableError: the source distribution cannot be downloaded or stored.
    """
    _add_package(PACKAGE, search=[str(sources_directory())])
    for name, content in STAND_INS.items():
        _add_package(f"{PACKAGE}.{name.partition('.')[0]}", search=[])
        vars(_add_package(f"{PACKAGE}.{name}", search=[])).update(content)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", pytest.PytestUnknownMarkWarning
        )  # transformers' tests have marks that are not registered here
        return [importlib.import_module(f"{PACKAGE}.{name}") for name in names]


def sources_directory() -> Path:
    """Return the unpacked `tests/` folder of the installed version of transformers.

    Raises:
        SourcesUnavailableError: the source distribution cannot be downloaded or stored.
    """
    version = transformers.__version__
    directory = Path(constants.HF_HOME) / "whisper_hf" / f"transformers-{version}-tests"
    if not directory.is_dir():
        try:
            directory.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
                _unpack_tests(_download(version, Path(scratch)), directory)
        except (OSError, tarfile.TarError, subprocess.SubprocessError) as error:
            raise SourcesUnavailableError(f"no source distribution of transformers {version}: {error}") from error
    return directory


def _download(version: str, directory: Path) -> Path:
    """Download the source distribution with pip, which uses the configured index, mirror and proxy."""
    command = [sys.executable, "-m", "pip", "download", f"transformers=={version}", "--no-deps", "--quiet"]
    command += ["--no-binary", "transformers", "--dest", str(directory), "--retries", "1", "--timeout", "60"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    archive = directory / f"transformers-{version}.tar.gz"
    if result.returncode or not archive.is_file():
        reason = result.stderr.strip()[-500:]
        raise SourcesUnavailableError(f"cannot download the source distribution of transformers {version}: {reason}")
    return archive


def _unpack_tests(archive: Path, directory: Path) -> None:
    """Unpack the `tests/` folder of a source distribution beside it, and move the folder to `directory`."""
    prefix = f"{archive.name.removesuffix('.tar.gz')}/tests"
    with tarfile.open(archive) as source:
        members = [member for member in source if member.name.startswith(f"{prefix}/")]
        source.extractall(archive.parent, members, filter="data")
    unpacked = archive.parent / prefix
    (unpacked / "__init__.py").touch()  # `test_configuration_common` loads it by its path
    try:
        unpacked.rename(directory)
    except OSError:  # another process has written it in the meantime
        if not directory.is_dir():
            raise


def _add_package(name: str, search: list[str]) -> ModuleType:
    """Add an empty package to `sys.modules` that finds its submodules in the given folders."""
    package = ModuleType(name)
    package.__path__ = search
    sys.modules[name] = package
    return package
