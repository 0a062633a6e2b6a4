"""The README says what is true: the settings table is generated, the commands and files it names exist."""

import re
from pathlib import Path

from indexer_kernels import MODES
from scripts.print_settings import PAGES, README, with_table

ROOT = Path(__file__).resolve().parent.parent
TEXT = README.read_text()


def test_settings_tables_are_the_generated_ones():
    assert {"README.md", "docs/monitoring.md"} <= set(PAGES)
    for page in PAGES:
        text = (ROOT / page).read_text()
        assert with_table(text, page) == text, f"{page}: run scripts/print_settings.py --write"
        assert page in TEXT or page == "README.md", f"README.md does not say that {page} lists settings"


def test_is_short():
    assert len(TEXT.splitlines()) <= 130


def test_every_mode_is_described():
    for mode in MODES:
        assert f"| `{mode}` |" in TEXT, mode


def test_named_files_exist():
    named = set(re.findall(r"(?:scripts|docs)/[a-z_]+\.(?:sh|py|md)", TEXT))
    assert {"scripts/run.sh", "scripts/test.sh"} <= named
    missing = [name for name in named if not (ROOT / name).is_file()]
    assert not missing, missing
