"""README and docs say what is true: tables of settings are generated, reasons complete, and what they name exists."""

import dataclasses
import re
from pathlib import Path

import pytest

from indexer_kernels import MODES
from scripts.print_settings import ALL, PAGES, settings_table, with_table
from sglang_ext import policy
from sglang_ext.settings import Settings, load_settings
from sglang_ext.settings_file import read_settings_file

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()
PAPERS = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("page", PAGES)
def test_settings_tables_are_the_generated_ones(page):
    text = (ROOT / page).read_text()
    assert with_table(text, page) == text, "run scripts/print_settings.py --write"


def test_every_setting_is_in_the_table_of_all():
    names = re.findall(r"^\| `(\w+)`", settings_table(ALL), re.MULTILINE)
    assert names == [field.name for field in dataclasses.fields(Settings)]


def test_the_settings_file_of_the_docs_loads(tmp_path):
    text = (ROOT / "docs" / "settings.md").read_text()
    example = text.partition("```json\n")[2].partition("```")[0]
    (tmp_path / "example.json").write_text(example)
    settings = load_settings(None, {"SGLANG_EXT_SETTINGS_FILE": str(tmp_path / "example.json")})
    assert [number for number, _ in settings.layers] == [0, 3, 4]


def test_the_example_of_tuning_is_a_settings_file():
    path = str(ROOT / "docs" / "results" / "tuning" / "small_dsa_settings.json")
    read_settings_file(path).check_model(3, 64, 2048)
    settings = load_settings(None, {"SGLANG_EXT_SETTINGS_FILE": path})
    assert [settings.of_layer(layer).auto_prefill_mode for layer in range(3)] == ["group_rerank"] + 2 * ["misa_rerank"]


def test_every_reason_is_explained():
    text = (ROOT / "docs" / "troubleshooting.md").read_text().partition("## By reason")[2].partition("\n## ")[0]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| `")]
    rows = [(reason.strip("`"), meaning, what) for reason, meaning, what in cells]
    assert {reason for reason, _, _ in rows} == set(policy.UNSUPPORTED) | policy.BY_CHOICE
    assert len(rows) == len(set(rows)) and all(meaning for _, meaning, _ in rows)
    assert all(what for reason, _, what in rows if reason in policy.UNSUPPORTED), "a refusal says what to do"


def test_the_tests_of_faults_exist():
    text = (ROOT / "docs" / "troubleshooting.md").read_text().partition("## By what happened")[2]
    folder = ROOT / "tests" / "sglang_ext"
    for row in re.findall(r"^\| [^|]+\|.*\| ([^|]+) \|$", text, re.MULTILINE)[1:]:
        for name in re.findall(r"`([\w/]+\.py)`", row):
            assert (ROOT / "tests" / name).is_file() or (folder / name).is_file(), name


@pytest.mark.parametrize("paper", PAPERS)
def test_pages_that_a_page_names_exist(paper):
    """`docs/x.md` from the root, `x.md` beside the page, `results/...` below it."""
    path = ROOT / paper
    named = set(re.findall(r"`([\w./]+\.(?:md|svg|json|png))`", path.read_text()))
    named |= set(re.findall(r"\]\(([\w./]+\.(?:md|svg|png))\)", path.read_text()))
    named = {name for name in named if name.endswith((".md", ".svg")) or name.startswith(("docs/", "results/"))}
    missing = [name for name in named if not (ROOT / name).is_file() and not (path.parent / name).is_file()]
    assert not missing, missing


def test_is_short():
    assert len(TEXT.splitlines()) <= 130


def test_every_mode_is_described():
    for mode in MODES:
        assert f"| `{mode}` |" in TEXT, mode


def test_named_files_exist():
    named = set(re.findall(r"(?:scripts|docs)/[a-z_]+\.(?:sh|py|md)", TEXT)) | {"CONTRIBUTING.md"}
    assert {"scripts/run.sh", "scripts/test.sh"} <= named
    missing = [name for name in named if not (ROOT / name).is_file()]
    assert not missing, missing
