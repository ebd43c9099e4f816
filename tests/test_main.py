"""The command line: what it says, what it imports and when, and how it ends."""

import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import whisper_hf
from whisper_hf.__main__ import COMMANDS, TOOLS, main

from .conftest import ROOT

OPTIONS = {  # of the commands that parse their own arguments
    "convert": "source target --to-dense --max-shard-size --block-size --topk-blocks --local-blocks --sink-blocks",
    "quantize": "source target --recipe --keep --dtype --device --text --no-comparison --max-shard-size "
    "--trust-remote-code",
    "verify": "source --revision --subfolder",
    "cache-signals": "--teacher --dataset --output --top-k --samples --temperature --tokenizer --split --text-column "
    "--max-length --batch-size --dtype --seed",
}
# runs `python -m whisper_hf` with several arguments in one process; prints what each call writes to stdout, its exit
# status, and the modules that it imports beyond those of the package and of the calls before
CALLS = """
import contextlib, io, json, runpy, sys
import whisper_hf

for call in json.loads(sys.argv[1]):
    sys.argv, before, written = ["whisper_hf", *call], set(sys.modules), io.StringIO()
    with contextlib.redirect_stdout(written):
        try:
            runpy.run_module("whisper_hf", run_name="__main__", alter_sys=True)
        except SystemExit as left:
            status = left.code
    print(json.dumps([written.getvalue(), status, sorted(set(sys.modules) - before)]))
"""


def printed(arguments: list[str], capsys: pytest.CaptureFixture) -> str:
    """Return what a call prints that ends with status 0."""
    with pytest.raises(SystemExit, match=r"^0$"):
        main(arguments)
    return capsys.readouterr().out


def refusal(arguments: list[str], capsys: pytest.CaptureFixture) -> str:
    """Return the last line of what a call prints to stderr that ends with status 2."""
    with pytest.raises(SystemExit, match=r"^2$"):
        main(arguments)
    written = capsys.readouterr()
    assert written.out == ""
    assert "Traceback" not in written.err
    return written.err.splitlines()[-1]


def test_help_has_a_line_for_each_command(capsys) -> None:
    lines = printed(["--help"], capsys).splitlines()
    assert lines[0] == "usage: whisper-hf [-h] [--version] COMMAND ..."
    listed = [line.split(maxsplit=1) for line in lines if re.match(r"  [a-z]", line) and "whisper-hf" not in line]
    assert dict(listed) == COMMANDS
    assert sum(line.startswith("  whisper-hf ") for line in lines) == 3  # examples
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("command", OPTIONS)
def test_help_of_a_command_has_its_options_and_an_example(command: str, capsys) -> None:
    text = printed([command, "--help"], capsys)
    assert re.match(rf"usage: whisper-hf {command} \[-h\]", text)
    assert re.search(rf"^example:\n  whisper-hf {command} \S", text, flags=re.MULTILINE)
    listed = re.findall(r"^  (?:-h, )?(--[a-z-]+|[a-z]+)(?= |$)", text.partition("example:")[2], flags=re.MULTILINE)
    assert sorted(listed) == sorted([*OPTIONS[command].split(), "--help"])
    assert set(OPTIONS) == set(COMMANDS) - set(TOOLS)


def test_examples_in_help_parse(capsys, monkeypatch) -> None:
    for command in OPTIONS:
        text = printed([command, "--help"], capsys)
        example = re.search(rf"^  whisper-hf ({command} .*)$", text, flags=re.MULTILINE).group(1)
        seen = []
        monkeypatch.setattr(f"whisper_hf.commands.{command.replace('-', '_')}.run", seen.append)
        main(example.split())
        assert len(seen) == 1, example


def test_help_of_lm_eval_is_the_harness_own(capsys) -> None:
    pytest.importorskip("lm_eval", reason="it is not installed: pip install 'whisper-hf[evaluation]'")
    text = printed(["lm-eval", "--help"], capsys)
    assert "whisper-hf lm-eval run --model hf" in text
    assert "usage: lm-eval" in text


def test_arguments_of_other_tools_go_untouched(monkeypatch) -> None:
    pytest.importorskip("lm_eval", reason="it is not installed: pip install 'whisper-hf[evaluation]'")
    given = ["run", "--model", "hf", "--", "--version", "-h"]
    seen: list[list[str]] = []
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: seen.append(sys.argv))
    monkeypatch.setattr(sys, "argv", sys.argv)
    assert main(["lm-eval", *given]) == 0
    assert seen == [["lm-eval", *given]]


def test_a_package_that_a_command_lacks_is_named(capsys, monkeypatch) -> None:
    monkeypatch.delitem(sys.modules, "whisper_hf.commands.convert", raising=False)
    monkeypatch.setitem(sys.modules, "whisper_hf.conversion", None)
    assert refusal(["convert", "source", "target"], capsys).startswith("whisper-hf convert: error: import of")


def test_version(capsys) -> None:
    assert printed(["--version"], capsys) == f"whisper-hf {whisper_hf.__version__}\n"


def test_the_console_script_is_this_command_line() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    assert [EntryPoint(name, value, "console_scripts").load() for name, value in scripts.items()] == [main]
    assert list(scripts) == ["whisper-hf"]


def test_an_unknown_command_lists_the_known_ones(capsys) -> None:
    message = refusal(["nonsense"], capsys)
    assert message.startswith("whisper-hf: error: argument COMMAND: invalid choice: 'nonsense' (choose from ")
    assert re.findall(r"[a-z][a-z-]+", message.partition("choose from ")[2]) == list(COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "whisper-hf: error: the following arguments are required: COMMAND"),
        (["--nonsense"], "whisper-hf: error: "),
        (["convert", "FOLDER"], "whisper-hf convert: error: the following arguments are required: target"),
        (["convert", "FOLDER", "new", "--nonsense"], "whisper-hf convert: error: unrecognized arguments: --nonsense"),
        (["convert", "FOLDER", "new", "--block-size", "x"], "argument --block-size: invalid int value: 'x'"),
        (["convert", "FOLDER", "new", "--block-size", "17"], "block_size must be a power of two, got 17"),
        (["convert", "FOLDER", "new"], "Unrecognized model in FOLDER"),
        (["convert", "/no/such", "new"], "'/no/such'"),
        (["quantize", "FOLDER", "new"], "whisper-hf quantize: error: the following arguments are required: --recipe"),
        (["quantize", "FOLDER", "new", "--recipe", "int3"], "argument --recipe: invalid choice: 'int3' (choose from"),
        (
            ["quantize", "FOLDER", "new", "--recipe", "nf4", "--text", "/no/such"],
            "No such file or directory",
        ),
        (["quantize", "/no/such", "new", "--recipe", "nf4"], "'/no/such'"),
        (["verify"], "whisper-hf verify: error: the following arguments are required: source"),
        (["verify", "/no/such"], "'/no/such'"),
        (["cache-signals"], "the following arguments are required: --teacher, --dataset, --output"),
    ],
)
def test_bad_input_ends_with_status_2_and_a_line(arguments, message, tmp_path, capsys, monkeypatch) -> None:
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    folder = str(tmp_path / "folder")
    got = refusal([folder if argument == "FOLDER" else argument for argument in arguments], capsys)
    assert message.replace("FOLDER", folder) in got
    assert [path.name for path in Path().iterdir()] == ["folder"]


def test_python_m_imports_a_command_when_it_runs() -> None:
    """In a fresh process: help and version nothing beyond `import whisper_hf`, each command only what it needs."""
    calls = [["--version"], ["--help"], ["nonsense"], ["verify"], ["convert"], ["quantize"], ["cache-signals"]]
    command = [sys.executable, "-c", CALLS, json.dumps(calls)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "RuntimeWarning" not in done.stderr
    answers = {call[0]: json.loads(line) for call, line in zip(calls, done.stdout.splitlines(), strict=True)}
    assert answers["--version"][0] == f"whisper-hf {whisper_hf.__version__}\n"
    for word, (_, status, modules) in answers.items():
        assert status == (0 if word in ("--version", "--help") else 2)
        ours = {name for name in modules if name.startswith("whisper_hf.")}
        packages = {name.partition(".")[0] for name in modules}
        if word in COMMANDS:
            commands = {name for name in ours if name.startswith("whisper_hf.commands.")}
            assert commands == {f"whisper_hf.commands.{word.replace('-', '_')}"}
        else:
            assert ours == set()
            assert not packages & {"torch", "transformers"}
        if word not in ("quantize", "cache-signals"):
            assert not packages & {"peft", "datasets", "bitsandbytes"}
    assert "whisper_hf.conversion" not in answers["verify"][2]
