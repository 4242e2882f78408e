"""Augmentation of a whole batch at once, as pure functions of (seed, epoch, sample).

All geometry composes into one affine matrix a picture, all colour into one 3 x 4 matrix a picture, whatever the number
of operations asked for; then blur, noise and a blank rectangle. The same code runs on any device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from cnnrun.config.spec import Kind, Kinds, Spec
from cnnrun.data.augment.colour import add_noise, change_colours, gaussian_blur, rectangle_masks
from cnnrun.data.augment.geometry import (
    Mirror,
    Shift,
    affine_matrices,
    crop_matrices,
    draw_crop_boxes,
    grow_windows,
    mirror_and_shift,
    move_targets,
    warp,
)
from cnnrun.data.augment.mixing import make_mosaics, mix_images
from cnnrun.data.augment.random_slots import SLOTS, Draws

Reach = Mapping[str, Tensor | float]
UnitFraction = Annotated[float, Field(gt=0, le=1)]
Ratio = Annotated[float, Field(ge=0.1, le=10)]


class Crop(Spec):
    """A random part of each picture at the full size, as torchvision's RandomResizedCrop."""

    scale: tuple[UnitFraction, UnitFraction] = Field((0.25, 1.0), strict=False)
    """The smallest and largest part of the area."""
    ratio: tuple[Ratio, Ratio] = Field((0.75, 4 / 3), strict=False)
    """The narrowest and widest ratio of width to height."""
    safe: bool = False
    """Grown until no object is cut; for boxes."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.scale[0] > self.scale[1] or self.ratio[0] > self.ratio[1]:
            raise ValueError("give [smallest, largest]")
        return self


class TrivialAugment(Kind):
    """One operation a picture, of random strength (Mueller and Hutter 2021), out of the vocabulary of `augment`."""

    kind = "trivial_augment"
    main = "strength"

    strength: float = Field(1.0, gt=0, le=1)
    """The part of the widest ranges that is used."""


# The reach of each operation that a policy chooses from, in the units of `Augment`'s settings.
_WIDEST_RANGES = {
    "nothing": 0.0, "shift_y": 0.3, "shift_x": 0.3, "rotate": 135.0, "shear": 45.0, "scale": 0.5, "brightness": 0.99,
    "contrast": 0.99, "blur": 1.5, "noise": 32.0, "saturation": 0.99, "hue": 0.5, "grayscale": 1.0,
}  # fmt: skip
_COMPUTED = tuple(name for name in _WIDEST_RANGES if name not in ("nothing", "shift_y", "shift_x"))
_COLOUR_OPERATIONS = ("saturation", "hue", "grayscale")  # the last of them: grey pictures have none


_SLOTS_OF = {
    "shift": ("shift_y", "shift_x"), "rotate": ("rotate",), "shear": ("shear",),
    "scale": ("scale",), "crop": ("crop_area", "crop_shape", "crop_y", "crop_x"), "blur": ("blur",),
    "noise": ("noise",),
    "colour": ("brightness", "contrast", "saturation", "hue", "grayscale"),
    "erase": ("erase", "erase_area", "erase_shape", "erase_y", "erase_x"),
    "mosaic": ("mosaic", "mosaic_y", "mosaic_x"),
    "mixup": ("mix", "mix_part"), "cutmix": ("mix", "mix_part", "mix_y", "mix_x"),
}  # fmt: skip


class Augment(Spec):
    """Random changes of the training pictures, new ones every epoch. Everything is off by default."""

    flip: Literal["none", "horizontal", "vertical", "both"] = "none"
    """Mirrors half of the pictures, left-right, up-down, or each for itself."""
    crop: Crop | None = None
    shift: float = Field(0.0, ge=0, le=1)
    """Moves by up to this part of the height and width, in whole pixels; what moves in is black."""
    rotate: float = Field(0.0, ge=0, le=180)
    """Turns by up to so many degrees either way."""
    scale: float = Field(0.0, ge=0, lt=1)
    """Enlarges or shrinks by a factor in [1 - scale, 1 + scale]."""
    shear: float = Field(0.0, ge=0, lt=90)
    """Slants by up to so many degrees either way."""
    brightness: float = Field(0.0, ge=0, le=1)
    """Multiplies by a factor in [1 - brightness, 1 + brightness]."""
    contrast: float = Field(0.0, ge=0, le=1)
    """Stretches around the picture's mean grey by a factor in [1 - contrast, 1 + contrast]."""
    saturation: float = Field(0.0, ge=0, le=1)
    """Stretches around each pixel's grey by a factor in [1 - saturation, 1 + saturation]; colour pictures only."""
    hue: float = Field(0.0, ge=0, le=0.5)
    """Turns the colour circle by up to this part of it; colour pictures only."""
    grayscale: float = Field(0.0, ge=0, le=1)
    """The probability of taking all colour away; colour pictures only."""
    blur: float = Field(0.0, ge=0, le=8)
    """Gaussian blur of up to so many pixels' deviation."""
    noise: float = Field(0.0, ge=0, le=128)
    """Gaussian noise of up to this deviation, in pixel values."""
    erase: float = Field(0.0, ge=0, le=1)
    """The probability of blanking a rectangle of 2 to 33 % of the picture (Zhong et al. 2020)."""
    mixup: float = Field(0.0, ge=0, le=10)
    """Mixes each picture with another; the part is drawn from Beta(mixup, mixup). Labels follow."""
    cutmix: float = Field(0.0, ge=0, le=10)
    """Pastes a rectangle of another picture; the area is drawn from Beta(cutmix, cutmix). Labels follow."""
    mosaic: float = Field(0.0, ge=0, le=1)
    """The part of the pictures that become four in one (Bochkovskiy et al. 2020); for boxes."""
    min_visible: float = Field(0.25, ge=0, le=1)
    """An object of whose box less than this part is left inside the picture is no object to find."""
    policy: Annotated[TrivialAugment, Kinds()] | None = None

    @model_validator(mode="after")
    def _policy_chooses(self) -> Self:
        own = ("shift", "rotate", "scale", "shear", "brightness", "contrast", "saturation", "hue", "grayscale")
        clash = [name for name in (*own, "blur", "noise") if getattr(self, name)]
        if self.policy and clash:
            raise ValueError(f"policy chooses {clash[0]} and its strength itself; remove one of them")
        return self

    @property
    def has_changes(self) -> bool:
        """Whether any picture is changed at all."""
        return self != type(self)(min_visible=self.min_visible)

    @property
    def has_mixing(self) -> bool:
        """Whether pictures are mixed with others."""
        return bool(self.mixup or self.cutmix)

    @property
    def partner_count(self) -> int:
        """How many other pictures of the batch each is put together with."""
        return 3 if self.mosaic else int(self.has_mixing)

    @property
    def has_geometry(self) -> bool:
        """Whether what is in a picture changes its place."""
        return bool(self.shift or self.flip != "none" or self.crop) or self._any("rotate", "scale", "shear")

    @property
    def is_copy_only(self) -> bool:
        """Whether pictures are only copied in other ways, and stay bytes; else they become float32."""
        return not (self.crop or self._any(*_COMPUTED) or self.erase or self.partner_count)

    def apply(self, pictures_BCHW: Tensor, draws: Draws, targets: dict[str, Tensor] | None = None) -> Tensor:
        """uint8 pictures, changed: values 0..255, uint8 where pixels are only copied, else float32.

        The same inputs give the same bits. The targets say where objects are, for `crop.safe`.
        """
        reach = self._reach(draws, pictures_BCHW.shape[1])
        pictures = self._moved(pictures_BCHW, draws, reach, targets)
        if self.is_copy_only:
            return pictures
        pictures = pictures.float()
        if self._any("brightness", "contrast", "saturation", "hue", "grayscale"):
            pictures = self._recoloured(pictures, draws, reach)
        if self._any("blur"):
            largest = self.blur or _WIDEST_RANGES["blur"] * (self.policy.strength if self.policy else 0)
            pictures = gaussian_blur(pictures, reach["blur"] * draws["blur"], largest)
        if self._any("noise"):
            sigma = reach["noise"] * draws["noise"]
            pictures = add_noise(pictures, sigma, draws.seed, draws.epoch, draws.index_B)
        return self._erased(pictures, draws) if self.erase else pictures

    def mix(self, pictures_BCHW: Tensor, partner_B: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Augmented pictures mixed with their partners, and how much of each is its own: float32 [B]."""
        return mix_images(pictures_BCHW, partner_B, draws, self.mixup, self.cutmix)

    def move_targets(self, targets: dict[str, Tensor], shape: Sequence[int], draws: Draws) -> dict[str, Tensor]:
        """The targets of pictures [B, C, H, W] that `apply` changed: boxes lie where what they show does."""
        if not self.has_geometry or "boxes" not in targets:
            return targets
        return move_targets(targets, self.matrices(draws, shape, targets), shape, self.min_visible)

    def make_mosaics(
        self, pictures: Tensor, partners_BP: Tensor, targets: dict[str, Tensor], draws: Draws
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Augmented pictures as mosaics, with their targets."""
        return make_mosaics(pictures, partners_BP, targets, draws, self.mosaic, self.min_visible)

    def matrices(self, draws: Draws, shape: Sequence[int], targets: dict[str, Tensor] | None = None) -> Tensor:
        """[B, 2, 3]: where each output pixel comes from, for `geometry.warp`, `move_points` and `move_boxes`."""
        return self._matrices(draws, self._reach(draws, shape[1]), shape, targets)

    def _any(self, *names: str) -> bool:
        return self.policy is not None or any(getattr(self, name) for name in names)

    def slots(self) -> list[str]:
        """The draws that `apply` and `mix` ask for."""
        if self.policy:
            return list(SLOTS)
        flips = {"horizontal": ["flip_x"], "vertical": ["flip_y"], "both": ["flip_x", "flip_y"], "none": []}[self.flip]
        asked = [name for name in _SLOTS_OF if getattr(self, name, 0) not in (0, None)]
        if self._any("brightness", "contrast", "saturation", "hue", "grayscale"):
            asked += ["colour"]
        if self.has_geometry:  # what `matrices` asks for
            asked += ["rotate", "scale", "shear"]
        return list(dict.fromkeys([*flips, *(slot for name in asked for slot in _SLOTS_OF[name])]))

    def _reach(self, draws: Draws, channels: int) -> Reach:
        """How far each operation may go, in each picture where that differs: in the units of the settings."""
        if self.policy is None:
            given = {name: getattr(self, name) for name in _WIDEST_RANGES if name in type(self).model_fields}
            return given | {"shift_y": self.shift, "shift_x": self.shift}
        names = [name for name in _WIDEST_RANGES if channels == 3 or name not in _COLOUR_OPERATIONS]
        chosen = (draws["policy"] * len(names)).long()
        return {
            name: (chosen == names.index(name)).float() * (reach * self.policy.strength) if name in names else 0.0
            for name, reach in _WIDEST_RANGES.items()
        }

    def _moved(self, pictures: Tensor, draws: Draws, reach: Reach, targets: dict[str, Tensor] | None) -> Tensor:
        if self.crop or self._any("rotate", "scale", "shear"):
            return warp(pictures.float(), self._matrices(draws, reach, pictures.shape, targets))
        if self.shift or self.flip != "none":
            return mirror_and_shift(pictures, self._mirror(draws), self._shift(draws, reach, pictures.shape))
        return pictures

    def _matrices(self, draws: Draws, reach: Reach, shape: Sequence[int], targets: dict[str, Tensor] | None) -> Tensor:
        degree = math.pi / 180
        angle = reach["rotate"] * degree * draws.symmetric("rotate")
        slant = torch.tan(reach["shear"] * degree * draws.symmetric("shear"))
        size = 1 / (1 + reach["scale"] * draws.symmetric("scale"))
        mirror = torch.stack([1.0 - 2 * flipped for flipped in self._flips(draws)], 1)
        down, right = self._shifts(draws, reach, shape)
        made = affine_matrices(angle, slant, size, mirror, torch.stack([right, down], 1).float())
        if self.crop is None:
            return made
        places = [draws[slot] for slot in ("crop_area", "crop_shape", "crop_y", "crop_x")]
        window = draw_crop_boxes(self.crop.scale, self.crop.ratio, places, shape)
        if self.crop.safe and targets is not None:
            window = grow_windows(window, targets, made, shape)
        return crop_matrices(made, window, shape)

    def _flips(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """1 for each picture that is mirrored left-right, up-down, else 0: int64 [B] each."""

        def drawn(slot: str, way: str) -> Tensor:
            return (draws[slot] < 0.5).long() if self.flip in (way, "both") else torch.zeros_like(draws.index_B)

        return drawn("flip_x", "horizontal"), drawn("flip_y", "vertical")

    def _mirror(self, draws: Draws) -> Mirror:
        sideways, upside_down = self._flips(draws)
        if self.flip == "both":
            return Mirror(((), (3,), (2,), (2, 3)), sideways + 2 * upside_down)
        if self.flip == "vertical":
            return Mirror(((), (2,)), upside_down)
        return Mirror(((), (3,)) if self.flip == "horizontal" else ((),), sideways)

    def _shift(self, draws: Draws, reach: Reach, shape: Sequence[int]) -> Shift | None:
        if not self.shift:
            return None
        most = [math.floor(self.shift * side + 1e-4) for side in shape[2:]]
        return Shift(*self._shifts(draws, reach, shape), (most[0], most[1]))

    def _shifts(self, draws: Draws, reach: Reach, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Whole pixels down and right: int64 [B] each, uniform over -reach..reach."""

        def drawn(slot: str, side: int) -> Tensor:
            if not self._any("shift"):
                return torch.zeros_like(draws.index_B)
            far = reach[slot] * side + 1e-4  # 0.29 of 100 is 29, whatever float32 says
            pixels = math.floor(far) if isinstance(far, float) else far.long()
            return (draws[slot] * (2 * pixels + 1)).long() - pixels

        return drawn("shift_y", shape[2]), drawn("shift_x", shape[3])

    def _recoloured(self, pictures: Tensor, draws: Draws, reach: Reach) -> Tensor:
        factor = {name: 1 + reach[name] * draws.symmetric(name) for name in ("brightness", "contrast", "saturation")}
        colourless = draws["grayscale"] < reach["grayscale"]
        saturation = torch.where(colourless, 0.0, factor["saturation"])
        angle = 2 * math.pi * reach["hue"] * draws.symmetric("hue")
        return change_colours(pictures, factor["brightness"], factor["contrast"], saturation, angle)

    def _erased(self, pictures: Tensor, draws: Draws) -> Tensor:
        """A rectangle of random area, shape and place set to the mid grey, in a part of the pictures."""
        height, width = pictures.shape[2:]
        area = (0.02 + 0.31 * draws["erase_area"]) * height * width
        ratio = torch.exp(math.log(1 / 0.3) * draws.symmetric("erase_shape"))
        blank = rectangle_masks(area, ratio, draws["erase_y"], draws["erase_x"], height, width)
        blank &= (draws["erase"] < self.erase)[:, None, None]
        return pictures.masked_fill(blank[:, None], 127.5)
