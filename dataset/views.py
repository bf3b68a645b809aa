"""Views: several differently augmented versions of each image, made in batches on the device that holds the images.

Drawing and applying are separate. `ViewMaker.draw` decides everything random, on the host, as a pure function of
(seed, epoch, position of the image in the epoch's order, number of the view); `ViewMaker.apply` is exact arithmetic:
what PIL and torchvision give for the same parameters, wherever and with whatever other images it runs.

V views (S of them in training, one for each network), B images, C = 3 channels, H x W image size, N ops in sequence.
"""

import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dataset.augment import erasing, geometry
from dataset.augment.plan import StepPlan, Upload, plan_mirror, plan_step
from dataset.augment.policy import (
    AUTOAUGMENT_POLICIES,
    TRIVIAL,
    AutoAugment,
    ColorJitter,
    Policy,
    Steps,
    TrivialAugment,
    parse_randaugment,
)
from dataset.memory import advise_huge_pages
from dataset.options import DataOptions
from recipe.datasets import ROWS, Statistic
from utils.errors import UserError, reason
from utils.memory import is_out_of_memory
from utils.seed import STREAM_VIEW, counter_uniform, fold_in

logger = logging.getLogger(__name__)

HAS_TRITON = importlib.util.find_spec("triton") is not None
# Fields of ViewSpec that the Triton kernel obeys; views with another one set are made without it.
KERNEL_KNOWS = frozenset(
    [
        "crop_size",
        "padding",
        "padding_mode",
        "flip",
        "policy",
        "color_jitter",
        "erase_p",
        "erase_area",
        "erase_ratio",
        "erase_mode",
        "mean",
        "std",
        "fill",
        "random_resized_crop",
    ]
)
KERNEL_SIZES = (8, 16, 32, 64)  # pixels, sides of the views that it can make
# Pixels worked on at a time: on CPUs what the caches hold, on GPUs what keeps memory in bounds.
CHUNK_PIXELS = MappingProxyType({"cpu": 1 << 20, "cuda": 1 << 23})
SLOWER = "views are made by plain operations, which are the same and take longer."
DRAWN_HERE = "the host draws them, which are the same and take longer."
PROBED = 64  # images whose views the kernel has to make as the plain ops do, before it is used


@dataclass(frozen=True, kw_only=True)
class ViewSpec:
    """What a training view goes through, in order: crop, flip, colour jitter, policy, normalising, erasing.

    Attributes:
        crop_size: side of a view in pixels.
        padding: pixels added on every side before cropping.
        padding_mode: one of `dataset.options.PADDING_MODES`.
        flip: mirror half of the views.
        policy: "none", an AutoAugment policy ("cifar10", "svhn", "imagenet"), "trivial", or a RandAugment string.
        color_jitter: brightness, contrast and saturation change by up to this part; 0: off.
        erase_p: probability of random erasing.
        erase_area: smallest and largest erased part of the image.
        erase_ratio: smallest and largest height / width of what is erased.
        erase_mode: "const" (0 of the normalised image) or "pixel" (unit Gaussian noise).
        mean, std: per channel, on the scale [0, 1].
        fill: colour (0 to 255) where RandAugment's geometric ops read outside the image.
        random_resized_crop: views come already cropped; neither padded nor cropped again.
    """

    crop_size: int
    padding: int = 0
    padding_mode: str = "zero"
    flip: bool = False
    policy: str = "none"
    color_jitter: float = 0.0
    erase_p: float = 0.0
    erase_area: tuple[float, float] = (0.02, 1 / 3)
    erase_ratio: tuple[float, float] = (0.3, 3.3)
    erase_mode: str = "const"
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fill: tuple[int, int, int] = (128, 128, 128)
    random_resized_crop: bool = False


def view_spec(recipe: str, options: DataOptions, *, mean: Statistic, std: Statistic) -> ViewSpec:
    """The training views that the flags ask for. What is named alike in both is taken as it is.

    Args:
        recipe: name of a row of `recipe.datasets.ROWS`, which decides what the flags leave open.
        options: the flags.
        mean, std: per channel, on the scale [0, 1].
    """
    row = ROWS[recipe].views
    erase_area, erase_ratio = options.erase_area or row.erase_area, options.erase_ratio or row.erase_ratio
    red, green, blue = (min(255, round(255 * channel)) for channel in mean)
    decided = {
        "padding": 0 if row.random_resized_crop else options.padding,
        "flip": row.flip,
        "policy": options.randaa or (row.policy if options.is_autoaugment else "none"),
        "erase_p": options.erase_p if options.is_cutout and erase_area[1] > 0 else 0.0,
        "erase_area": (erase_area[0], erase_area[1]),
        "erase_ratio": (erase_ratio[0], erase_ratio[1]),
        "mean": mean,
        "std": std,
        "fill": (red, green, blue),
        "random_resized_crop": row.random_resized_crop,
    }
    alike = {field.name for field in fields(ViewSpec)} & {field.name for field in fields(DataOptions)}
    return ViewSpec(**{name: getattr(options, name) for name in alike} | decided)


def plain_spec(crop_size: int, mean: Sequence[float], std: Sequence[float]) -> ViewSpec:
    """No augmentation: what an evaluation takes. mean, std: per channel, on the scale [0, 1]."""
    return ViewSpec(crop_size=crop_size, mean=(mean[0], mean[1], mean[2]), std=(std[0], std[1], std[2]))


@dataclass(frozen=True, kw_only=True)
class ViewParameters:
    """Everything random about V views of B images.

    Attributes:
        image_size: height and width of the images, in pixels.
        tops_VB, lefts_VB: int64 [V, B], corner of the crop in the padded image, in pixels.
        flips_VB: bool [V, B], mirror the crop.
        steps: ops in sequence with the colour that their geometric ops fill with, one entry for each source of ops
            (colour jitter, policy).
        boxes_VB4: int64 [V, B, 4], erased rectangle (top, left, height, width) of the view; all 0: none.
        noise_keys_VB: int64 [V, B], keys of the noise of erase_mode "pixel".
    """

    image_size: tuple[int, int]
    tops_VB: np.ndarray
    lefts_VB: np.ndarray
    flips_VB: np.ndarray
    steps: tuple[tuple[Steps, tuple[int, int, int]], ...]
    boxes_VB4: np.ndarray
    noise_keys_VB: np.ndarray


_CROP_SLOTS = 4  # top, left, flip, noise key
_BOX_SLOTS = erasing.PLACE_SLOTS + 2
_RETRY_SLOTS = 2 * (erasing.TRIES - 1)


class ViewMaker:
    """Makes the views of one run.

    Args:
        spec: what a view goes through.
        seed: of the run.

    Raises:
        UserError: spec.policy is a malformed RandAugment string.
    """

    def __init__(self, spec: ViewSpec, seed: int) -> None:
        self.spec = spec
        self.seed = seed
        self._kernel_works: bool | None = None  # not known before its first use
        self._draws_on_device: bool | None = None  # nor this
        self._drawing: tuple[object, Any] = (None, None)  # a `triton_draw.Drawing`, and where and for what it draws
        self._policies: list[Policy] = []
        if spec.color_jitter:
            self._policies.append(ColorJitter(spec.color_jitter))
        if spec.policy in AUTOAUGMENT_POLICIES:
            self._policies.append(AutoAugment(spec.policy))
        elif spec.policy == TRIVIAL:
            self._policies.append(TrivialAugment(spec.crop_size))
        elif spec.policy != "none":
            self._policies.append(parse_randaugment(spec.policy, spec.fill))

    def draw(
        self, epoch: int, positions_B: np.ndarray, num_views: int, image_size: tuple[int, int], *, first_view: int = 0
    ) -> ViewParameters:
        """Draw the parameters of `num_views` views of each image.

        Args:
            epoch: counted from 0.
            positions_B: int64 [B], positions of the images in the epoch's global order.
            num_views: V.
            image_size: height and width of the images that `apply` will get, in pixels.
            first_view: number of the first of these views among all that are made of an image.

        Raises:
            UserError: the crop is larger than the padded images.
        """
        spec = self.spec
        key = fold_in(self.seed, STREAM_VIEW, epoch)
        views_V = np.arange(first_view, first_view + num_views)
        num_slots = _CROP_SLOTS + sum(policy.num_slots for policy in self._policies) + _BOX_SLOTS
        uniforms = counter_uniform(key, positions_B, views_V, num_slots)
        room_y, room_x = self._room(image_size)
        steps, slot = [], _CROP_SLOTS
        for policy in self._policies:
            steps.append((policy.draw(uniforms[..., slot : slot + policy.num_slots]), policy.fill))
            slot += policy.num_slots

        def boxes(uniforms_VBU: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            return erasing.draw_erasing(
                uniforms_VBU[..., slot:],
                spec.crop_size,
                spec.crop_size,
                probability=spec.erase_p,
                area=spec.erase_area,
                ratio=spec.erase_ratio,
            )

        boxes_VB4, missed_VB = boxes(uniforms)
        again = np.flatnonzero(missed_VB.any(axis=0))
        if len(again):  # rare, and later slots do not change the numbers of earlier ones
            more = counter_uniform(key, np.asarray(positions_B)[again], views_V, num_slots + _RETRY_SLOTS)
            boxes_VB4[:, again] = boxes(more)[0]
        return ViewParameters(
            image_size=image_size,
            tops_VB=(uniforms[..., 0] * (room_y + 1)).astype(np.int64),
            lefts_VB=(uniforms[..., 1] * (room_x + 1)).astype(np.int64),
            flips_VB=(uniforms[..., 2] < 0.5) & spec.flip,
            steps=tuple(steps),
            boxes_VB4=boxes_VB4,
            noise_keys_VB=(uniforms[..., 3] * 2.0**53).astype(np.int64),
        )

    def _room(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """How far a crop can move in the padded image, down and to the right, in pixels."""
        spec = self.spec
        if spec.random_resized_crop and image_size != (spec.crop_size, spec.crop_size):
            raise ValueError(f"views must come cropped to {spec.crop_size}x{spec.crop_size} pixels, got {image_size}")
        room_y, room_x = (size + 2 * spec.padding - spec.crop_size for size in image_size)
        if min(room_y, room_x) < 0:
            raise UserError(
                f"--crop_size {spec.crop_size} does not fit into images of {image_size[0]}x{image_size[1]} pixels "
                f"with --padding {spec.padding}: give a --crop_size of {min(image_size) + 2 * spec.padding} or less."
            )
        if spec.padding_mode == "reflect" and spec.padding >= min(image_size):
            raise UserError(
                f"--padding {spec.padding} cannot be filled by --padding_mode reflect from images of "
                f"{image_size[0]}x{image_size[1]} pixels: give {min(image_size) - 1} or less."
            )
        return room_y, room_x

    def apply(
        self,
        images: Tensor,
        parameters: ViewParameters,
        *,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> Tensor:
        """Make the views that the parameters describe: float [V, B, C, crop_size, crop_size], on the images' device.

        Nothing waits for the device, but for the kernel's first views, which are compared with those of the plain
        operations; where it cannot be built or differs, these are used from then on. Pixels are computed in float32, in
        float64 if that is the dtype.

        Args:
            images: uint8 [B, C, H, W], or views already cropped, uint8 [V, B, C, crop_size, crop_size].
            parameters: of these B images, from `draw`.
            dtype, memory_format: of the result; the format is that of each [B, C, H, W].

        Raises:
            ValueError: images of another type or shape.
        """
        num_views, batch = parameters.tops_VB.shape
        self._check_images(images, num_views, batch, parameters.image_size)
        views = self._empty(images, num_views, dtype, memory_format)
        pixels = CHUNK_PIXELS.get(images.device.type, CHUNK_PIXELS["cpu"])
        chunk = max(1, pixels // (num_views * self.spec.crop_size**2))
        has_kernel = self._has_kernel(views, images) and not self._has_noise(parameters)
        if has_kernel and self._kernel_works is None:
            part = slice(0, min(batch, PROBED, chunk))
            self._kernel_works = self._fills_alike(views[:, part], images[part], parameters, part)
        for start in range(0, batch, chunk):
            part = slice(start, start + chunk)
            some = (views[:, part], images[..., part, :, :, :], parameters, part)
            if not (has_kernel and self._kernel_works and self._filled_by_kernel(*some)):
                self._fill(*some)
        return views

    def _check_images(self, images: Tensor, num_views: int, batch: int, image_size: tuple[int, int]) -> None:
        leading = [(batch,), (num_views, batch)] if self.spec.random_resized_crop else [(batch,)]
        if (
            images.dtype != torch.uint8
            or tuple(images.shape[:-3]) not in leading
            or tuple(images.shape[-2:]) != image_size
        ):
            height, width = image_size
            raise ValueError(
                f"the parameters are of uint8 images [{batch}, C, {height}, {width}]"
                f"{' or views of them' * self.spec.random_resized_crop}, got {images.dtype} {list(images.shape)}"
            )

    def _empty(self, images: Tensor, num_views: int, dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor:
        """Room for V views of every image: [V, B, C, crop_size, crop_size]."""
        batch, channels, size = images.shape[-4], images.shape[-3], self.spec.crop_size
        views = torch.empty(
            (num_views * batch, channels, size, size), dtype=dtype, device=images.device, memory_format=memory_format
        )
        return advise_huge_pages(views).view(num_views, batch, channels, size, size)

    def _fills_alike(self, views_VBCHW: Tensor, images: Tensor, parameters: ViewParameters, part: slice) -> bool:
        """Whether the kernel makes these views as `_fill` does; asked once in a run."""
        if not self._filled_by_kernel(views_VBCHW, images, parameters, part):
            return False
        alike = self._are_plain(views_VBCHW, images, parameters, part)
        if not alike:
            logger.warning("The Triton kernel makes other views than the plain operations do on this GPU; %s", SLOWER)
        return alike

    def _are_plain(self, views_VBCHW: Tensor, images: Tensor, parameters: ViewParameters, part: slice) -> bool:
        """Whether the views are, bit for bit, those of `_fill`; the host waits for both."""
        plain_VBCHW = torch.empty_like(views_VBCHW)
        self._fill(plain_VBCHW, images, parameters, part)
        return torch.equal(views_VBCHW, plain_VBCHW)

    def _filled_by_kernel(self, views_VBCHW: Tensor, images: Tensor, parameters: ViewParameters, part: slice) -> bool:
        """Whether the kernel could be built and started; else one line says why, and it is not tried again.

        Triton builds its kernels on this machine: without a C compiler, Python's headers, a folder that it can write
        to, or on a GPU or driver that it does not know, it raises whatever it meets.
        """
        try:
            self._fill_by_kernel(views_VBCHW, images, parameters, part)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            self._kernel_works = False
            logger.warning("The Triton kernel for views cannot be used here (%s); %s", reason(error)[:200], SLOWER)
            return False
        return True

    def _has_noise(self, parameters: ViewParameters) -> bool:
        """Whether some of the views get noise, which the Triton kernel does not know."""
        return self.spec.erase_mode == "pixel" and bool(parameters.boxes_VB4.any())

    def _has_kernel(self, views_VBCHW: Tensor, images: Tensor) -> bool:
        """Whether the Triton kernel makes these views: small ones of whole images on a GPU, in float32."""
        if not (images.is_cuda and HAS_TRITON):
            return False
        unknown = [field for field in fields(ViewSpec) if field.name not in KERNEL_KNOWS]
        if any(getattr(self.spec, field.name) != field.default for field in unknown):
            return False
        return (
            views_VBCHW.dtype == torch.float32
            and views_VBCHW.shape[2] == 3
            and self.spec.crop_size in KERNEL_SIZES
            and images.dim() == 4
        )

    def _fill_by_kernel(self, views_VBCHW: Tensor, images: Tensor, parameters: ViewParameters, part: slice) -> None:
        """`_fill` in one kernel."""
        from dataset.augment.triton_views import make_views

        windows = (parameters.tops_VB, parameters.lefts_VB, parameters.flips_VB)
        make_views(
            views_VBCHW,
            images,
            windows_K3=np.stack([array[:, part].ravel() for array in windows], axis=1).astype(np.int64),
            boxes_K4=parameters.boxes_VB4[:, part].reshape(-1, 4),
            steps=[
                (*(array[:, part].ravel() for array in step), fill)
                for steps, fill in parameters.steps
                for step in zip(*steps, strict=True)
            ],
            scale_3C=self._scale(),
            padding=self.spec.padding,
            reflect=self.spec.padding_mode == "reflect",
        )

    def _fill(self, views_VBCHW: Tensor, images: Tensor, parameters: ViewParameters, part: slice) -> None:
        """Make the views of some of the images; `part` says which ones of the parameters' B."""
        spec, device = self.spec, images.device
        num_views, batch, _, size, _ = views_VBCHW.shape
        upload = Upload()
        scale = upload.add(self._scale())
        plans, order_K = self._plan(parameters, part, upload)
        regroup = [upload.add(plan.order) for plan in plans[1:]]
        in_order = upload.add(np.argsort(order_K))
        boxes_K4 = parameters.boxes_VB4[:, part].reshape(-1, 4)
        erased = np.flatnonzero(boxes_K4[:, 2] * boxes_K4[:, 3])
        boxes = upload.add(boxes_K4)
        noise = [upload.add(array) for array in (erased, parameters.noise_keys_VB[:, part].ravel()[erased])]

        padded = geometry.pad_images(images.flatten(0, -4).contiguous(), spec.padding, spec.padding_mode)
        starts_K = self._window_starts(parameters, part, padded.shape)
        starts = upload.add(starts_K[plans[0].order] if plans else starts_K)
        tensors = upload.send(device)

        pixels_KCHW = geometry.cut_windows(padded, tensors[starts], size, size)
        for number, plan in enumerate(plans):
            if number:
                pixels_KCHW = pixels_KCHW.index_select(0, tensors[regroup[number - 1]])
            plan.run(pixels_KCHW, tensors)
        if plans:
            pixels_KCHW = pixels_KCHW.index_select(0, tensors[in_order])

        exact = torch.promote_types(views_VBCHW.dtype, torch.float32)
        values = views_VBCHW if exact == views_VBCHW.dtype else torch.empty_like(views_VBCHW, dtype=exact)
        values.copy_(pixels_KCHW.view(values.shape))
        _normalise(values, tensors[scale])
        if len(erased):
            inside = erasing.inside_boxes(tensors[boxes], size, size, exact)
            values.mul_((1 - inside).view(num_views, batch, 1, size, size))
            if spec.erase_mode == "pixel":
                index, keys = (tensors[place] for place in noise)
                normals = erasing.counter_normal(keys, values[0, 0].numel()).view(-1, *values.shape[2:])
                where = (index // batch, index % batch)
                values[where] = values[where] + normals.to(exact) * inside.index_select(0, index)
        if values is not views_VBCHW:
            views_VBCHW.copy_(values)

    def _plan(self, parameters: ViewParameters, part: slice, upload: Upload) -> tuple[list[StepPlan], np.ndarray]:
        """Plans of all steps in sequence, and the order in which they leave the K = V x B views: int64 [K]."""
        size = self.spec.crop_size
        order_K = np.arange(parameters.tops_VB[:, part].size)
        plans = []
        if self.spec.flip:
            plans.append(plan_mirror(parameters.flips_VB[:, part].ravel()))
            order_K = plans[0].order
        for steps, fill in parameters.steps:
            fill_place = upload.add(np.array(fill, dtype=np.float64))
            for step in zip(*steps, strict=True):
                ops_K, values_K, resamples_K = (array[:, part].ravel()[order_K] for array in step)
                if ops_K.any():
                    plan = plan_step(
                        ops_K, values_K, resamples_K, height=size, width=size, fill_place=fill_place, upload=upload
                    )
                    order_K = order_K[plan.order]
                    plans.append(plan)
        return plans, order_K

    def _window_starts(self, parameters: ViewParameters, part: slice, shape: torch.Size) -> np.ndarray:
        """Where each view's window starts in padded images of this shape: int64 [K]."""
        images, channels, rows, columns = shape
        tops_K, lefts_K = parameters.tops_VB[:, part].ravel(), parameters.lefts_VB[:, part].ravel()
        numbers_K = np.arange(len(tops_K)) % images
        return (numbers_K * channels * rows + tops_K) * columns + lefts_K

    def evaluate(
        self,
        images: Tensor,
        dtype: torch.dtype = torch.float32,
        *,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> Tensor:
        """Images without augmentation: uint8 [B, C, H, W] -> normalised float [B, C, H, W]."""
        upload = Upload()
        scale = upload.add(self._scale())
        values = images.to(torch.promote_types(dtype, torch.float32), memory_format=memory_format)
        _normalise(values, upload.send(images.device)[scale])
        return values.to(dtype)

    def _scale(self) -> np.ndarray:
        """Largest pixel value, mean and std of each channel: float64 [3, C]."""
        return np.array([[255.0] * len(self.spec.mean), self.spec.mean, self.spec.std])

    def make(
        self,
        images: Tensor,
        epoch: int,
        positions_B: np.ndarray,
        num_views: int,
        dtype: torch.dtype = torch.float32,
        *,
        memory_format: torch.memory_format = torch.contiguous_format,
        first_view: int = 0,
    ) -> Tensor:
        """`draw` and `apply` in one: float views [V, B, C, crop_size, crop_size].

        Where the kernel of `apply` works, views are drawn on the device too, if a table holds all that the policy may
        draw and nothing is erased by noise; the first ones are compared with those that the host draws.

        Raises:
            UserError: as `draw`.
            ValueError: as `apply`.
        """
        height, width = images.shape[-2:]
        if self._kernel_works and self._draws_on_device is not False and self._has_table():
            self._check_images(images, num_views, len(positions_B), (height, width))
            views = self._empty(images, num_views, dtype, memory_format)
            if self._has_kernel(views, images) and self._drawn_by_kernel(views, images, epoch, positions_B, first_view):
                return views
        parameters = self.draw(epoch, positions_B, num_views, (height, width), first_view=first_view)
        return self.apply(images, parameters, dtype=dtype, memory_format=memory_format)

    def _has_table(self) -> bool:
        """Whether all that can be drawn is few ops, or none, and no noise."""
        has_noise = self.spec.erase_mode == "pixel" and self.spec.erase_p > 0
        few = len(self._policies) == 0 or (len(self._policies) == 1 and self._policies[0].levels is not None)
        return few and not has_noise

    def _drawn_by_kernel(
        self, views_VBCHW: Tensor, images: Tensor, epoch: int, positions_B: np.ndarray, first_view: int
    ) -> bool:
        """Whether kernels could draw and make these views; else one line says why, and it is not tried again."""
        try:
            self._draw_and_fill(views_VBCHW, images, epoch, positions_B, first_view)
            if self._draws_on_device is None:
                self._draws_on_device = self._are_as_drawn_here(views_VBCHW, images, epoch, positions_B, first_view)
        except UserError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            self._draws_on_device = False
            logger.warning("Views cannot be drawn by a kernel here (%s); %s", reason(error)[:200], DRAWN_HERE)
        return bool(self._draws_on_device)

    def _are_as_drawn_here(
        self, views_VBCHW: Tensor, images: Tensor, epoch: int, positions_B: np.ndarray, first_view: int
    ) -> bool:
        """Whether the first views are those that the host draws and plain operations make; it waits, once in a run."""
        height, width = images.shape[-2:]
        part = slice(0, min(len(images), PROBED))
        parameters = self.draw(epoch, positions_B[part], len(views_VBCHW), (height, width), first_view=first_view)
        alike = self._are_plain(views_VBCHW[:, part], images[part], parameters, part)
        if not alike:
            logger.warning("The kernel draws other views on this GPU than the host does; %s", DRAWN_HERE)
        return alike

    def _draw_and_fill(
        self, views_VBCHW: Tensor, images: Tensor, epoch: int, positions_B: np.ndarray, first_view: int
    ) -> None:
        """Draw on the device, and make the views there."""
        from dataset.augment.triton_views import Drawn, make_drawn_views

        drawing, scale_3C = self._drawing_for(images)
        windows_K8, records_NK9 = drawing.draw(
            fold_in(self.seed, STREAM_VIEW, epoch), positions_B, num_views=len(views_VBCHW), first_view=first_view
        )
        make_drawn_views(
            views_VBCHW,
            images,
            Drawn(windows_K8, records_NK9, drawing.tables, scale_3C),
            drawing.num_steps,
            padding=self.spec.padding,
            reflect=self.spec.padding_mode == "reflect",
        )

    def _drawing_for(self, images: Tensor) -> Any:
        """What draws for images of this size on this device, and the numbers that normalise; made once in a run."""
        from dataset.augment.triton_draw import Boxes, Drawing

        spec, height, width = self.spec, *images.shape[-2:]
        wanted = (images.device, height, width)
        if self._drawing[0] != wanted:
            boxes = Boxes(probability=spec.erase_p, area=spec.erase_area, ratio=spec.erase_ratio)
            drawing = Drawing(
                self._policies[0] if self._policies else None,
                size=spec.crop_size,
                room=self._room((height, width)),
                flip=spec.flip,
                boxes=boxes if spec.erase_p > 0 else None,
                first_slot=_CROP_SLOTS,
                device=images.device,
            )
            self._drawing = (wanted, (drawing, torch.from_numpy(self._scale()).to(images.device)))
        return self._drawing[1]


def _normalise(values: Tensor, scale_3C: Tensor) -> None:
    """In place, [..., C, H, W]: from 0 to 255 to torchvision's ToTensor and Normalize.

    255 is a tensor because a GPU multiplies by the reciprocal of a number, which rounds twice.
    """
    top, mean, std = scale_3C.to(values.dtype).unsqueeze(-1).unsqueeze(-1)
    values.div_(top).sub_(mean).div_(std)
