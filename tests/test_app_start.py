"""`python -m app` before it answers: what is wrong is told at once, and a request to end is heard."""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from app.__main__ import main
from app.port import check_port

ROOT = Path(__file__).resolve().parents[1]
HEARD = """
import sys, time
from app.__main__ import end_on_signals
end_on_signals()
try:
    print("up", flush=True)
    time.sleep(60)
finally:
    print("the lesson is cancelled", flush=True)
"""


@pytest.fixture(autouse=True)
def no_base(monkeypatch):
    """Everything here is told before the base is loaded, and leaves the environment as it was."""

    def load(*_arguments, **_named):
        pytest.fail("the base was loaded first")

    monkeypatch.setattr("app.engine.load_base", load)
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "")


@pytest.fixture
def port():
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def refused(capsys, *flags):
    """What is printed where the page does not start."""
    assert main([str(flag) for flag in flags]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    return message


def test_an_output_folder_that_is_a_file(capsys, port, tmp_path):
    (tmp_path / "afile").write_text("x")
    assert "another --output_dir" in refused(capsys, "--output_dir", tmp_path / "afile", "--port", port)


@pytest.mark.parametrize("device", ["foo", "cuda:99"])
def test_a_device_that_is_not_here(capsys, port, tmp_path, device):
    message = refused(capsys, "--output_dir", tmp_path, "--port", port, "--device", device)
    assert f"device {device!r}" in message
    assert "there are: cpu" in message


def test_a_port_that_is_taken(capsys, tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        message = refused(capsys, "--output_dir", tmp_path, "--port", other.getsockname()[1])
    assert "--port" in message
    assert "GRADIO" not in message


def test_a_port_that_is_free_stays_free(port):
    check_port(port)
    check_port(port)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_request_to_end_is_heard(name):
    number = getattr(signal, name)
    heard = f"import signal; signal.signal({number:d}, signal.SIG_DFL)\n{HEARD}"  # whatever these tests run under, nohup say
    process = subprocess.Popen([sys.executable, "-c", heard], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    time.sleep(0.1)
    process.send_signal(number)
    assert process.stdout.read() == "the lesson is cancelled\n"
    assert process.wait(30) == 128 + number
