"""Methods that explain a network: the settings of each are here, its drawing is in a module of its own.

`Method` is the registry: `cnnrun explain` has a command for each of its members. Nothing here imports torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from cnnrun.explain.method_base import (
    BackwardRule,
    Channels,
    Class,
    ExplainMethod,
    FirstChannels,
    ImageCount,
    ImageMethod,
    Layer,
    Layers,
    Map,
    Natural,
    SplitMethod,
)

__all__ = ["Method", "filters", "gradients", "top_patches", "worst_images"]


if TYPE_CHECKING:
    from cnnrun.explain.run import OpenRun
    from cnnrun.explain.subject import Explanation

Pixels = Annotated[int | None, Field(ge=1)]


class Filters(ExplainMethod):
    """Show the kernels of a conv, by default the first. Example: cnnrun explain filters runs/digits/1"""

    kind = "filters"
    layer: Layer = Field(
        None, description="Conv by path (model[2].conv), name, or name in the weights; default: the first."
    )

    def explain(self, run: OpenRun) -> Explanation:
        from cnnrun.explain.methods.filters import filters

        return filters(run.subject, self.layer)


class Features(ImageMethod):
    """Show a layer's feature maps of images. Example: cnnrun explain features --layer model[1].conv --image 3"""

    kind = "features"
    layer: Layer = None

    def explain(self, run: OpenRun) -> Explanation:
        from cnnrun.explain.methods.features import feature_maps

        run.subject.find_feature_map_layer(self.layer)
        return feature_maps(run.subject, self.load_images(run), self.layer)


class Top(SplitMethod):
    """Show each channel's nine strongest patches and their deconvolutions. Example: cnnrun explain top --split train"""

    kind = "top"
    layer: Layer = None
    channels: Channels = ()
    first_channels: FirstChannels = 16

    def explain(self, run: OpenRun) -> Explanation:
        from cnnrun.explain.methods.top_patches import top_patches

        run.subject.check_channels(run.subject.find_feature_map_layer(self.layer), self.channels)
        return top_patches(
            run.subject, run.load_examples(self.split), self.layer, self.channels, self.first_channels, run.batch
        )


class Deconv(ImageMethod):
    """Project the strongest cells of a layer back to pixels. Example: cnnrun explain deconv --file cat.jpg"""

    kind = "deconv"
    layer: Layer = None
    channels: Channels = Field(
        (), description="The number of a channel, from 0; may be repeated; by default the strongest channels."
    )

    def explain(self, run: OpenRun) -> Explanation:
        from cnnrun.explain.methods.deconv import deconv

        run.subject.check_channels(run.subject.find_feature_map_layer(self.layer), self.channels)
        return deconv(run.subject, self.load_images(run), self.layer, self.channels)


class Occlude(ImageMethod):
    """Show scores as a grey square covers parts of an image. Example: cnnrun explain occlude --file cat.jpg"""

    kind = "occlude"
    class_: Class = None
    size: Pixels = Field(
        None, description="Side of the square in pixels; by default a quarter of the image's shorter side."
    )
    stride: Pixels = Field(None, description="Step of the square in pixels; by default a quarter of its side.")
    layer: Layer = None
    images: ImageCount = 2

    def explain(self, run: OpenRun) -> Explanation:
        from cnnrun.explain.methods.occlude import occlude

        run.subject.find_feature_map_layer(self.layer)
        return occlude(run.subject, self.load_images(run), self.layer, self.class_, self.size, self.stride)


class GradCam(ImageMethod):
    """Show where a layer supports a class (Grad-CAM). Example: cnnrun explain gradcam --file cat.jpg --class cat"""

    kind = "gradcam"
    class_: Class = None
    layer: Layer = None

    def explain(self, run: OpenRun) -> Explanation:
        from cnnrun.explain.methods.gradients import gradcam

        run.subject.find_feature_map_layer(self.layer)
        return gradcam(run.subject, self.load_images(run), self.layer, self.class_)


class Saliency(ImageMethod):
    """Show how strongly a score depends on each pixel. Example: cnnrun explain saliency --rule guided"""

    kind = "saliency"
    class_: Class = None
    rule: BackwardRule = Field("plain", description="Backward rule of ReLUs: the gradient (plain), guided, or deconv.")

    def explain(self, run: OpenRun) -> Explanation:
        from cnnrun.explain.methods.gradients import saliency

        return saliency(run.subject, self.load_images(run), self.class_, self.rule)


class Evolve(SplitMethod):
    """Show channels' strongest patches by checkpoint (train with train.keep). Example: cnnrun explain evolve"""

    kind = "evolve"
    layer: Layer = None
    channels: Channels = ()
    first_channels: FirstChannels = 6

    def explain(self, run: OpenRun) -> Explanation:
        from cnnrun.explain.methods.evolve import evolve

        run.subject.check_channels(run.subject.find_feature_map_layer(self.layer), self.channels)
        history = run.history()
        return evolve(history, run.load_examples(self.split), self.layer, self.channels, self.first_channels, run.batch)


class Invariance(ImageMethod):
    """Measure features and scores of shifted, enlarged and rotated images. Example: cnnrun explain invariance"""

    kind = "invariance"
    class_: Class = None
    layers: Layers = Field(
        (),
        description="A layer by path or name; may be repeated; by default the first conv and the last layer before "
        "the head.",
    )
    images: ImageCount = 5

    def explain(self, run: OpenRun) -> Explanation:
        from cnnrun.explain.methods.invariance import invariance

        for layer in self.layers:
            run.subject.find_layer(layer)
        return invariance(run.subject, self.load_images(run), self.layers, self.class_)


class Embed(SplitMethod):
    """Write a layer's vectors of images, with a map and linear probes. Example: cnnrun explain embed --map tsne"""

    kind = "embed"
    out: ClassVar[str] = "The file for the vectors: .npz or .parquet."
    suffixes: ClassVar[tuple[str, ...]] = (".npz", ".parquet")
    layers: Layers = Field((), description="A layer by path or name; may be repeated; by default the head's input.")
    map: Map = Field("pca", description="Projection of the vectors to a plane.")
    probe: bool | None = Field(None, description="Fit a linear model on each layer's vectors; by default if possible.")

    def explain(self, run: OpenRun) -> Explanation:
        from cnnrun.explain.methods.embed import EmbedOptions, embed

        for layer in self.layers:
            run.subject.find_layer(layer)
        name, data = run.load_data(self.split, with_train=self.probe is not False)
        options = EmbedOptions(self.layers, self.map, self.probe)
        return embed(run.subject, data.splits, name, options, run.batch)


class Detections(ImageMethod):
    """Draw the targets of images beside the network's detections. Example: cnnrun explain detections runs/bccd/1"""

    kind = "detections"
    images: ImageCount = 8

    def explain(self, run: OpenRun) -> Explanation:
        from cnnrun.explain.methods.detections import detections

        return detections(run.subject, self.load_images(run))


class Assign(SplitMethod):
    """Draw the cells of each level assigned to objects. Example: cnnrun explain assign --split train --image 3"""

    kind = "assign"
    image: Natural = Field(0, description="The number of the image in the split, from 0.")

    def explain(self, run: OpenRun) -> Explanation:
        from cnnrun.explain.methods.detections import show_assignment
        from cnnrun.explain.run import Selection

        return show_assignment(run.subject, run.load_images(Selection(self.split, indices=(self.image,))))


Method = (
    Filters | Features | Top | Deconv | Occlude | GradCam | Saliency | Evolve | Invariance | Embed | Detections | Assign
)
