"""docker/versions.env is the one place of the image's versions: every default that repeats one is compared with it."""

import re

import pytest

from tests.docker.image_files import DOCKER, ROOT, build_arguments, versions

PYPROJECT = (ROOT / "pyproject.toml").read_text()


def test_are_those_of_the_package():
    assert re.findall(r'^version = "(.+)"$', PYPROJECT, re.MULTILINE) == [versions()["PACKAGE_VERSION"]]
    (sglang,) = re.findall(r'^sglang = \["sglang==(.+)"\]$', PYPROJECT, re.MULTILINE)
    assert versions()["SGLANG_VERSION"] == f"v{sglang}"


def test_digest_is_empty_or_a_digest():
    assert re.fullmatch(r"(sha256:[0-9a-f]{64})?", versions()["SGLANG_DIGEST"])


def test_dockerfile_repeats_them():
    defaults = build_arguments()
    assert defaults.pop("REVISION") == "unknown"
    assert defaults == versions()


@pytest.mark.parametrize("name", ["compose.yaml", "README.md"])
def test_defaults_of_variables_repeat_them(name):
    text = (DOCKER / name).read_text()
    repeated = {key: value for key, value in re.findall(r"\$\{(\w+):-([^}]*)\}", text) if key in versions()}
    assert repeated == {key: versions()[key] for key in repeated}
    assert name != "compose.yaml" or repeated.keys() == versions().keys()


@pytest.mark.parametrize("name", ["kubernetes.yaml", "README.md", "Dockerfile"])
def test_image_names_carry_the_package_version(name):
    tags = set(re.findall(r"\bsglang-ext:(\d[\w.]*)", (DOCKER / name).read_text()))
    assert tags == {versions()["PACKAGE_VERSION"]}
