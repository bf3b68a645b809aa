"""Cream's published YAML dialect in terms of our flags, and the recipes in script/cream."""

from pathlib import Path

import pytest
import yaml

import parser_params
from model import LARGE, BackboneRequest, backbones, build_network
from recipe.cream_yaml import KEYS, RELEASED, is_published, is_published_key, read_published
from utils.errors import UserError

ROOT = Path(__file__).parent.parent
EXAMPLE = [[0], [3], [3, 3], [3, 1, 3], [3, 3, 3, 3], [3, 3, 3], [0]]
TRAIN = """
AUTO_RESUME: False
DATA_DIR: './data/imagenet'
MODEL: 'Supernet_Training'
RESUME_PATH: './experiments/workspace/train/resume.pth.tar'
SAVE_PATH: './experiments/workspace/train'
SEED: 42
LOG_INTERVAL: 50
RECOVERY_INTERVAL: 0
WORKERS: 8
NUM_GPU: 8
AMP: False
OUTPUT: 'None'
EVAL_METRICS: 'prec1'
TTA: 0
DATASET:
  NUM_CLASSES: 1000
  IMAGE_SIZE: 224
  INTERPOLATION: 'bilinear'
  BATCH_SIZE: 128
  NO_PREFECHTER: False
NET:
  GP: 'avg'
  DROPOUT_RATE: 0.0
  EMA:
    USE: True
    FORCE_CPU: False
    DECAY: 0.9998
OPT: 'sgd'
LR: 1.0
EPOCHS: 120
META_LR: 1e-4
BATCHNORM:
  SYNC_BN: False
SUPERNET:
  UPDATE_ITER: 200
  SLICE: 4
  POOL_SIZE: 10
  RESUNIT: False
  DIL_CONV: False
  UPDATE_2ND: True
  FLOPS_MINIMUM: 0
  FLOPS_MAXIMUM: 600
  PICK_METHOD: 'meta'
  META_STA_EPOCH: 20
  HOW_TO_PROB: 'pre_prob'
  PRE_PROB: (0.05,0.2,0.05,0.5,0.05,0.15)
"""
RETRAIN = """
AUTO_RESUME: False
DATA_DIR: './data/imagenet'
MODEL: '14m_retrain'
SAVE_PATH: './experiments/workspace/retrain'
NUM_GPU: 8
DATASET:
  BATCH_SIZE: 128
NET:
  SELECTION: 14
  DROPOUT_RATE: 0.2
  EMA: {USE: True, FORCE_CPU: False, DECAY: 0.9999}
OPT: 'rmsproptf'
OPT_EPS: 1e-3
EPOCHS: 500
DECAY_EPOCHS: 2.4
DECAY_RATE: 0.973
SCHED: 'step'
LR: 0.064
WARMUP_LR: 1e-6
WARMUP_EPOCHS: 3
WEIGHT_DECAY: 1e-5
AUGMENTATION:
  AA: 'rand-m9-mstd0.5'
  RE_PROB: 0.2
  RE_MODE: 'pixel'
"""


def read(text, *overrides, processes=8):
    return read_published(yaml.safe_load(text), where="--config x.yaml", overrides=overrides, processes=processes)


def test_search_file():
    flags, warnings, _ = read(TRAIN)
    expected = {
        "method": "cream",
        "arch": "cream_supernet",
        "dataset": "imagenet",
        "data": "./data/imagenet",
        "model_dir": "./experiments/workspace/train",
        "proc_name": "Supernet_Training",
        "seed": 42,
        "print_freq": 50,
        "workers": 8,
        "save_steps": 0,
        "num_classes": 1000,
        "batch_size": 1024,
        "eval_batch_size": 512,
        "epochs": 120,
        "optimizer": "SGD",
        "is_nesterov": True,
        "momentum": 0.9,
        "lr": 1.0,
        "lr_mode": "linear",
        "slow_start_epochs": -1,
        "end_lr": 0.0,
        "weight_decay": 1e-4,
        "no_decay": "norm_bias",
        "is_label_smoothing": True,
        "is_cutout": True,
        "erase_p": 0.2,
        "erase_mode": "pixel",
        "erase_area": [0.02, 1 / 3],
        "erase_ratio": [0.3, 1 / 0.3],
        "crop_area": [0.08, 1.0],
        "crop_interpolation": "random",
        "eval_interpolation": "bilinear",
        "crop_pct": 0.875,
        "color_jitter": 0.4,
        "is_autoaugment": False,
        "is_mixup": False,
        "is_amp": False,
        "is_syncbn": False,
        "ema_decay": 0.0,
        "global_pool": "avg",
        "dropout_rate": 0.0,
        "meta_lr": 1e-4,
        "update_iter": 200,
        "slice": 4,
        "pool_size": 10,
        "acc_gap": 5.0,
        "flops_minimum": 0.0,
        "flops_maximum": 600.0,
        "pick_method": "meta",
        "meta_sta_epoch": 20,
        "how_to_prob": "pre_prob",
        "pre_prob": [0.05, 0.2, 0.05, 0.5, 0.05, 0.15],
    }
    assert flags == expected
    assert warnings == [
        "--config x.yaml: without effect: AMP, DATASET.INTERPOLATION, DATASET.NO_PREFECHTER, NET.EMA.DECAY, "
        "NET.EMA.FORCE_CPU, NET.EMA.USE, OUTPUT, SUPERNET.UPDATE_2ND."
    ]


def test_retraining_file():
    flags, warnings, _ = read(RETRAIN)
    expected = {
        "arch": "cream_14",
        "crop_size": 64,
        "optimizer": "RMSpropTF",
        "optimizer_eps": 1e-3,
        "lr": 0.064,
        "lr_mode": "epoch_step",
        "decay_epochs": 2.4,
        "decay_factor": 0.973,
        "slow_start_lr": 1e-6,
        "slow_start_epochs": 3,
        "end_lr": 0.0,
        "epochs": 500,
        "weight_decay": 1e-5,
        "ema_decay": 0.9999,
        "dropout_rate": 0.2,
        "randaa": "rand-m9-mstd0.5",
        "color_jitter": 0.0,
        "batch_size": 1024,
        "seed": 42,
        "honour_single_block": False,
    }
    assert {name: flags.get(name) for name in expected} == expected
    assert not {"method", "meta_lr", "slice", "resume", "pre_prob"} & set(flags)
    assert warnings == ["--config x.yaml: without effect: NET.EMA.FORCE_CPU."]


def test_cosine_retraining_has_its_cool_down():
    flags = read(RETRAIN, "SCHED", "cosine", "NET.SELECTION", "287").flags
    expected = {"lr_mode": "epoch_cos", "epochs": 510, "decay_epochs": 500.0, "end_lr": 1e-5, "crop_size": 224}
    assert {name: flags[name] for name in expected} == expected
    assert "decay_factor" not in flags
    flags = read(RETRAIN, "SCHED", "cosine", "COOLDOWN_EPOCHS", "2", "MIN_LR", "1e-6", "EPOCHS", "8").flags
    assert (flags["epochs"], flags["decay_epochs"], flags["end_lr"]) == (10, 8.0, 1e-6)


def test_test_file():
    text = "{AUTO_RESUME: True, RESUME_PATH: a.pth.tar, MODEL: Childnet_Testing, NET: {SELECTION: 42}, NUM_GPU: 2}"
    flags, warnings, _ = read(text, processes=2)
    assert (flags["arch"], flags["crop_size"], flags["resume"]) == ("cream_43", 96, "a.pth.tar")
    assert (flags["batch_size"], flags["eval_batch_size"]) == (64, 128)
    assert "lr_mode" not in flags
    assert warnings == []


def test_what_is_left_out_has_the_published_default():
    flags, warnings, _ = read("{SUPERNET: {SLICE: 4}}", processes=1)
    expected = {"lr": 0.01, "epochs": 200, "update_iter": 1300, "batch_size": 32, "eval_batch_size": 128, "workers": 4}
    assert {name: flags[name] for name in expected} == expected
    assert "model_dir" not in flags
    assert warnings == []
    assert read("{NET: {SELECTION: 14}}").flags["ema_decay"] == 0.9998


@pytest.mark.parametrize("text", ["MODEL_SELECTION: 287", "NET: {SELECTION: 287}", "NET: {MODEL_SELECTION: 287}"])
def test_spellings_of_the_selection(text):
    assert read(text).flags["arch"] == "cream_287"
    both = {**yaml.safe_load(text), "MODEL_SELECTION": 287}
    assert read(yaml.safe_dump(both)).flags["arch"] == "cream_287"
    with pytest.raises(UserError, match="disagree"):
        read("{MODEL_SELECTION: 14, NET: {SELECTION: 43}}")


@pytest.mark.parametrize(
    "text",
    [
        f"INPUT_ARCH: {EXAMPLE}",
        f"NET: {{INPUT_ARCH: {EXAMPLE}}}",
        f"INPUT_ARCH: '{EXAMPLE}'",
        f"{{MODEL_SELECTION: -1, INPUT_ARCH: {EXAMPLE}, NET: {{INPUT_ARCH: {EXAMPLE}}}}}",
    ],
)
def test_spellings_of_the_arch_list(text):
    flags = read(text, "DATASET.IMAGE_SIZE", "96").flags
    assert (flags["arch"], flags["crop_size"], flags["honour_single_block"]) == ("cream", 96, False)
    assert yaml.safe_load(flags["arch_list"]) == EXAMPLE
    request = BackboneRequest(arch="cream", num_classes=10, shape=LARGE, options=flags)
    assert len(build_network(request).blocks) == 7
    with pytest.raises(UserError, match="disagree"):
        read(f"{{INPUT_ARCH: {EXAMPLE}, NET: {{INPUT_ARCH: [[0], [0]]}}}}")


def test_a_selection_wins_over_a_list_and_forces_its_size():
    flags, warnings, _ = read(f"{{MODEL_SELECTION: 112, INPUT_ARCH: {EXAMPLE}, DATASET: {{IMAGE_SIZE: 224}}}}")
    assert (flags["arch"], flags["crop_size"]) == ("cream_114", 160)
    assert "arch_list" not in flags
    assert warnings == ["--config x.yaml: without effect: DATASET.IMAGE_SIZE, INPUT_ARCH."]


def test_released_models_are_the_registered_ones():
    for selection, (arch, size) in RELEASED.items():
        assert backbones.get(arch).crop_size == size == backbones.get(f"cream_{selection}").crop_size


def test_switches():
    flags = read(TRAIN, "DATASET.IMAGE_SIZE", "160", "SUPERNET.STA_NUM", "[4, 4, 5, 4, 4]", "OPT", "momentum").flags
    assert (flags["crop_size"], flags["sta_num"], flags["is_nesterov"]) == (160, [4, 4, 5, 4, 4], False)
    flags = read(TRAIN, "AUGMENTATION.SMOOTHING", "0", "AUGMENTATION.RE_PROB", "0").flags
    assert (flags["is_label_smoothing"], flags["is_cutout"]) == (False, False)
    flags = read(TRAIN, "AUTO_RESUME", "True").flags
    assert flags["resume"] == "./experiments/workspace/train/resume.pth.tar"
    flags, warnings, _ = read(RETRAIN, "AUGMENTATION.AA", "none", "NET.EMA.USE", "False", "SUPERNET.SLICE", "8")
    assert (flags["color_jitter"], flags["ema_decay"]) == (0.4, 0.0)
    assert "randaa" not in flags
    assert "SUPERNET.SLICE" in warnings[0]


@pytest.mark.parametrize("text", [TRAIN, RETRAIN])
def test_the_optimisers_of_the_dialect(text):
    for name, ours in (("adam", "Adam"), ("AdamW", "AdamW"), ("rmsproptf", "RMSpropTF")):
        flags = read(text, "OPT", name, "OPT_EPS", "1e-5").flags
        assert (flags["optimizer"], flags["optimizer_eps"]) == (ours, 1e-5)
    flags, warnings, _ = read(text, "OPT", "sgd", "OPT_EPS", "1e-5")
    assert "optimizer_eps" not in flags
    assert "OPT_EPS" in warnings[0]
    assert read(TRAIN, "OPT", "adam").flags["optimizer_eps"] == 1e-2  # the published default


def test_number_of_processes_is_the_launchers():
    flags, warnings, _ = read(TRAIN, processes=2)
    assert flags["batch_size"] == 256
    assert "NUM_GPU 8 is ignored: 2 processes" in warnings[0]


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (("LR_RATE", "1"), "'LR_RATE' is not a known key"),
        (("SUPERNET.SLICES", "1"), "Did you mean 'SUPERNET.SLICE'"),
        (("DATASET.NO_PREFETCHER", "1"), "Did you mean 'DATASET.NO_PREFECHTER'"),
        (("LR",), "'LR': overrides are KEY VALUE pairs"),
        (("LR", "fast"), "LR: 'fast' is not usable: expected a number"),
        (("EPOCHS", "1.5"), "EPOCHS: '1.5' is not usable: expected a whole number"),
        (("NET.EMA.USE", "maybe"), "expected True or False"),
        (("SUPERNET.PRE_PROB", "(0.1,"), "expected numbers"),
        (("SUPERNET.PRE_PROB", "0.1"), "expected numbers"),
        (("SUPERNET.STA_NUM", "__import__('os')"), "expected whole numbers"),
        (("NET.INPUT_ARCH", "[1, 2]"), "expected a list of lists"),
        (("NET.SELECTION", "470"), "470 is not a released model: 14, 42, 43, 112, 114, 287, 481, 604"),
        (("NET.SELECTION", "23"), "23 is not a released model"),
        (("NET.SELECTION", "-1"), "needs INPUT_ARCH"),
        (("SCHED", "sgd"), "SCHED 'sgd' is not one of cosine, step"),
        (("SCHED", "cosin"), "Did you mean 'cosine'"),
        (("OPT", "adamax"), "OPT 'adamax' is not one of"),
        (("TTA", "2"), "TTA 2 is not supported"),
        (("EVAL_METRICS", "prec5"), "EVAL_METRICS"),
        (("SUPERNET.RESUNIT", "True"), "RESUNIT True is not supported"),
        (("SUPERNET.DIL_CONV", "True"), "DIL_CONV True is not supported"),
        (("AUGMENTATION.SMOOTHING", "0.2"), "must be 0 or 0.1"),
        (("AUGMENTATION.RE_MODE", "rand"), "must be pixel or const"),
    ],
)
def test_what_cannot_work_is_refused(overrides, fault):
    with pytest.raises(UserError) as error:
        read(RETRAIN, *overrides)
    assert fault in str(error.value)
    assert "\n" not in str(error.value)


def test_a_search_ignores_a_schedule():
    flags, warnings, _ = read(TRAIN, "SCHED", "sgd", "WARMUP_EPOCHS", "3")
    assert flags["lr_mode"] == "linear"
    assert "SCHED, SUPERNET.UPDATE_2ND, WARMUP_EPOCHS" in warnings[0]


@pytest.mark.parametrize(
    "pattern", ["LR_NOISE_PCT", "OPTIMIZER.NAME", "AUGMENTATION.MIXUP_OFF", "BATCHNORM.BN_EPS", "VERBOSE"]
)
def test_keys_without_effect_are_accepted_and_said(pattern):
    assert pattern in read(TRAIN, pattern, "1").warnings[0]


def test_the_dialect_is_told_by_its_capitals():
    assert is_published(yaml.safe_load(TRAIN))
    assert is_published_key("SUPERNET.UPDATE_2ND")
    assert not is_published({"lr": 1})
    assert not is_published({})
    assert not is_published({"LR": 1, "epochs": 2})


def test_every_flag_exists():
    known = parser_params._known_flags("cream")
    for text, overrides in ((TRAIN, ()), (TRAIN, ("SUPERNET.STA_NUM", "[1,1,1,1,1]")), (RETRAIN, ("SCHED", "cosine"))):
        for name, value in read(text, *overrides).flags.items():
            known[name].parse(value, name)
    assert {key.flag for key in KEYS.values()} - {None} <= set(known)


def test_overrides_decide_what_the_table_says():
    plain = read(RETRAIN, "INPUT_ARCH", str(EXAMPLE)).flags
    changes = {"NET.SELECTION": "-1", "EPOCHS": "7", "OPT": "sgd", "SCHED": "cosine", "AUGMENTATION.AA": "none"}
    changes |= {"DATASET.BATCH_SIZE": "3", "DATASET.VAL_BATCH_MUL": "2", "NET.EMA.USE": "0", "MIN_LR": "1", "LR": "2"}
    changes |= {"DECAY_EPOCHS": "3", "DECAY_RATE": "0.5", "AUGMENTATION.SMOOTHING": "0", "AUGMENTATION.RE_PROB": "0"}
    for key, value in changes.items():
        flags, _, overridden = read(RETRAIN, "INPUT_ARCH", str(EXAMPLE), key, value)
        changed = {name for name in flags if flags[name] != plain.get(name)}
        assert changed - {"arch_list", "arch"} <= overridden, key
        assert changed or key == "MIN_LR", key
        assert "seed" not in overridden
    assert not read(RETRAIN).overridden


def test_the_parser_reads_the_dialect(tmp_path, monkeypatch):
    file = tmp_path / "train.yaml"
    file.write_text(TRAIN)
    argv = ["--config", str(file), "--seed", "5", "--lr", "0.7", "--workers", "3", "EPOCHS", "60", "WORKERS", "2"]
    config = parser_params.resolve_config(parser_params.parse_config(argv), data_recipe="imagenet")
    found = [(getattr(config, n), config.origins[n]) for n in ("seed", "lr", "workers", "epochs", "momentum")]
    assert found == [(5, "flag"), (0.7, "flag"), (2, "override"), (60, "override"), (0.9, "yaml")]
    assert (config.method, config.batch_size, config.erase_mode, config.color_jitter) == ("cream", 128, "pixel", 0.4)
    assert config.method_options.pre_prob == (0.05, 0.2, 0.05, 0.5, 0.05, 0.15)
    assert "NUM_GPU 8 is ignored: 1 processes" in config.warnings[0]
    assert "without effect" in config.warnings[1]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "8")
    config = parser_params.parse_config(["--config", str(file), "lr", "0.5", "DATASET.BATCH_SIZE", "4"])
    assert (config.batch_size, config.lr, len(config.warnings)) == (32, 0.5, 1)
    # a selection among the overrides makes another run of it, with other flags
    config = parser_params.parse_config(["--config", str(file), "NET.SELECTION", "287", "SCHED", "cosine"])
    assert (config.method, config.arch, config.crop_size) == ("co_training", "cream_287", 224)


@pytest.mark.parametrize(
    ("text", "argv", "fault"),
    [
        (TRAIN, ["SUPERNET.SLICES", "1"], "Did you mean 'SUPERNET.SLICE'"),
        (TRAIN + "LR_RATE: 1\n", [], "'LR_RATE' is not a known key"),
        (TRAIN, ["LR"], "one has no value"),
        (TRAIN, ["LR", "1", "--no_cuda"], "LR.*--config behind all flags"),
        (TRAIN, ["lrr", "1"], "override 'lrr' is not a known flag"),
        ("lr: 1", ["LR", "1"], "override 'LR' is not a known flag"),
        ("lr: 1\nLR: 1", [], "'LR' is not a known flag"),
    ],
)
def test_the_parser_refuses_in_one_line(tmp_path, text, argv, fault):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match=fault):
        parser_params.parse_config(["--config", str(tmp_path / "x.yaml"), *argv])


@pytest.mark.parametrize("path", sorted((ROOT / "script" / "cream").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_usable(path):
    config = parser_params.parse_config(["--config", str(path)])
    if config.method == "cream":
        assert config.arch == "cream_supernet"
    request = BackboneRequest(
        arch=config.arch,
        num_classes=10,
        shape=LARGE if config.dataset == "imagenet" else "small",
        options=config.backbone_options,
    )
    assert build_network(request).training
    if path.stem.startswith("retrain_"):
        assert config.arch == f"cream_{path.stem.removeprefix('retrain_')}"
        assert config.crop_size == backbones.get(config.arch).crop_size
