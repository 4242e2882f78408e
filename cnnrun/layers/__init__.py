"""The layers. This union is the registry: a new leaf is one file beside this one, and its line here."""

from cnnrun.layers.activation import Activation
from cnnrun.layers.conv import Conv, ConvTranspose, Linear
from cnnrun.layers.drop import Dropout, Dropout2d, DropPath
from cnnrun.layers.gate import LayerScale, SqueezeExcite
from cnnrun.layers.local import LocalResponseNorm, Softmax
from cnnrun.layers.merge import Add, Concat, Multiply
from cnnrun.layers.norm import Norm
from cnnrun.layers.pool import (
    AdaptiveAvgPool,
    AdaptiveMaxPool,
    AvgPool,
    GlobalAvgPool,
    GlobalMaxPool,
    MaxPool,
)
from cnnrun.layers.reshape import ChannelShuffle, Chunk, Flatten, Identity, Pad, PixelShuffle, Upsample

Leaf = (
    (Conv | ConvTranspose | Linear)
    | (MaxPool | AvgPool | AdaptiveAvgPool | AdaptiveMaxPool | GlobalAvgPool | GlobalMaxPool)
    | Norm
    | LocalResponseNorm
    | Activation
    | Softmax
    | (Dropout | Dropout2d | DropPath)
    | (Flatten | Identity | Upsample | PixelShuffle | ChannelShuffle | Chunk | Pad)
    | (SqueezeExcite | LayerScale)
    | (Concat | Add | Multiply)
)
