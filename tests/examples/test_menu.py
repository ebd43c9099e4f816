"""`examples/README.md` names every script in the folder, and nothing that is not there."""

import re

import pytest

from ..conftest import ROOT

EXAMPLES = ROOT / "examples"
MENU = (EXAMPLES / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("folder", ["", "support", "benchmarks", "recipes"])
def test_every_script_is_on_the_menu(folder: str) -> None:
    scripts = {path.relative_to(EXAMPLES).as_posix() for path in (EXAMPLES / folder).glob("[!_]*.py")}
    assert scripts
    assert scripts <= {*re.findall(r"\]\(([^)]+)\)", MENU)}


def test_links_and_commands_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)]+)\)", MENU):
        assert (EXAMPLES / link.partition("#")[0]).exists(), link
    for script in re.findall(r"python (examples/\S+\.py)", MENU):
        assert (ROOT / script).is_file(), script
