"""The `augment` section, and augmentation of whole batches as pure functions of (seed, epoch, sample).

All geometry becomes one affine matrix for each image, and all colour one 3 x 4 matrix, for any number of operations.
Blur, noise and a blank rectangle follow. The same code runs on any device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from cnnrun.config.spec import Kind, Kinds, Spec
from cnnrun.contracts.target_kind import TargetKind
from cnnrun.data.augment import geometry, mixing
from cnnrun.data.augment.colour import add_noise, change_colours, gaussian_blur, rectangle_masks
from cnnrun.data.augment.random_slots import SLOTS, Draws

Maxima = Mapping[str, Tensor | float]  # operation -> its maximum strength, the same for all images or one for each
UnitFraction = Annotated[float, Field(gt=0, le=1)]
Ratio = Annotated[float, Field(ge=0.1, le=10)]


class Crop(Spec):
    """A random part of each image, resized to the full size, as torchvision's RandomResizedCrop."""

    scale: tuple[UnitFraction, UnitFraction] = Field((0.25, 1.0), strict=False)
    """The smallest and largest fraction of the area."""
    ratio: tuple[Ratio, Ratio] = Field((0.75, 4 / 3), strict=False)
    """The smallest and largest ratio of width to height."""
    safe: bool = False
    """Grow the crop until no object is cut. Only for data with boxes."""

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.scale[0] > self.scale[1] or self.ratio[0] > self.ratio[1]:
            raise ValueError("give [smallest, largest]")
        return self


class TrivialAugment(Kind):
    """One random operation of `augment` for each image, of random strength (Mueller and Hutter 2021)."""

    kind = "trivial_augment"
    main = "strength"

    strength: float = Field(1.0, gt=0, le=1)
    """The fraction of the widest ranges that is used."""


# The maximum strength of each operation that a policy chooses from, in the units of `Augment`'s settings.
_WIDEST_RANGES = {
    "nothing": 0.0, "shift_y": 0.3, "shift_x": 0.3, "rotate": 135.0, "shear": 45.0, "scale": 0.5, "brightness": 0.99,
    "contrast": 0.99, "blur": 1.5, "noise": 32.0, "saturation": 0.99, "hue": 0.5, "grayscale": 1.0,
}  # fmt: skip
# The operations that compute new pixel values; the others only copy pixels.
_COMPUTED_OPERATIONS = tuple(name for name in _WIDEST_RANGES if name not in ("nothing", "shift_y", "shift_x"))
_COLOUR_SETTINGS = ("brightness", "contrast", "saturation", "hue", "grayscale")
_RGB_OPERATIONS = ("saturation", "hue", "grayscale")  # grey images have no colour to change

# The random numbers that each setting needs; `colour` stands for all colour settings.
_SLOTS_OF = {
    "shift": ("shift_y", "shift_x"), "rotate": ("rotate",), "shear": ("shear",),
    "scale": ("scale",), "crop": ("crop_area", "crop_shape", "crop_y", "crop_x"), "blur": ("blur",),
    "noise": ("noise",),
    "colour": _COLOUR_SETTINGS,
    "erase": ("erase", "erase_area", "erase_shape", "erase_y", "erase_x"),
    "mosaic": ("mosaic", "mosaic_y", "mosaic_x"),
    "mixup": ("mix", "mix_part"), "cutmix": ("mix", "mix_part", "mix_y", "mix_x"),
}  # fmt: skip


class Augment(Spec):
    """Random changes of the training images, new in every epoch. Everything is off by default."""

    flip: Literal["none", "horizontal", "vertical", "both"] = "none"
    """Mirrors half of the images: left-right, up-down, or both independently."""
    crop: Crop | None = None
    """Shows a random part of each image at the full size."""
    shift: float = Field(0.0, ge=0, le=1)
    """Shifts by up to this fraction of the height and width, in whole pixels; pixels from outside are black."""
    rotate: float = Field(0.0, ge=0, le=180)
    """Turns by up to this angle in either direction, in degrees."""
    scale: float = Field(0.0, ge=0, lt=1)
    """Enlarges or shrinks by a factor in [1 - scale, 1 + scale]."""
    shear: float = Field(0.0, ge=0, lt=90)
    """Slants by up to this angle in either direction, in degrees."""
    brightness: float = Field(0.0, ge=0, le=1)
    """Multiplies pixel values by a factor in [1 - brightness, 1 + brightness]."""
    contrast: float = Field(0.0, ge=0, le=1)
    """Scales the difference from the image's mean grey by a factor in [1 - contrast, 1 + contrast]; without RGB, that \
from each channel's mean."""
    saturation: float = Field(0.0, ge=0, le=1)
    """Scales each pixel's difference from its grey by a factor in [1 - saturation, 1 + saturation]. Only for colour \
images."""
    hue: float = Field(0.0, ge=0, le=0.5)
    """Rotates hues by up to this fraction of the colour circle in either direction. Only for colour images."""
    grayscale: float = Field(0.0, ge=0, le=1)
    """The probability of removing all colour. Only for colour images."""
    blur: float = Field(0.0, ge=0, le=8)
    """Gaussian blur with a deviation of up to this, in pixels."""
    noise: float = Field(0.0, ge=0, le=128)
    """Gaussian noise with a deviation of up to this, in pixel values of 0 to 255."""
    erase: float = Field(0.0, ge=0, le=1)
    """The probability of blanking a rectangle of 2 to 33 % of the image (Zhong et al. 2020)."""
    mixup: float = Field(0.0, ge=0, le=10)
    """Mixes each image with another; the weight is drawn from Beta(mixup, mixup). Labels follow."""
    cutmix: float = Field(0.0, ge=0, le=10)
    """Pastes a rectangle of another image; the area is drawn from Beta(cutmix, cutmix). Labels follow."""
    mosaic: float = Field(0.0, ge=0, le=1)
    """The fraction of images that become a mosaic of four (Bochkovskiy et al. 2020). Only for boxes or masks."""
    min_visible: float = Field(0.25, ge=0, le=1)
    """An object is dropped if less than this fraction of its box is left inside the image. Only for data with boxes."""
    policy: Annotated[TrivialAugment, Kinds()] | None = None
    """Chooses operations and their strengths at random, in place of the settings above."""

    @model_validator(mode="after")
    def _refuse_policy_with_operations(self) -> Self:
        operations = ("shift", "rotate", "scale", "shear", *_COLOUR_SETTINGS, "blur", "noise")
        conflicts = [name for name in operations if getattr(self, name)]
        if self.policy and conflicts:
            raise ValueError(f"policy chooses {conflicts[0]} and its strength itself; remove one of them")
        return self

    @property
    def has_changes(self) -> bool:
        """Return whether any setting changes images."""
        return self != type(self)(min_visible=self.min_visible)

    @property
    def has_mixing(self) -> bool:
        """Return whether images are mixed with others, and their labels too."""
        return bool(self.mixup or self.cutmix)

    @property
    def partner_count(self) -> int:
        """The number of other images of the batch that each image is combined with."""
        return 3 if self.mosaic else int(self.has_mixing)

    def target_kinds_needed(self) -> dict[tuple[str, ...], tuple[TargetKind, ...]]:
        """Settings in use that serve only some kinds of targets, each with these kinds."""
        kinds = {("mosaic",): (TargetKind.BOXES, TargetKind.MASKS), ("crop", "safe"): (TargetKind.BOXES,)}
        is_used = {("mosaic",): self.mosaic > 0, ("crop", "safe"): self.crop is not None and self.crop.safe}
        return {setting: kinds[setting] for setting in kinds if is_used[setting]}

    @property
    def has_geometry(self) -> bool:
        """Return whether the content of images moves, so that boxes and masks must move too."""
        return bool(self.shift or self.flip != "none" or self.crop) or self._is_on("rotate", "scale", "shear")

    @property
    def is_copy_only(self) -> bool:
        """Return whether pixels are only copied, so that images stay uint8; otherwise they become float32."""
        return not (self.crop or self._is_on(*_COMPUTED_OPERATIONS) or self.erase or self.partner_count)

    def apply(self, images_BCHW: Tensor, draws: Draws, targets: dict[str, Tensor] | None = None) -> Tensor:
        """Augment images of values 0..255. The result has them too, as float32 unless uint8 pixels are only copied.

        The same inputs give the same bits. `crop.safe` needs the targets, for the boxes of the objects.
        """
        maxima = self._maxima(draws, images_BCHW.shape[1])
        images = self._move_images(images_BCHW, draws, maxima, targets)
        if self.is_copy_only:
            return images
        images = images.float()
        if self._is_on(*_COLOUR_SETTINGS):
            images = self._change_colours(images, draws, maxima)
        if self._is_on("blur"):
            max_sigma = self.blur or _WIDEST_RANGES["blur"] * (self.policy.strength if self.policy else 0)
            images = gaussian_blur(images, maxima["blur"] * draws["blur"], max_sigma)
        if self._is_on("noise"):
            sigma = maxima["noise"] * draws["noise"]
            images = add_noise(images, sigma, draws.seed, draws.epoch, draws.index_B)
        return self._blank_rectangles(images, draws) if self.erase else images

    def mix(self, images_BCHW: Tensor, partner_B: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Augmented images mixed with their partners, and the weight of each image's own label, float32 [B]."""
        return mixing.mix_images(images_BCHW, partner_B, draws, self.mixup, self.cutmix)

    def move_targets(self, targets: dict[str, Tensor], shape: Sequence[int], draws: Draws) -> dict[str, Tensor]:
        """The targets for images [B, C, H, W] that `apply` changed: boxes and masks move with the content."""
        if not self.has_geometry or not targets.keys() & {"boxes", "masks"}:
            return targets
        matrices = self.matrices(draws, shape, targets)
        if "masks" in targets:
            return {**targets, "masks": geometry.warp_masks(targets["masks"], matrices)}
        return geometry.move_targets(targets, matrices, shape, self.min_visible)

    def make_mosaics(
        self, images: Tensor, partners_BP: Tensor, targets: dict[str, Tensor], draws: Draws
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Turn augmented images into mosaics of four, and move their boxes or masks."""
        return mixing.make_mosaics(images, partners_BP, targets, draws, self.mosaic, self.min_visible)

    def matrices(self, draws: Draws, shape: Sequence[int], targets: dict[str, Tensor] | None = None) -> Tensor:
        """The source of each output pixel, [B, 2, 3], for `geometry.warp`, `move_points` and `move_boxes`."""
        return self._build_matrices(draws, self._maxima(draws, shape[1]), shape, targets)

    def _is_on(self, *names: str) -> bool:
        """Return whether one of the settings is on; a policy may choose any of them."""
        return self.policy is not None or any(getattr(self, name) for name in names)

    def slots(self) -> list[str]:
        """The names of the random numbers that `apply`, `mix` and `make_mosaics` need."""
        if self.policy:
            return list(SLOTS)
        flips = {"horizontal": ["flip_x"], "vertical": ["flip_y"], "both": ["flip_x", "flip_y"], "none": []}[self.flip]
        operations = [name for name in _SLOTS_OF if getattr(self, name, 0) not in (0, None)]
        if self._is_on(*_COLOUR_SETTINGS):
            operations += ["colour"]
        if self.has_geometry:  # `matrices` always needs these
            operations += ["rotate", "scale", "shear"]
        return list(dict.fromkeys([*flips, *(slot for name in operations for slot in _SLOTS_OF[name])]))

    def _maxima(self, draws: Draws, channels: int) -> Maxima:
        """The maximum strength of each operation, in the units of the settings; a tensor [B] if a policy chooses."""
        if self.policy is None:
            maxima = {name: getattr(self, name) for name in _WIDEST_RANGES if name in type(self).model_fields}
            return maxima | {"shift_y": self.shift, "shift_x": self.shift}
        names = [name for name in _WIDEST_RANGES if channels == 3 or name not in _RGB_OPERATIONS]
        choice_B = (draws["policy"] * len(names)).long()
        return {
            name: (choice_B == names.index(name)).float() * (widest * self.policy.strength) if name in names else 0.0
            for name, widest in _WIDEST_RANGES.items()
        }

    def _move_images(self, images: Tensor, draws: Draws, maxima: Maxima, targets: dict[str, Tensor] | None) -> Tensor:
        """Images with their content moved: flipped, shifted, cropped, or warped by a matrix."""
        if self.crop or self._is_on("rotate", "scale", "shear"):
            return geometry.warp(images.float(), self._build_matrices(draws, maxima, images.shape, targets))
        if self.shift or self.flip != "none":
            return geometry.flip_and_shift(
                images, self._draw_flip(draws), self._draw_shift(draws, maxima, images.shape)
            )
        return images

    def _build_matrices(
        self, draws: Draws, maxima: Maxima, shape: Sequence[int], targets: dict[str, Tensor] | None
    ) -> Tensor:
        """The matrices of all moves, [B, 2, 3]; see `matrices`."""
        degree = math.pi / 180
        angle = maxima["rotate"] * degree * draws.draw_symmetric("rotate")
        shear = torch.tan(maxima["shear"] * degree * draws.draw_symmetric("shear"))
        inverse_scale = 1 / (1 + maxima["scale"] * draws.draw_symmetric("scale"))
        flip = torch.stack([1.0 - 2 * is_flipped for is_flipped in self._draw_flip_flags(draws)], 1)
        down, right = self._draw_shift_pixels(draws, maxima, shape)
        matrices = geometry.affine_matrices(angle, shear, inverse_scale, flip, torch.stack([right, down], 1).float())
        if self.crop is None:
            return matrices
        crop_draws = [draws[slot] for slot in ("crop_area", "crop_shape", "crop_y", "crop_x")]
        crop = geometry.draw_crops(self.crop.scale, self.crop.ratio, crop_draws, shape)
        if self.crop.safe and targets is not None:
            crop = geometry.grow_crops(crop, targets, matrices, shape)
        return geometry.crop_matrices(matrices, crop, shape)

    def _draw_flip_flags(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """1 for each image that is flipped left-right, and up-down, else 0; int64 [B] each."""

        def draw(slot: str, direction: str) -> Tensor:
            return (draws[slot] < 0.5).long() if self.flip in (direction, "both") else torch.zeros_like(draws.index_B)

        return draw("flip_x", "horizontal"), draw("flip_y", "vertical")

    def _draw_flip(self, draws: Draws) -> geometry.Flip:
        """Draw how each image is flipped."""
        left_right, up_down = self._draw_flip_flags(draws)
        if self.flip == "both":
            return geometry.Flip(((), (3,), (2,), (2, 3)), left_right + 2 * up_down)
        if self.flip == "vertical":
            return geometry.Flip(((), (2,)), up_down)
        return geometry.Flip(((), (3,)) if self.flip == "horizontal" else ((),), left_right)

    def _draw_shift(self, draws: Draws, maxima: Maxima, shape: Sequence[int]) -> geometry.Shift | None:
        """Draw how far each image is shifted, or return None if `shift` is off."""
        if not self.shift:
            return None
        max_down, max_right = (math.floor(self.shift * side + 1e-4) for side in shape[2:])
        return geometry.Shift(*self._draw_shift_pixels(draws, maxima, shape), (max_down, max_right))

    def _draw_shift_pixels(self, draws: Draws, maxima: Maxima, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Whole pixels down and right, int64 [B] each, uniform between minus and plus the maximum."""

        def draw(slot: str, side: int) -> Tensor:
            if not self._is_on("shift"):
                return torch.zeros_like(draws.index_B)
            limit = maxima[slot] * side + 1e-4  # 0.29 of 100 must be 29, but float32 gives a little less
            pixels = math.floor(limit) if isinstance(limit, float) else limit.long()
            return (draws[slot] * (2 * pixels + 1)).long() - pixels

        return draw("shift_y", shape[2]), draw("shift_x", shape[3])

    def _change_colours(self, images: Tensor, draws: Draws, maxima: Maxima) -> Tensor:
        """Draw the colour changes of each image, and apply them."""
        factor = {
            name: 1 + maxima[name] * draws.draw_symmetric(name) for name in ("brightness", "contrast", "saturation")
        }
        is_grey = draws["grayscale"] < maxima["grayscale"]
        saturation = torch.where(is_grey, 0.0, factor["saturation"])
        angle = 2 * math.pi * maxima["hue"] * draws.draw_symmetric("hue")
        return change_colours(images, factor["brightness"], factor["contrast"], saturation, angle)

    def _blank_rectangles(self, images: Tensor, draws: Draws) -> Tensor:
        """Set a rectangle of random area, shape and place to mid grey, in the fraction `erase` of the images."""
        height, width = images.shape[2:]
        area = (0.02 + 0.31 * draws["erase_area"]) * height * width
        height_per_width = torch.exp(math.log(1 / 0.3) * draws.draw_symmetric("erase_shape"))
        mask = rectangle_masks(area, height_per_width, draws["erase_y"], draws["erase_x"], height, width)
        mask &= (draws["erase"] < self.erase)[:, None, None]
        return images.masked_fill(mask[:, None], 127.5)
