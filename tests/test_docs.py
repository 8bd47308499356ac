"""README, CONTRIBUTING and docs name what is there: commands, modules, settings, targets, paths."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.main import get_command

from service.cli.main import app
from service.edges.http.schema import VqaRequest
from service.settings import OF_THE_COMMAND, PREFIX, Settings
from service.telemetry.metrics import Metrics
from tests.deploy.metric_names import known_metrics
from tests.support.paths import PROJECT

PAGES = [
    PROJECT / "README.md",
    PROJECT / "CONTRIBUTING.md",
    *sorted((PROJECT / "docs").glob("*.md")),
    *sorted((PROJECT / "deploy").glob("*/README.md")),
]
PYTHONS_OWN = {"venv", "pip", "pytest"}
MOST_WORDS = 1_000  # of the README, without code and tables: two minutes and a half of reading
FOLDERS = "service|triton_models|model_repository|reference|build_engines|benchmarks|tests|scripts|docs|examples|deploy"


def named(pattern: str) -> set[str]:
    """What the pattern's group is, everywhere in the pages; it is somewhere."""
    found = {name for page in PAGES for name in re.findall(pattern, page.read_text(), re.MULTILINE)}
    assert found
    return found


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Of each heading as GitHub makes it: lower case, spaces as hyphens, other characters left out."""
    headings = re.findall(r"^#+ (.+)$", without_code(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def leads_somewhere(link: str, page: Path) -> bool:
    file, _, anchor = link.partition("#")
    target = page.parent / file if file else page
    return target.exists() and (not anchor or anchor in anchors(target))


@pytest.mark.parametrize("page", [*PAGES, PROJECT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_every_link_leads_to_a_file_and_its_heading(page: Path):
    links = re.findall(r"\]\(([^)]+)\)", without_code(page.read_text()))
    assert [link for link in links if "://" not in link and not leads_somewhere(link, page)] == []


def test_every_path_in_code_marks_is_there():
    paths = named(rf"`((?:{FOLDERS})/[\w./-]*)`")
    assert sorted(path for path in paths if not (PROJECT / path).exists()) == []


def test_every_test_that_a_page_names_is_there():
    tests = "".join(path.read_text() for path in (PROJECT / "tests").rglob("test_*.py"))
    assert sorted(name for name in named(r"`(test_\w+)`") if f"def {name}(" not in tests) == []
    files = {path.name for path in (PROJECT / "tests").rglob("test_*.py")}
    assert named(r"`(?:tests/[\w/]*)?(test_\w+\.py)`") <= files


def test_the_readme_is_short():
    """Two minutes for a newcomer; the rest has pages of its own."""
    text = without_code((PROJECT / "README.md").read_text())
    prose = "\n".join(line for line in text.splitlines() if not line.startswith("|"))
    words = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", prose).split()
    assert 200 < len(words) <= MOST_WORDS


def test_every_module_that_is_run_is_there():
    modules = named(r"python3? -m ([\w.]+)") - PYTHONS_OWN
    assert [module for module in modules if importlib.util.find_spec(module) is None] == []


def test_every_command_is_there():
    assert named(r"(?:`|/|\$ |0 )glimpse ([a-z]+)") <= get_command(app).commands.keys()


def command_lines(page: Path) -> Iterator[list[str]]:
    """The words after `glimpse` of each command line in the page's code."""
    text = page.read_text()
    blocks = re.findall(r"^```sh\n(.*?)^```$|^((?:    .*\n)+)", text, re.MULTILINE | re.DOTALL)
    lines = "".join(map("".join, blocks)).replace("\\\n", " ").splitlines()
    for line in lines + re.findall(r"`([^`]*\bglimpse [a-z][^`]*)`", text.replace("\n", " ")):
        found = re.match(r"\s*(?:\$ )?(?:[A-Z_]+=\S* +)*(?:\.venv/bin/)?glimpse ([a-z].*)", line)
        if found:
            yield shlex.split(found[1], comments=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_every_option_of_a_command_is_there(page: Path):
    for words in command_lines(page):
        command, rest = get_command(app), list(words)
        while hasattr(command, "commands") and rest:
            command = command.commands[rest.pop(0)]
        if command.context_settings.get("ignore_unknown_options"):  # passed on to a tool that reads them itself
            continue
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert {word.partition("=")[0] for word in rest if word.startswith("-")} <= known | {"--help"}, words


def test_every_target_of_make_is_there():
    targets = set(re.findall(r"^([a-z-]+):.*##", (PROJECT / "Makefile").read_text(), re.MULTILINE))
    assert named(r"(?:^|`)make ([a-z-]+)") <= targets


def test_every_setting_is_there():
    known = {PREFIX + name.upper() for name in Settings.model_fields} | set(OF_THE_COMMAND)
    assert named(r"(GLIMPSE_[A-Z][A-Z_]*[A-Z])") <= known


def test_every_metric_is_there():
    families = {family.name for family in Metrics().registry.collect()}
    assert named(r"`(glimpse_\w+)`") <= families | known_metrics()


def test_the_api_page_has_every_field_of_a_question():
    page = (PROJECT / "docs" / "api.md").read_text()
    section = page.partition("\n## A question\n")[2].partition("\n### ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == VqaRequest.model_fields.keys()


def test_every_script_is_there():
    assert [name for name in named(r"python3 (scripts/\w+\.py)") if not (PROJECT / name).exists()] == []
