from __future__ import annotations

import logging
import os
import re
from pathlib import Path

import pytest

from engram.errors import OperatorError
from engram.log_lines import NOTICE, Formatter, logging_to, quoted, set_level

logger = logging.getLogger("engram.tests")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("plain", "plain"),
        ("", '""'),
        ("two words", '"two words"'),
        ("a=b", '"a=b"'),
        ('say "x" \\ \n\r', '"say \\"x\\" \\\\ \\n\\r"'),
    ],
)
def test_values(value: str, shown: str) -> None:
    assert quoted(value) == shown


def test_lines(tmp_path: Path) -> None:
    path = tmp_path / "engram.log"
    with logging_to(str(path), "notice"):
        logger.info("not this")
        logger.log(NOTICE, "ready")
        logger.warning("segment %d\nis damaged", 7, extra={"fields": {"client": 3, "file": "a b"}})
        set_level("debug")
        logger.debug("now this")
        set_level("nothing")
        logger.error("not this")
    logger.warning("nor this")
    lines = path.read_text().splitlines()
    assert all(re.match(r"time=\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z ", line) for line in lines)
    assert [line.partition(" ")[2] for line in lines] == [
        "level=notice message=ready",
        'level=warning message="segment 7\\nis damaged" client=3 file="a b"',
        'level=debug message="now this"',
    ]


def test_what_went_wrong_stays_on_its_line() -> None:
    try:
        raise ValueError("no\nway")
    except ValueError as error:
        information = (type(error), error, error.__traceback__)
    record = logging.LogRecord("engram", logging.ERROR, "", 1, "failed", (), information)
    line = Formatter().format(record)
    assert "\n" not in line
    assert 'level=error message=failed exception="Traceback ' in line
    assert line.endswith('ValueError: no\\nway"')


def test_a_path_that_is_no_text_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "engram.log"
    with monkeypatch.context() as patched:
        # What pytest captures goes from process to process as UTF-8, which has no such characters.
        patched.setattr(logging.getLogger(), "handlers", [])
        with logging_to(str(path), "notice"):
            logging.getLogger("engram").warning("%s is damaged", os.fsdecode(b"/data/\xff"))
    assert path.read_text().endswith(r'message="/data/\udcff is damaged"' + "\n")


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    with (
        pytest.raises(OperatorError, match=r"cannot log to .*: No such file or directory"),
        logging_to(str(tmp_path / "nosuch" / "engram.log"), "notice"),
    ):
        pass
