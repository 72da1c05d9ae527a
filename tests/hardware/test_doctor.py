"""scripts.doctor: what is found on invented machines, and on this one."""

import json
import socket

import pytest

from nanochat_jax.hardware import doctor
from nanochat_jax.hardware.doctor import ALL, Gpu

H100 = Gpu("NVIDIA H100 80GB HBM3", "550.54.15", "9.0", 80000, 81559)
PLUGIN_12, PLUGIN_13 = {"jax-cuda12-plugin": "0.10.2"}, {"jax-cuda13-plugin": "0.12.0"}


@pytest.fixture
def installed(monkeypatch):
    """Pretends that these packages are installed, besides what is."""
    real = doctor.version_of

    def pretend(**versions):
        plugins = {f"jax-{name}-plugin" for name in doctor.DRIVERS}
        known = {name.replace("_", "-"): version for name, version in versions.items()}
        monkeypatch.setattr(doctor, "version_of", lambda name: known.get(name, None if name in plugins else real(name)))

    return pretend


def says(monkeypatch, output: str, status: int = 0, errors: str = "") -> None:
    monkeypatch.setattr(doctor, "run", lambda *command, **more: (status, output, errors))


def stopped(findings) -> set[str]:
    return {what for finding in findings for what in finding.stops}


@pytest.mark.parametrize(
    ("driver", "plugin", "words"),
    [
        ("550.54.15", "12", ""),
        ("580.65", "13", ""),
        ("580.65", "12", ""),  # older builds run on newer drivers
        ("550.54.15", "13", "580"),
        ("470.1", "12", "525"),
        ("550.54.15", None, "cuda12"),
        ("580.65", None, "cuda"),
    ],
)
def test_driver_and_plugin_fit_or_the_fix_is_named(installed, driver, plugin, words):
    installed(**({f"jax_cuda{plugin}_plugin": "0.10.2"} if plugin else {}))
    findings = doctor.driver([Gpu(H100.name, driver, "9.0", 80000, 81559)])
    assert stopped(findings) == (set(ALL) if words else set())
    assert not words or any(words in finding.fix for finding in findings if finding.stops)


@pytest.mark.parametrize(
    ("gpu", "words"),
    [
        (H100, ""),
        (Gpu("Tesla T4", "550", "7.5", 15000, 15360), "float32"),
        (Gpu(H100.name, "550", "9.0", 1000, 81559), "another process"),
        (Gpu("NVIDIA RTX A1000", "550", "8.6", 8000, 8188), "not in the table"),
        (Gpu("NVIDIA GB10", "580", "12.1", 0, 0), ""),  # its memory is the system's: not said
    ],
)
def test_a_card_that_is_slow_full_or_unknown_is_noted(installed, gpu, words):
    installed(jax_cuda12_plugin="0.10.2")
    card = doctor.driver([gpu])[-1]
    assert not card.stops and words in card.fix and bool(card.fix) == bool(words)


def test_what_nvidia_smi_says(monkeypatch):
    says(monkeypatch, "NVIDIA H100 80GB HBM3, 550.54.15, 9.0, 80000, 81559\nNVIDIA GB10, 580.9, 12.1, [N/A], [N/A]\n")
    assert doctor.query_gpus() == [H100, Gpu("NVIDIA GB10", "580.9", "12.1", 0, 0)]
    says(monkeypatch, "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", 9)
    assert doctor.query_gpus() == []


STARTED = {"backend": "gpu", "kinds": [H100.name] * 8, "cudnn": [91002, 91001]}


@pytest.mark.parametrize(
    ("output", "status", "what"),
    [
        (STARTED, 0, set()),
        (STARTED | {"cudnn": [90100, 91001]}, 0, {"training", "evaluating"}),
        (STARTED | {"backend": "cpu", "kinds": ["cpu"], "cudnn": None}, 0, set(ALL)),
        (None, -6, set(ALL)),
    ],
)
def test_jax_that_does_not_start_or_falls_back(monkeypatch, output, status, what):
    says(monkeypatch, f"a warning\n{json.dumps(output)}\n" if output else "", status, "CUDA_ERROR_NO_DEVICE")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/cuda-11/lib64")
    findings = doctor.start_jax([H100])
    assert stopped(findings) == what
    assert not what or "/opt/cuda-11/lib64" in findings[-1].fix


TOPOLOGY = " \tGPU0\tGPU1\t\n GPU0\tX\t{0}\t\n GPU1\t{0}\tX\t\n\nLegend:\n\n  X    = Self\n  OK   = Status Ok\n"


def test_gpus_that_do_not_reach_each_other(monkeypatch):
    says(monkeypatch, TOPOLOGY.format("OK"))
    assert not doctor.peers(2)[0].fix and doctor.peers(1) == []
    says(monkeypatch, TOPOLOGY.format("NS"))
    assert "NS" in doctor.peers(2)[0].what and doctor.peers(2)[0].fix and not doctor.peers(2)[0].stops


def test_a_port_that_is_taken_and_a_folder_that_is_none(monkeypatch, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = doctor.free_port(server.getsockname()[1])
    assert stopped(taken) == {"serving"} and not stopped(doctor.free_port(0))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "file"))
    assert stopped(doctor.base_folder()) == {"training", "evaluating"}


def test_missing_libraries_stop_what_needs_them(monkeypatch):
    monkeypatch.setattr(doctor, "version_of", lambda name: None if name in ("fastapi", "grain") else "1")
    assert stopped(doctor.packages()) == {"training", "serving"}


def test_the_hub_is_not_asked_offline_and_stops_nothing(monkeypatch):
    monkeypatch.setenv("NANOCHAT_OFFLINE", "1")
    assert "offline" in doctor.hub()[0].what
    monkeypatch.delenv("NANOCHAT_OFFLINE")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    [finding] = doctor.hub()
    assert finding.fix and not finding.stops


def test_this_machine(monkeypatch, base, capsys):
    monkeypatch.setenv("NANOCHAT_OFFLINE", "1")
    assert doctor.main(["--port=0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-3:]] == list(ALL) and all(" start" in line for line in lines[-3:])
    assert any(line.startswith("ok") and str(base) in line for line in lines)
