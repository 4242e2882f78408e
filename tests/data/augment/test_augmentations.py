"""Each operation equals a plain loop over single images and pixels."""

from __future__ import annotations

import colorsys
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cnnrun.base.randomness import uniform
from cnnrun.data.augment.geometry import crop_matrices, draw_crops, move_boxes, move_points, warp
from cnnrun.data.augment.random_slots import SLOTS, Draws
from cnnrun.data.augment.settings import Augment

SEED, EPOCH = 5, 3


def pictures(count=6, channels=3, height=9, width=7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, channels, height, width), generator=generator, dtype=torch.uint8)


def draw(index: int, slot: str) -> float:
    return float(uniform(SEED, EPOCH, torch.tensor([index]), torch.tensor([SLOTS.index(slot)])))


def augment_images(augment: Augment, given: torch.Tensor) -> torch.Tensor:
    return augment.apply(given, Draws(SEED, EPOCH, torch.arange(len(given)), augment.slots())).float()


def test_no_augmentation_changes_nothing():
    assert torch.equal(augment_images(Augment(), pictures()), pictures().float())


@pytest.mark.parametrize("flip", ["horizontal", "vertical", "both"])
@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_flips_and_shifts_equal_a_loop_over_pixels(flip, shift):
    given, got = pictures(), augment_images(Augment(flip=flip, shift=shift), pictures())
    for i, picture in enumerate(given):
        height, width = picture.shape[1:]
        if flip in ("horizontal", "both") and draw(i, "flip_x") < 0.5:
            picture = picture.flip(2)
        if flip in ("vertical", "both") and draw(i, "flip_y") < 0.5:
            picture = picture.flip(1)
        reach_y, reach_x = int(shift * height), int(shift * width)
        down = math.floor(draw(i, "shift_y") * (2 * reach_y + 1)) - reach_y
        right = math.floor(draw(i, "shift_x") * (2 * reach_x + 1)) - reach_x
        expected = torch.zeros(picture.shape)
        for y in range(height):
            for x in range(width):
                if 0 <= y - down < height and 0 <= x - right < width:
                    expected[:, y, x] = picture[:, y - down, x - right]
        assert torch.equal(got[i], expected)


def test_shifts_are_fractions_of_the_height_and_of_the_width():
    """Images four times as wide as high, shifted by whole pixels and by the matrices."""
    augment, given = Augment(shift=0.25), torch.zeros(40, 1, 8, 32, dtype=torch.uint8)
    given[:, :, 4, 16] = 255
    moved = augment_images(augment, given)
    matrices = augment.matrices(Draws(SEED, EPOCH, torch.arange(40), augment.slots()), given.shape)
    for i in range(40):
        down = math.floor(draw(i, "shift_y") * 5) - 2
        right = math.floor(draw(i, "shift_x") * 17) - 8
        assert moved[i, 0].nonzero().tolist() == [[4 + down, 16 + right]]
        assert matrices[i, :, 2].tolist() == pytest.approx([-right, -down])


def test_whole_pixel_shifts_equal_warping_by_the_matrices():
    augment = Augment(flip="both", shift=0.3)
    given = pictures()
    matrices = augment.matrices(Draws(SEED, EPOCH, torch.arange(len(given))), given.shape)
    assert torch.allclose(augment_images(augment, given), warp(given.float(), matrices), atol=1e-2)


def test_geometry_equals_bilinear_sampling_pixel_by_pixel():
    augment = Augment(rotate=30, scale=0.3, shear=15, shift=0.2, flip="both")
    given, got = pictures(3), augment_images(augment, pictures(3))
    height, width = given.shape[2:]
    for i, picture in enumerate(given.double()):
        angle = math.radians(30) * (2 * draw(i, "rotate") - 1)
        slant = math.tan(math.radians(15) * (2 * draw(i, "shear") - 1))
        size = 1 / (1 + 0.3 * (2 * draw(i, "scale") - 1))
        mirror = [-1 if draw(i, slot) < 0.5 else 1 for slot in ("flip_x", "flip_y")]
        reach = int(0.2 * height), int(0.2 * width)
        down = math.floor(draw(i, "shift_y") * (2 * reach[0] + 1)) - reach[0]
        right = math.floor(draw(i, "shift_x") * (2 * reach[1] + 1)) - reach[1]
        for y in range(height):
            for x in range(width):
                # From the centre, back through shift, rotation with size, shear and mirror.
                u, v = x + 0.5 - width / 2 - right, y + 0.5 - height / 2 - down
                u, v = (
                    size * (math.cos(angle) * u + math.sin(angle) * v),
                    size * (math.cos(angle) * v - math.sin(angle) * u),
                )
                u, v = mirror[0] * (u + slant * v), mirror[1] * v
                px, py = u + width / 2 - 0.5, v + height / 2 - 0.5
                value = torch.zeros(3, dtype=torch.float64)
                for yy in (math.floor(py), math.floor(py) + 1):
                    for xx in (math.floor(px), math.floor(px) + 1):
                        if 0 <= yy < height and 0 <= xx < width:
                            value += (1 - abs(py - yy)) * (1 - abs(px - xx)) * picture[:, yy, xx]
                assert torch.allclose(got[i, :, y, x].double(), value, atol=0.02)


@pytest.mark.parametrize("channels", [1, 3])
def test_brightness_and_contrast_equal_the_formula(channels):
    given = pictures(channels=channels)
    got = augment_images(Augment(brightness=0.4, contrast=0.5), given)
    weights = torch.tensor([0.299, 0.587, 0.114] if channels == 3 else [1.0])
    for i, picture in enumerate(given.float()):
        bright = picture * (1 + 0.4 * (2 * draw(i, "brightness") - 1))
        mean = (bright * weights[:, None, None]).sum(0).mean()
        stretch = 1 + 0.5 * (2 * draw(i, "contrast") - 1)
        expected = (mean + stretch * (bright - mean)).clamp(0, 255)
        assert torch.allclose(got[i], expected, atol=1e-3)


def test_saturation_equals_the_formula():
    given = pictures()
    got = augment_images(Augment(saturation=0.9), given)
    for i, picture in enumerate(given.float()):
        grey = (picture * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0)
        keep = 1 + 0.9 * (2 * draw(i, "saturation") - 1)
        assert torch.allclose(got[i], (grey + keep * (picture - grey)).clamp(0, 255), atol=1e-3)


def test_hue_keeps_grey_and_luma_and_rotates_colours():
    grey = torch.full((6, 3, 4, 4), 90, dtype=torch.uint8)
    assert torch.allclose(augment_images(Augment(hue=0.5), grey), grey.float(), atol=1e-2)
    red = torch.zeros(40, 3, 2, 2, dtype=torch.uint8)
    red[:, 0], red[:, 1:] = 140, 100
    turned = augment_images(Augment(hue=0.5), red)
    luma = torch.tensor([0.299, 0.587, 0.114])
    assert torch.allclose(turned[:, :, 0, 0] @ luma, (red.float()[:, :, 0, 0]) @ luma, atol=0.05)
    hues = [colorsys.rgb_to_hsv(*(p / 255).tolist())[0] for p in turned[:, :, 0, 0]]
    assert max(hues) - min(hues) > 0.6


def test_erase_blanks_one_rectangle_of_the_stated_size():
    given = torch.zeros(300, 1, 20, 30, dtype=torch.uint8)
    got = augment_images(Augment(erase=0.5), given)[:, 0]
    blank = got == 127.5
    hit = blank.flatten(1).any(1)
    assert 0.4 < float(hit.float().mean()) < 0.6
    for one in blank[hit]:
        rows, columns = one.any(1), one.any(0)
        assert torch.equal(one, rows[:, None] & columns[None, :])
        assert 0.01 < float(one.float().mean()) < 0.40


def test_the_erased_rectangle_follows_the_draws():
    """Zhong et al. 2020: 2 to 33 % of the area, a ratio of height to width of 0.3 to 1 / 0.3, anywhere inside."""
    height, width = 20, 30
    got = augment_images(Augment(erase=1.0), torch.zeros(400, 1, height, width, dtype=torch.uint8))[:, 0] == 127.5
    for i in range(400):
        area = (0.02 + 0.31 * draw(i, "erase_area")) * height * width
        ratio = (1 / 0.3) ** (2 * draw(i, "erase_shape") - 1)
        tall = min(max(round((area * ratio) ** 0.5), 1), height)
        wide = min(max(round((area / ratio) ** 0.5), 1), width)
        top = math.floor(draw(i, "erase_y") * (height - tall + 1))
        left = math.floor(draw(i, "erase_x") * (width - wide + 1))
        expected = torch.zeros(height, width, dtype=torch.bool)
        expected[top : top + tall, left : left + wide] = True
        assert torch.equal(got[i], expected)
    assert got[:, 0].any()
    assert got[:, -1].any()
    assert got[:, :, 0].any()
    assert got[:, :, -1].any()


@given(
    st.fixed_dictionaries(
        {
            "flip": st.sampled_from(["none", "horizontal", "vertical", "both"]),
            "shift": st.sampled_from([0.0, 0.2]),
            "rotate": st.sampled_from([0.0, 20.0]),
            "brightness": st.sampled_from([0.0, 0.3]),
            "hue": st.sampled_from([0.0, 0.1]),
            "erase": st.sampled_from([0.0, 0.7]),
        }
    ),
    st.sampled_from([1, 3]),
)
@settings(max_examples=40, deadline=None)
def test_an_image_alone_equals_the_image_in_a_batch(asked, channels):
    augment, given = Augment(**asked), pictures(channels=channels)
    together = augment_images(augment, given)
    for i in range(len(given)):
        alone = augment.apply(given[i : i + 1], Draws(SEED, EPOCH, torch.tensor([i]), augment.slots()))
        assert torch.allclose(alone[0].float(), together[i], atol=1e-3)
    assert together.min() >= 0
    assert together.max() <= 255


def test_crops_equal_torchvisions_crop_and_resize():
    """A crop enlarged to full size equals torchvision's resize of that box, except at the border."""
    from torchvision.transforms.v2.functional import resize

    given = (torch.arange(24 * 20).view(1, 1, 24, 20) % 7 * 30).byte().expand(1, 3, -1, -1)
    box = torch.tensor([[5.0, 6.0, 15.0, 18.0]])
    eye = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])
    got = warp(given.float(), crop_matrices(eye, box, given.shape))
    expected = resize(given[..., 6:18, 5:15].float(), [24, 20], antialias=False)
    assert torch.allclose(got[..., 2:-2, 2:-2], expected[..., 2:-2, 2:-2], atol=0.05)


@pytest.mark.parametrize(
    ("scale", "ratio"), [((0.2, 0.9), (0.5, 2.0)), ((0.2, 0.6), (1.5, 3.0)), ((1.0, 1.0), (1.0, 1.0))]
)
def test_crop_boxes_lie_inside_with_the_requested_area_and_ratio(scale, ratio):
    shape = (500, 3, 40, 40)
    draws = Draws(SEED, EPOCH, torch.arange(500))
    places = [draws[slot] for slot in ("crop_area", "crop_shape", "crop_y", "crop_x")]
    box = draw_crops(scale, ratio, places, shape)
    assert box.min() >= 0
    assert (box <= 40 + 1e-4).all()
    wide, tall = (box[:, 2] - box[:, 0]).double(), (box[:, 3] - box[:, 1]).double()
    assert (wide * tall <= scale[1] * 1600 * 1.001).all()
    whole = (wide < 40) & (tall < 40)
    assert torch.allclose(
        wide[whole] * tall[whole] / 1600, (scale[0] + (scale[1] - scale[0]) * places[0].double())[whole]
    )
    assert ((wide / tall)[whole] <= ratio[1] * 1.001).all()
    assert ((wide / tall)[whole] >= ratio[0] * 0.999).all()


def test_a_crop_of_the_whole_image_changes_nothing():
    given = pictures()
    crop = Augment.model_validate({"crop": {"scale": [1.0, 1.0], "ratio": [1.0, 1.0]}})
    square = given[..., :7, :7]
    assert torch.allclose(augment_images(crop, square), square.float(), atol=1e-2)


def test_grayscale_removes_colour_from_the_given_share_of_images():
    given = pictures(200)
    got = augment_images(Augment(grayscale=0.3), given)
    grey = (given.float() * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True).expand_as(got)
    for i in range(200):
        assert torch.allclose(got[i], grey[i] if draw(i, "grayscale") < 0.3 else given[i].float(), atol=1e-3)


def test_blur_equals_scipys_gaussian():
    from scipy.ndimage import gaussian_filter1d

    given, sigma = pictures(4, 3, 20, 18), 1.4
    got = augment_images(Augment(blur=sigma), given)
    for i, picture in enumerate(given):
        expected = picture.double().numpy()
        for axis in (1, 2):
            own = max(sigma * draw(i, "blur"), 1e-3)
            expected = gaussian_filter1d(expected, own, axis=axis, mode="nearest", radius=math.ceil(3 * sigma))
        assert torch.allclose(got[i].double(), torch.from_numpy(expected), atol=1e-3)


def test_noise_is_gaussian_independent_and_reproducible():
    given = torch.full((64, 3, 16, 16), 128, dtype=torch.uint8)
    augment = Augment(noise=20.0)
    got = augment_images(augment, given)
    assert torch.equal(got, augment_images(augment, given))
    sigma = torch.tensor([20 * draw(i, "noise") for i in range(64)])
    unit = ((got - 128) / sigma[:, None, None, None])[sigma > 2]
    assert abs(float(unit.mean())) < 0.02
    assert abs(float(unit.std()) - 1) < 0.02
    assert abs(float((unit.abs() < 1).float().mean()) - 0.6827) < 0.01  # as of a normal distribution
    flat = unit.flatten(1)
    assert abs(float((flat[:, 1:] * flat[:, :-1]).mean())) < 0.02
    half = flat.shape[1] // 2
    assert abs(float((flat[:, :half] * flat[:, half:]).mean())) < 0.02
    pairs = (unit[:-1] * unit[1:]).mean((1, 2, 3))  # between images, the mean of 768 products of two normals
    assert float(pairs.abs().max()) < 5 / 768**0.5


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_mixup_equals_the_formula(alpha):
    given = pictures(50).float()
    augment = Augment(mixup=alpha)
    partner = torch.arange(50).roll(-1)
    mixed, own = augment.mix(given, partner, Draws(SEED, EPOCH, torch.arange(50), augment.slots()))
    from scipy.special import betaincinv

    for i in range(50):
        part = betaincinv(alpha, alpha, (math.floor(draw(i, "mix_part") * 4096) + 0.5) / 4096)
        assert float(own[i]) == pytest.approx(part, abs=1e-6)
        assert torch.allclose(mixed[i], part * given[i] + (1 - part) * given[(i + 1) % 50], atol=1e-3)


def test_cutmix_pastes_one_rectangle_and_weights_by_its_pixels():
    given = torch.stack([torch.full((1, 12, 10), float(i)) for i in range(80)])
    augment = Augment(cutmix=1.0)
    partner = torch.arange(80).roll(-1)
    mixed, own = augment.mix(given, partner, Draws(SEED, EPOCH, torch.arange(80), augment.slots()))
    for i in range(80):
        pasted = mixed[i, 0] != i
        assert (mixed[i, 0][pasted] == (i + 1) % 80).all()
        rows, columns = pasted.any(1), pasted.any(0)
        assert torch.equal(pasted, rows[:, None] & columns[None, :])
        assert float(own[i]) == pytest.approx(1 - float(pasted.float().mean()))
    assert 0.3 < float(own.mean()) < 0.7


def test_with_mixup_and_cutmix_each_image_gets_one_of_them():
    given = torch.stack([torch.full((1, 8, 8), 100.0 * (i % 2)) for i in range(100)])
    augment = Augment(mixup=1.0, cutmix=1.0)
    mixed, _ = augment.mix(given, torch.arange(100).roll(-1), Draws(SEED, EPOCH, torch.arange(100), augment.slots()))
    pasted = torch.tensor([set(one.flatten().tolist()) <= {0.0, 100.0} for one in mixed])
    chosen = torch.tensor([draw(i, "mix") < 0.5 for i in range(100)])
    assert (pasted | ~chosen).all()
    assert 0.3 < float(chosen.float().mean()) < 0.7


@pytest.mark.parametrize("channels", [1, 3])
def test_trivial_augment_applies_one_known_operation_to_embed_each(channels):
    from cnnrun.data.augment.settings import _RGB_OPERATIONS, _WIDEST_RANGES

    count, given = 60, pictures(60, channels, 16, 16)
    policy = Augment.model_validate({"policy": {"trivial_augment": 0.5}})
    got = augment_images(policy, given)
    names = [name for name in _WIDEST_RANGES if channels == 3 or name not in _RGB_OPERATIONS]
    seen = set()
    for i in range(count):
        name = names[int(draw(i, "policy") * len(names))]
        seen.add(name)
        if name == "nothing":
            expected = given[i].float()
        elif name.startswith("shift"):
            pixels = int(0.3 * 0.5 * 16)
            by = math.floor(draw(i, name) * (2 * pixels + 1)) - pixels
            expected = torch.zeros(given[i].shape)
            source = given[i].float().roll(by, 1 if name == "shift_y" else 2)
            inside = [0 <= p - by < 16 for p in range(16)]
            mask = torch.tensor(inside).view(-1, 1) if name == "shift_y" else torch.tensor(inside)
            expected = source * mask
        else:
            alone = Augment.model_validate({name: _WIDEST_RANGES[name] * 0.5})
            expected = alone.apply(given[i : i + 1], Draws(SEED, EPOCH, torch.tensor([i]), alone.slots()))[0]
        tolerance = 0.6 if name == "blur" else 2e-2  # the policy sizes its window for its largest deviation
        assert torch.allclose(got[i], expected, atol=tolerance), name
    assert len(seen) > 6


def test_points_and_boxes_follow_the_image():
    """A warped bright dot lies at its moved point and inside its moved box."""
    augment = Augment(rotate=25, scale=0.2, shear=10, shift=0.1, flip="both", crop={"scale": [0.6, 1.0]})
    count, side = 40, 64
    place = torch.randint(24, 40, (count, 2), generator=torch.Generator().manual_seed(0))
    given = torch.zeros(count, 1, side, side, dtype=torch.uint8)
    for i, (x, y) in enumerate(place.tolist()):
        given[i, 0, y - 1 : y + 2, x - 1 : x + 2] = 255
    draws = Draws(SEED, EPOCH, torch.arange(count), augment.slots())
    got, matrices = augment.apply(given, draws)[:, 0], augment.matrices(draws, given.shape)
    points = move_points(place[:, None].double() + 0.5, matrices.double(), given.shape)[:, 0]
    corners = torch.cat([place - 1, place + 2], 1)[:, None].double()
    boxes = move_boxes(corners, matrices.double(), given.shape)[:, 0]
    axis = torch.arange(side).double() + 0.5
    inside = 0
    for i in range(count):
        mass = got[i].double()
        if not ((points[i] > 5) & (points[i] < side - 5)).all():
            continue
        inside += 1
        x, y = (mass.sum(0) * axis).sum() / mass.sum(), (mass.sum(1) * axis).sum() / mass.sum()
        assert torch.allclose(points[i], torch.stack([x, y]), atol=0.3)
        x1, y1, x2, y2 = boxes[i].tolist()
        assert x1 <= x <= x2
        assert y1 <= y <= y2
    assert inside > 25
    far = move_boxes(torch.tensor([[[-500.0, -500.0, 900.0, 900.0]]]).expand(count, 1, 4), matrices, given.shape)
    assert (far.min() >= 0) & (far.max() <= side)


EVERYTHING = {
    "flip": "both", "shift": 0.2, "rotate": 20.0, "scale": 0.2, "shear": 10.0, "crop": {"scale": [0.4, 1.0]},
    "brightness": 0.3, "contrast": 0.3, "saturation": 0.3, "hue": 0.1, "grayscale": 0.2, "blur": 1.0, "noise": 9.0,
    "erase": 0.5, "mixup": 0.4, "cutmix": 1.0,
}  # fmt: skip


@pytest.mark.parametrize(
    "asked",
    [EVERYTHING, {"policy": "trivial_augment", "flip": "both"}, {"flip": "both", "shift": 0.2, "contrast": 0.3}],
)
def test_threads_and_batch_size_change_no_bit(asked):
    """An augmented image depends only on (seed, epoch, sample), not on threads or the batch size."""
    augment, given = Augment.model_validate(asked), pictures(96, 3, 40, 36)
    before = torch.get_num_threads()

    def made(threads: int, size: int) -> torch.Tensor:
        torch.set_num_threads(threads)
        parts = []
        for index in torch.arange(96).split(size):
            draws = Draws(SEED, EPOCH, index, augment.slots())
            out = augment.apply(given[index], draws)
            if augment.has_mixing:
                out, _ = augment.mix(out, torch.arange(len(index)), draws)
            parts.append(out)
        return torch.cat(parts)

    try:
        expected = made(1, 96)
        for threads, size in ((2, 96), (3, 96), (2, 48), (1, 32), (4, 32)):
            assert torch.equal(made(threads, size), expected), (threads, size)
    finally:
        torch.set_num_threads(before)


def test_every_augmentation_declares_the_draws_it_uses():
    for name, value in EVERYTHING.items():
        augment_images(Augment.model_validate({name: value}), pictures())
    augment_images(Augment.model_validate(EVERYTHING), pictures())


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"policy": "trivial_augment", "rotate": 5.0}, "policy chooses rotate"),
        ({"crop": {"scale": [0.9, 0.1]}}, "smallest, largest"),
        ({"policy": {"trivial_augment": 2.0}}, "less than or equal to 1"),
    ],
)
def test_contradictory_augmentations_are_refused(asked, words):
    with pytest.raises(ValidationError, match=words):
        Augment.model_validate(asked)


def test_labels_are_mixed_like_their_images():
    from cnnrun.contracts.facts import DataFacts
    from cnnrun.tasks.classification import Classify

    task = Classify().bind(DataFacts(("a", "b", "c"), (1, 4, 4)))
    targets, partners = {"labels": torch.tensor([0, 1])}, {"labels": torch.tensor([2, 1])}
    soft = task.learning.mix_targets(targets, partners, torch.tensor([0.75, 0.5]))
    assert torch.allclose(soft["labels"], torch.tensor([[0.75, 0.0, 0.25], [0.0, 1.0, 0.0]]))
    assert task.showing.describe_targets(soft) == ["a 0.75  c 0.25", "b 1.00"]
    outputs = torch.randn(2, 3)
    loss = task.learning.build_criterion()(outputs, soft)["cross_entropy"]
    each = -outputs.log_softmax(1).double()
    expected = (0.75 * each[0, 0] + 0.25 * each[0, 2] + each[1, 1]) / 2
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
