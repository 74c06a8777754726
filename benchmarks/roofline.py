"""What each stage cannot do without: operations and bytes for one unit of its work.

Norms, softmaxes and activations are left out: they are a few per cent of the products.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from benchmarks.figures import Needs
from mlpmem_rag.backbone import Backbone, decoder_layers, mlp_sublayer
from mlpmem_rag.hardware import dtype_name
from mlpmem_rag.memory import Memory

FLOAT32 = 4


def forward_needs(
    backbone: Backbone,
    lengths: Sequence[int],
    batch_tokens: int,
    *,
    shared: int = 0,
    kept: float = 1.0,
) -> Needs:
    """The base model up to the tapped MLP sublayer, for one token of sequences of these lengths.

    Two operations a weight; attention compares each token with those before it, twice (scores and
    values). Weights are read once a batch, and the keys of a share `kept` of the tokens written.
    Before each sequence stand `shared` tokens that were read before.
    """
    layers = decoder_layers(backbone.model)[: backbone.layer + 1]
    weights = sum(matrix_weights(layer) for layer in layers)
    weights -= matrix_weights(mlp_sublayer(layers[-1], backbone.hidden_size))
    before = shared + sum(n * (n + 1) / 2 for n in lengths) / sum(lengths)
    attention = 4 * before * _attention_width(layers[0], backbone.hidden_size) * len(layers)
    size = backbone.model.dtype.itemsize
    return Needs(
        flops=2 * weights + attention,
        bytes=weights * size / batch_tokens + 2 * kept * backbone.hidden_size,
        dtype=dtype_name(backbone.model.dtype),
    )


def search_needs(rows: int, width: int, *, dtype: str = "float32") -> Needs:
    """One query against so many rows: one product each; the rows are read once for many queries."""
    return Needs(flops=2.0 * rows * width, bytes=FLOAT32 * width, dtype=dtype)


def vote_needs(k: int, kept: int) -> Needs:
    """The votes of one row of k neighbours: sorted, and so many tokens stored.

    A comparison counts as one operation, as many as a sort of k needs, though no machine compares
    as fast as it multiplies. Four bytes are a neighbour's number, four its distance; four are
    written of a token, and two of its probability.
    """
    return Needs(flops=k * math.log2(k), bytes=8.0 * k + 6.0 * kept, dtype="float32")


def step_needs(memory: Memory, rows: int, dtype: str) -> Needs:
    """One row of a training step of so many rows.

    Six operations a weight: forward, gradient of the input, gradient of the weight. A step reads
    weight, gradient and two moments in float32 and writes three of them.
    """
    weights = matrix_weights(memory)
    return Needs(flops=6.0 * weights, bytes=7 * FLOAT32 * weights / rows, dtype=dtype)


def decode_needs(weights: int, size: int, batch: int, dtype: str) -> Needs:
    """One step of so many sequences at once: every weight is read, and used twice a sequence."""
    return Needs(flops=2.0 * weights * batch, bytes=float(weights * size), dtype=dtype)


def matrix_weights(module: nn.Module) -> int:
    """Numbers in the matrices of a module, those that are shared once."""
    return sum(p.numel() for p in module.parameters() if p.ndim >= 2)


def _attention_width(layer: nn.Module, hidden_size: int) -> int:
    """Heads times their width: what the query projection gives."""
    for name, module in layer.named_modules():
        if name.endswith("q_proj") and isinstance(module, nn.Linear):
            return module.out_features
    return hidden_size
