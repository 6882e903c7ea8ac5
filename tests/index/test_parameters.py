from __future__ import annotations

import pytest

from engram.index.distances import METRICS
from engram.index.parameters import QUANTIZATIONS, Parameters, default_parameters


@pytest.mark.parametrize("metric", METRICS)
def test_graphs_are_held_in_a_byte_a_number_unless_asked_otherwise(metric: str) -> None:
    assert default_parameters(384, metric) == Parameters(384, metric, 32, 128, "int8", recall=0.99)
    assert default_parameters(8, metric).quantization == "int8"


def test_short_vectors_are_held_as_they_are() -> None:
    assert default_parameters(7, "l2").quantization == "f32"


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_every_metric_goes_with_every_quantization(metric: str, quantization: str) -> None:
    assert Parameters(4, metric, 16, 128, quantization).quantization == quantization


@pytest.mark.parametrize(
    "values",
    [
        (0, "cosine", 16, 128, "int8"),
        (4, "hamming", 16, 128, "f32"),
        (4, "cosine", 1, 128, "int8"),
        (4, "cosine", 16, 0, "int8"),
        (4, "cosine", 16, 128, "int4"),
        (4, "cosine", 16, 128, "int8", 0.0),
        (4, "cosine", 16, 128, "int8", 1.5),
    ],
)
def test_parameters_without_meaning_are_refused(values: tuple[int, str, int, int, str]) -> None:
    with pytest.raises(ValueError, match=r".+"):
        Parameters(*values)
