"""The documentation is true where a machine can tell: links lead somewhere, settings exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rethinker.config import Config
from rethinker.settings import settings, to_yaml
from tests.families import table
from tests.families.tiny_models import FAMILIES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "kernels/README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
SETTINGS = ROOT / "docs" / "settings.md"
SECTIONS = {setting.key.split(".")[0] for setting in settings() if "." in setting.key}


def anchors(page: Path) -> set[str]:
    """What `#...` may follow a link to a page: its headings as the hub spells them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    """Every relative link is a file of the repository, and its anchor a heading there."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), f"{target} does not exist"
        assert not anchor or anchor in anchors(file), f"{target}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_it_names_exists(page):
    """Every `make TARGET` and every file of the tests is there, and torchrun starts the launcher that there is."""
    text, makefile = page.read_text(), (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:`|^)make ([a-z-]+)", text, flags=re.M):
        assert re.search(rf"^{target}:", makefile, flags=re.M), f"make {target}: no such target"
    files = [str(file) for file in (ROOT / "tests").rglob("test_*.py")]
    for named in re.findall(r"`([\w/]*test_\w+\.py)", text):
        assert any(file.endswith(f"/{named}") for file in files), f"there is no {named}"
    assert "-m rethinker.train" not in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_settings_exist(page):
    """Every `section.name` and --section.name that a page speaks of is a setting, or an entry of a mapping."""
    text = page.read_text()
    names = re.findall(r"--([a-z]+\.[a-z_.]+[a-z_])", text)
    names += [name for name in re.findall(r"`([a-z]+\.[a-z_.]*[a-z_])`", text) if name.split(".")[0] in SECTIONS]
    known = {setting.key for setting in settings()}
    mappings = tuple(f"{setting.key}." for setting in settings() if setting.is_mapping)
    others = {"section.name", "train.py", "run.py", "validation.jsonl"}  # the form of a setting; files
    unknown = {name for name in names if name not in known | others and not name.startswith(mappings)}
    assert not unknown


def settings_reference() -> str:
    """The page with the recipe of all defaults as config.py has it now."""
    preface = SETTINGS.read_text().partition("```yaml\n")[0]
    return f"{preface}```yaml\n{to_yaml(Config())}```\n"


def test_the_settings_reference_is_current():
    """docs/settings.md is what config.py says; `python -m tests.test_docs` writes it again."""
    assert SETTINGS.read_text() == settings_reference()


def test_every_page_can_be_reached():
    """Each page of docs/ is linked from the README or from another page."""
    linked = {
        (page.parent / t.partition("#")[0]).resolve()
        for page in PAGES
        for t in re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    }
    assert {page for page in PAGES if page.parent.name == "docs"} <= linked


if __name__ == "__main__":
    SETTINGS.write_text(settings_reference())


def test_every_family_is_in_the_table():
    """One row each, every cell written by a test that exists."""
    rows = table.read(ROOT / "docs" / "families.md")
    assert list(rows) == sorted(FAMILIES)
    assert [name for name, cells in rows.items() if len(cells) != len(table.COLUMNS) or not all(cells)] == []
    tests = "".join(file.read_text("utf-8") for file in (ROOT / "tests").glob("*/test_*.py"))
    assert all(f"def {test}(" in tests for test in table.COLUMNS.values())
