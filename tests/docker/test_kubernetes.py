"""docker/kubernetes.yaml: the objects fit together, and its settings are settings."""

import dataclasses

import yaml

from sglang_ext.layer_values import ALLOWED
from sglang_ext.settings import Settings, load_settings
from tests.docker.image_files import DOCKER, script, texts_of

OBJECTS = list(yaml.safe_load_all((DOCKER / "kubernetes.yaml").read_text()))
ENTRYPOINT = script("entrypoint")


def the(kind):
    """The only object of a kind."""
    (found,) = [each for each in OBJECTS if each["kind"] == kind]
    return found


POD = the("Deployment")["spec"]["template"]
(SERVER,) = POD["spec"]["containers"]
VALUES = the("ConfigMap")["data"]


def test_objects():
    kinds = {(each["apiVersion"], each["kind"]) for each in OBJECTS}
    plain = {("v1", kind) for kind in ("ConfigMap", "PersistentVolumeClaim", "Service")}
    assert kinds == plain | {("apps/v1", "Deployment")}
    names = [(each["kind"], each["metadata"]["name"]) for each in OBJECTS]
    assert len(names) == len(set(names))


def test_labels_select_the_pod():
    labels = POD["metadata"]["labels"]
    assert the("Service")["spec"]["selector"] == the("Deployment")["spec"]["selector"]["matchLabels"] == labels


def test_settings_are_known_and_accepted():
    known = {"SGLANG_EXT_" + field.name.upper() for field in dataclasses.fields(Settings)}
    assert VALUES.keys() <= known | set(ENTRYPOINT.VARIABLES)
    assert all(isinstance(value, str) for value in VALUES.values()), "a ConfigMap holds strings only"
    load_settings(None, VALUES)
    assert "--strict" in ENTRYPOINT.command_of(VALUES | {"MODEL_PATH": "org/name"}, [])
    assert SERVER["envFrom"] == [{"configMapRef": {"name": the("ConfigMap")["metadata"]["name"]}}]
    assert "env" not in SERVER and "command" not in SERVER, "the entry point and the ConfigMap say everything"


def test_nothing_is_set_that_a_settings_file_tunes():
    """A variable replaces what `sglang-ext tune` found for single layers, and what is measured for other models."""
    assert not {name.removeprefix("SGLANG_EXT_").lower() for name in VALUES} & set(ALLOWED) - {"mode"}


def test_no_service_becomes_a_setting():
    """Kubernetes sets <SERVICE>_PORT and more in every pod; the plugin refuses SGLANG_EXT_PORT."""
    assert POD["spec"]["enableServiceLinks"] is False
    assert not the("Service")["metadata"]["name"].upper().replace("-", "_").startswith("SGLANG_EXT")


def test_gpus_match_the_ranks():
    assert SERVER["resources"]["limits"]["nvidia.com/gpu"] == VALUES["TP"]


def test_ports_and_probes():
    (port,) = SERVER["ports"]
    assert str(port["containerPort"]) == ENTRYPOINT.DEFAULTS["PORT"] and "PORT" not in VALUES
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert SERVER[probe]["httpGet"] == {"path": "/health", "port": port["name"]}
    (service_port,) = the("Service")["spec"]["ports"]
    assert service_port["targetPort"] == port["name"]
    assert POD["metadata"]["annotations"]["prometheus.io/port"] == str(port["containerPort"])


def test_volumes_are_there():
    volumes = {volume["name"]: volume for volume in POD["spec"]["volumes"]}
    claims = {each["metadata"]["name"] for each in OBJECTS if each["kind"] == "PersistentVolumeClaim"}
    used = {v["persistentVolumeClaim"]["claimName"] for v in volumes.values() if "persistentVolumeClaim" in v}
    assert used == claims
    mounts = {mount["name"]: mount for mount in SERVER["volumeMounts"]}
    assert mounts.keys() == volumes.keys()
    assert mounts["model"]["mountPath"] == VALUES["MODEL_PATH"] and mounts["model"]["readOnly"]
    assert volumes["shm"]["emptyDir"]["medium"] == "Memory" and mounts["shm"]["mountPath"] == "/dev/shm"


def test_init_container_fills_the_cache_with_the_kernels_of_the_image():
    (init,) = POD["spec"]["initContainers"]
    assert init["image"] == SERVER["image"]
    (mount,) = init["volumeMounts"]
    source, target = init["command"][-2:]
    assert target == mount["mountPath"]
    (cache,) = [each for each in SERVER["volumeMounts"] if each["name"] == mount["name"]]
    assert source == cache["mountPath"] + "/."
    assert all(f"={cache['mountPath']}/" in word for text in texts_of("ENV") for word in text.split())
