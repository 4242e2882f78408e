"""The layers that contain no other layers. The union is their registry: a new layer needs a module and a line here."""

from cnnrun.model.layers.activation import Activation, Softmax
from cnnrun.model.layers.channel_gates import LayerScale, SqueezeExcite
from cnnrun.model.layers.conv import Conv, ConvTranspose
from cnnrun.model.layers.dropout import Dropout, Dropout2d, DropPath
from cnnrun.model.layers.linear import Linear
from cnnrun.model.layers.merge import Add, Concat, Multiply
from cnnrun.model.layers.norm import LocalResponseNorm, Norm
from cnnrun.model.layers.pool import AdaptiveAvgPool, AdaptiveMaxPool, AvgPool, GlobalAvgPool, GlobalMaxPool, MaxPool
from cnnrun.model.layers.reshape import ChannelShuffle, Chunk, Flatten, Identity, Pad, PixelShuffle, Upsample

__all__ = ["Leaf", "activation", "merge", "norm", "norm_and_activation", "reshape"]


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
