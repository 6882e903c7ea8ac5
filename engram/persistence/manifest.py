"""MANIFEST: what of a data directory is current.

Two lines: a JSON object with the fields of `Manifest` and a `version`, the format level, and the CRC-32C of
that line (without its newline) as eight hexadecimal digits. The file is replaced atomically and changes only
at a snapshot; it is made when the directory is, after the log's first file and before its first record.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs
from crc32c import crc32c

from engram.errors import DamagedDataError, NewerFormatError
from engram.files import Files, read_file, replace_file
from engram.format_level import LEVEL, check_level, level_of


@attrs.frozen
class Manifest:
    """The current snapshot and where the log goes on from it.

    Attributes:
        snapshot: name of the snapshot's folder; empty before the first one.
        lsn: the snapshot holds all operations up to this one; 0 before the first.
        checksum: of the snapshot's table of columns.
        size: bytes of the snapshot's files.
        time: when it became current, seconds since the epoch; 0 before the first.
        first_log_file: number of the file that holds the operation after `lsn`.
        segments: ids of the segments that the snapshot names.
    """

    first_log_file: int
    snapshot: str = ""
    lsn: int = 0
    checksum: int = 0
    size: int = 0
    time: int = 0
    segments: tuple[str, ...] = ()


def encode_manifest(manifest: Manifest) -> bytes:
    line = json.dumps({"version": LEVEL, **attrs.asdict(manifest)}).encode()
    return line + b"\n%08x\n" % crc32c(line)


def decode_manifest(content: bytes, path: Path) -> Manifest:
    """The inverse of `encode_manifest`.

    Raises:
        DamagedDataError: the content is not what was written.
        NewerFormatError: a newer engram wrote it.
    """
    line, _, checksum = content.partition(b"\n")
    if checksum != b"%08x\n" % crc32c(line):
        raise DamagedDataError(path, "checksum mismatch")
    fields: dict[str, Any] = json.loads(line)
    check_level(path, level_of(fields.pop("version")))
    if unknown := fields.keys() - attrs.fields_dict(Manifest).keys():
        raise NewerFormatError(path, f"the field {min(unknown)} is not known")
    return Manifest(**{**fields, "segments": tuple(fields["segments"])})


def read_manifest(path: Path) -> Manifest | None:
    """The manifest, or None when there is none. Raises what `decode_manifest` does."""
    try:
        content = read_file(path)
    except FileNotFoundError:
        return None
    return decode_manifest(content, path)


def write_manifest(files: Files, path: Path, manifest: Manifest) -> None:
    """Replaces the manifest: after a crash it is the old one or the new one."""
    replace_file(files, path, encode_manifest(manifest))
