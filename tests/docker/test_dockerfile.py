"""The Dockerfile, its ignore file and the shell scripts beside it: what linters say, and what they do not look at."""

import json
import re

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
