"""docs/settings.md is what `make settings` makes of service/settings.py."""

from __future__ import annotations

import importlib.util
import re
import sys
from types import ModuleType

import pytest

from service.settings import PREFIX, Settings
from tests.support.paths import PROJECT


@pytest.fixture(scope="module")
def writer() -> ModuleType:
    """scripts/write_settings.py, which is no package."""
    spec = importlib.util.spec_from_file_location("write_settings", PROJECT / "scripts" / "write_settings.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["write_settings"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_committed_page_is_what_the_script_makes(writer: ModuleType):
    """If this fails, run `make settings`."""
    assert writer.PAGE.read_text() == writer.page(list(writer.groups(writer.SOURCE.read_text())))


def test_the_page_has_every_setting_once(writer: ModuleType):
    named = re.findall(rf"^\| `({PREFIX}\w+)` \|", writer.PAGE.read_text(), re.MULTILINE)
    assert named == [PREFIX + name.upper() for name in Settings.model_fields]


def test_comments_go_to_their_group_or_to_their_setting(writer: ModuleType):
    source = (
        "class Settings(BaseSettings):\n"
        "    # About both.\n"
        "    http_port: int = 1  # beside\n"
        "    # Above,\n"
        "    # in two lines.\n"
        "    http_host: str = ''\n"
        "\n"
        "    log_dir: Path = Path('x')\n"
    )
    first, second = writer.groups(source)
    assert first.about == "About both."
    assert first.rows == [("http_port", "beside"), ("http_host", "Above, in two lines.")]
    assert (second.about, second.rows) == ("", [("log_dir", "")])
    assert "at least 0, at most 65535 | beside |" in writer.page([first])
