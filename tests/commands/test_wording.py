from __future__ import annotations

import re
from pathlib import Path

import pytest

from engram.commands.wording import BUSY, in_words
from engram.index.errors import (
    FilterError,
    FilterSyntaxError,
    FilterTooDeepError,
    FilterTooLongError,
    RefusalError,
    SearchBusyError,
    VectorEncodingError,
    VectorNormError,
    WrongDimensionError,
)
from engram.index.filters import compile_filter
from engram.index.vectors import MAXIMUM_NORM

NEAR = "ERR syntax error in FILTER expression near: "


@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        (FilterSyntaxError(b".x @ 1", 3), NEAR + "@ 1"),
        # Where nothing is left to show, all is shown.
        (FilterSyntaxError(b".x == 'abc", 10), NEAR + ".x == 'abc"),
        (FilterSyntaxError(b"", 0), NEAR),
        (FilterSyntaxError(b"1 \xff", 2), NEAR + "\udcff"),
        (FilterTooLongError(65536), "ERR FILTER expression is longer than 65536 bytes"),
        (FilterTooDeepError(256), "ERR FILTER expression is nested too deeply"),
        (VectorEncodingError(17), "ERR invalid vector encoding"),
        (WrongDimensionError(4, 3), "ERR wrong vector dimension: index expects 4, got 3"),
        (VectorNormError(MAXIMUM_NORM), "ERR vector must be finite, with a norm of at most 1e+18"),
        (SearchBusyError(5.0), BUSY),
    ],
)
def test_a_refusal_in_words(refusal: RefusalError, words: str) -> None:
    assert str(in_words(refusal)) == words


def kinds(of: type[RefusalError]) -> set[type[RefusalError]]:
    """The refusals that are raised: those without kinds of their own."""
    found = of.__subclasses__()
    return set().union(*map(kinds, found)) if found else {of}


def test_every_refusal_has_words_of_its_own() -> None:
    covered = {
        FilterSyntaxError,
        FilterTooDeepError,
        FilterTooLongError,
        SearchBusyError,
        VectorEncodingError,
        VectorNormError,
        WrongDimensionError,
    }
    assert kinds(RefusalError) == covered


def test_the_errors_of_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs" / "filters.md").read_text()
    fences = re.findall(r"^```errors\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    lines = [line for fence in fences for line in fence.splitlines()]
    assert len(lines) > 10
    for expression, words in zip(lines[::2], lines[1::2], strict=True):
        with pytest.raises(FilterError) as raised:
            compile_filter(expression.encode())
        assert str(in_words(raised.value)) == words
