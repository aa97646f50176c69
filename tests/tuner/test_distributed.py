"""A chief and two workers as processes of `keras-kd search`, one of which is killed; and addresses at which nobody answers."""

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import keras_tuner
import pytest

import keras_kd
from keras_kd.tuner import check_chief, pareto_front
from tests.tuner.common import hypermodel, metrics_of

ROOT = pathlib.Path(keras_kd.__file__).parent.parent
SECONDS = 240  # for all of a search: the machine may be busy


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Processes:
    """Starts interpreters of their own, never forks of this one; their output goes to files, which no full pipe holds up."""

    def __init__(self, folder, port):
        self.folder, self.port, self.started = folder, port, []
        self.end = time.monotonic() + SECONDS

    def start(self, name, **environment):
        lean = {"TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1", "OMP_NUM_THREADS": "1"}
        kept = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()}
        env = kept | lean | environment | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        role = ["--chief"] if name == "chief" else ["--worker", name]
        options = [*role, "--address", f"127.0.0.1:{self.port}", "--timeout", "120"]
        with open(self.folder / f"{name}.log", "a") as log:
            script = str(ROOT / "tests" / "tuner" / "search_process.py")
            command = [sys.executable, "-m", "keras_kd.cli", "search", *options, script, str(self.folder)]
            process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        self.started.append(process)
        return process

    def wait_for(self, condition, what):
        while not condition():
            if time.monotonic() > self.end:
                logs = "\n".join(f"{file.name}: {file.read_text()[-1500:]}" for file in self.folder.glob("*.log"))
                pytest.fail(f"No {what} within {SECONDS} seconds.\n{logs}")
            time.sleep(0.1)

    def wait(self, process, what):
        self.wait_for(lambda: process.poll() is not None, f"end of {what}")
        return process.returncode

    def stop(self):
        for process in self.started:
            if process.poll() is None:
                process.kill()
            process.wait(timeout=30)


@pytest.fixture
def processes(tmp_path):
    made = Processes(tmp_path, free_port())
    yield made
    made.stop()


def listening():
    """A socket that lets others connect, and never says anything."""
    server = socket.socket()
    server.bind(("127.0.0.1", 0))
    server.listen()
    return contextlib.closing(server)


@pytest.mark.slow
def test_a_search_survives_the_death_of_a_worker_that_is_started_again(processes, tmp_path, monkeypatch):
    chief = processes.start("chief")
    killed = processes.start("tuner1")
    processes.wait_for((tmp_path / "tuner1.is_running").exists, "trial of tuner1")
    monkeypatch.setenv("KERASTUNER_TUNER_ID", "chief")
    monkeypatch.setenv("KERASTUNER_ORACLE_IP", "127.0.0.1")
    monkeypatch.setenv("KERASTUNER_ORACLE_PORT", str(processes.port))
    with pytest.raises(ConnectionError, match="is another chief running"):
        check_chief()
    for name in ("KERASTUNER_TUNER_ID", "KERASTUNER_ORACLE_IP", "KERASTUNER_ORACLE_PORT"):
        monkeypatch.delenv(name)
    killed.send_signal(signal.SIGKILL)
    killed.wait(timeout=30)
    with listening() as server:
        other = processes.start("tuner0", SILENT=f"127.0.0.1:{server.getsockname()[1]}")
        assert processes.wait(other, "tuner0") == 0
    assert chief.poll() is None  # it waits for the trial of the dead one, and would do so for ever
    again = processes.start("tuner1")
    assert processes.wait(again, "tuner1") == 0
    assert processes.wait(chief, "chief") == 0

    tuner = reload(tmp_path)
    trials = sorted(tuner.oracle.trials.values(), key=lambda trial: trial.trial_id)
    assert [(trial.trial_id, trial.status) for trial in trials] == [(str(index), "COMPLETED") for index in range(3)]
    assert all(trial.score == metrics_of(trial)["val_accuracy"] for trial in trials)
    assert len(list((tmp_path / "search" / "teacher").iterdir())) == 1  # one recording, for all workers
    seconds, message = (tmp_path / "silent.txt").read_text().split(" ", 1)
    assert float(seconds) < 10
    assert "somebody listens, who is no chief" in message


def reload(folder):
    """The finished search, where no chief is."""
    return keras_tuner.RandomSearch(hypermodel(), objective="val_accuracy", max_trials=3, directory=folder, project_name="search")


def test_an_address_that_answers_nobody_is_an_error_within_seconds(monkeypatch):
    port = free_port()
    monkeypatch.setenv("KERASTUNER_TUNER_ID", "tuner0")
    monkeypatch.setenv("KERASTUNER_ORACLE_IP", "127.0.0.1")
    monkeypatch.setenv("KERASTUNER_ORACLE_PORT", str(port))
    start = time.monotonic()
    with pytest.raises(ConnectionError, match=f"No chief answers at 127.0.0.1:{port}. Received in 0.5 seconds: .*refused"):
        check_chief(timeout=0.5)
    assert time.monotonic() - start < 5


def test_in_a_search_on_one_machine_there_is_nothing_to_check():
    assert check_chief() is None


def test_the_chief_finds_its_port_free(monkeypatch):
    port = free_port()
    monkeypatch.setenv("KERASTUNER_TUNER_ID", "chief")
    monkeypatch.setenv("KERASTUNER_ORACLE_IP", "127.0.0.1")
    monkeypatch.setenv("KERASTUNER_ORACLE_PORT", str(port))
    assert check_chief() == f"127.0.0.1:{port}"


def test_missing_variables_and_wrong_addresses_are_named(monkeypatch):
    with pytest.raises(ValueError, match="must be \"host:port\". Received: address='127.0.0.1'"):
        check_chief("127.0.0.1")
    with pytest.raises(ValueError, match="`timeout` must be greater than 0"):
        check_chief(timeout=0)
    monkeypatch.setenv("KERASTUNER_ORACLE_IP", "127.0.0.1")
    with pytest.raises(ValueError, match="Received: no KERASTUNER_ORACLE_PORT, KERASTUNER_TUNER_ID"):
        check_chief()


def test_a_worker_does_not_know_the_front():
    class Client:
        def get_best_trials(self):
            return []

    with pytest.raises(ValueError, match="A worker does not know all trials"):
        pareto_front(Client(), ["val_accuracy", "bytes"])
