"""The Dockerfile, its ignore file and the shell scripts beside it: what linters say, and what they do not look at."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.docker.image_files import DOCKER, FILES, ROOT, build_arguments, instructions, run_tool, script, texts_of


def test_hadolint_is_content():
    done = run_tool("hadolint", "--failure-threshold", "style", "docker/Dockerfile")
    assert done.returncode == 0 and done.stdout == "", done.stdout + done.stderr


def test_shellcheck_is_content():
    scripts = sorted(path.relative_to(ROOT).as_posix() for path in DOCKER.glob("*.sh"))
    assert scripts
    done = run_tool("shellcheck", *scripts)
    assert done.returncode == 0, done.stdout


def test_base_is_pinned_with_and_without_a_digest():
    (base,) = texts_of("FROM")
    # As Docker expands it: the word after :+ stands where the argument is not empty.
    image = base.replace("${SGLANG_VERSION}", build_arguments()["SGLANG_VERSION"])
    assert image.replace("${SGLANG_DIGEST:+@${SGLANG_DIGEST}}", "") == "lmsysorg/sglang:v0.5.23"
    assert build_arguments()["SGLANG_DIGEST"] == ""
    names = [instruction.name for instruction in instructions()]
    assert names[:3] == ["ARG", "ARG", "FROM"]


def test_entry_point_is_in_exec_form():
    (entry,) = texts_of("ENTRYPOINT")
    program, path = json.loads(entry)
    assert program == "python3"
    assert any(text.endswith(path) for text in texts_of("COPY"))
    assert not texts_of("CMD"), "what follows the image's name is arguments of the server"


def test_health_check_asks_the_port_of_the_entry_point():
    (check,) = texts_of("HEALTHCHECK")
    port = script("entrypoint").DEFAULTS["PORT"]
    assert f"${{PORT:-{port}}}/health" in check
    assert texts_of("EXPOSE") == [port]


CACHES = """
import os
from sglang.kernels.jit.utils.compile.cache import cache_root
from sglang.srt.environ import envs, redirect_third_party_caches

redirect_third_party_caches()
print(cache_root(), envs.SGLANG_CACHE_DIR.get(), envs.SGLANG_DG_CACHE_DIR.get(), os.environ["HF_HOME"], sep="\\n")
for name in ("TRITON", "TORCHINDUCTOR", "TILELANG"):
    print(os.environ[f"{name}_CACHE_DIR"])
print(os.environ["FLASHINFER_WORKSPACE_BASE"])
"""


def test_sglang_keeps_what_it_compiles_in_the_volume():
    """As SGLang itself resolves its folders: one that stays in the container is compiled again after every restart."""
    pytest.importorskip("sglang", reason="the sglang extra is not installed")
    set_here = dict(word.split("=", 1) for text in texts_of("ENV") for word in text.split())
    unset = {name: value for name, value in os.environ.items() if "CACHE" not in name and "WORKSPACE" not in name}
    done = subprocess.run([sys.executable, "-c", CACHES], env=unset | set_here, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    folders = done.stdout.split()[-8:]
    assert len(folders) == 8 and all(folder.startswith("/var/cache/sglang-ext/") for folder in folders), folders


def test_labels():
    (labels,) = texts_of("LABEL")
    assert 'image.version="${PACKAGE_VERSION}"' in labels and 'image.revision="${REVISION}"' in labels


def test_nothing_floats():
    text = (DOCKER / "Dockerfile").read_text() + (DOCKER / "install.sh").read_text()
    assert "latest" not in text and "apt" not in text and "--upgrade" not in text
    for line in re.findall(r"pip install .*", text):
        assert "--no-cache-dir" in line
        assert "--no-deps" in line or '"$pinned"' in line, line


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_secrets_and_no_plugin_settings_in_the_image(path):
    text = path.read_text()
    assert not re.search(r"(TOKEN|SECRET|PASSWORD|API_KEY)[\"']?\s*[=:]\s*\S", text)
    if path.name == "Dockerfile":
        assert "SGLANG_EXT_" not in text, "a setting in the image would stand against MODE, STRICT and the others"


def test_only_what_is_copied_is_sent():
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    sent = {line[1:] for line in lines if line.startswith("!")}
    copied = {source for text in texts_of("COPY") for source in text.split()[:-1]}
    assert sent == copied
    assert all((ROOT / source).exists() for source in copied)


def test_readme_names_every_file_and_variable():
    text = (DOCKER / "README.md").read_text()
    names = [path.name for path in FILES if path.name != "README.md"]
    missing = [name for name in (*names, *script("entrypoint").VARIABLES) if f"`{name}`" not in text]
    assert not missing, missing
