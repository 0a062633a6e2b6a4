"""docker/compose.yaml as Docker Compose itself reads it: one service per mode, each alone in its profile."""

import json

import pytest
import yaml

from sglang_ext.settings import SERVE_MODES
from tests.docker.image_files import DOCKER, build_arguments, run_tool, script, texts_of

FILE = yaml.safe_load((DOCKER / "compose.yaml").read_text())
SERVICES = FILE["services"]
MODES = ["native", "misa", "misa_rerank", "hisa", "auto"]
ENTRYPOINT = script("entrypoint")


def resolved(tmp_path, *profiles, **variables):
    """The services Compose would start for these profiles."""
    chosen = [word for profile in profiles for word in ("--profile", profile)]
    arguments = ["-f", "docker/compose.yaml", *chosen, "config", "--format", "json"]
    done = run_tool("docker-compose", *arguments, **({"MODEL_FOLDER": str(tmp_path)} | variables))
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "Compose warns"
    return json.loads(done.stdout)["services"]


def test_one_service_and_profile_per_mode():
    assert sorted(SERVICES) == sorted(MODES)
    for name, service in SERVICES.items():
        assert service["profiles"] == [name]
        assert service["environment"]["MODE"] == name
        assert name in SERVE_MODES


@pytest.mark.parametrize("mode", MODES)
def test_variables_are_those_of_the_entry_point(mode):
    assert set(SERVICES[mode]["environment"]) <= set(ENTRYPOINT.VARIABLES)


@pytest.mark.parametrize("mode", MODES)
def test_profile_starts_one_complete_service(mode, tmp_path):
    services = resolved(tmp_path, mode)
    assert list(services) == [mode]
    service = services[mode]
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia" and device["capabilities"] == ["gpu"]
    assert int(service["shm_size"]) >= 16 << 30
    assert service["restart"] == "on-failure:5"
    assert "/health" in service["healthcheck"]["test"][-1]
    (port,) = service["ports"]
    assert (port["published"], port["target"]) == ("30000", 30000)
    # The mode reaches the server; nothing of the environment is refused.
    (folder,) = [volume for volume in service["volumes"] if volume["type"] == "bind"]
    assert folder["read_only"] and service["environment"]["MODEL_PATH"] == folder["target"]
    words = ENTRYPOINT.command_of(service["environment"] | {"MODEL_PATH": "org/name"}, [])
    assert words[words.index("--mode") + 1] == mode and "--strict" in words and "--enable-metrics" in words


def test_cache_volume_holds_the_caches_of_the_image(tmp_path):
    (cache,) = [volume for volume in resolved(tmp_path, "auto")["auto"]["volumes"] if volume["type"] == "volume"]
    folders = [word.split("=", 1)[1] for text in texts_of("ENV") for word in text.split()]
    assert folders and all(folder.startswith(cache["target"] + "/") for folder in folders)


def test_build_arguments_are_those_of_the_dockerfile():
    assert FILE["x-server"]["build"]["args"].keys() == build_arguments().keys()


def test_no_service_starts_without_a_profile(tmp_path):
    assert resolved(tmp_path) == {}


def test_variables_of_the_shell_arrive(tmp_path):
    shell = {"TP": "4", "GPUS": "4", "PORT": "8000", "RESTART": "unless-stopped", "DECODE_MODE": "hisa"}
    service = resolved(tmp_path, "misa", EXTRA_ARGS="--a 'b c'", **shell)["misa"]
    assert service["environment"]["TP"] == "4" and service["environment"]["DECODE_MODE"] == "hisa"
    assert service["environment"]["EXTRA_ARGS"] == "--a 'b c'"
    assert service["ports"][0]["published"] == "8000" and service["restart"] == "unless-stopped"
    assert service["deploy"]["resources"]["reservations"]["devices"][0]["count"] == 4


def test_missing_model_folder_is_said():
    done = run_tool("docker-compose", "-f", "docker/compose.yaml", "--profile", "auto", "config", MODEL_FOLDER="")
    assert done.returncode != 0 and "MODEL_FOLDER is missing a value: set it to the folder" in done.stderr
