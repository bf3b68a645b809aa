import dataclasses
import logging
import math
import multiprocessing
import os
import signal
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resized_crop

from dataset import DataSource, ImageSet
from dataset.augment.resized_crop import RESIZED_CROP_SLOTS, draw_resized_crops
from dataset.cut import RandomCrops, Request, ResizedCropSpec
from dataset.decode import read_rgb, resize_crop
from dataset.loader import EvalLoader, TrainLoader
from dataset.options import DataOptions
from dataset.pipeline import build_eval_loader, build_train_loader
from dataset.sampler import ClassBalancedSampler, class_balanced_order, images_per_class, shard
from recipe.preprocessing import eval_resize
from tests.fake_gpu import GPU, fake_gpu
from utils.errors import RunError, UserError
from utils.launch import World
from utils.seed import STREAM_ORDER, STREAM_VIEW, counter_uniform, fold_in, numpy_generator

CPU = torch.device("cpu")
CROP = ResizedCropSpec(size=20, area=(0.2, 0.9), ratio=(0.5, 1.5))


def in_memory(size, num_classes=3):
    """Image i holds the value i mod 256 everywhere but in its first pixel, which holds i // 256."""
    images = (torch.arange(size) % 256).to(torch.uint8)[:, None, None, None].repeat(1, 3, 2, 2)
    images[:, :, 0, 0] = (torch.arange(size) // 256).to(torch.uint8)[:, None]
    return ImageSet(targets=torch.arange(size) % num_classes, images=images)


def train_loader(split, **changes):
    options = {
        "batch_size": 4,
        "num_views": 2,
        "seed": 5,
        "rank": 0,
        "world_size": 1,
        "device": CPU,
        "workers": 0,
        "crop": None if split.images is not None else CROP,
    }
    return TrainLoader(split, **{**options, **changes})


def eval_loader(split, **changes):
    sides = {"resize": None, "crop": None} if split.images is not None else {"resize": 24, "crop": 20}
    options = {"batch_size": 3, "rank": 0, "world_size": 1, "device": CPU, "workers": 0, **sides}
    return EvalLoader(split, **{**options, **changes})


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Thirteen files of different sizes."""
    root = tmp_path_factory.mktemp("files")
    generator = np.random.default_rng(0)
    paths = []
    for i in range(13):
        height, width = generator.integers(25, 60, 2)
        paths.append(root / f"{i}.{'jpg' if i % 2 else 'png'}")
        Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(paths[-1])
    return ImageSet(targets=torch.arange(13) % 3, paths=tuple(paths))


@pytest.fixture
def damaged(files, tmp_path):
    """As `files`, but the fourth and the eighth cannot be read."""
    paths = list(files.paths)
    for i in (3, 7):
        paths[i] = tmp_path / f"{i}.png"
        paths[i].write_bytes(b"")
    return ImageSet(targets=files.targets, paths=tuple(paths))


def assert_same(batches, others):
    for one, other in zip(batches, others, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels_B, other.labels_B)
        assert torch.equal(one.indices_B, other.indices_B)
        assert (one.positions_B == other.positions_B).all()
        assert one.global_batch_size == other.global_batch_size


@given(size=st.integers(0, 100), world_size=st.integers(1, 9))
def test_shards_are_those_of_array_split(size, world_size):
    expected = np.array_split(np.arange(size), world_size)
    for rank in range(world_size):
        assert np.arange(size)[shard(size, rank, world_size)].tolist() == expected[rank].tolist()


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 300),
    batch_size=st.integers(1, 64),
    world_size=st.integers(1, 5),
    epoch=st.integers(0, 3),
    drop_last=st.booleans(),
)
def test_the_parts_of_all_processes_are_the_batch_of_one(size, batch_size, world_size, epoch, drop_last):
    split = in_memory(size)

    def loader(rank, world_size):
        return train_loader(split, batch_size=batch_size, rank=rank, world_size=world_size, drop_last=drop_last)

    if min(size, batch_size) < world_size:
        with pytest.raises(UserError, match="--batch_size"):
            loader(0, world_size)
        return
    alone = loader(0, 1)
    loaders = [loader(rank, world_size) for rank in range(world_size)]
    assert len({part.steps_per_epoch for part in loaders}) == 1
    whole, rest = divmod(size, batch_size)
    expected = whole if drop_last and whole else whole + (rest > 0)
    assert alone.steps_per_epoch == expected
    assert loaders[0].steps_per_epoch == expected - (0 < rest < world_size and expected > whole)

    order = numpy_generator(5, STREAM_ORDER, epoch).permutation(size)
    steps = zip(alone.epoch(epoch), *(part.epoch(epoch) for part in loaders))  # noqa: B905 (the last may be missing)
    for step, (batch, *parts) in enumerate(steps):
        positions = np.arange(step * batch_size, min((step + 1) * batch_size, size))
        assert batch.positions_B.tolist() == positions.tolist()
        assert batch.indices_B.tolist() == order[positions].tolist()
        assert torch.equal(batch.labels_B, split.targets[batch.indices_B])
        assert torch.equal(batch.images, split.images[batch.indices_B])
        assert batch.global_batch_size == len(positions)
        assert {part.global_batch_size for part in parts} == {len(positions)}
        sizes = [len(part.labels_B) for part in parts]
        assert min(sizes) > 0
        assert max(sizes) - min(sizes) <= 1
        for name in ("images", "labels_B", "indices_B"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
        assert np.concatenate([part.positions_B for part in parts]).tolist() == positions.tolist()
    assert [len(list(part.epoch(epoch))) for part in loaders] == [loaders[0].steps_per_epoch] * world_size


@settings(max_examples=60, deadline=None)
@given(size=st.integers(0, 120), batch_size=st.integers(1, 40), world_size=st.integers(1, 5))
def test_evaluation_takes_every_image_exactly_once(size, batch_size, world_size):
    split = in_memory(size)
    loaders = [
        eval_loader(split, batch_size=batch_size, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    parts = [list(part) for part in loaders]
    seen = [batch for part in parts for batch in part]
    assert [i for batch in seen for i in batch.indices_B.tolist()] == list(range(size))
    assert [i for batch in seen for i in batch.positions_B.tolist()] == list(range(size))
    for batch in seen:
        assert 0 < len(batch.labels_B) <= batch_size
        assert torch.equal(batch.images, split.images[batch.indices_B])
        assert torch.equal(batch.labels_B, split.targets[batch.indices_B])
    assert [len(part) for part in loaders] == [len(part) for part in parts]
    for step in range(max(map(len, parts))):
        together = [part[step] for part in parts if step < len(part)]
        assert {batch.global_batch_size for batch in together} == {sum(len(batch.labels_B) for batch in together)}


def test_epochs_and_seeds_have_orders_of_their_own():
    split = in_memory(50)

    def order(seed, epoch):
        return torch.cat([batch.indices_B for batch in train_loader(split, seed=seed, batch_size=10).epoch(epoch)])

    assert torch.equal(order(1, 3), order(1, 3))
    assert not torch.equal(order(1, 3), order(1, 4))
    assert not torch.equal(order(1, 3), order(2, 3))
    assert sorted(order(1, 3).tolist()) == list(range(50))


def test_an_epoch_can_be_entered_at_any_batch(files):
    for split in (in_memory(30), files):
        loader = train_loader(split)
        whole = list(loader.epoch(2))
        for start in range(len(whole) + 1):
            assert_same(loader.epoch(2, start), whole[start:])


def test_what_was_done_is_not_decoded_again(files, monkeypatch):
    opened = []
    monkeypatch.setattr("dataset.loader.read_rgb", lambda path: opened.append(path) or read_rgb(path))
    loader = train_loader(files)
    (batch,) = loader.epoch(0, 2)
    assert opened == [str(files.paths[i]) for i in batch.indices_B]


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random"])
def test_views_of_files_are_torchvisions_crops_of_pils_images_bit_for_bit(files, interpolation):
    crop = ResizedCropSpec(size=20, area=(0.2, 0.9), ratio=(0.5, 1.5), interpolation=interpolation)
    chosen = []
    for batch in train_loader(files, num_views=3, crop=crop).epoch(4):
        assert batch.images.shape == (3, 4, 3, 20, 20)
        assert (batch.images.dtype, batch.images.is_contiguous()) == (torch.uint8, True)
        key = fold_in(5, STREAM_VIEW, 4, 1)
        uniforms = counter_uniform(key, batch.positions_B, np.arange(3), RESIZED_CROP_SLOTS + 1)
        for row, index in enumerate(batch.indices_B.tolist()):
            image = Image.open(files.paths[index])
            for view in range(3):
                name = interpolation
                if name == "random":
                    name = "bilinear" if uniforms[view, row, -1] < 0.5 else "bicubic"
                chosen.append(name)
                drawn = uniforms[view, row, :RESIZED_CROP_SLOTS]
                box = draw_resized_crops(drawn, image.height, image.width, (0.2, 0.9), (0.5, 1.5))
                expected = np.asarray(resized_crop(image, *box.tolist(), [20, 20], InterpolationMode(name)))
                assert (batch.images[view, row].permute(1, 2, 0).numpy() == expected).all()
    assert set(chosen) == ({"bilinear", "bicubic"} if interpolation == "random" else {interpolation})


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [24, 130])
@pytest.mark.parametrize(("width", "height"), [(100, 75), (3, 2), (1, 1), (400, 40), (7, 300), (200_000, 1)])
def test_crops_of_any_shape_are_torchvisions(interpolation, size, width, height):
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    crop = ResizedCropSpec(size=size, area=(0.1, 1.0), interpolation=interpolation)
    for position in range(5):
        views = RandomCrops(crop, 2, seed=0).prepare(Request(0, np.zeros(1), np.array([position]), 1))(image, 0)
        key = fold_in(0, STREAM_VIEW, 0, 1)
        uniforms = counter_uniform(key, np.array([position]), np.arange(2), RESIZED_CROP_SLOTS)
        for view in range(2):
            box = draw_resized_crops(uniforms[view, 0], height, width)
            expected = np.asarray(resized_crop(image, *box.tolist(), [size, size], InterpolationMode(interpolation)))
            assert (views[view].permute(1, 2, 0).numpy() == expected).all()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 3])
def test_how_a_view_is_resized_depends_on_neither_workers_nor_processes(files, workers, world_size):
    def views(rank, world_size, workers):
        crop = dataclasses.replace(CROP, interpolation="random")
        loader = train_loader(files, crop=crop, num_views=2, rank=rank, world_size=world_size, workers=workers)
        return [batch.images for batch in loader.epoch(1)]

    parts = [views(rank, world_size, workers) for rank in range(world_size)]
    for whole, *split in zip(views(0, 1, 0), *parts, strict=True):
        assert torch.equal(whole, torch.cat(split, dim=1))


def test_evaluation_resizes_and_cuts_files(files):
    batches = list(eval_loader(files))
    assert [len(batch.labels_B) for batch in batches] == [3, 3, 3, 3, 1]
    for batch in batches:
        for image, index in zip(batch.images, batch.indices_B.tolist(), strict=True):
            expected = np.asarray(resize_crop(Image.open(files.paths[index]), 24, 20))
            assert (image.permute(1, 2, 0).numpy() == expected).all()


@pytest.mark.parametrize("world_size", [2, 3])
def test_views_do_not_depend_on_the_number_of_processes(files, world_size):
    parts = [list(train_loader(files, rank=rank, world_size=world_size).epoch(1)) for rank in range(world_size)]
    for batch, *pieces in zip(train_loader(files).epoch(1), *parts, strict=True):
        assert torch.equal(torch.cat([piece.images for piece in pieces], dim=1), batch.images)


def test_workers_change_nothing_and_live_on(files, damaged):
    """One test for all that needs worker processes, since they are slow to start.

    Errors are not kept in a variable: they would tie a knot of references, and the garbage collector takes a loader in
    such a knot apart in an order that leaves its workers waiting.
    """
    others = set(multiprocessing.active_children())
    plain, loader = train_loader(files), train_loader(files, workers=3)
    state = torch.get_rng_state()
    whole = list(plain.epoch(0))
    assert_same(loader.epoch(0), whole)
    processes = set(multiprocessing.active_children()) - others
    assert_same(loader.epoch(0, 1), whole[1:])
    abandoned = loader.epoch(1)
    next(abandoned)
    assert_same(loader.epoch(2), plain.epoch(2))
    assert set(multiprocessing.active_children()) - others == processes
    assert len(processes) == 3
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is not drawn from

    failing = train_loader(damaged, workers=1)
    with pytest.raises(RunError, match=r"\A/[^\n]*: the file is empty\.[^\n]*--on_bad_image skip[^\n]*\Z"):
        list(failing.epoch(0))
    skipping = train_loader(damaged, workers=1, on_bad_image="skip")
    assert_same(skipping.epoch(0), train_loader(damaged, on_bad_image="skip").epoch(0))
    assert set(skipping.bad_images) <= {damaged.paths[3], damaged.paths[7]}
    assert skipping.bad_images
    del loader, abandoned, failing, skipping
    assert set(multiprocessing.active_children()) == others  # at once, and not when the garbage collector comes round


def test_a_worker_that_dies_is_one_line(files, monkeypatch):
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
    before = set(multiprocessing.active_children())
    loader = train_loader(files, workers=1, batch_size=1)
    batches = loader.epoch(0)
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - before
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(RunError, match=r"\A[^\n]*decoding process died[^\n]*--workers[^\n]*\Z"):
        list(batches)


@pytest.mark.parametrize("index", [3, 7])
def test_a_bad_image_stops_training_and_evaluation_with_its_name(damaged, index):
    split = damaged.subset(torch.tensor([0, 1, index, 2]))
    for batches in (train_loader(split).epoch(0), eval_loader(split)):
        with pytest.raises(RunError) as error:
            list(batches)
        text = str(error.value)
        assert "\n" not in text
        assert text.startswith(str(damaged.paths[index]))
        assert "--on_bad_image skip" in text
        assert error.value.exit_code == 1


def test_skipped_images_leave_the_rest_of_the_batch_alone(files, damaged):
    loader = train_loader(damaged, on_bad_image="skip", batch_size=13)
    (batch,) = loader.epoch(0)
    (sound,) = train_loader(files, batch_size=13).epoch(0)
    kept = torch.tensor([i not in (3, 7) for i in sound.indices_B])
    assert torch.equal(batch.indices_B, sound.indices_B[kept])
    assert torch.equal(batch.images, sound.images[:, kept])
    assert torch.equal(batch.labels_B, sound.labels_B[kept])
    assert (batch.positions_B == sound.positions_B[kept.numpy()]).all()
    assert batch.global_batch_size == 13
    assert loader.bad_images == {damaged.paths[3]: "the file is empty", damaged.paths[7]: "the file is empty"}

    evaluation = eval_loader(damaged, on_bad_image="skip", batch_size=1)
    seen = [int(batch.indices_B) for batch in evaluation]
    assert seen == [i for i in range(13) if i not in (3, 7)]
    assert set(evaluation.bad_images) == {damaged.paths[3], damaged.paths[7]}


def test_a_training_batch_without_any_readable_image_is_an_error(damaged):
    split = damaged.subset(torch.tensor([3, 7]))
    with pytest.raises(RunError, match="the file is empty"):
        list(train_loader(split, on_bad_image="skip").epoch(0))


def test_time_is_counted_only_while_waiting(files, monkeypatch):
    clock = [0.0]

    def read_in_one_second(path):
        clock[0] += 1
        return read_rgb(path)

    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    monkeypatch.setattr("dataset.loader.read_rgb", read_in_one_second)
    for loader, batches, seconds in (
        (train := train_loader(files), train.epoch(0), 12),
        (test := eval_loader(files), test, 13),
    ):
        assert loader.time_waiting == 0
        for _ in batches:
            clock[0] += 100  # the step
        assert loader.time_waiting == seconds


def test_constructors_refuse_what_cannot_work(files):
    with pytest.raises(UserError, match="training set is empty"):
        train_loader(ImageSet.empty(), crop=None)
    with pytest.raises(ValueError, match="files need a crop"):
        train_loader(files, crop=None)
    with pytest.raises(ValueError, match="files need a crop"):
        eval_loader(files, resize=None)
    with pytest.raises(ValueError, match="in memory take none"):
        train_loader(in_memory(5), crop=CROP)
    with pytest.raises(ValueError, match=r"sampler.* 7 .* 8"):
        list(train_loader(in_memory(9), sampler=lambda epoch: np.arange(7)).epoch(0))
    assert list(eval_loader(ImageSet.empty(), resize=8, crop=8)) == []


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    batch_size=st.integers(2, 24),
    per_class=st.integers(1, 4),
    seed=st.integers(0, 5),
)
def test_class_balanced_batches(sizes, batch_size, per_class, seed):
    targets = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    targets = targets[torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))]
    if batch_size < per_class:
        with pytest.raises(UserError, match="--batch_size"):
            images_per_class(len(sizes), batch_size, per_class)
        return
    m = images_per_class(len(sizes), batch_size, per_class)
    assert m == min(d for d in range(per_class, 25) if batch_size % d == 0 and d * len(sizes) >= batch_size)
    order = class_balanced_order(
        targets, batch_size=batch_size, per_class=per_class, generator=np.random.default_rng(seed)
    )
    assert order.dtype == np.int64
    assert len(order) == max(1, len(targets) // batch_size) * batch_size
    for groups in order.reshape(-1, batch_size // m, m):
        labels = targets[torch.from_numpy(groups)]
        assert (labels == labels[:, :1]).all()
        assert len(labels[:, 0].unique()) == len(labels)
        for label, group in zip(labels[:, 0].tolist(), groups, strict=True):
            if sizes[label] >= m:
                assert len(set(group.tolist())) == m


def test_class_balanced_draws_are_uniform():
    targets = torch.tensor([0] * 5 + [1] * 5 + [2] * 3)
    order = np.concatenate(
        [class_balanced_order(targets, batch_size=4, generator=np.random.default_rng(seed)) for seed in range(4000)]
    )
    pairs = order.reshape(-1, 2)
    for label, members in enumerate((range(5), range(5, 10), range(10, 13))):
        drawn = np.sort(pairs[targets[pairs[:, 0]] == label])
        assert len(drawn) == pytest.approx(len(pairs) / 3, rel=0.03)
        counts = np.unique(drawn, axis=0, return_counts=True)[1]
        assert len(counts) == math.comb(len(members), 2)
        assert counts == pytest.approx([len(drawn) / len(counts)] * len(counts), rel=0.15)
    few = class_balanced_order(torch.zeros(2).long(), batch_size=600, per_class=6, generator=np.random.default_rng(0))
    assert np.bincount(few) == pytest.approx([300, 300], rel=0.2)


def test_the_class_balanced_sampler_drives_the_loader(caplog):
    targets = torch.arange(100) % 10
    split = ImageSet(targets=targets, images=torch.zeros(100, 3, 2, 2, dtype=torch.uint8))
    with caplog.at_level(logging.INFO):
        sampler = ClassBalancedSampler(targets, batch_size=32, seed=1)
    assert "4 images of a class" in caplog.text
    loader = train_loader(split, batch_size=32, sampler=sampler)
    assert loader.steps_per_epoch == 3
    batches = list(loader.epoch(0))
    for batch in batches:
        assert sorted(batch.labels_B.bincount(minlength=10).tolist())[-8:] == [4] * 8
    assert_same(loader.epoch(0, 1), batches[1:])
    assert torch.equal(torch.cat([b.indices_B for b in batches]), torch.from_numpy(sampler(0)))
    assert sampler(0).tolist() != sampler(1).tolist()
    caplog.clear()
    ClassBalancedSampler(targets, batch_size=31, seed=1)  # a prime: no smaller groups fill the batch
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "of one class" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        ClassBalancedSampler(torch.arange(400) % 100, batch_size=128, seed=1)
    assert caplog.text == ""


def test_the_published_sampler_has_one_positive_for_each_anchor():
    targets = torch.arange(50_000) % 100
    order = class_balanced_order(targets, batch_size=128, generator=np.random.default_rng(0))
    assert len(order) == 49_920
    assert len(set(order.tolist())) == pytest.approx(31_606, rel=0.02)  # what the spec's reference run touched


def test_images_in_memory_stay_on_the_host_where_the_device_is_full(monkeypatch):
    split = in_memory(9)
    expected = list(train_loader(split).epoch(0))
    monkeypatch.setattr("dataset.loader._fits", lambda device, num_bytes: False)
    assert_same(train_loader(split).epoch(0), expected)


@pytest.mark.parametrize("make", [train_loader, eval_loader])
def test_images_on_a_device_need_not_stay_on_the_host(monkeypatch, make):
    monkeypatch.setattr("dataset.loader._fits", lambda device, images: True)
    split = in_memory(9)
    on_host = weakref.ref(split.images)
    loader = make(split, device=torch.device("meta"))
    split = loader.resident(split)
    assert split.images.device.type == "meta"
    assert split.images.shape[0] == len(split) == 9
    assert on_host() is None
    # where the device is full they are still there, and files have none
    monkeypatch.setattr("dataset.loader._fits", lambda device, images: False)
    split = in_memory(9)
    assert make(split, device=torch.device("meta")).resident(split).images is split.images


@pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU has tests of its own")
def test_images_that_stay_on_the_host_go_to_a_gpu_beside_its_steps(monkeypatch):
    sent: list[torch.device] = []

    class Noted:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def send(self, images: torch.Tensor) -> torch.Tensor:
            sent.append(images.device)
            return images.to(self.device)

    monkeypatch.setattr("dataset.loader.Uploads", Noted)
    monkeypatch.setattr("dataset.loader._fits", lambda device, images: False)
    with fake_gpu(monkeypatch, num_classes=3):
        batches = list(train_loader(in_memory(13), device=GPU).epoch(0))
    assert sent == [CPU] * len(batches)
    assert {tensor.device for batch in batches for tensor in (batch.images, batch.labels_B)} == {GPU}


@pytest.mark.gpu
def test_batches_arrive_on_the_gpu_from_memory_pinned_memory_and_files(files, monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    device = torch.device("cuda", 0)
    for split in (in_memory(30), files):
        expected = list(train_loader(split).epoch(0))
        for share in (0.25, 0.0):
            monkeypatch.setattr("dataset.loader.DEVICE_SHARE", share)
            batches = list(train_loader(split, device=device).epoch(0))
            assert {t.device for b in batches for t in (b.images, b.labels_B, b.indices_B)} == {device}
            host = [
                b._replace(images=b.images.cpu(), labels_B=b.labels_B.cpu(), indices_B=b.indices_B.cpu())
                for b in batches
            ]
            assert_same(host, expected)


def test_large_images_are_cut_as_asked(tmp_path):
    """--crop_area bounds the training crops, --crop_pct the cut of evaluation."""
    pixels = np.random.default_rng(0).integers(0, 256, (70, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    split = ImageSet(targets=torch.zeros(2, dtype=torch.int64), paths=(tmp_path / "a.png",) * 2)
    source = DataSource(
        name="imagenet", recipe="imagenet", classes=("a", "b"), mean=(0.5,) * 3, std=(0.5,) * 3, crop_size=35,
        train=split, test=split,
    )  # fmt: skip
    options = DataOptions(crop_size=35, batch_size=2, eval_batch_size=2, workers=0, crop_area=(1.0, 1.0))
    world = World(0, 1, 0, 1, torch.device("cpu"))
    train = build_train_loader(source, options, world, num_views=1, seed=0)
    whole = np.asarray(Image.fromarray(pixels).resize((35, 35), Image.Resampling.BICUBIC))
    batch = next(iter(train.epoch(0)))
    for view in batch.images.flatten(0, -4).permute(0, 2, 3, 1).numpy():
        assert np.abs(view - whole.astype(np.int16)).max() <= 2  # no other box has the whole area
    for crop_pct, side in ((None, int(1.15 * 35)), (0.5, 70)):
        (batch,) = build_eval_loader(split, dataclasses.replace(options, crop_pct=crop_pct), world)
        resized = Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)
        corner = round((side - 35) / 2)
        wanted = np.asarray(resized.crop((corner, corner, corner + 35, corner + 35)))
        assert np.array_equal(batch.images[0].permute(1, 2, 0).numpy(), wanted)
    assert [eval_resize(size, 0.875) for size in (64, 96, 160, 224)] == [73, 109, 182, 256]
    assert [eval_resize(size) for size in (64, 224)] == [73, 257]


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_how_files_are_resized_is_a_flag(files, interpolation):
    source = DataSource(
        name="folder",
        recipe="imagenet",
        classes=("a", "b", "c"),
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        crop_size=20,
        train=files,
        test=files,
    )
    options = DataOptions(
        crop_size=20, batch_size=4, workers=0, crop_interpolation=interpolation, eval_interpolation=interpolation
    )
    world = World(0, 1, 0, 1, torch.device("cpu"))
    (batch, *_) = build_eval_loader(files, options, world)
    for image, index in zip(batch.images, batch.indices_B.tolist(), strict=True):
        expected = np.asarray(resize_crop(read_rgb(files.paths[index]), 23, 20, interpolation))
        assert (image.permute(1, 2, 0).numpy() == expected).all()
    crop = ResizedCropSpec(size=20, interpolation=interpolation)
    pairs = zip(
        build_train_loader(source, options, world, num_views=2, seed=5).epoch(1),
        train_loader(files, crop=crop).epoch(1),
        strict=True,
    )
    assert all(torch.equal(ours.images, expected.images) for ours, expected in pairs)
