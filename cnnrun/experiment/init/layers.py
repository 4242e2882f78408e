"""The layers of the networks that `init` writes, as YAML."""

from __future__ import annotations

import math

SMALL_SIDE = 40  # pixels; images whose shorter side is at most this are not scaled down
_CONV = "  - conv: {{out_channels: {0}, norm: batch, activation: relu}}\n"
_TWO_CONVS = "  - repeat: {{times: 2, layers: [conv: {{out_channels: {0}, norm: batch, activation: relu}}]}}\n"
_STAGE = """  - residual:
      norm: batch
      activation: relu
      layers:
        - conv: {{out_channels: {0}, stride: 2, norm: batch, activation: relu}}
        - conv: {{out_channels: {0}, norm: batch}}
"""
_DETECTOR = """blocks:
  stage:
    parameters: {out_channels, times: 1}
    layers:
      - conv: {out_channels: $out_channels, stride: 2, norm: batch, activation: silu}
      - repeat:
          times: $times
          layers:
            - residual:
                - conv: {out_channels: $out_channels, norm: batch, activation: silu}
                - conv: {out_channels: $out_channels, norm: batch, activation: silu}
model:
  - conv: {out_channels: 16, stride: 2, norm: batch, activation: silu}
  - conv: {out_channels: 32, stride: 2, norm: batch, activation: silu}
  - stage: {name: c3, out_channels: 64}
  - stage: {name: c4, out_channels: 96}
  - stage: {name: c5, out_channels: 128}
  - conv: {name: p5, out_channels: 64, kernel_size: 1, norm: batch, activation: silu}
  - fpn_up: {name: p4, lateral: c4}
  - fpn_up: {name: p3, lateral: c3}
"""
_DOUBLE = """blocks:
  double:
    parameters: {width}
    layers: [{repeat: {times: 2, layers: [{conv: {out_channels: $width, norm: batch, activation: relu}}]}}]
"""
_FACES = """model:
  - conv: {out_channels: 32, norm: batch, activation: relu}
  - max_pool: 2
  - conv: {out_channels: 64, norm: batch, activation: relu}
  - max_pool: 2
  - conv: {out_channels: 128, norm: batch, activation: relu}
  - max_pool: 2
  - conv: {out_channels: 128, norm: batch, activation: relu}
"""


def classifier_model(side: int) -> str:
    """The section `model` for one answer per image: pairs of convolutions for small images, else residual stages."""
    if side <= SMALL_SIDE:
        text = _CONV.format(32) + _CONV.format(32)
        for width in (64, 128)[: max(1, round(math.log2(side / 8)))]:
            text += "  - max_pool: 2\n" + _TWO_CONVS.format(width)
    else:
        text = "  - conv: {out_channels: 32, stride: 2, norm: batch, activation: relu}\n"
        for width in (64, 128, 256, 256)[: max(2, round(math.log2(side / 12)))]:
            text += _STAGE.format(width)
    return f"model:\n{text}  - global_avg_pool\n  - dropout: 0.2\n"


def pretrained_model(network: str, weights: str, last_layer: str) -> str:
    """The section `model` with a zoo network up to its last layer, whose averages have the name `pooled`."""
    return (
        f"model:\n  zoo: {network}\n  until: {last_layer}\n  weights: {weights}\n  layers:\n"
        "    - global_avg_pool: {name: pooled}\n    - dropout: 0.2\n"
    )


def pretrained_detector_model(network: str, weights: str, last_layer: str, levels: tuple[str, ...]) -> str:
    """The section `model` of a detector on a zoo network; `levels` are its layers from a half of the image's side."""
    return (
        f"model:\n  zoo: {network}\n  until: {last_layer}\n  weights: {weights}\n  layers:\n"
        "    - conv: {name: p5, out_channels: 64, kernel_size: 1, norm: batch, activation: silu}\n"
        f"    - fpn_up: {{name: p4, lateral: {levels[3]}}}\n    - fpn_up: {{name: p3, lateral: {levels[2]}}}\n"
    )


def detector_model() -> str:
    """The sections `blocks` and `model` of a detector with the levels p3, p4 and p5, as in configs/bccd.yaml."""
    return _DETECTOR


def embedder_model(side: int) -> str:
    """The section `model` of an embedder, as in configs/orl-faces.yaml; larger images are pooled once more."""
    text = _FACES
    for _ in range(max(0, round(math.log2(side / 56)))):
        text += "  - max_pool: 2\n  - conv: {out_channels: 128, norm: batch, activation: relu}\n"
    return text + "  - flatten\n  - dropout: 0.3\n"


def pretrained_segmenter_model(network: str, weights: str, levels: tuple[str, ...]) -> str:
    """The sections `blocks` and `model` of a U-Net whose first half is a zoo network, up to the last of `levels`."""
    text = f"{_DOUBLE}model:\n  zoo: {network}\n  until: {levels[3]}\n  weights: {weights}\n  layers:\n"
    for level, width in ((3, 64), (2, 48), (1, 32)):
        name = f"name: merged{level}, " if level > 1 else ""
        text += f"    - conv_transpose: {{name: up{level}, out_channels: {width}}}\n"
        text += f"    - concat: [{levels[level - 1]}, up{level}]\n    - double: {{{name}width: {width}}}\n"
    return text


def segmenter_model(depth: int) -> str:
    """The sections `blocks` and `model` of a U-Net with `depth` poolings, as in configs/digit-segments.yaml."""
    widths = [12 * 2**level for level in range(depth + 1)]
    text = f"{_DOUBLE}model:\n"
    for level, width in enumerate(widths[:-1], 1):
        text += f"  - double: {{name: down{level}, width: {width}}}\n  - max_pool: 2\n"
    text += f"  - double: {{name: bottom, width: {widths[-1]}}}\n"
    for level, width in reversed(list(enumerate(widths[:-1], 1))):
        text += f"  - conv_transpose: {{name: up{level}, out_channels: {max(16, width)}}}\n"
        text += f"  - concat: [down{level}, up{level}]\n"
        name = f"name: merged{level}, " if level > 1 else ""
        text += f"  - double: {{{name}width: {max(16, width)}}}\n"
    return text
