"""The commands that show what a network sees."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cnnrun.commands.options import Device, Json, Runs, SplitName, Target, show

if TYPE_CHECKING:
    from cnnrun.explain.run_method import Asked

explain_app = typer.Typer(
    help="See what a trained network sees, finds, and learns by. Pictures go to RUN/explain.", no_args_is_help=True
)

Out = Annotated[Path | None, typer.Option(help="The PNG file to write; by default in the run's folder explain.")]
Layer = Annotated[
    str | None,
    typer.Option(
        help="By path (model[2].conv), name, or name in the weights; by default the last conv, or a detector's finest."
    ),
]
Layers = Annotated[list[str] | None, typer.Option("--layer", help="A layer, as often as you like.")]
Channels = Annotated[list[int] | None, typer.Option("--channel", min=0, help="A channel, as often as you like.")]
Most = Annotated[int, typer.Option(min=1, max=1000, help="Channels where none is named: the first ones.")]
Count = Annotated[int, typer.Option(min=1, max=100, help="How many, the split's first.")]
Numbers = Annotated[
    list[int] | None, typer.Option("--picture", min=0, help="A sample's number in the split, as often as you like.")
]
Files = Annotated[
    list[Path] | None, typer.Option("--file", help="A picture or a folder of yours instead, as often as you like.")
]
Aimed = Annotated[str | None, typer.Option("--target", help="A class or number; by default what the network says.")]


class Rule(StrEnum):
    """What ReLUs hand back."""

    plain = "plain"
    guided = "guided"
    deconv = "deconv"


class Map(StrEnum):
    """How vectors become points of a plane."""

    pca = "pca"
    tsne = "tsne"


def _asked(
    target: Path | None,
    runs: Path,
    device: str,
    out: Path | None,
    split: str | None = None,
    count: int = 8,
    numbers: Sequence[int] | None = None,
    files: Sequence[Path] | None = None,
) -> Asked:
    """What every explanation is asked."""
    from cnnrun.base.device import choose
    from cnnrun.explain.run_method import Asked

    return Asked(target, runs, choose(device), out, split, count, numbers or (), files or ())


def _show(data: dict[str, Any], as_json: bool) -> None:
    from cnnrun.commands.explain_tables import explained

    show(data, as_json, explained)


@explain_app.command("filters")
def filters(
    target: Target = None,
    layer: Layer = None,
    out: Out = None,
    device: Device = "auto",
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """The kernels of a conv, by default the first. Example: cnnrun explain filters runs/digits/1"""
    from cnnrun.explain import run_method

    asked = _asked(target, runs, device, out)
    _show(run_method.filters(asked, layer), as_json)


@explain_app.command("features")
def features(
    target: Target = None,
    layer: Layer = None,
    split: SplitName = None,
    pictures: Count = 4,
    picture: Numbers = None,
    file: Files = None,
    out: Out = None,
    device: Device = "auto",
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """A layer's maps of pictures. Example: cnnrun explain features --layer model[1].conv --picture 3"""
    from cnnrun.explain import run_method

    asked = _asked(target, runs, device, out, split, pictures, picture, file)
    _show(run_method.features(asked, layer), as_json)


@explain_app.command("top")
def top(
    target: Target = None,
    layer: Layer = None,
    channel: Channels = None,
    channels: Most = 16,
    split: SplitName = None,
    out: Out = None,
    device: Device = "auto",
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Each channel's nine strongest patches and their deconvolutions. Example: cnnrun explain top --split train"""
    from cnnrun.explain import run_method

    asked = _asked(target, runs, device, out, split)
    _show(run_method.top(asked, layer, channel or [], channels), as_json)


@explain_app.command("deconv")
def deconv(
    target: Target = None,
    layer: Layer = None,
    channel: Channels = None,
    split: SplitName = None,
    pictures: Count = 4,
    picture: Numbers = None,
    file: Files = None,
    out: Out = None,
    device: Device = "auto",
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """What the strongest cells stand for in pictures. Example: cnnrun explain deconv --file cat.jpg"""
    from cnnrun.explain import run_method

    asked = _asked(target, runs, device, out, split, pictures, picture, file)
    _show(run_method.deconv(asked, layer, channel or []), as_json)


@explain_app.command("occlude")
def occlude(
    run: Target = None,
    target: Aimed = None,
    size: Annotated[int | None, typer.Option(min=1, help="The square's side; by default a quarter.")] = None,
    stride: Annotated[int | None, typer.Option(min=1, help="Its steps; by default a quarter of its side.")] = None,
    layer: Layer = None,
    split: SplitName = None,
    pictures: Count = 2,
    picture: Numbers = None,
    file: Files = None,
    out: Out = None,
    device: Device = "auto",
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """What the network says as a grey square moves over a picture. Example: cnnrun explain occlude --file cat.jpg"""
    from cnnrun.explain import run_method

    asked = _asked(run, runs, device, out, split, pictures, picture, file)
    _show(run_method.occlude(asked, layer, target, size, stride), as_json)


@explain_app.command("gradcam")
def gradcam(
    run: Target = None,
    target: Aimed = None,
    layer: Layer = None,
    split: SplitName = None,
    pictures: Count = 4,
    picture: Numbers = None,
    file: Files = None,
    out: Out = None,
    device: Device = "auto",
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Where a layer speaks for what the network says. Example: cnnrun explain gradcam --file cat.jpg --target cat"""
    from cnnrun.explain import run_method

    asked = _asked(run, runs, device, out, split, pictures, picture, file)
    _show(run_method.gradcam(asked, layer, target), as_json)


@explain_app.command("saliency")
def saliency(
    run: Target = None,
    target: Aimed = None,
    rule: Annotated[Rule, typer.Option(help="What ReLUs hand back: the slope, or as the deconvnet does.")] = Rule.plain,
    split: SplitName = None,
    pictures: Count = 4,
    picture: Numbers = None,
    file: Files = None,
    out: Out = None,
    device: Device = "auto",
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """How much each pixel would change what the network says. Example: cnnrun explain saliency --rule guided"""
    from cnnrun.explain import run_method

    asked = _asked(run, runs, device, out, split, pictures, picture, file)
    _show(run_method.saliency(asked, target, rule.value), as_json)


@explain_app.command("evolve")
def evolve(
    target: Target = None,
    layer: Layer = None,
    channel: Channels = None,
    channels: Most = 6,
    split: SplitName = None,
    out: Out = None,
    device: Device = "auto",
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Channels' strongest patches, checkpoint by checkpoint (train with train.keep). Example: cnnrun explain evolve"""
    from cnnrun.explain import run_method

    asked = _asked(target, runs, device, out, split)
    _show(run_method.evolve(asked, layer, channel or [], channels), as_json)


@explain_app.command("invariance")
def invariance(
    run: Target = None,
    target: Aimed = None,
    layer: Layers = None,
    split: SplitName = None,
    pictures: Count = 5,
    picture: Numbers = None,
    file: Files = None,
    out: Out = None,
    device: Device = "auto",
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Features and scores as pictures are shifted, enlarged, turned. Example: cnnrun explain invariance"""
    from cnnrun.explain import run_method

    asked = _asked(run, runs, device, out, split, pictures, picture, file)
    _show(run_method.invariance(asked, layer or [], target), as_json)


@explain_app.command("ablate")
def ablate(
    target: Target = None,
    remove: Annotated[
        list[str] | None, typer.Option(help="A layer to leave out, several joined by commas; each word a variant.")
    ] = None,
    change: Annotated[
        list[str] | None, typer.Option(help="Settings to change (KEY.PATH=VALUE), joined by commas; with --retrain.")
    ] = None,
    retrain: Annotated[bool, typer.Option("--retrain", help="Train each variant from scratch.")] = False,
    split: SplitName = None,
    out: Out = None,
    device: Device = "auto",
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """The numbers without layers, or with other sizes. Example: cnnrun explain ablate --remove model[3] --retrain"""
    from cnnrun.base.device import keep_freed_memory
    from cnnrun.results.studies import ablate as ablating

    keep_freed_memory()
    asked = _asked(target, runs, device, out, split)
    _show(ablating.ablate(asked, remove or [], change or [], retrain), as_json)


@explain_app.command("embed")
def embed(
    target: Target = None,
    layer: Layers = None,
    map_: Annotated[Map, typer.Option("--map", help="How the vectors become points of a plane.")] = Map.pca,
    probe: Annotated[
        bool | None,
        typer.Option("--probe/--no-probe", help="A linear model of each layer's vectors; by default where it can be."),
    ] = None,
    split: SplitName = None,
    out: Annotated[Path | None, typer.Option(help="The file for the vectors: .npz or .parquet.")] = None,
    device: Device = "auto",
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Pictures as a layer's vectors: a file, a map, linear probes. Example: cnnrun explain embed --map tsne"""
    from cnnrun.explain import run_method

    asked = _asked(target, runs, device, out, split)
    _show(run_method.embed(asked, layer or [], map_.value, probe), as_json)


@explain_app.command("found")
def found(
    target: Target = None,
    split: SplitName = None,
    pictures: Count = 8,
    picture: Numbers = None,
    file: Files = None,
    out: Out = None,
    device: Device = "auto",
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Draw what is in pictures beside what the network finds. Example: cnnrun explain found runs/bccd/1 --split val"""
    from cnnrun.explain import run_method

    asked = _asked(target, runs, device, out, split, pictures, picture, file)
    _show(run_method.found(asked), as_json)


@explain_app.command("assign")
def assign(
    target: Target = None,
    split: SplitName = None,
    picture: Annotated[int, typer.Option(min=0, help="The sample's number in the split.")] = 0,
    out: Out = None,
    device: Device = "auto",
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Draw which cells of which level learn which object. Example: cnnrun explain assign --split train --picture 3"""
    from cnnrun.explain import run_method

    asked = _asked(target, runs, device, out, split, 1, [picture])
    _show(run_method.assign(asked), as_json)
