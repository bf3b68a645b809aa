"""Which GPUs a run uses, how processes are started and where they meet."""

import socket

import pytest
import torch

from utils import launch
from utils.errors import Incomplete, Interrupted, RunError, Stopped, UserError
from utils.launch import World, naming_lost_processes


def test_gpu_ids_that_do_not_exist_are_refused() -> None:
    with pytest.raises(UserError, match=r"--gpu_ids 0,99.*no such GPU"):
        launch.visible_gpus(no_cuda=False, gpu=None, gpu_ids="0,99")
    with pytest.raises(UserError, match=r"--gpu 99.*no such GPU"):
        launch.visible_gpus(no_cuda=False, gpu=99, gpu_ids=None)
    with pytest.raises(UserError, match=r"--gpu_ids 'zero'"):
        launch.visible_gpus(no_cuda=False, gpu=None, gpu_ids="zero")
    assert launch.visible_gpus(no_cuda=True, gpu=None, gpu_ids=None) == []


def test_several_gpus_are_named_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    named = launch.named_gpus("--devices", "cuda:1, cuda:0")
    assert named == [torch.device("cuda", 1), torch.device("cuda", 0)]
    with pytest.raises(UserError, match=r"--devices cuda,cuda:0.*twice"):
        launch.named_gpus("--devices", "cuda,cuda:0")
    assert launch.one_gpu("--device", "cuda") == torch.device("cuda", 0)
    for name, line in (("cuda:2", "this machine's 2 GPUs"), ("", "one GPU"), ("cuda:0,cuda:1", "one GPU")):
        with pytest.raises(UserError, match=f"--device {name}.*{line}"):
            launch.one_gpu("--device", name)


def test_several_nodes_need_a_meeting_point() -> None:
    with pytest.raises(UserError, match="meeting point"):
        launch.spawn(print, (), processes=1, nodes=2, node=0, url="env://")
    with pytest.raises(UserError, match=r"--dist_url host:1"):
        launch.spawn(print, (), processes=1, nodes=2, node=0, url="host:1")


def test_a_port_in_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": 0, "WORLD_SIZE": 2}.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(RunError, match=rf"--dist_url.*127\.0\.0\.1:{port}.*port in use") as caught:
            launch.join([])
    assert "\n" not in str(caught.value)


class Beat:
    """Stands in for a heartbeat."""

    def __init__(self, gone: str = "") -> None:
        self.gone, self.said, self.advice = gone, [], ""

    def who_is_gone(self) -> str:
        self.said.append("waited")
        return self.gone

    def fail(self, *, follows: bool = False) -> None:
        self.said.append("followed" if follows else "failed")


@pytest.mark.parametrize(
    ("error", "gone", "said", "text"),
    [
        (RuntimeError("closed by peer"), "process 1 died", ["waited", "followed"], "process 1 died; process 0 stops"),
        (RuntimeError("a mistake"), "", ["waited", "failed"], "a mistake"),
        (RunError("a bad image"), "process 1 died", ["failed"], "a bad image"),
        (torch.OutOfMemoryError("full"), "process 1 died", ["failed"], "full"),
        (UserError("no data"), "", ["failed"], "no data"),
        (Interrupted(2), "", ["failed"], "interrupted"),
        (Stopped(15), "", [], "stopped"),
        (Incomplete("not all", {}), "", [], "not all"),
    ],
)
def test_whoever_fails_says_so_and_whoever_follows_names_the_other(error, gone, said, text) -> None:
    beat = Beat(gone)
    world = World(0, 2, 0, 2, torch.device("cpu"), beat)  # type: ignore[arg-type]
    kind = RunError if "followed" in said else type(error)
    with pytest.raises(kind, match=text), naming_lost_processes(world, "Start it again."):
        raise error
    assert beat.said == said
    assert beat.advice == "Start it again."  # where this process is stuck, its heartbeat says so


def test_where_torch_has_no_nccl_processes_with_gpus_use_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows."""
    backends = []

    def init(backend: str, **_: object) -> None:
        backends.append(backend)
        raise RuntimeError("far enough")

    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda *_, **__: iter([(None, 0, 2)]))
    monkeypatch.setattr(launch, "fresh_store", lambda *_: None)
    monkeypatch.setattr(torch.distributed, "init_process_group", init)
    for there in (True, False):
        monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda there=there: there)
        with pytest.raises(RunError, match="far enough"):
            launch.join([0, 1])
    assert backends == ["nccl", "gloo"]
