"""The device that computes: waiting for it, equal bits, and what they depend on."""

import os

import pytest
import torch

import train_split
from parser_params import parse_config
from utils.device import ask_for_determinism, gpu_facts, wait_for

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)


@pytest.fixture(autouse=True)
def _settings_as_before(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
    fills = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fills
    torch.use_deterministic_algorithms(False)


def test_only_a_gpu_is_waited_for(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    wait_for(CPU)
    wait_for(GPU)
    assert waited == [GPU]


def test_determinism_is_asked_of_all_libraries_and_of_none_without_it(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    ask_for_determinism(False)
    assert torch.backends.cudnn.benchmark
    assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    ask_for_determinism(True)
    assert not torch.backends.cudnn.benchmark
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    ask_for_determinism(True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"  # the user's own


def test_it_is_asked_for_before_a_process_finds_its_gpu(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)

    def join(*_, **__):
        raise ZeroDivisionError(os.environ.get("CUBLAS_WORKSPACE_CONFIG"))

    monkeypatch.setattr(train_split.launch, "join", join)
    flags = ["--dataset", "digits", "--arch", "resnet20", "--no_cuda", "--deterministic", "1"]
    with pytest.raises(ZeroDivisionError, match=":4096:8"):
        train_split.run(parse_config(flags, program="train_split.py"))


def test_a_checkpoint_knows_the_gpu_and_its_library(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 92000)
    assert gpu_facts(CPU) == {}
    assert gpu_facts(GPU) == {"gpu": "GPU 1", "cudnn": "92000"}
