"""Every loss, under all pairs of its options, equals its documented formula in plain Python and float64.

The mean over the parts of a batch, weighted by their sizes, equals the loss of the batch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from cnnrun.config.spec import union_members
from cnnrun.contracts.facts import DataFacts, NumberStatistics
from cnnrun.contracts.task import TaskSpec
from cnnrun.contracts.task_parts import Criterion
from cnnrun.tasks.classification import Classify
from cnnrun.tasks.detection.head import FIRST_LOGIT
from cnnrun.tasks.detection.task import Detect
from cnnrun.tasks.embedding.losses import ArcFace, CosFace, EmbeddingLoss, EmbeddingLossSpec, NormFace, Triplet
from cnnrun.tasks.embedding.task import Verify
from cnnrun.tasks.multilabel import Multilabel
from cnnrun.tasks.multilabel_losses import Asymmetric, Bce, Focal, MultilabelLoss, MultilabelLossSpec
from cnnrun.tasks.regression.losses import Gaussian, Huber, Mae, Mse, Quantile, RegressionLoss
from cnnrun.tasks.regression.task import Regress

BATCH = 9
NEAR = {"rel": 1e-9, "abs": 1e-12}


def draws(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def pairs(**options: list) -> Iterator[dict]:
    """Settings that cover all pairs of values of each two options; the other options have their first value."""
    seen = []
    for one, other in itertools.combinations(options, 2):
        for values in itertools.product(options[one], options[other]):
            settings = {name: of[0] for name, of in options.items()} | dict(zip((one, other), values, strict=True))
            if settings not in seen:
                seen.append(settings)
                yield settings


def build_criterion(spec: TaskSpec, facts: DataFacts) -> Criterion:
    return spec.bind(facts).learning.build_criterion()


def loss_of(criterion: nn.Module, outputs: Tensor, targets: dict[str, Tensor]) -> float:
    with torch.no_grad():
        return float(sum(criterion(outputs, targets).values()))


def in_parts(criterion: nn.Module, outputs: Tensor, targets: dict[str, Tensor]) -> float:
    parts = torch.arange(len(outputs)).split(4)
    assert len({len(part) for part in parts}) > 1
    of = [loss_of(criterion, outputs[part], {name: each[part] for name, each in targets.items()}) for part in parts]
    return sum(value * len(part) for value, part in zip(of, parts, strict=True)) / len(outputs)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# --- classify ---------------------------------------------------------------------------------------------------------

COUNTS = (4, 2, 8, 2)  # their balanced weights are exact in float32
CLASSES = DataFacts(("ape", "bee", "cat", "dog"), (1, 8, 8), class_counts=COUNTS, counts={"train": 16})
WEIGHTS = {None: [1.0] * 4, "balanced": [1.0, 2.0, 0.5, 2.0], "listed": [1.0, 50.0, 0.0, 0.25]}


def smoothed_cross_entropy(row: list[float], label: int, smoothing: float) -> float:
    log_p = [value - math.log(sum(map(math.exp, row))) for value in row]
    target = [(1 - smoothing) * (k == label) + smoothing / len(row) for k in range(len(row))]
    return -sum(part * value for part, value in zip(target, log_p, strict=True))


def labels_of(task: Classify | Multilabel, targets: dict[str, Tensor], mixed: bool) -> dict[str, Tensor]:
    """The targets unchanged, or in float64 mixed with their neighbours' by shares that are exact in float32."""
    if not mixed:
        return targets
    own = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0, 0.875, 0.5, 0.125, 0.625])
    made = task.bind(CLASSES).learning.mix_targets(
        targets, {name: values.roll(1, 0) for name, values in targets.items()}, own
    )
    return {name: values.double() for name, values in made.items()}


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_the_classification_loss_equals_its_formula(smoothing, weights, mixed):
    task = Classify(label_smoothing=smoothing, class_weights=WEIGHTS[weights] if weights == "listed" else weights)
    criterion, outputs = build_criterion(task, CLASSES).double(), 2 * draws(0)(BATCH, 4)
    targets = labels_of(task, {"labels": torch.tensor([0, 1, 2, 3, 0, 0, 2, 1, 3])}, mixed)
    shares = targets["labels"].tolist() if mixed else torch.eye(4)[targets["labels"]].tolist()
    expected = sum(
        part * WEIGHTS[weights][k] * smoothed_cross_entropy(row, k, smoothing)
        for row, parts in zip(outputs.tolist(), shares, strict=True)
        for k, part in enumerate(parts)
    )
    assert loss_of(criterion, outputs, targets) == pytest.approx(expected / BATCH, **NEAR)
    assert in_parts(criterion, outputs, targets) == pytest.approx(expected / BATCH, **NEAR)


def test_weights_of_absent_classes_do_not_change_the_loss():
    outputs, targets = draws(1)(6, 3), {"labels": torch.tensor([0, 0, 1, 1, 0, 1])}
    facts = DataFacts(("ape", "bee", "cat"), (1, 8, 8))
    light, heavy = (
        build_criterion(Classify(label_smoothing=0.1, class_weights=[1.0, 1.0, weight]), facts).double()
        for weight in (1, 50)
    )
    assert loss_of(heavy, outputs, targets) == loss_of(light, outputs, targets)


def test_balanced_weights_need_counted_classes():
    task, facts = Classify(class_weights="balanced"), DataFacts(("ape", "bee"), (1, 8, 8))  # as of an imported network
    outputs, targets = draws(1)(4, 2), {"labels": torch.tensor([0, 0, 1, 0])}
    weighted, plain = (spec.bind(facts).learning.build_criterion().double() for spec in (task, Classify()))
    assert loss_of(weighted, outputs, targets) == loss_of(plain, outputs, targets)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_loss_of_a_guess_equals_the_loss_of_a_uniform_guess(weights):
    task = Classify(label_smoothing=0.1, class_weights=WEIGHTS[weights] if weights == "listed" else weights)
    labels = torch.arange(4).repeat_interleave(torch.tensor(COUNTS))  # the classes as frequent as in train
    loss = loss_of(build_criterion(task, CLASSES).double(), torch.zeros(16, 4).double(), {"labels": labels})
    assert task.bind(CLASSES).learning.guess_loss() == pytest.approx(loss, **NEAR)


# --- multilabel -------------------------------------------------------------------------------------------------------

POSITIVE = {None: [1.0] * 4, "balanced": [3.0, 7.0, 1.0, 7.0], "listed": [0.5, 50.0, 1.0, 4.0]}
LABEL_LOSSES: list[MultilabelLossSpec] = [
    Bce(),
    *(Focal(gamma=gamma) for gamma in (0.0, 0.5, 2.0)),
    *(
        Asymmetric(positive=positive, negative=negative, margin=margin)
        for positive, negative, margin in itertools.product((0.0, 1.5), (0.0, 4.0), (0.0, 0.05, 0.5))
    ),
]


def of_label(loss: MultilabelLossSpec, logit: float, present: float, weight: float) -> float:
    p = sigmoid(logit)
    if isinstance(loss, Asymmetric):
        shifted = max(p - loss.margin, 0.0)
        absent = shifted**loss.negative * math.log(1 - shifted)
        return -(weight * present * (1 - p) ** loss.positive * math.log(p) + (1 - present) * absent)
    entropy = -(weight * present * math.log(p) + (1 - present) * math.log(1 - p))
    return entropy * (present * (1 - p) + (1 - present) * p) ** getattr(loss, "gamma", 0.0)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("weights", POSITIVE)
@pytest.mark.parametrize("loss", LABEL_LOSSES, ids=repr)
def test_the_multilabel_loss_equals_its_formula(loss, weights, mixed):
    task = Multilabel(loss=loss, positive_weights=POSITIVE[weights] if weights == "listed" else weights)
    criterion, draw = build_criterion(task, CLASSES).double(), draws(2)
    outputs, present = 2 * draw(BATCH, 4), draw(BATCH, 4) > 0.3
    targets = labels_of(task, {"present": present}, mixed)
    expected = sum(
        of_label(loss, logit, part, POSITIVE[weights][k])
        for row, parts in zip(outputs.tolist(), targets["present"].double().tolist(), strict=True)
        for k, (logit, part) in enumerate(zip(row, parts, strict=True))
    ) / (BATCH * 4)
    assert loss_of(criterion, outputs, targets) == pytest.approx(expected, **NEAR)
    assert in_parts(criterion, outputs, targets) == pytest.approx(expected, **NEAR)


def test_every_multilabel_loss_is_tested():
    assert {type(loss) for loss in LABEL_LOSSES} == set(union_members(MultilabelLoss))


# --- regress ----------------------------------------------------------------------------------------------------------

NUMBERS = DataFacts(
    (),
    (1, 8, 8),
    numbers=(
        NumberStatistics("weight", 512.0, 128.0, 10.0, 900.0),
        NumberStatistics("turn", 3.0, 26.0, -45.0, 45.0),
        NumberStatistics("hour", 12.0, 6.0, 0.0, 24.0),
        NumberStatistics("length", 0.25, 0.125, 0.0, 1.0),
    ),
)
COLUMNS: list[list[str]] = [[], ["length", "hour"], ["hour", "length", "weight"]]
PERIODS = {"hour": 24.0, "turn": 360.0}
FITS: list = [Mse(), Mae(), Huber(delta=0.5), Huber(delta=2.0), Gaussian(), Quantile(), Quantile(quantiles=[0.5, 0.8])]


def bessel_i0(x: float) -> float:
    """The power series of I0: sum over k of (x^2 / 4)^k / k!^2."""
    term = total = 1.0
    for k in range(1, 200):
        term *= x * x / 4 / k**2
        total += term
    return total


def apart(loss, off: float) -> float:
    """The loss of a difference in standard units."""
    if isinstance(loss, Mse):
        return off**2
    if isinstance(loss, Mae):
        return abs(off)
    return off**2 / 2 if abs(off) <= loss.delta else loss.delta * (abs(off) - loss.delta / 2)


def of_number(loss, raw: list[float], truth: float) -> float:
    if isinstance(loss, Gaussian):
        variance = math.log1p(math.exp(raw[1])) + 1e-6
        return 0.5 * (math.log(2 * math.pi * variance) + (truth - raw[0]) ** 2 / variance)
    if isinstance(loss, Quantile):
        said = itertools.accumulate([raw[0], *(math.log1p(math.exp(each)) for each in raw[1:])])
        costs = [
            max(part * (truth - q), (part - 1) * (truth - q)) for part, q in zip(loss.quantiles, said, strict=True)
        ]
        return sum(costs) / len(costs)
    return apart(loss, raw[0] - truth)


def of_angle(loss, raw: list[float], radians: float) -> float:
    along = math.cos(radians), math.sin(radians)
    if isinstance(loss, Gaussian):
        kappa = math.sqrt(raw[0] ** 2 + raw[1] ** 2 + 1e-6)
        return math.log(2 * math.pi * bessel_i0(kappa)) - raw[0] * along[0] - raw[1] * along[1]
    return apart(loss, raw[0] - along[0]) + apart(loss, raw[1] - along[1])


def fitted_by_hand(task: Regress, outputs: list[list[float]], truth: list[list[float]]) -> float:
    known = {number.name: place for place, number in enumerate(NUMBERS.numbers)}
    names = task.columns or list(known)
    plain, angles = [n for n in names if n not in task.angles], [n for n in names if n in task.angles]
    total, width = 0.0, task.loss.outputs_per_number
    for row, numbers in zip(outputs, truth, strict=True):
        for at, name in enumerate(plain):
            number, value = NUMBERS.numbers[known[name]], numbers[known[name]]
            total += of_number(task.loss, row[at * width : (at + 1) * width], (value - number.mean) / number.std)
        for at, name in enumerate(angles):
            first = len(plain) * width + 2 * at
            total += of_angle(task.loss, row[first : first + 2], numbers[known[name]] / PERIODS[name] * 2 * math.pi)
    return total / (len(outputs) * len(names))


@pytest.mark.parametrize("angles", [[], ["hour"], ["turn", "hour"]], ids=repr)
@pytest.mark.parametrize("columns", COLUMNS, ids=repr)
@pytest.mark.parametrize("loss", FITS, ids=repr)
def test_the_regression_loss_equals_its_formula(loss, columns, angles):
    learned = {name: PERIODS[name] for name in angles if not columns or name in columns}
    if learned and not loss.can_learn_angles:
        return  # refused, see regression/test_task.py
    task, draw = Regress(loss=loss, columns=columns, angles=learned), draws(3)
    criterion = build_criterion(task, NUMBERS).double()
    count = len(columns or NUMBERS.numbers)
    outputs = 2 * draw(BATCH, (count - len(learned)) * loss.outputs_per_number + 2 * len(learned))
    truth = draw(BATCH, 4) * torch.tensor([128.0, 26.0, 6.0, 0.125]) + torch.tensor([512.0, 3.0, 12.0, 0.25])
    expected = fitted_by_hand(task, outputs.tolist(), truth.tolist())
    assert loss_of(criterion, outputs, {"numbers": truth}) == pytest.approx(expected, **NEAR)
    assert in_parts(criterion, outputs, {"numbers": truth}) == pytest.approx(expected, **NEAR)


def test_every_regression_loss_is_tested():
    assert {type(loss) for loss in FITS} == set(union_members(RegressionLoss))


# --- verify -----------------------------------------------------------------------------------------------------------

PEOPLE = DataFacts(
    ("ann", "bob", "cid", "dot", "eve"), (1, 8, 8), class_counts=(3, 0, 5, 2, 4)
)  # bob has no training images
MARGINS: list[EmbeddingLossSpec] = [
    *(
        kind(margin=margin, scale=scale, warmup=warmup)
        for kind in (ArcFace, CosFace)
        for margin, scale, warmup in itertools.product((0.0, 0.25, 1.2), (1.0, 30.0), (0.0, 0.5))
    ),
    *(NormFace(scale=scale) for scale in (1.0, 30.0)),
]


def draw_embeddings(seed: int) -> tuple[Tensor, list[int]]:
    rows = draws(seed)(BATCH, 6)
    return rows / rows.norm(dim=1, keepdim=True), [0, 2, 3, 4, 0, 2, 3, 4, 0]


@pytest.mark.parametrize("done", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("loss", MARGINS, ids=repr)
def test_margin_losses_equal_their_formulas(loss, done):
    criterion = build_criterion(Verify(dimension=6, loss=loss), PEOPLE).double()
    criterion.set_progress(done)
    (outputs, labels), trained = draw_embeddings(4), [0, 2, 3, 4]
    full = getattr(loss, "margin", 0.0)
    margin = full * min(1.0, done / loss.warmup) if getattr(loss, "warmup", 0.0) else full
    total = 0.0
    for row, label in zip(outputs.tolist(), labels, strict=True):
        logits = []
        for person, centre in zip(trained, criterion.centres.tolist(), strict=True):
            length = math.sqrt(sum(each * each for each in centre))
            cosine = sum(x * c for x, c in zip(row, centre, strict=True)) / length
            if person == label and isinstance(loss, ArcFace):
                turned = math.acos(cosine) + margin
                cosine = math.cos(turned) if turned < math.pi else -2 - math.cos(turned)
            elif person == label:
                cosine -= margin
            logits.append(loss.scale * cosine)
        most = max(logits)
        total += most + math.log(sum(math.exp(each - most) for each in logits)) - logits[trained.index(label)]
    targets = {"labels": torch.tensor(labels)}
    assert loss_of(criterion, outputs, targets) == pytest.approx(total / BATCH, **NEAR)
    assert in_parts(criterion, outputs, targets) == pytest.approx(total / BATCH, **NEAR)


@pytest.mark.parametrize("margin", [0.05, 0.2, 4.0])
def test_the_triplet_loss_equals_its_formula(margin):
    """Each part of a batch has its own triplets, as documented, so each part alone is compared with the formula."""
    criterion = build_criterion(Verify(dimension=6, loss=Triplet(margin=margin)), PEOPLE).double()
    outputs, labels = draw_embeddings(5)
    for part in (range(BATCH), range(4), range(3, 9)):
        rows, people = [outputs[i].tolist() for i in part], [labels[i] for i in part]
        apart = [[sum((x - y) ** 2 for x, y in zip(one, other, strict=True)) for other in rows] for one in rows]
        costs = []
        for a, p in itertools.permutations(range(len(rows)), 2):
            others = [apart[a][n] for n in range(len(rows)) if people[n] != people[a]]
            if people[a] == people[p] and others:
                chosen = min((far for far in others if far > apart[a][p]), default=max(others))
                costs.append(max(0.0, apart[a][p] - chosen + margin))
        expected = sum(costs) / max(1, len(costs))
        targets = {"labels": torch.tensor(people)}
        assert loss_of(criterion, outputs[list(part)], targets) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_every_embedding_loss_is_tested():
    assert {type(loss) for loss in MARGINS} | {Triplet} == set(union_members(EmbeddingLoss))


# --- detect -----------------------------------------------------------------------------------------------------------

SCENES = DataFacts(("ape", "bee", "cat"), (3, 32, 32), class_counts=(30, 20, 10), counts={"train": 20})
DETECT = list(
    pairs(
        box_loss=["ciou", "diou", "giou"],
        gamma=[2.0, 0.0, 0.5],
        box_weight=[2.0, 0.5],
        top_k=[13, 1, 3],
        alpha=[1.0, 0.0, 0.5],
        beta=[6.0, 0.0, 1.0],
    )
)


def scenes() -> tuple[Tensor, dict[str, Tensor]]:
    """Outputs [B, A, 7 + 3] of two levels, of strides 8 and 16, and objects, some of them crowds."""
    draw, cells = draws(6), []
    for stride in (8, 16):
        places = [(i + 0.5) * stride for i in range(32 // stride)]
        cells += [[x, y, stride] for y in places for x in places]
    place = torch.tensor(cells, dtype=torch.float64).repeat(BATCH, 1, 1)
    sides = place[..., 2:] * (0.3 + draw(*place.shape[:2], 4).abs())
    boxes = torch.cat([place[..., :2] - sides[..., :2], place[..., :2] + sides[..., 2:]], 2)
    outputs = torch.cat([boxes, place, draw(*place.shape[:2], 3)], 2)
    corner = draw(BATCH, 4, 2).abs() * 8
    true = torch.cat([corner, corner + 3 + 8 * draw(BATCH, 4, 2).abs()], 2)
    objects = (draw(BATCH, 4) * 2).round().long().clamp(-1, 2)
    objects[0] = -1  # an image without objects
    return outputs, {"boxes": true, "objects": objects, "roles": (draw(BATCH, 4) > 1).byte() * 2}


def iou(one: list[float], other: list[float], tiny: float = 0.0) -> tuple[float, float]:
    """Intersection over union, and the union."""
    wide = max(0.0, min(one[2], other[2]) - max(one[0], other[0]))
    tall = max(0.0, min(one[3], other[3]) - max(one[1], other[1]))
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)) - wide * tall
    return wide * tall / (union + tiny), union


def box_loss(kind: str, one: list[float], other: list[float]) -> float:
    """1 minus GIoU (Rezatofighi et al. 2019), DIoU or CIoU (Zheng et al. 2020), with torchvision's 1e-7 added."""
    overlap, union = iou(one, other, 1e-7)
    wide = max(one[2], other[2]) - min(one[0], other[0])
    tall = max(one[3], other[3]) - min(one[1], other[1])
    if kind == "giou":
        return 1 - overlap + (wide * tall - union) / (wide * tall + 1e-7)
    apart = sum((one[i] + one[i + 2] - other[i] - other[i + 2]) ** 2 for i in (0, 1)) / 4
    loss = 1 - overlap + apart / (wide**2 + tall**2 + 1e-7)
    if kind == "ciou":
        turns = [math.atan((box[2] - box[0]) / (box[3] - box[1])) for box in (one, other)]
        shape = 4 / math.pi**2 * (turns[0] - turns[1]) ** 2
        loss += shape * shape / (1 - overlap + shape + 1e-7)
    return loss


def inside(box: list[float], x: float, y: float, stride: float) -> bool:
    wide, tall = max(box[2] - box[0], stride), max(box[3] - box[1], stride)
    return abs(x - (box[0] + box[2]) / 2) < wide / 2 and abs(y - (box[1] + box[3]) / 2) < tall / 2


def assign_by_hand(task: Detect, cells: list[list[float]], true: list, labels: list[int], real: list[int]) -> dict:
    """The object and the quality of each assigned cell (TOOD, Feng et al. 2021)."""
    wants: dict[int, list] = {}
    for m in real:
        found = []
        for a, row in enumerate(cells):
            if inside(true[m], *row[4:FIRST_LOGIT]):
                overlap, score = iou(true[m], row[:4])[0], sigmoid(row[FIRST_LOGIT + labels[m]])
                found.append((score**task.alpha * overlap**task.beta, overlap, a))
        for align, overlap, a in sorted(found, key=lambda each: -each[0])[: task.top_k]:
            wants.setdefault(a, []).append((overlap, m, align))
    owned = {a: max(each, key=lambda want: want[0]) for a, each in wants.items()}
    mine = {m: [want for want in owned.values() if want[1] == m] for m in real}
    best = {m: (max(w[0] for w in each), max(w[2] for w in each)) for m, each in mine.items() if each}
    return {a: (m, align * best[m][0] / max(best[m][1], 1e-9)) for a, (_, m, align) in owned.items()}


def detection_by_hand(task: Detect, outputs: list, true: list, objects: list, roles: list) -> float:
    total = 0.0
    for cells, boxes, labels, of in zip(outputs, true, objects, roles, strict=True):
        real = [m for m, label in enumerate(labels) if label >= 0 and not of[m]]
        vague = [m for m, label in enumerate(labels) if label >= 0 and of[m]]
        owners = assign_by_hand(task, cells, boxes, labels, real)
        for a, row in enumerate(cells):
            owner, quality = owners.get(a, (-1, 0.0))
            if owner < 0 and any(inside(boxes[m], *row[4:FIRST_LOGIT]) for m in vague):
                continue
            for k, logit in enumerate(row[FIRST_LOGIT:]):
                target, p = quality if owner >= 0 and labels[owner] == k else 0.0, sigmoid(logit)
                total += focal_of(task.gamma, target, p)
            if owner >= 0:
                total += task.box_weight * quality * box_loss(task.box_loss, row[:4], boxes[owner])
    return total / (60 / 20 * len(outputs))


def focal_of(gamma: float, target: float, p: float) -> float:
    entropy = -(target * math.log(p) + (1 - target) * math.log(1 - p))
    if gamma:
        return abs(target - p) ** gamma * entropy
    own = sum(-each * math.log(each) for each in (target, 1 - target) if each)
    return entropy - own


@pytest.mark.parametrize("settings", DETECT, ids=repr)
def test_the_detection_loss_equals_its_formula(settings):
    task, (outputs, targets) = Detect(**settings), scenes()
    criterion = build_criterion(task, SCENES).double()
    words = (targets[name].tolist() for name in ("boxes", "objects", "roles"))
    expected = detection_by_hand(task, outputs.tolist(), *words)
    assert loss_of(criterion, outputs, targets) == pytest.approx(expected, **NEAR)
    assert in_parts(criterion, outputs, targets) == pytest.approx(expected, **NEAR)
