"""The process of `y7`: exit codes, signals, and a standard output that is closed or full."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import typer
from typer.testing import CliRunner

from tests.support.terminal import run_in_terminal
from yolov7_deploy import __version__
from yolov7_deploy.__main__ import SPIN_COUNT
from yolov7_deploy.cli.app import COMMANDS, _run, app
from yolov7_deploy.cli.command import PANELS
from yolov7_deploy.cli.options import announce_replacement, check_json_path
from yolov7_deploy.errors import UsageError
from yolov7_deploy.paper import VARIANTS

SHORT = ["train", "--show-hyp"]  # prints a few lines and imports no heavy library
TIMEOUT_S = 120.0


def y7(*arguments: str, shell_redirection: str = "", encoding: str = "utf-8") -> subprocess.CompletedProcess[str]:
    """Run a command through a shell, which can close or redirect its standard output."""
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {shell_redirection}', "sh", sys.executable, "-m", "yolov7_deploy", *arguments],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env={**os.environ, "PYTHONIOENCODING": encoding},
        check=False,
    )


@pytest.mark.parametrize("arguments", [SHORT, ["--help"], ["info", "yolov7", "--json", "-"]], ids=" ".join)
def test_a_full_standard_output_is_an_error_without_traceback(arguments):
    done = y7(*arguments, shell_redirection=">/dev/full")
    assert done.returncode == 1, done.stderr
    assert "Standard output cannot be written: No space left on device" in done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


def test_a_closed_standard_output_is_an_error_without_traceback():
    done = y7(*SHORT, shell_redirection=">&-")
    assert (done.returncode, "Traceback" in done.stderr) == (1, False), done.stderr
    assert "Standard output is closed" in done.stderr


def test_a_closed_standard_output_is_not_taken_by_the_next_file(tmp_path):
    done = y7("info", "yolov7", "--json", str(tmp_path / "a.json"), shell_redirection=">&-")
    assert done.returncode == 1
    if (tmp_path / "a.json").exists():
        json.loads((tmp_path / "a.json").read_text())


def test_all_standard_streams_may_be_closed():
    assert y7(*SHORT, shell_redirection="<&- >&- 2>&-").returncode == 1
    assert y7(*SHORT, shell_redirection="<&- 2>&-").returncode == 0


def test_a_reader_that_ends_early_is_an_exit_code_without_traceback():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "yolov7_deploy", *SHORT]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=TIMEOUT_S, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_foreign_texts_in_an_error_are_printed_as_text_in_every_encoding():
    name = os.fsdecode(b"\x1b]0;title\x07-\xff-\xe2\x80\xae.pt")
    for encoding in ("utf-8", "ascii"):
        done = y7("info", name, encoding=encoding)
        assert done.returncode == 1 and r"\x1b]0;title\x07-\udcff-\u202e.pt" in done.stderr, done.stderr
        assert "\x1b" not in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_a_command_cleanly_with_its_exit_code(tmp_path, number, exit_code):
    command = [sys.executable, "-m", "yolov7_deploy", "shapes", "-o", str(tmp_path / "data"), "--train", "100000"]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        # Background jobs of a shell ignore SIGINT, and `nohup` ignores SIGHUP.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    deadline = time.monotonic() + TIMEOUT_S
    while not any(tmp_path.glob(".data.*/images/train/*.png")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, "Traceback" in err) == (exit_code, False), err
    assert list(tmp_path.iterdir()) == []


def test_a_replaced_file_is_announced(tmp_path, capsys):
    path = tmp_path / "model.onnx"
    for _ in range(2):
        with announce_replacement(path, to_stderr=False):
            path.write_text("new")
    assert capsys.readouterr().out == f"{path} existed and was replaced.\n"


@pytest.mark.parametrize("option", ["--json", "--predictions"])
def test_a_json_result_replaces_no_file_of_another_kind(tmp_path, option):
    path = tmp_path / "shapes.yaml"
    path.write_text("names: [a]\n")
    result = CliRunner().invoke(app, ["val", "--data", str(path), option, str(path)])
    assert isinstance(result.exception, UsageError) and "exists and is not JSON" in result.exception.message
    assert path.read_text() == "names: [a]\n"


@pytest.mark.parametrize("content", ["", " \n[1]", '{"a": 1}'])
def test_an_existing_json_file_and_a_device_can_be_results(tmp_path, content):
    path = tmp_path / "result.json"
    path.write_text(content)
    assert [check_json_path(text) for text in (str(path), os.devnull, "-", None)] == [str(path), os.devnull, "-", None]


@pytest.mark.parametrize("path", [".", "file/result.json"])
def test_a_json_path_that_cannot_be_written_is_an_error_before_the_work(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(app, ["doctor", "--json", path])
    assert isinstance(result.exception, UsageError) and "cannot be written" in result.exception.message
    assert result.output == ""


# --- help and version -------------------------------------------------------------------------------------------------

ALL_COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
NAMES = [command.__name__ for command, _ in COMMANDS]


def shown(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("option", ["--version", "-V"])
def test_the_version_is_printed(option):
    assert shown(option) == f"yolov7-deploy {__version__}\n"


@pytest.mark.parametrize("name", NAMES)
def test_help_of_a_command_has_an_example_and_is_the_same_in_all_spellings(name):
    text = shown(name, "--help")
    assert text == shown(name, "-h") and text == shown("help", name)
    assert f"Example:  y7 {name}" in text


@pytest.mark.parametrize("name", NAMES)
def test_help_fits_a_terminal_of_80_columns(name):
    text = shown(name, "--help")
    assert max(map(len, text.splitlines())) <= 80
    assert "list[" not in text  # a type of Python is not the name of a value


def test_help_lists_all_commands():
    for text in (shown("--help"), shown("help")):
        assert all(f"\n  {name} " in text for name in NAMES) and "y7 help COMMAND" in text
        assert "..." not in text.partition("Commands:")[2] and max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("name", PANELS)
def test_every_option_is_in_one_panel(name):
    options = (one for one in ALL_COMMANDS[name].params if one.param_type_name == "option")
    own = {option.name for option in options} - {"quiet", "verbose", "json_path"}
    listed = [parameter for names in PANELS[name].values() for parameter in names.split()]
    assert len(listed) == len(set(listed))
    assert own - {"context"} <= set(listed) and set(listed) <= own | {"json_path"}
    text = shown(name, "--help")
    assert all(f"\n{panel}:\n" in text for panel in PANELS[name])


@pytest.mark.parametrize(
    ("command", "option", "values"),
    [
        ("export", "--nms", "plugin|standard|efficient|none"),
        ("export", "--precision", "fp32|fp16|int8"),
        ("train", "--assigner", "independent|lead-guided|coarse-to-fine"),
        ("val", "--split", "val|test|train"),
    ],
)
def test_help_shows_the_values_of_an_option(command, option, values):
    assert f"{option} {values}" in shown(command, "--help").replace("--precision, --quantize", "--precision")


def test_help_shows_all_variants():
    text = "".join(shown("train", "--help").split())  # lines break at hyphens
    assert f"Oneof:{','.join(VARIANTS)}." in text


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("y7 exp", {"export"}),
        ("y7 export --nms e", {"efficient"}),
        ("y7 train --variant yolov7-t", {"yolov7-tiny", "yolov7-tiny-silu"}),
        ("y7 detect --weights yolov7-d", {"yolov7-d6", "yolov7-d6_training"}),
        ("y7 detect --weights runs/", {"runs/best.onnx", "runs/train/"}),
        ("y7 detect --max", {"--max-age", "--max-det"}),
    ],
)
def test_the_shell_completes_commands_options_values_and_model_files(tmp_path, words, expected):
    (tmp_path / "runs" / "train").mkdir(parents=True)
    for name in ("best.onnx", "notes.txt"):
        (tmp_path / "runs" / name).touch()
    environment = {
        **os.environ,
        "_Y7_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, "-c", "from yolov7_deploy.cli.app import main; main()"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=True)
    assert set(done.stdout.split()) == expected, done.stderr


# --- messages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("no_colour", [False, True])
def test_errors_are_coloured_on_a_terminal_unless_the_user_objects(no_colour):
    environment = {"NO_COLOR": "1"} if no_colour else {}
    code, output = run_in_terminal([sys.executable, "-m", "yolov7_deploy", "info", "absent.pt"], env=environment)
    start = "LoadError:" if no_colour else "\x1b[1;31mLoadError:\x1b[0m"
    assert code == 1 and output.startswith(f"{start} absent.pt does not exist.\n")
    assert ("\x1b[36mCheck the path" in output) is not no_colour


def test_errors_in_a_pipe_have_no_colours():
    assert y7("info", "absent.pt").stderr.startswith("LoadError: absent.pt does not exist.\nCheck the path")


def test_a_verbose_error_has_a_traceback():
    done = y7("info", "absent.pt", "-v")
    assert done.returncode == 1 and "Traceback" in done.stderr and "LoadError: absent.pt does not exist." in done.stderr


@pytest.mark.parametrize("arguments", [["-q", "shapes"], ["shapes", "-q"], ["shapes", "--quiet"]], ids=" ".join)
def test_quiet_commands_print_their_result_only(tmp_path, arguments):
    done = y7(*arguments, "--output", str(tmp_path / "data"), "--train", "1", "--val", "1")
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 1)


def test_a_missing_library_names_the_command_after_other_options(monkeypatch, capsys):
    def fail(**_):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr("yolov7_deploy.cli.app.app", fail)
    monkeypatch.setattr("sys.argv", ["y7", "-q", "train"])
    assert _run() == 1
    assert "torch is needed for y7 train." in capsys.readouterr().err


def test_a_command_with_a_typing_error_is_suggested():
    result = CliRunner().invoke(app, ["exprot"])
    assert result.exit_code == 2 and "Did you mean 'export'" in result.output


@pytest.mark.parametrize(
    ("variables", "expected"),
    [({}, SPIN_COUNT), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")],
)
def test_threads_of_openmp_spin_briefly_unless_the_user_chose_it(tmp_path, variables, expected):
    code = (
        "import atexit, os, pathlib, sys\n"
        "atexit.register(lambda: pathlib.Path('seen').write_text(str(os.environ.get('GOMP_SPINCOUNT'))))\n"
        "sys.argv = ['y7', '--version']\n"
        "from yolov7_deploy.__main__ import main\n"
        "main()\n"
    )
    inherited = {name: text for name, text in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**inherited, **variables}, check=True)
    assert (tmp_path / "seen").read_text() == expected
