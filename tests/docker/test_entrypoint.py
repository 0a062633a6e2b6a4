"""The image's entry point: variables become one command; a wrong one becomes one line, before anything is imported."""

import os
import shlex
import signal
import subprocess
import sys
import textwrap

import pytest

from sglang_ext.settings import SERVE_MODES
from tests.docker.image_files import DOCKER, script

ENTRYPOINT = script("entrypoint")
HUB = {"MODEL_PATH": "org/name"}
FIXED = ["--host", "0.0.0.0", "--port", "30000"]


@pytest.fixture
def model(tmp_path):
    """A folder that looks like a model."""
    folder = tmp_path / "a model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return str(folder)


def command(environ, *arguments):
    """What the entry point would run, without `sglang-ext serve`."""
    words = ENTRYPOINT.command_of(environ, arguments)
    assert words[:2] == ["sglang-ext", "serve"]
    return words[2:]


def run(environ, *arguments):
    """The script in a process of its own, with nothing but these variables."""
    # -S and -I: a process without site-packages shows that the standard library is enough.
    program = [sys.executable, "-I", "-S", str(DOCKER / "entrypoint.py"), *arguments]
    return subprocess.run(program, env=environ, capture_output=True, text=True, timeout=30, check=False)


def test_knows_the_modes_of_the_settings():
    assert ENTRYPOINT.MODES == SERVE_MODES


def test_defaults(model):
    assert command({"MODEL_PATH": model}) == ["--model-path", model, *FIXED, "--strict"]


def test_every_variable_becomes_its_argument():
    variables = {"HOST": "127.0.0.1", "PORT": "8000", "TP": "8", "MODE": "auto", "PREFILL_MODE": "misa_rerank"}
    variables |= {"DECODE_MODE": "HISA", "STRICT": "no", "ENABLE_METRICS": "On"}
    expected = "--model-path org/name --host 127.0.0.1 --port 8000 --tp-size 8 --mode auto --prefill-mode misa_rerank"
    assert command(HUB | variables) == [*expected.split(), "--decode-mode", "hisa", "--enable-metrics"]


def test_empty_variables_are_unset():
    assert command(HUB | dict.fromkeys(set(ENTRYPOINT.VARIABLES) - set(HUB), "")) == command(HUB)


def test_empty_settings_are_unset_too():
    settings = {"SGLANG_EXT_STRICT": "", "SGLANG_EXT_ACTIVE_HEADS": " ", "SGLANG_EXT_CANDIDATES": "4096"}
    done = run(HUB | settings, "--dry-run")
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    assert words[:3] == ["SGLANG_EXT_CANDIDATES=4096", "sglang-ext", "serve"] and "--strict" in words


def test_arguments_pass_through_last():
    extra = """--served-model-name 'a name' --json-model-override-args '{"a": "$HOME"}'"""
    words = command(HUB | {"EXTRA_ARGS": extra}, "--context-length", "131072", "--x=y z")
    assert words == [*command(HUB), *shlex.split(extra), "--context-length", "131072", "--x=y z"]


@pytest.mark.parametrize(
    ("argument", "left_out"),
    [("--host=::1", ["--host", "0.0.0.0"]), ("--model-path=/elsewhere", ["--model-path", "org/name"])],
)
def test_an_argument_replaces_the_default(argument, left_out):
    environ = {} if "model" in argument else HUB
    expected = [word for word in command(HUB) if word not in left_out]
    assert command(environ, argument) == [*expected, argument]


def test_plugin_variables_replace_the_defaults():
    assert "--strict" not in command(HUB | {"SGLANG_EXT_STRICT": "0"})
    assert "--mode" not in command(HUB | {"SGLANG_EXT_MODE": "hisa"})


@pytest.mark.parametrize(
    ("environ", "arguments", "message"),
    [
        ({"MODEL_PATH": ""}, (), "MODEL_PATH is not set"),
        ({"MODEL_PATH": "/no/such/model"}, (), "MODEL_PATH=/no/such/model does not exist"),
        ({"MODEL_PATH": "org/name/more"}, (), "MODEL_PATH=org/name/more does not exist"),
        ({"MODEL_PATH": "../name"}, (), "MODEL_PATH=../name does not exist"),
        ({"MODE": "mias"}, (), "MODE=mias must be one of native, misa, misa_rerank, hisa, group_rerank, auto"),
        ({"DECODE_MODE": "none"}, (), "DECODE_MODE=none must be one of native"),
        ({"PORT": "http"}, (), "PORT=http must be a number from 1 to 65535"),
        ({"PORT": "65536"}, (), "PORT=65536 must be a number from 1 to 65535"),
        ({"PORT": "\u0663"}, (), "PORT=\u0663 must be a number"),
        ({"TP": "-8"}, (), "TP=-8 must be a number from 1 to 1024"),
        ({"TP": "eight"}, (), "TP=eight must be a number"),
        ({"STRICT": "maybe"}, (), "STRICT=maybe must be one of 1, true"),
        ({"DRY_RUN": "perhaps"}, (), "DRY_RUN=perhaps must be one of 1, true"),
        ({"EXTRA_ARGS": "--a 'b"}, (), "EXTRA_ARGS=--a 'b cannot be split into arguments: No closing quotation"),
        ({"MODE": "hisa", "SGLANG_EXT_MODE": "hisa"}, (), "MODE=hisa and SGLANG_EXT_MODE=hisa say the same thing"),
        ({"MODE": "hisa"}, ("--mode", "misa"), "MODE=hisa and --mode say the same thing"),
        ({"MODE": "hisa", "EXTRA_ARGS": "--mode=misa"}, (), "MODE=hisa and --mode say the same thing"),
        ({"STRICT": "0", "SGLANG_EXT_STRICT": "1"}, (), "STRICT=0 and SGLANG_EXT_STRICT=1 say the same thing"),
        ({}, ("--model-path", "x"), "MODEL_PATH=org/name and --model-path say the same thing"),
        ({"TP": "8"}, ("-tp", "4"), "TP=8 and -tp say the same thing"),
        ({}, ("--port", "1"), "--port is given as an argument; set PORT instead"),
    ],
)
def test_wrong_variables_end_with_one_line(environ, arguments, message):
    done = run(HUB | environ | {"PYTHONUTF8": "1", "LC_ALL": "C.UTF-8"}, *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"entrypoint: error: {message}") and done.stderr.count("\n") == 1


def test_an_empty_model_folder_is_an_unmounted_volume(tmp_path):
    done = run({"MODEL_PATH": str(tmp_path)})
    assert done.returncode == 2 and "is the model's volume mounted there?" in done.stderr


@pytest.mark.parametrize(("variables", "arguments"), [({"DRY_RUN": "1"}, ()), ({}, ("--dry-run",))])
def test_dry_run_prints_the_command(variables, arguments, model):
    ours = {"SGLANG_EXT_ACTIVE_HEADS": "16", "SGLANG_EXT_NATIVE_LAYERS": "0-2, 60"}
    done = run({"MODEL_PATH": model} | ours | variables, *arguments, "--context-length", "131072")
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    assert words[:2] == [f"{name}={value}" for name, value in ours.items()]
    expected = ["sglang-ext", "serve", "--model-path", model, *FIXED, "--strict", "--context-length", "131072"]
    assert words[2:] == expected


@pytest.fixture
def stand_in(tmp_path):
    """A folder with a `sglang-ext` that says what it got and waits for a signal."""
    program = f"""\
        #!{sys.executable}
        import os, signal, sys, time
        def stop(number, frame):
            os.write(1, b"stopped by %d\\n" % number)
            os._exit(3)
        signal.signal(signal.SIGTERM, stop)
        print(os.getpid(), os.environ["SGLANG_EXT_CANDIDATES"], *sys.argv[1:], flush=True)
        time.sleep(30)
    """
    path = tmp_path / "sglang-ext"
    path.write_text(textwrap.dedent(program))
    path.chmod(0o755)
    return str(tmp_path)


def test_becomes_the_server_and_gets_its_signals(stand_in):
    environ = HUB | {"PATH": stand_in, "SGLANG_EXT_CANDIDATES": "4096"}
    program = [sys.executable, str(DOCKER / "entrypoint.py")]
    with subprocess.Popen(program, env=environ, stdout=subprocess.PIPE, text=True) as server:
        try:
            words = server.stdout.readline().split()
            assert words == [str(server.pid), "4096", "serve", *command(HUB)], "not the same process, or not its words"
            server.send_signal(signal.SIGTERM)
            assert server.stdout.readline() == f"stopped by {int(signal.SIGTERM)}\n"
            assert server.wait(timeout=10) == 3
        finally:
            server.kill()


def test_missing_package_is_said(tmp_path):
    done = run(HUB | {"PATH": str(tmp_path)})
    assert done.returncode == 127 and done.stderr == "entrypoint: error: sglang-ext is not installed in this image\n"


def test_serve_takes_what_the_entry_point_makes(model):
    """The words reach SGLang's command line through the real `sglang-ext serve`."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("SGLANG_")}
    words = command({"MODEL_PATH": model, "MODE": "misa_rerank", "DECODE_MODE": "native", "TP": "8"}, "--dry-run")
    program = [sys.executable, "-m", "sglang_ext.cli", "serve", *words]
    done = subprocess.run(program, cwd=DOCKER.parent, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    modes = "SGLANG_EXT_DECODE_MODE=native SGLANG_EXT_MODE=misa_rerank SGLANG_EXT_STRICT=1"
    server = ["--model-path", model, *FIXED, "--tp-size", "8"]
    assert done.stdout.startswith(modes) and shlex.split(done.stdout)[-8:] == server
