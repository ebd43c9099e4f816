"""Every README stays true: its snippets run, its links lead somewhere, and the names in it exist."""

import argparse
import importlib.util
import re
import shlex
import tomllib
from pathlib import Path
from urllib.parse import unquote

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from whisper_hf.__main__ import COMMANDS, TOOLS
from whisper_hf.conversion import FAMILIES
from whisper_hf.objectives import DIVERGENCES
from whisper_hf.quantization import RECIPES

from .conftest import ROOT, SIZES, tiny_model

HIDDEN_OR_MADE = {"runs", "build", "dist"}  # folders without READMEs of this repository, as those with a leading dot
PATHS = {
    path.relative_to(ROOT).parent.as_posix(): path
    for path in sorted(ROOT.rglob("README.md"))
    if not any(part in HIDDEN_OR_MADE or part.startswith(".") for part in path.relative_to(ROOT).parts)
}
READMES = {folder: path.read_text(encoding="utf-8") for folder, path in PATHS.items()}
PAGES = {path: path.read_text(encoding="utf-8") for path in [*PATHS.values(), ROOT / "examples/benchmarks/LOG.md"]}
SNIPPETS = {
    f"{folder}-{number}": snippet
    for folder, text in READMES.items()
    for number, snippet in enumerate(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))
}
STAND_INS = {"HuggingFaceTB/SmolLM2-135M-Instruct": LlamaConfig(**SIZES), "Qwen/Qwen3-0.6B": Qwen3Config(**SIZES)}
PUBLISHED = ("whisper-lm-135m", "whisper-lm-mini")  # of our own, which the cards load
MOST_LINES, MOST_BYTES = 200, 13 * 1024  # of the first page that a stranger sees
FOLDERS = "whisper_hf|examples|tests|model_cards"
FENCED = re.compile(r"```.*?```", flags=re.DOTALL)


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    """Return a folder with a tiny checkpoint for each name that snippets load."""
    folder = tmp_path_factory.mktemp("hub")
    models = {name: AutoModelForCausalLM.from_config(config) for name, config in STAND_INS.items()}
    for name, model in {**models, **{name: tiny_model() for name in PUBLISHED}}.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("snippet", SNIPPETS.values(), ids=SNIPPETS)
def test_snippets_run(snippet: str, stand_ins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of that name, in the working directory, takes the place of a model of the Hub."""
    for path in stand_ins.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "README.md", "exec"), {})


def test_every_hub_id_has_a_stand_in() -> None:
    named = set(re.findall(r'"([\w-]+/[\w.-]+)"', "".join(SNIPPETS.values())))
    assert named == set(STAND_INS)


def test_the_first_page_leads_to_every_guide() -> None:
    linked = set(re.findall(r"\]\(([\w/.]+README\.md)\)", READMES["."]))
    cards_and_data = {f"model_cards/{name}" for name in PUBLISHED} | {"examples/data"}
    assert linked == {f"{folder}/README.md" for folder in set(READMES) - cards_and_data - {"."}}


def test_the_first_page_is_short() -> None:
    assert len(READMES["."].splitlines()) <= MOST_LINES
    assert len(READMES["."].encode()) <= MOST_BYTES


def test_ci_runs_the_test_command() -> None:
    command = next(line for line in READMES["."].splitlines() if line.endswith("pytest"))
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


def anchors(page: str) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_anchors_are_those_of_github() -> None:
    assert anchors("# A `b_c`, d!\n```\n# no heading\n```\n## E-f (g)\n") == {"a-b_c-d", "e-f-g"}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", PAGES[page]):
        name, _, anchor = unquote(link).partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_and_modules_named_exist(page: Path) -> None:
    text = re.sub(r"\]\([^)]+\)|https?://\S+", "]", PAGES[page])  # links have a test of their own
    for name in re.findall(rf"(?<![\w/.-])(?:{FOLDERS})/[\w./-]*\w", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`([\w.-]+\.(?:py|yaml))`", text):
        found = [(ROOT / name).exists(), *(any((ROOT / folder).rglob(name)) for folder in FOLDERS.split("|"))]
        assert any(found), name
    for module in re.findall(r"python -m ((?:whisper_hf|tests)[\w.]*)", text):
        assert importlib.util.find_spec(module), module


@pytest.mark.parametrize("folder", READMES)
def test_python_names_exist(folder: str) -> None:
    for dotted in re.findall(r"(?<![\w/.])whisper_hf((?:\.[A-Za-z_]\w*)+)", READMES[folder]):
        found, path = importlib.import_module("whisper_hf"), "whisper_hf"
        for part in dotted.split(".")[1:]:
            path = f"{path}.{part}"
            if not hasattr(found, part):
                importlib.import_module(path)
            found = getattr(found, part)


def test_commands_parse() -> None:
    blocks = [block for text in READMES.values() for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)]
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    commands = [words[1:] for words in lines if words[:1] == ["whisper-hf"]]
    assert commands
    for name, *arguments in commands:
        assert name in COMMANDS
        if name not in TOOLS:
            parser = argparse.ArgumentParser()
            importlib.import_module(f"whisper_hf.commands.{name.replace('-', '_')}").add_arguments(parser)
            parser.parse_args(arguments)


@pytest.mark.parametrize("folder", READMES)
def test_commands_named_exist(folder: str) -> None:
    assert set(re.findall(r"whisper-hf ([a-z][\w-]*)", READMES[folder])) <= set(COMMANDS)


def test_the_guide_names_every_command() -> None:
    assert {name for name in COMMANDS if f"| `{name} " not in READMES["whisper_hf"]} == set()


@pytest.mark.parametrize(
    ("names", "folder"),
    [(FAMILIES, "."), (DIVERGENCES, "whisper_hf/distillation"), (RECIPES, "whisper_hf/quantization")],
    ids=["families", "divergences", "recipes"],
)
def test_guides_name_every_choice(names: dict, folder: str) -> None:
    assert names
    assert [name for name in names if f"`{name}`" not in READMES[folder]] == []


def test_the_wheel_has_types_and_no_guides() -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["whisper_hf"]
    assert (ROOT / "whisper_hf" / "py.typed").is_file()
    assert data == ["py.typed", "cards/template.md"]
