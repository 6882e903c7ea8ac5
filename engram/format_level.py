"""The format level of a data directory: one number, written into all that says how to read the rest.

It stands in MANIFEST, in the header of each file of the log and in each table of columns. Whatever an engram
of the level before would misread raises it: another layout, a new operation, a new field of an old one. An
engram reads its own level and all below. Files of several levels may stand side by side: each has that of
whoever wrote it.

So that a newer level can be told from damage, some things are fixed for ever: MANIFEST's first line is a JSON
object with a number `version`, its second the line's checksum; the header of a log file has 64 bytes, with
magic, level and checksum at their places (log_format.py); a table of columns is a JSON object with a number
`version`.
"""

from __future__ import annotations

from pathlib import Path

from engram.errors import NewerFormatError

LEVEL = 3

# MANIFEST and tables of columns had a number of their own.
_OLD_VERSIONS = {1: 2}


def level_of(version: int) -> int:
    """The level that a `version` in JSON stands for."""
    return _OLD_VERSIONS.get(version, version)


def check_level(path: Path, level: int) -> None:
    """Raises NewerFormatError when the level in a file, whose checksum is right, is not known yet."""
    if level > LEVEL:
        raise NewerFormatError(path, f"level {level}")
