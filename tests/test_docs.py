"""README and docs name what is there: commands, modules, settings, targets, files."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from typer.main import get_command

from service.cli.main import app
from service.settings import Settings
from tests.support.paths import PROJECT

PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]
PYTHONS_OWN = {"venv", "pip"}


def named(pattern: str) -> set[str]:
    """What the pattern's group is, everywhere in the pages; it is somewhere."""
    found = {name for page in PAGES for name in re.findall(pattern, page.read_text(), re.MULTILINE)}
    assert found
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file(page: Path):
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def test_every_module_that_is_run_is_there():
    modules = named(r"python3? -m ([\w.]+)") - PYTHONS_OWN
    assert [module for module in modules if importlib.util.find_spec(module) is None] == []


def test_every_command_is_there():
    assert named(r"(?:`|/|\$ |0 )glimpse ([a-z]+)") <= get_command(app).commands.keys()


def test_every_target_of_make_is_there():
    targets = set(re.findall(r"^([a-z-]+):.*##", (PROJECT / "Makefile").read_text(), re.MULTILINE))
    assert named(r"(?:^|`)make ([a-z-]+)") <= targets


def test_every_setting_is_there():
    assert named(r"GLIMPSE_([A-Z][A-Z_]*[A-Z])") <= {name.upper() for name in Settings.model_fields}


def test_every_script_is_there():
    assert [name for name in named(r"python3 (scripts/\w+\.py)") if not (PROJECT / name).exists()] == []
