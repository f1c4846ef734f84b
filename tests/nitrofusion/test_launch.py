"""Several processes of one run: how they end is how the run ends, and a signal reaches them."""

import dataclasses
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from nitrofusion.config import TrainConfig
from nitrofusion.errors import CheckpointError, InputError, NitroError, Preempted, StorageError, TrainingError
from nitrofusion.options import train_config
from nitrofusion.presets import run_preset
from nitrofusion.torchrun import END_WITH_PARENT
from nitrofusion.train import launch
from nitrofusion.train.launch import _run

TORCHRUN = [sys.executable, "-m", "nitrofusion.torchrun", "--standalone", "--nproc_per_node=1", "--no-python"]


@pytest.mark.parametrize("code", [3, 75, 137])
def test_torchrun_ends_as_its_processes(code):
    ends = "import os; os.kill(os.getpid(), 9)" if code == 137 else f"raise SystemExit({code})"
    ending = [*TORCHRUN, sys.executable, "-c", ends]
    if code == 75:
        with pytest.raises(Preempted):
            _run(ending)
    else:
        assert _run(ending) == code


@pytest.mark.parametrize(
    "code, error",
    [(1, NitroError), (2, InputError), (3, StorageError), (4, CheckpointError), (5, TrainingError), (137, NitroError)],
)
def test_a_failure_is_of_the_kind_that_its_processes_met(monkeypatch, code, error):
    """A process that memory did not suffice for, or that was killed, did not diverge."""
    monkeypatch.setattr(sys.modules[_run.__module__], "_run", lambda command: code)
    with pytest.raises(NitroError, match=f"all 2 processes must end well, got exit code {code}") as caught:
        launch(TrainConfig(batch_size=4), 2)
    assert caught.type is error


def test_a_run_under_nohup_outlives_its_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        hangs_up = "import os, signal, time; os.kill(os.getppid(), signal.SIGHUP); time.sleep(0.3)"
        assert _run([sys.executable, "-c", hangs_up]) == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_processes_are_told_to_stop_when_who_launched_them_is_killed(tmp_path):
    """Or they would train on, and the same command would find its folder taken."""
    saved, ready = tmp_path / "saved", tmp_path / "ready"
    os.mkfifo(ready)
    worker = "import signal, sys, time; from pathlib import Path\n"
    worker += f"def stop(*_): Path({str(saved)!r}).touch(); sys.exit(75)\n"
    worker += f"signal.signal(signal.SIGTERM, stop); open({str(ready)!r}, 'w').close(); time.sleep(60)"
    command = [*TORCHRUN[:3], END_WITH_PARENT, *TORCHRUN[3:], sys.executable, "-c", worker]
    launcher = f"from nitrofusion.train.launch import _run; _run({command!r})"
    parent = subprocess.Popen([sys.executable, "-c", launcher])
    open(ready).close()  # noqa: SIM115
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while not saved.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert saved.exists()


def test_its_processes_read_the_configuration_that_was_given(monkeypatch, tmp_path):
    """Also what JSON spells as YAML does not: infinity, and characters beyond U+FFFF."""
    config = train_config("train", ["--preset", "world-smoke"], "")[0]
    output, prompts = str(tmp_path / "\U0001f600: #1"), str(tmp_path / "\u00e9\u2028.txt")
    given = dataclasses.replace(config, batch_size=4, output=output, images=None, prompts=prompts, lr=1e-5)
    given = dataclasses.replace(given, clip_grad_norm=math.inf)
    read = []

    def run(command):
        read.append(train_config("train", command[command.index("nitrofusion.train") + 1 :], "")[0])
        return 0

    monkeypatch.setattr(sys.modules[_run.__module__], "_run", run)
    assert launch(given, 2) == Path(output)
    assert read == [dataclasses.replace(given, batch_size=2)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_passed_on_and_what_it_stops_is_waited_for(tmp_path, number):
    """Python's own ``subprocess.run`` kills a child that takes longer than a quarter of a second."""
    saved, ready = tmp_path / "saved", tmp_path / "ready"
    os.mkfifo(ready)
    stops = "import signal, sys, time; from pathlib import Path\n"
    stops += f"def stop(*_): time.sleep(0.6); Path({str(saved)!r}).touch(); sys.exit(1)\n"
    stops += f"signal.signal(signal.SIGTERM, stop); open({str(ready)!r}, 'w').close(); time.sleep(30)"

    def send() -> None:
        open(ready).close()  # noqa: SIM115
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    thread = threading.Thread(target=send)
    thread.start()
    with pytest.raises(Preempted):
        _run([sys.executable, "-c", stops])
    thread.join()
    assert saved.exists() and signal.getsignal(number) is before


@pytest.mark.parametrize("processes", [0, -1, 2.0, "2", True])
def test_no_number_of_processes_is_refused(processes):
    with pytest.raises(InputError, match=f"processes must be an integer >= 1, got {processes!r}"):
        launch(TrainConfig(batch_size=4), processes)


def test_the_preset_that_is_named_is_the_one_that_is_used(tmp_path):
    """However it is abbreviated or repeated, and in whichever file it stands."""
    plain, smoke, start = (tmp_path / f"{name}.yaml" for name in ("plain", "smoke", "start"))
    plain.write_text("lr: 1.0e-5\n")
    smoke.write_text("preset: world-smoke\nseed: 7\n")
    start.write_text("preset: world-start\n")
    for words, wanted in [
        (["--pres", "world-smoke"], "world-smoke"),
        (["--pres=world-smoke"], "world-smoke"),
        (["--preset", "world", "--preset", "world-smoke"], "world-smoke"),
        (["--conf", smoke], "world-smoke"),
        (["--config", plain, "--config", smoke], "world-smoke"),
        (["--config", start, f"--config={smoke}"], "world-smoke"),
        (["--preset", "world-smoke", "--config", start], "world-smoke"),
        (["--config", plain], "world"),
        ([], "world"),
    ]:
        config, _ = train_config("train", [str(word) for word in words], "")
        assert config.stages == run_preset(wanted).stages, words
        assert (config.seed == 7) == (smoke in words or f"--config={smoke}" in words)
