"""The vocabulary: frozen data that describes a model. No files, no device, no arithmetic."""

from .attention import Attention, FusedQKV, SplitQKV
from .block import Block
from .decoder import Decoder
from .linear import Embedding, Linear
from .metadata import REQUIRED, Metadata
from .mlp import ACTIVATIONS, MLP, Activation, FusedGateUp
from .module import Module
from .norm import LayerNorm, Norm, RMSNorm
from .position import LearnedPositions, LinearScaling, Pairing, Rope, YarnScaling
from .rope_metadata import read_rope
from .tensors import TensorSpec

__all__ = [
    "ACTIVATIONS",
    "MLP",
    "REQUIRED",
    "Activation",
    "Attention",
    "Block",
    "Decoder",
    "Embedding",
    "FusedGateUp",
    "FusedQKV",
    "LayerNorm",
    "LearnedPositions",
    "Linear",
    "LinearScaling",
    "Metadata",
    "Module",
    "Norm",
    "Pairing",
    "RMSNorm",
    "Rope",
    "SplitQKV",
    "TensorSpec",
    "YarnScaling",
    "read_rope",
]
