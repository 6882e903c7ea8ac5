from __future__ import annotations

from engram.index.attributes import AttributeColumns, decode_columns
from engram.index.filters import compile_filter
from engram.index.masks import MaskCache
from engram.index.texts import Texts


def test_a_mask_is_made_once_and_the_least_recently_used_is_let_go() -> None:
    columns = decode_columns(Texts.of([b'{"x": %d}' % number for number in range(50)]))
    made: list[int] = []
    cache = MaskCache()

    def ask(number: int) -> None:
        def make() -> AttributeColumns:
            made.append(number)
            return columns

        mask = cache.mask(compile_filter(b".x == %d" % number), make)
        assert mask.nonzero()[0].tolist() == [number]

    for number in [*range(16), 0, 16, 0, 1]:
        ask(number)
    assert made == [*range(17), 1]
