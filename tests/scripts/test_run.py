"""scripts/run.sh and environment.sh over a stand-in of Python: no network, nothing installed, folders with blanks."""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
# What `python -m venv` makes here: a python that notes what pip is asked for, and fails as often as it is told to;
# a sglang-ext that says where and with what it was started.
PYTHON = f"""#!/usr/bin/env bash
case $1 in
  -m) mkdir -p "$3/bin"; cp "$(dirname "$0")"/stubs/* "$3/bin/" ;;
  *) exec "{sys.executable}" "$@" ;;
esac
"""
PIP = """#!/usr/bin/env bash
echo "$*" >> "$NOTES/pip"
[ ! -f "$NOTES/fail" ]
"""
SGLANG_EXT = """#!/usr/bin/env bash
echo "in $PWD:" "$@"
"""
NO_GPU = "#!/usr/bin/env bash\nexit 9\n"
# More than a pipe holds: whoever reads only the first line ends its writer by a signal.
EIGHT_GPUS = """#!/usr/bin/env bash
for n in 0 1 2 3 4 5 6 7; do printf 'GPU %s: H200 %09000d\\n' $n 0; done
printf '%0200000d\\n' 0
"""


class Machine(NamedTuple):
    """environ: for `run.sh`; notes: the folder with what pip was asked for; elsewhere: a folder to start from."""

    environ: dict[str, str]
    notes: Path
    elsewhere: Path

    def run(self, *words: str, cwd: Path | None = None, code: int = 0) -> str:
        done = subprocess.run(words, cwd=cwd or self.elsewhere, env=self.environ, capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def asked(self) -> list[str]:
        return (self.notes / "pip").read_text().splitlines()


@pytest.fixture
def machine(tmp_path) -> Machine:
    folder = tmp_path / "a folder"
    for name, text in (
        ("python", PYTHON),
        ("stubs/python", PIP),
        ("stubs/sglang-ext", SGLANG_EXT),
        ("nvidia-smi", NO_GPU),
    ):
        path = folder / "bin" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    environ = {
        **os.environ,
        "PYTHON": str(folder / "bin" / "python"),
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "XDG_CACHE_HOME": str(folder / "the cache"),
        "NOTES": str(folder),
    }
    (folder / "here").mkdir()
    return Machine(environ, folder, folder / "here")


def test_compares_in_the_callers_folder_and_builds_once(machine):
    script = os.path.relpath(ROOT / "scripts" / "run.sh", machine.elsewhere)
    out = machine.run(script, "--json", "out file.json")
    assert out.splitlines()[-1] == f"in {machine.elsewhere}: compare --json out file.json"
    asked = machine.asked()
    assert machine.run(script).splitlines() == [f"in {machine.elsewhere}: compare"]
    assert machine.asked() == asked, "the second run needs no pip"


def test_an_interrupted_build_is_no_environment(machine):
    (machine.notes / "fail").touch()
    assert "pip could not install the light environment" in machine.run(str(ROOT / "scripts" / "run.sh"), code=1)
    (machine.notes / "fail").unlink()
    assert "building the light environment" in machine.run(str(ROOT / "scripts" / "run.sh"))


def test_help_from_anywhere(machine):
    out = machine.run("./run.sh", "--help", cwd=ROOT / "scripts")
    assert out.startswith("Set up and run the main job.") and "scripts/run.sh MODEL_PATH" in out


def test_an_interrupted_link_is_made_again(machine, tmp_path):
    """Another checkout's pip removes the old link first: after that the environment is linked to none."""
    machine.run(str(ROOT / "scripts" / "run.sh"))
    other = tmp_path / "other"
    (other / "scripts").mkdir(parents=True)
    for name in ("pyproject.toml", "scripts/run.sh", "scripts/environment.sh"):
        (other / name).write_bytes((ROOT / name).read_bytes())
    (machine.notes / "fail").touch()
    machine.run("bash", str(other / "scripts" / "run.sh"), code=1)
    (machine.notes / "fail").unlink()
    asked = len(machine.asked())
    machine.run(str(ROOT / "scripts" / "run.sh"))
    assert [line.split()[-2:] for line in machine.asked()[asked:]] == [["-e", "."]]


def test_gpus_are_seen_however_many_there_are(machine):
    (machine.notes / "bin" / "nvidia-smi").write_text(EIGHT_GPUS)
    machine.run("bash", "-euo", "pipefail", "-c", "source scripts/environment.sh; has_gpu", cwd=ROOT)
    (machine.notes / "bin" / "nvidia-smi").write_text(NO_GPU)
    machine.run("bash", "-euo", "pipefail", "-c", "source scripts/environment.sh; has_gpu", cwd=ROOT, code=1)
