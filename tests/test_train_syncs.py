"""No step of training waits for the device, whatever the method and its options; evaluation reads only at its end."""

from pathlib import Path

import pytest
import torch

from dataset import SourceRequest, open_source
from dataset.augment.color import count_without_waiting
from parser_params import parse_config, resolve_config
from train_split import Trainer
from utils.distributed import World
from utils.sync_audit import SyncAudit

AUGMENTED = ["--is_autoaugment", "1", "--erase_p", "1"]
SPACE = """
operators: [[3, 2], [5, 2], [3, 4]]
stages:
  - {channels: 8, stride: 2}
  - {channels: 8, stride: 1}
deepening: [[2, 2], [1, 2]]
resolution: 8
stem_channels: 8
stem_stride: 1
base_channels: 8
tail_channels: 16
head_channels: 16
"""
SUPERNET = ["--method", "cream", "--arch", "cream_supernet", "--search_space", SPACE, "--sta_num", "2,2"]
SUPERNET += ["--slice", 2, "--flops_maximum", 0.2, "--meta_sta_epoch", 0, "--how_to_prob", "even"]


@pytest.fixture
def trainer_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Function of flags -> a trainer before its first step; an interval has two steps."""

    def build(*flags: object, device: str = "cpu") -> Trainer:
        argv = [
            "--dataset",
            "synthetic",
            "--num_classes",
            "10",
            "--crop_size",
            "8",
            "--arch",
            "resnet20",
            "--batch_size",
            "8",
            "--seed",
            "1",
            "--print_freq",
            "2",
        ]
        argv += ["--model_dir", str(tmp_path), *map(str, flags)]
        if device == "cpu":
            monkeypatch.setattr(torch, "bincount", count_without_waiting)  # as on a GPU
        config = parse_config(argv, program="train_split.py")
        request = SourceRequest(dataset=config.dataset, root=tmp_path, num_classes=config.num_classes, crop_size=8)
        source = open_source(request)
        config = resolve_config(config, data_recipe=source.recipe, crop_size=source.crop_size)
        trainer = Trainer(config, World(0, 1, 0, 1, torch.device(device)), source, None)
        trainer.method.train()
        return trainer

    return build


ROWS = {
    "s1": [*AUGMENTED, "--split_factor", 1, "--amp_dtype", "fp32"],
    "everything": [
        *AUGMENTED,
        "--split_factor",
        2,
        "--ema_decay",
        0.9,
        "--clip_grad",
        1,
        "--iters_to_accumulate",
        2,
        "--on_nonfinite",
        "skip",
        "--is_ensembled_loss",
        1,
        "--amp_dtype",
        "bf16",
    ],
    "s4": ["--split_factor", 4, "--is_mixup", 0, "--optimizer", "AdamW"],
    "randaa": ["--split_factor", 2, "--randaa", "rand-m9-n2-mstd0.5", "--optimizer", "RMSpropTF"],
    "dml": ["--method", "dml", "--split_factor", 2],
    "dks": ["--method", "dks", "--arch", "resnet20_cifar"],
    "l_mcl": ["--method", "l_mcl", "--arch", "lmcl_resnet20_cifar", "--meta_freq", 3],
    "l_mcl_bank": ["--method", "l_mcl", "--arch", "lmcl_resnet20_cifar", "--contrast", "bank", "--neg_k", 16],
}


@pytest.mark.parametrize("flags", ROWS.values(), ids=ROWS)
def test_a_step_waits_for_nothing(trainer_of, flags):
    trainer = trainer_of(*flags)
    batches = trainer.loader.epoch(0)
    trainer._interval(batches)
    with SyncAudit(trainer.world.device) as audit:
        trainer._interval(batches)
    assert trainer.step == 4
    assert audit.found == []


def test_a_search_reads_the_two_numbers_that_decide_what_comes_next(trainer_of):
    trainer = trainer_of(*SUPERNET)
    found = []
    for epoch in (0, 1):
        trainer.epoch, batches = epoch, trainer.loader.epoch(epoch)
        trainer._interval(batches)
        with SyncAudit(trainer.world.device) as audit:
            trainer._interval(batches)
        found.append([line.split(" at ")[0] for line in audit.found])
    while_closed, while_open = found
    assert while_closed == []
    # per step: the teacher, from the scores of the board; and the path's accuracy
    assert while_open == 2 * ["tolist", "tolist"]


def test_an_evaluation_reads_nothing_but_its_figures(trainer_of):
    found = []
    for batch_size in (16, 300):
        trainer = trainer_of("--eval_batch_size", batch_size, "--split_factor", 2)
        trainer.method.eval()
        with SyncAudit(trainer.world.device) as audit:
            trainer._evaluate("test")
        found.append(audit.found)
    many_batches, one_batch = found
    assert many_batches == one_batch


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("flags", ROWS.values(), ids=ROWS)
def test_a_gpu_is_not_waited_for_either(trainer_of, flags):
    trainer = trainer_of(*flags, device="cuda")
    batches = trainer.loader.epoch(0)
    trainer._interval(batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer._interval(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
