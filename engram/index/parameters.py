"""What is fixed when an index is made: its dimension, its metric, and how its graphs are built."""

from __future__ import annotations

import attrs

from engram.index.distances import METRICS

QUANTIZATIONS = ("int8", "bf16", "f32")

CONNECTIVITY = 16
EXPANSION = 128


@attrs.frozen
class Parameters:
    """The parameters of one index.

    `connectivity` and `expansion` are M and ef_construction of Malkov & Yashunin,
    https://arxiv.org/abs/1603.09320. `quantization` is how rows are held in the graphs: see
    `graph.Quantizer`. Distances in results always come from the float32 rows.
    """

    dimension: int = attrs.field(validator=attrs.validators.ge(1))
    metric: str = attrs.field(validator=attrs.validators.in_(METRICS))
    connectivity: int = attrs.field(validator=attrs.validators.ge(2))
    expansion: int = attrs.field(validator=attrs.validators.ge(1))
    quantization: str = attrs.field(validator=attrs.validators.in_(QUANTIZATIONS))

    @quantization.validator
    def _one_scale_needs_one_length(self, _: object, quantization: str) -> None:
        if quantization == "int8" and self.metric != "cosine":
            raise ValueError(f"int8 graphs are for cosine, not for {self.metric}")


def default_parameters(dimension: int, metric: str) -> Parameters:
    """The parameters of an index of which only dimension and metric were asked for."""
    # Rows of one length share one scale. Where lengths differ, each number keeps its own exponent.
    quantization = "int8" if metric == "cosine" else "bf16"
    return Parameters(dimension, metric, CONNECTIVITY, EXPANSION, quantization)
