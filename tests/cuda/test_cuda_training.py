"""Training on a GPU: reproducibility, resuming, precisions, tasks, synchronization of host and GPU, layers."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import nn

from cnnrun.base.errors import CheckpointError, ConfigError, NonFiniteError
from cnnrun.data import training_batches
from cnnrun.experiment import assemble, schema
from cnnrun.results.studies.train_run import train_run
from cnnrun.tasks.classification import CrossEntropy
from cnnrun.training import checkpoints
from cnnrun.training.determinism import deterministic_kernels, use_deterministic_layers
from cnnrun.training.learner import Learner
from cnnrun.training.loss_monitor import LossMonitor
from cnnrun.training.setup import TrainingSetup
from cnnrun.training.state import TrainingState
from tests.support.configs import KINDS, case_config, tiny_experiment
from tests.support.images import write_pictures
from tests.support.interrupted_trainings import digest, stop_at
from tests.support.networks import LAYER_KINDS, random_inputs
from tests.support.non_finite_values import PLACES

pytestmark = pytest.mark.cuda
CPU = torch.device("cpu")
RICH = ["train.ema={decay: 0.9}", "data.augment={shift: 0.2, rotate: 8, mixup: 0.2}", "train.clip=1.0"]
EVERYTHING = (
    "data.augment={flip: both, crop: {}, brightness: 0.2, contrast: 0.2, blur: 1, noise: 3, erase: 0.3, cutmix: 1}"
)


# Layers whose gradient is computed differently on a GPU.
SPECIAL_GRADIENTS = (
    "model=[{pad: {padding: 1, mode: reflect}}, {conv: 4}, {local_response_norm: 3}, {adaptive_avg_pool: 6}, "
    "{upsample: {scale_factor: 2, mode: bilinear}}, {adaptive_max_pool: 5}, flatten]"
)


@pytest.fixture(scope="module")
def pets(tmp_path_factory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("data") / "pets")


def experiment_of_kind(pets: Path, root: Path, kind: str) -> schema.Experiment:
    """A small config, named tiny, of a task or of another feature of training."""
    return case_config(pets, root, (0, 2, kind)).model_copy(update={"name": "tiny"})


# --- the same bits ----------------------------------------------------------------------------------------------------


def is_resume_exact(made: schema.Experiment, root: Path, gpu: torch.device, step: int) -> bool:
    whole = Path(train_run(made, root / "whole", gpu, resume=False)["run"])
    with stop_at(step):
        train_run(made, root / "cut", gpu, resume=True)
    cut = Path(train_run(made, root / "cut", gpu, resume="strict")["run"])
    return digest(whole) == digest(cut)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_resumed_training_equals_an_uninterrupted_one(gpu, tmp_path, precision):
    assert is_resume_exact(tiny_experiment(*RICH, f"train.precision={precision}"), tmp_path, gpu, 9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_training_of_every_kind_equals_an_uninterrupted_one(gpu, tmp_path, pets, kind):
    assert is_resume_exact(experiment_of_kind(pets, tmp_path, kind), tmp_path, gpu, 7)


def test_a_repeated_training_gives_the_same_bits(gpu, tmp_path):
    runs = [Path(train_run(tiny_experiment(*RICH), tmp_path / name, gpu, resume=False)["run"]) for name in "ab"]
    assert digest(runs[0]) == digest(runs[1])


@pytest.mark.parametrize("first", ["cpu", "cuda"])
def test_resuming_on_another_device_is_reported(gpu, tmp_path, capfd, first):
    devices = [CPU, gpu] if first == "cpu" else [gpu, CPU]
    with stop_at(9):
        train_run(tiny_experiment(*RICH), tmp_path, devices[0], resume=True)
    with pytest.raises(CheckpointError, match=f"device was {devices[0]}, is {devices[1]}"):
        train_run(tiny_experiment(*RICH), tmp_path, devices[1], resume="strict")
    assert train_run(tiny_experiment(*RICH), tmp_path, devices[1], resume=True)["steps"] == 34
    assert f"device was {devices[0]}, is {devices[1]}: the result may differ" in capfd.readouterr().err


def test_strict_resume_is_refused_without_deterministic_kernels(gpu, tmp_path):
    made = tiny_experiment("train.deterministic=false", "train.epochs=1")
    with pytest.raises(CheckpointError, match="train.deterministic is false"):
        train_run(made, tmp_path, gpu, resume="strict")
    assert train_run(made, tmp_path, gpu, resume=False)["steps"] == 17
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(("enabled", "warn_only"), [(False, False), (True, True), (True, False)])
def test_training_restores_pytorchs_determinism_settings(gpu, tmp_path, monkeypatch, enabled, warn_only):
    """Kernels are deterministic during training; afterwards the settings are restored, even after an error."""
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
    seen: list[bool] = []

    def forward(self, outputs, targets):
        seen.append(torch.are_deterministic_algorithms_enabled())
        raise RuntimeError("histc_cuda does not have a deterministic implementation, but you set ...")

    monkeypatch.setattr(CrossEntropy, "forward", forward)
    with pytest.raises(ConfigError, match="no deterministic kernel for histc_cuda .*`deterministic: false`"):
        train_run(tiny_experiment(), tmp_path, gpu, resume=False)
    after = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    assert seen == [True]
    assert after == (enabled, warn_only)
    assert not torch.backends.cudnn.benchmark


# --- every layer ------------------------------------------------------------------------------------------------------


def outputs_and_gradients(module: nn.Module, inputs: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """The layer's output and the gradients of its inputs and parameters, on the CPU."""
    moved = [tensor.detach().to(device).requires_grad_() for tensor in inputs]
    out = module.to(device)(*moved)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    (out * weight.to(device)).sum().backward()
    found = [out.detach(), *(tensor.grad for tensor in [*moved, *module.parameters()])]
    return [tensor.cpu() for tensor in found]


EXAMPLES = [(kind, kind.example) for kind in LAYER_KINDS]
EXAMPLES += [
    (kind, {"padding": 1, "mode": mode})
    for kind in LAYER_KINDS
    if kind.kind == "pad"
    for mode in ("reflect", "replicate")
]
EXAMPLES += [(kind, {"mode": "bilinear"}) for kind in LAYER_KINDS if kind.kind == "upsample"]


@pytest.mark.parametrize(("kind", "settings"), EXAMPLES, ids=lambda each: getattr(each, "kind", None))
def test_every_layer_is_reproducible_and_matches_the_cpu(gpu, kind, settings):
    """Evaluation mode turns dropout off; the resume tests above cover its random draws."""
    torch.manual_seed(0)
    layer = kind(**settings).build(kind.example_shape).double().eval()
    inputs = random_inputs(kind, dtype=torch.float64)
    expected = outputs_and_gradients(layer, inputs, CPU)
    layer.zero_grad()
    network = nn.Sequential(layer) if not kind.has_several_inputs else layer
    use_deterministic_layers(network)
    with deterministic_kernels(gpu, enabled=True):
        found = outputs_and_gradients(network, inputs, gpu)
        network.zero_grad()
        again = outputs_and_gradients(network, inputs, gpu)
    for one, other, third in zip(expected, found, again, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-11)
        assert torch.equal(other, third)


def test_adaptive_average_pooling_in_bfloat16_equals_pytorchs(gpu):
    x = torch.rand(2, 3, 7, 9, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = nn.AdaptiveAvgPool2d((3, 4))(x)
    network = nn.Sequential(nn.AdaptiveAvgPool2d((3, 4)))
    use_deterministic_layers(network)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        found = network(x.to(gpu))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.cpu(), expected)


def test_adaptive_average_pooling_first_used_in_inference_mode_has_gradients(gpu):
    """A resumed run may measure val, in inference mode, before its first step."""
    network = nn.Sequential(nn.AdaptiveAvgPool2d((2, 5)))
    use_deterministic_layers(network)
    x = torch.rand(2, 3, 11, 13, device=gpu, requires_grad=True)
    with torch.inference_mode():
        network(x)
    network(x).sum().backward()
    assert x.grad.isfinite().all()


def test_equal_maxima_share_the_gradient(gpu):
    network = nn.Sequential(nn.AdaptiveMaxPool2d((1, 1)))
    use_deterministic_layers(network)
    x = torch.ones(1, 1, 2, 2, device=gpu, requires_grad=True)
    network(x).sum().backward()
    assert x.grad.flatten().tolist() == [0.25] * 4


# --- non-finite values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
def test_a_non_finite_value_stops_training_one_step_later_and_is_never_saved(gpu, tmp_path, monkeypatch, place):
    poison, named = PLACES[place]
    poison(monkeypatch, 20, float("nan"))
    taken: list[int] = []
    real = Learner.update_weights

    def counting(self, step, factor):
        taken.append(step)
        real(self, step, factor)

    monkeypatch.setattr(Learner, "update_weights", counting)
    with pytest.raises(NonFiniteError) as stopped:
        train_run(tiny_experiment("train.ema={decay: 0.9}", "data.augment={rotate: 4}"), tmp_path, gpu, resume=False)
    lines = stopped.value.lines
    assert "at step 20; this step is not saved" in lines[0]
    spread = place in ("loss", "gradient", "weight")  # the value reached every weight before it was detected
    assert ("unknown, because the GPU" if spread else named) in lines[1]
    assert taken[-1] <= 20  # one more step is running when the value is detected; it changes no weight
    found = checkpoints.list_checkpoints(tmp_path / "tiny" / "1" / "checkpoints")
    assert [path.name for path in found] == ["step-00000017"]
    assert all(value.isfinite().all() for part in checkpoints.load(found[0]).parts.values() for value in part.values())


def test_float16_skips_a_step_whose_gradients_overflow(gpu, tmp_path, monkeypatch):
    real, losses = CrossEntropy.forward, []

    def forward(self, outputs, targets):
        found = real(self, outputs, targets)
        if torch.is_grad_enabled():
            losses.append(len(outputs))
            if len(losses) == 3:
                found = {
                    name: loss + (outputs * 1e9).sum() * 0 + (outputs.sum() * 1e30) for name, loss in found.items()
                }
        return found

    monkeypatch.setattr(CrossEntropy, "forward", forward)
    run = Path(
        train_run(tiny_experiment("train.precision=float16", "train.epochs=1"), tmp_path, gpu, resume=False)["run"]
    )
    saved = checkpoints.load_newest(run / "checkpoints", "latest", pytest.fail)
    assert saved.state["scaler"]["scale"] == 2.0**15  # half of the initial scale
    assert all(value.isfinite().all() for part in saved.parts.values() for value in part.values())


# --- what makes the host wait -----------------------------------------------------------------------------------------


@pytest.fixture
def _batch_by_batch(monkeypatch):
    """Prepare each batch separately, when it is requested."""
    monkeypatch.setattr(training_batches, "AHEAD_BYTES", 1)


def run_steps(setup: TrainingSetup, steps: int) -> None:
    """Run the first steps of a training; from the second on, making the host wait for the GPU is an error."""
    learner, state = Learner(setup), TrainingState(accumulate=setup.spec.accumulate)
    kernels = deterministic_kernels(setup.device, setup.spec.deterministic)
    with kernels, closing(setup.batches(state.accumulate)) as batches:
        losses = LossMonitor(learner, state, batches)
        try:
            for step in range(steps):
                learner.criterion.set_progress(step / steps)
                loss = learner.backward(batches.at(step), step)
                losses.add(learner.finiteness_probes(loss))
                learner.update_weights(step, 1.0)
                state.step += 1
                torch.cuda.set_sync_debug_mode("error")
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "overrides",
    [
        RICH,
        [EVERYTHING, "train.optimizer={adamw: 0.01}"],
        ["data.augment.policy=trivial_augment", "train.precision=bfloat16"],
        ["task={classify: {label_smoothing: 0.1, class_weights: balanced}}", "train.accumulate=4", "data.prefetch=0"],
        ["train.precision=float16", "train.deterministic=false"],
        [SPECIAL_GRADIENTS],
    ],
)
@pytest.mark.usefixtures("_batch_by_batch")
def test_no_training_step_makes_the_host_wait_for_the_gpu(gpu, overrides):
    made = tiny_experiment(*overrides)
    run_steps(assemble.build_setup(made, assemble.prepare_dataset(made), None, gpu), 4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("_batch_by_batch")
def test_no_training_step_of_any_kind_makes_the_host_wait_for_the_gpu(gpu, tmp_path, pets, kind):
    made = experiment_of_kind(pets, tmp_path, kind)
    run_steps(assemble.build_setup(made, assemble.prepare_dataset(made), None, gpu), 4)


def test_images_and_weights_are_in_channels_last_format(gpu, tmp_path, monkeypatch):
    seen: list[bool] = []
    real = nn.Conv2d.forward

    def forward(self, x):
        seen.append(x.is_contiguous(memory_format=torch.channels_last))
        seen.append(self.weight.is_contiguous(memory_format=torch.channels_last))
        return real(self, x)

    monkeypatch.setattr(nn.Conv2d, "forward", forward)
    made = tiny_experiment("train.epochs=1", "model=[{conv: 4}, {conv: 8}, flatten]")
    data = assemble.prepare_dataset(made)
    setup = assemble.build_setup(made, data, None, gpu)
    learner = Learner(setup)
    seen.clear()
    with closing(setup.batches(1)) as batches:
        learner.backward(batches.at(0), 0)
    assert len(seen) == 4
    assert all(seen)


# --- features of frozen layers, compiled networks ---------------------------------------------------------------------


def test_precomputed_frozen_features_train_like_the_frozen_layers(gpu, tmp_path):
    frozen = ["train.freeze=conv1", "train.epochs=2"]
    once = train_run(tiny_experiment(*frozen), tmp_path / "once", gpu, resume=False)
    anew = train_run(tiny_experiment(*frozen, "data.memory_gib=0"), tmp_path / "anew", gpu, resume=False)
    assert once["best"]["val/accuracy"] == pytest.approx(anew["best"]["val/accuracy"], abs=0.02)


def test_a_compiled_network_trains_like_an_uncompiled_one(real_gpu, tmp_path):
    results = []
    for word in ("false", "true"):
        made = tiny_experiment("train.epochs=3", f"train.compile={word}", "model=[{conv: 8}, flatten]")
        run = Path(train_run(made, tmp_path / word, real_gpu, resume=False)["run"])
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        results.append([row["train/loss"] for row in rows])
    assert results[0] == pytest.approx(results[1], rel=2e-2)
