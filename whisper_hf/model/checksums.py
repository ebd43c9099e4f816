# Copyright 2026 The whisper_hf authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The file `SHA256SUMS` of a checkpoint: a digest of each file of weights, in the format of `sha256sum -c`.

Saving writes it. Loading compares it only on request (`from_pretrained(..., verify_checksums=True)`), because hashing
takes a second per gigabyte and core, and because another tool may rewrite the weights with good reason.
"""

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CHECKSUMS = "SHA256SUMS"
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")
RENEW = "sha256sum *.safetensors* > SHA256SUMS"
AGAIN = "download it again (`hf download --force-download`), or save it again"
RESTORE = f"{AGAIN}, or, if it was changed on purpose, write new checksums in its folder: `{RENEW}`"


def write_checksums(folder: str | os.PathLike, patterns: Iterable[str] = WEIGHT_FILES) -> None:
    """Write `SHA256SUMS` for files in a folder; `sha256sum -c SHA256SUMS` checks them without this package."""
    files = sorted(file for pattern in patterns for file in Path(folder).glob(pattern))
    lines = [f"{digest}  {file.name}\n" for file, digest in zip(files, digests(files), strict=True)]
    Path(folder, CHECKSUMS).write_text("".join(lines), encoding="utf-8")


def read_checksums(sums: Path) -> dict[str, str]:
    """Return the names of the files in a `SHA256SUMS`, each with its digest of 64 hexadecimal digits.

    Empty lines and lines that begin with `#` are skipped.

    Raises:
        ValueError: a line that is not a digest, two spaces (or a space and `*`, for binary mode) and a name.
    """
    listed = {}
    for line in sums.read_text(encoding="utf-8-sig", errors="replace").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        digest, mode, name = line[:64].lower(), line[64:66], line[66:]
        if len(digest) != 64 or not set(digest) <= set("0123456789abcdef") or mode not in ("  ", " *") or not name:
            raise ValueError(
                f"{sums} must have lines of a SHA-256 and a file name, got {line[:99]!r}; write it again in its "
                f"folder: `{RENEW}`"
            )
        listed[name] = digest
    return listed


def refuse_changed(sums: Path, files: list[Path], remedy: str = RESTORE) -> None:
    """Hash files and compare the digests with those in a `SHA256SUMS`.

    Args:
        sums: the file that lists the digests.
        files: the files to hash, which it must list.
        remedy: the end of the error message.

    Raises:
        ValueError: a file that has another digest, or is not listed.
    """
    listed = read_checksums(sums)
    for file, digest in zip(files, digests(files), strict=True):
        if file.name not in listed:
            raise ValueError(f"{sums} must list {file.name}, got only {sorted(listed)}; {remedy}")
        if listed[file.name] != digest:
            raise ValueError(
                f"{file} is not the file that was saved: expected the SHA-256 {listed[file.name]} of {sums}, got "
                f"{digest}; {remedy}"
            )


def digests(files: Iterable[Path]) -> list[str]:
    """Return the SHA-256 of each file in hexadecimal digits, computed by several threads."""
    with ThreadPoolExecutor() as pool:  # hashing releases Python's global lock
        return list(pool.map(digest_file, files))


def digest_file(file: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
