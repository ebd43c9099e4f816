"""`whisper-hf verify`: status 0 for files as they were saved, 1 for a fault that it names, 2 for nothing to compare."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from whisper_hf.__main__ import main
from whisper_hf.model.checksums import CHECKSUMS, RENEW, write_checksums

from .conftest import tiny_model

ONE = "model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a model, in one file and in shards."""
    root = tmp_path_factory.mktemp("saved")
    tiny_model().save_pretrained(root / "one")
    tiny_model().save_pretrained(root / "shards", max_shard_size="10KB")
    return {folder.name: folder for folder in root.iterdir()}


@pytest.fixture
def folder(saved: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the folder with one file, to be damaged."""
    return shutil.copytree(saved["one"], tmp_path / "model")


@pytest.mark.parametrize("layout", ["one", "shards"])
def test_whole_folders_have_a_line_for_each_file(layout: str, saved, capsys) -> None:
    files = sorted(saved[layout].glob("*.safetensors*"))
    assert len(files) == 1 or len(files) > 3
    assert main(["verify", str(saved[layout])]) == 0
    *lines, summary = capsys.readouterr().out.splitlines()
    assert sorted(lines) == [f"{file.name}: OK" for file in files]
    size = sum(file.stat().st_size for file in files) / 1e6
    assert summary == f"{len(files)} files, {size:,.1f} MB: all as they were saved"


def change(file: Path) -> None:
    contents = bytearray(file.read_bytes())
    contents[-9] ^= 1
    file.write_bytes(contents)


def truncate_before_hashing(folder: Path) -> None:
    """Leave a file without its end whose checksum is right."""
    (folder / ONE).write_bytes((folder / ONE).read_bytes()[:-1])
    write_checksums(folder)


def hide(folder: Path) -> None:
    """List another file than the weights."""
    (folder / ONE).rename(folder / "adapter_model.safetensors")
    write_checksums(folder)
    (folder / "adapter_model.safetensors").rename(folder / ONE)
    shutil.copy(folder / ONE, folder / "adapter_model.safetensors")


FAULTS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "changed": (
        lambda folder: change(folder / ONE),
        [f"{ONE}: CHANGED, expected the SHA-256 ", ", got ", "1 of 1 files are not as they were saved", RENEW],
    ),
    "cut": (lambda folder: (folder / ONE).write_bytes(b"cut"), [f"{ONE}: CHANGED, expected the SHA-256 "]),
    "missing": (lambda folder: (folder / ONE).unlink(), [f"{ONE}: MISSING, expected the SHA-256 "]),
    "elsewhere": (
        lambda folder: (folder / CHECKSUMS).write_text(f"{'0' * 64}  ../../secret\n"),
        ["../../secret: NOT READ, it is not a file of this checkpoint"],
    ),
    "unreadable": (truncate_before_hashing, [f"{ONE}: OK", "must be a whole safetensors file"]),
    "not listed": (hide, ["adapter_model.safetensors: OK", f"{ONE}: NOT LISTED in {CHECKSUMS}"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(fault: str, folder: Path, capsys) -> None:
    damage, words = FAULTS[fault]
    (folder.parents[0] / "secret").write_text("not to be read")
    damage(folder)
    assert main(["verify", str(folder)]) == 1
    written = capsys.readouterr()
    for word in words:
        assert word in written.out + written.err
    assert "all as they were saved" not in written.out


def test_expected_and_got_are_the_digests(folder: Path, capsys) -> None:
    expected = (folder / CHECKSUMS).read_text()[:64]
    change(folder / ONE)
    main(["verify", str(folder)])
    said = capsys.readouterr().out
    write_checksums(folder)
    got = (folder / CHECKSUMS).read_text()[:64]
    assert got != expected
    assert said == f"{ONE}: CHANGED, expected the SHA-256 {expected}, got {got}\n"
    assert main(["verify", str(folder)]) == 0


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        (None, "got none; if you trust these files, write it in their folder"),
        ("", "got an empty one"),
        ("nonsense\n", "must have lines of a SHA-256 and a file name, got 'nonsense'"),
        (f"{'0' * 64} model.safetensors\n", "must have lines of a SHA-256 and a file name"),
        (f"{'g' * 64}  model.safetensors\n", "must have lines of a SHA-256 and a file name"),
        (f"{'0' * 64}  \n", "must have lines of a SHA-256 and a file name"),
    ],
)
def test_nothing_to_compare_is_misuse(contents: str | None, words: str, folder: Path, capsys) -> None:
    if contents is None:
        (folder / CHECKSUMS).unlink()
    else:
        (folder / CHECKSUMS).write_text(contents)
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["verify", str(folder)])
    written = capsys.readouterr()
    assert words in written.err
    assert written.out == ""


def test_binary_mode_and_capitals_are_read(folder: Path) -> None:
    """What `sha256sum --binary` and tools on other systems write."""
    digest, name = (folder / CHECKSUMS).read_text().split()
    (folder / CHECKSUMS).write_text(f"{digest.upper()} *{name}\n")
    assert main(["verify", str(folder)]) == 0


def test_comments_and_empty_lines_are_skipped(folder: Path, capsys) -> None:
    sums = folder / CHECKSUMS
    sums.write_text("\ufeff# made by us\n\n" + sums.read_text(encoding="utf-8"), encoding="utf-8")
    assert main(["verify", str(folder)]) == 0
    assert f"{ONE}: OK" in capsys.readouterr().out


def test_variants_are_read_and_must_be_listed(folder: Path, capsys) -> None:
    """Weights under another name than the usual one, listed but not readable, and readable but not listed."""
    variant = folder / "model.fp16.safetensors"
    (folder / ONE).rename(variant)
    write_checksums(folder)
    assert main(["verify", str(folder)]) == 0
    (folder / "note.txt").write_text("kept with the weights", encoding="utf-8")
    write_checksums(folder, ["note.txt"])
    capsys.readouterr()
    assert main(["verify", str(folder)]) == 1
    assert f"{variant.name}: NOT LISTED in {CHECKSUMS}" in capsys.readouterr().err
    variant.write_bytes(b"junk")
    write_checksums(folder)
    assert main(["verify", str(folder)]) == 1
    assert "must be a whole safetensors file" in capsys.readouterr().err


def test_a_subfolder_is_verified(folder: Path) -> None:
    assert main(["verify", str(folder.parent), "--subfolder", folder.name]) == 0


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("", "must be a folder or a Hub id, got ''"),
        ("FILE", "must be a folder or a Hub id, got a file"),
        ("/nowhere/at/all", "the folder '/nowhere/at/all' does not exist"),
        ("./mistyped", "the folder './mistyped' does not exist"),
        ("mistyped-folder", "is not a folder, and its SHA256SUMS is not in the cache"),
    ],
)
def test_what_is_no_checkpoint_is_named(source: str, words: str, folder: Path, capsys, monkeypatch) -> None:
    """Offline, so that a name that is not a folder cannot be looked up."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit) as ended:
        main(["verify", str(folder / ONE) if source == "FILE" else source])
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
