"""What is fixed when an index is made: its dimension, its metric, and how its graphs are built."""

from __future__ import annotations

import attrs

from engram.index.distances import METRICS

QUANTIZATIONS = ("int8", "bf16", "f32")

# Found by `benchmarks/recall_curves.py`: searches of equal recall, and building, cost least with these.
CONNECTIVITY = 32
EXPANSION = 128
RECALL = 0.99
_LEAST_QUANTIZED = 8


@attrs.frozen
class Parameters:
    """The parameters of one index.

    `connectivity` and `expansion` are M and ef_construction of Malkov & Yashunin,
    https://arxiv.org/abs/1603.09320. `quantization` is how rows are held in the graphs: see
    `graph.Quantizer`. Distances in results always come from the float32 rows. `recall`, in (0, 1], is the
    share of the nearest rows that searches are to find when they are not told how hard to try.
    """

    dimension: int = attrs.field(validator=attrs.validators.ge(1))
    metric: str = attrs.field(validator=attrs.validators.in_(METRICS))
    connectivity: int = attrs.field(validator=attrs.validators.ge(2))
    expansion: int = attrs.field(validator=attrs.validators.ge(1))
    quantization: str = attrs.field(validator=attrs.validators.in_(QUANTIZATIONS))
    recall: float = attrs.field(
        default=RECALL, validator=[attrs.validators.gt(0.0), attrs.validators.le(1.0)]
    )


def default_parameters(dimension: int, metric: str) -> Parameters:
    """The parameters of an index of which only dimension and metric were asked for."""
    # With few numbers to a row many rows would be the same in 8 bits, and nothing would be saved.
    quantization = "int8" if dimension >= _LEAST_QUANTIZED else "f32"
    return Parameters(dimension, metric, CONNECTIVITY, EXPANSION, quantization)
