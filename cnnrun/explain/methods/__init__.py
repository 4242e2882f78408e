"""Methods of looking into a network: the settings of each here, its drawing in a module of its own.

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
    ImageMethod,
    Images,
    Layer,
    Layers,
    Map,
    Natural,
    SplitMethod,
)

if TYPE_CHECKING:
    from cnnrun.explain.run_method import OpenRun
    from cnnrun.explain.subject import Explanation

Pixels = Annotated[int | None, Field(ge=1)]


class Filters(ExplainMethod):
    """The kernels of a conv, by default the first. Example: cnnrun explain filters runs/digits/1"""

    kind = "filters"
    layer: Layer = None

    def explain(self, run: OpenRun) -> Explanation:
        from cnnrun.explain.methods.filters import filters

        return filters(run.subject, self.layer)


class Features(ImageMethod):
    """A layer's maps of images. Example: cnnrun explain features --layer model[1].conv --image 3"""

    kind = "features"
    layer: Layer = None

    def explain(self, run: OpenRun) -> Explanation:
        from cnnrun.explain.methods.features import feature_maps

        run.subject.find_map_layer(self.layer)
        return feature_maps(run.subject, self.load_images(run), self.layer)


class Top(SplitMethod):
    """Each channel's nine strongest patches and their deconvolutions. Example: cnnrun explain top --split train"""

    kind = "top"
    layer: Layer = None
    channels: Channels = ()
    first_channels: FirstChannels = 16

    def explain(self, run: OpenRun) -> Explanation:
        from cnnrun.explain.methods.top_patches import top_patches

        run.subject.check_channels(run.subject.find_map_layer(self.layer), self.channels)
        return top_patches(
            run.subject, run.load_examples(self.split), self.layer, self.channels, self.first_channels, run.batch
        )


class Deconv(ImageMethod):
    """What the strongest cells stand for in images. Example: cnnrun explain deconv --file cat.jpg"""

    kind = "deconv"
    layer: Layer = None
    channels: Channels = ()

    def explain(self, run: OpenRun) -> Explanation:
        from cnnrun.explain.methods.deconv import deconv

        run.subject.check_channels(run.subject.find_map_layer(self.layer), self.channels)
        return deconv(run.subject, self.load_images(run), self.layer, self.channels)


class Occlude(ImageMethod):
    """What the network says as a grey square moves over an image. Example: cnnrun explain occlude --file cat.jpg"""

    kind = "occlude"
    class_: Class = None
    size: Pixels = Field(None, description="The square's side in pixels; by default a quarter of the image's.")
    stride: Pixels = Field(None, description="Its steps in pixels; by default a quarter of its side.")
    layer: Layer = None
    images: Images = 2

    def explain(self, run: OpenRun) -> Explanation:
        from cnnrun.explain.methods.occlude import occlude

        run.subject.find_map_layer(self.layer)
        return occlude(run.subject, self.load_images(run), self.layer, self.class_, self.size, self.stride)


class GradCam(ImageMethod):
    """Where a layer speaks for what the network says. Example: cnnrun explain gradcam --file cat.jpg --class cat"""

    kind = "gradcam"
    class_: Class = None
    layer: Layer = None

    def explain(self, run: OpenRun) -> Explanation:
        from cnnrun.explain.methods.gradients import gradcam

        run.subject.find_map_layer(self.layer)
        return gradcam(run.subject, self.load_images(run), self.layer, self.class_)


class Saliency(ImageMethod):
    """How much each pixel would change what the network says. Example: cnnrun explain saliency --rule guided"""

    kind = "saliency"
    class_: Class = None
    rule: BackwardRule = Field("plain", description="What ReLUs hand back: the slope, or as the deconvnet does.")

    def explain(self, run: OpenRun) -> Explanation:
        from cnnrun.explain.methods.gradients import saliency

        return saliency(run.subject, self.load_images(run), self.class_, self.rule)


class Evolve(SplitMethod):
    """Channels' strongest patches, checkpoint by checkpoint (train with train.keep). Example: cnnrun explain evolve"""

    kind = "evolve"
    layer: Layer = None
    channels: Channels = ()
    first_channels: FirstChannels = 6

    def explain(self, run: OpenRun) -> Explanation:
        from cnnrun.explain.methods.evolve import evolve

        run.subject.check_channels(run.subject.find_map_layer(self.layer), self.channels)
        history = run.history()
        return evolve(history, run.load_examples(self.split), self.layer, self.channels, self.first_channels, run.batch)


class Invariance(ImageMethod):
    """Features and scores as images are shifted, enlarged, turned. Example: cnnrun explain invariance"""

    kind = "invariance"
    class_: Class = None
    layers: Layers = ()
    images: Images = 5

    def explain(self, run: OpenRun) -> Explanation:
        from cnnrun.explain.methods.invariance import invariance

        for layer in self.layers:
            run.subject.find_layer(layer)
        return invariance(run.subject, self.load_images(run), self.layers, self.class_)


class Embed(SplitMethod):
    """Images as a layer's vectors: a file, a map, linear probes. Example: cnnrun explain embed --map tsne"""

    kind = "embed"
    out: ClassVar[str] = "The file for the vectors: .npz or .parquet."
    suffixes: ClassVar[tuple[str, ...]] = (".npz", ".parquet")
    layers: Layers = ()
    map: Map = Field("pca", description="How the vectors become points of a plane.")
    probe: bool | None = Field(None, description="A linear model of each layer's vectors; by default where it can be.")

    def explain(self, run: OpenRun) -> Explanation:
        from cnnrun.explain.methods.embed import embed

        for layer in self.layers:
            run.subject.find_layer(layer)
        name, data = run.load_data(self.split, with_train=self.probe is not False)
        return embed(run.subject, data.splits, name, self.layers, self.map, run.batch, self.probe)


class Detections(ImageMethod):
    """Draw what is in images beside what the network finds. Example: cnnrun explain detections runs/bccd/1"""

    kind = "detections"
    images: Images = 8

    def explain(self, run: OpenRun) -> Explanation:
        from cnnrun.explain.methods.detections import detections

        return detections(run.subject, self.load_images(run))


class Assign(SplitMethod):
    """Draw which cells of which level learn which object. Example: cnnrun explain assign --split train --image 3"""

    kind = "assign"
    image: Natural = Field(0, description="The image's number in the split.")

    def explain(self, run: OpenRun) -> Explanation:
        from cnnrun.explain.methods.detections import show_assignment
        from cnnrun.explain.run_method import Selection

        return show_assignment(run.subject, run.load_images(Selection(self.split, numbers=(self.image,))))


Method = (
    Filters | Features | Top | Deconv | Occlude | GradCam | Saliency | Evolve | Invariance | Embed | Detections | Assign
)
