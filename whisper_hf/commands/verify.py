"""Compare the weights of a checkpoint with its SHA256SUMS, and check that they can be read.

Every checkpoint that this package saves has a SHA256SUMS, which lists the files of weights. The exit status is 0 if all
listed files are as they were saved, 1 if one is not, and 2 if there is nothing to compare. If you changed a file on
purpose, write new checksums in its folder with `sha256sum *.safetensors* > SHA256SUMS`.

example:
  whisper-hf verify smollm2-sparse
"""

import argparse
import sys
from pathlib import Path

from ..checkpoint_io import check_source
from ..model.checkpoint_integrity import find_checksums, find_file, intact_files, leads_out, refuse_garbled
from ..model.checksums import CHECKSUMS, RENEW, RESTORE, digests, read_checksums


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("source", help="folder or Hub id of a checkpoint")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id (default: main)")
    parser.add_argument("--subfolder", default="", help="folder within the source that holds the checkpoint")


def run(options: argparse.Namespace) -> int:
    """Print a line for each file, and return the exit status.

    Raises:
        ValueError: a source without checksums, or with a file of checksums that is not one.
        OSError: the source does not exist.
    """
    source, hub_kwargs = options.source, {"revision": options.revision, "subfolder": options.subfolder}
    check_source(source)
    sums = find_checksums(source, **hub_kwargs)
    listed = read_checksums(sums) if sums else {}
    if not listed:
        raise ValueError(
            f"{source!r} must have a {CHECKSUMS} that lists its files, got {'an empty one' if sums else 'none'}; if "
            f"you trust these files, write it in their folder: `{RENEW}`"
        )
    found = {name: None if leads_out(name) else find_file(source, name, **hub_kwargs) for name in listed}
    paths = {name: path for name, path in found.items() if path is not None}
    got = dict(zip(paths, digests(paths.values()), strict=True))
    for name, expected in listed.items():
        print(f"{name}: {_state(name, expected, got.get(name))}")
    faults = sum(got.get(name) != expected for name, expected in listed.items())
    if faults:
        print(f"{faults} of {len(listed)} files are not as they were saved; {RESTORE}", file=sys.stderr)
        return 1
    return _readable(source, list(paths.values()), hub_kwargs)


def _state(name: str, expected: str, got: str | None) -> str:
    """Return what to say of a file."""
    if leads_out(name):
        return "NOT READ, it is not a file of this checkpoint"
    if got is None:
        return f"MISSING, expected the SHA-256 {expected}"
    return "OK" if got == expected else f"CHANGED, expected the SHA-256 {expected}, got {got}"


def _readable(source: str, verified: list[Path], hub_kwargs: dict) -> int:
    """Check headers and index of a checkpoint whose listed files are as they were saved, and return the exit status."""
    listed = [path for path in verified if path.suffix == ".safetensors"]
    beside = [path for folder in {path.parent for path in verified} for path in folder.glob("*.safetensors")]
    try:
        weights = {*intact_files(source, **hub_kwargs), *beside}
        for path in listed:
            refuse_garbled(path)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    unlisted = sorted(file.name for file in weights if file not in verified)
    if unlisted:
        print(f"{', '.join(unlisted)}: NOT LISTED in {CHECKSUMS}; {RESTORE}", file=sys.stderr)
        return 1
    size = sum(path.stat().st_size for path in verified)
    print(f"{len(verified)} files, {size / 1e6:,.1f} MB: all as they were saved")
    return 0
