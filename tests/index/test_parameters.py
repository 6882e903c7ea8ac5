from __future__ import annotations

import pytest

from engram.index.parameters import Parameters, default_parameters


@pytest.mark.parametrize(("metric", "quantization"), [("cosine", "int8"), ("l2", "bf16"), ("dot", "bf16")])
def test_graphs_of_rows_of_one_length_are_held_in_a_byte_a_number(metric: str, quantization: str) -> None:
    parameters = default_parameters(384, metric)
    assert parameters == Parameters(384, metric, 16, 128, quantization)


@pytest.mark.parametrize(
    "values",
    [
        (0, "cosine", 16, 128, "int8"),
        (4, "hamming", 16, 128, "f32"),
        (4, "cosine", 1, 128, "int8"),
        (4, "cosine", 16, 0, "int8"),
        (4, "cosine", 16, 128, "int4"),
        (4, "l2", 16, 128, "int8"),
        (4, "dot", 16, 128, "int8"),
    ],
)
def test_parameters_without_meaning_are_refused(values: tuple[int, str, int, int, str]) -> None:
    with pytest.raises(ValueError, match=r".+"):
        Parameters(*values)
