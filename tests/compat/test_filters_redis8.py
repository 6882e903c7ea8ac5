"""Filters answer, and fail, as those of a real Redis 8 do; docs/filters.md lists where they knowingly do not.

The command in the environment variable REDIS8 runs one, by default the peer that the benchmarks use.
"""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis import Redis, ResponseError

from engram.commands.wording import in_words
from engram.index.errors import FilterError
from engram.index.filters import compile_filter
from engram.protocol import replies
from tests.filter_cases import expressions, json_texts, soup, to_json

PEER = Path(__file__).parents[3] / "shared" / "peers" / "redis8.6"
STOP_SECONDS = 20

differential = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def redis8() -> Iterator[Redis]:
    command = shlex.split(os.environ.get("REDIS8", str(PEER)))
    if shutil.which(command[0]) is None:
        pytest.skip(f"no Redis 8 to compare with: there is no program '{command[0]}' (set REDIS8)")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    options = ["--bind", "127.0.0.1", "--port", str(port), "--save", "", "--dir", "/tmp"]
    with subprocess.Popen(
        [*command, *options], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        try:
            assert process.stdout is not None
            output = b""
            while b"Ready to accept connections" not in output:
                line = process.stdout.readline()
                assert line, f"Redis 8 did not start: {output.decode(errors='replace')}"
                output += line
            with Redis(port=port, protocol=2, socket_timeout=STOP_SECONDS) as client:
                yield client
        finally:
            process.terminate()
            process.wait(STOP_SECONDS)


def ask_redis(redis8: Redis, texts: list[bytes], expressions: list[bytes]) -> list[list[bool] | str]:
    """For each expression on which of the attributes it is true, or the error."""
    with redis8.pipeline(transaction=False) as pipeline:
        pipeline.delete("set")
        for number, text in enumerate(texts):
            pipeline.execute_command("VADD", "set", "VALUES", 2, 1, 0, str(number), "SETATTR", text)
        for expression in expressions:
            search = ["VSIM", "set", "VALUES", 2, 1, 0, "COUNT", len(texts), "FILTER", expression, "TRUTH"]
            pipeline.execute_command(*search)
        replies = pipeline.execute(raise_on_error=False)[1 + len(texts) :]
    answers: list[list[bool] | str] = []
    for reply in replies:
        if isinstance(reply, ResponseError):
            # redis-py drops the code, and in a pipeline puts the command before the text.
            message = str(reply)
            answers.append("ERR " + message[message.index("syntax error") :])
        else:
            found = {int(member) for member in reply}
            answers.append([number in found for number in range(len(texts))])
    return answers


def ask_engram(texts: list[bytes], expressions: list[bytes]) -> list[list[bool] | str]:
    answers: list[list[bool] | str] = []
    for expression in expressions:
        try:
            compiled = compile_filter(expression)
        except FilterError as error:
            answers.append(replies.error(str(in_words(error)))[1:-2].decode())
        else:
            answers.append([compiled.accepts(text) for text in texts])
    return answers


def agree(redis8: Redis, texts: list[bytes], expressions: list[bytes]) -> None:
    theirs, ours = ask_redis(redis8, texts, expressions), ask_engram(texts, expressions)
    for expression, their, our in zip(expressions, theirs, ours, strict=True):
        if their == our:
            continue
        assert isinstance(their, list), (expression, their, our)
        assert isinstance(our, list), (expression, their, our)
        differing = [text for text, a, b in zip(texts, their, our, strict=True) if a != b]
        raise AssertionError(
            f"{expression!r} of {differing[0]!r}: Redis says {their[texts.index(differing[0])]}"
        )


def spaced(expression: str) -> bytes:
    """With a space after null, which Redis needs: see docs/filters.md."""
    return expression.replace("null", "null ").encode()


@differential
@given(
    texts=st.lists(json_texts, min_size=10, max_size=30),
    expressions=st.lists(expressions.map(spaced), min_size=5, max_size=15),
)
def test_same_answers(redis8: Redis, texts: list[bytes], expressions: list[bytes]) -> None:
    agree(redis8, texts, expressions)


def comparable(expression: bytes) -> bool:
    """Whether a difference would be one that is not known: see docs/filters.md."""
    return not expression.endswith(b".") and b"\0" not in expression


@differential
@given(expressions=st.lists(soup.filter(comparable), min_size=10, max_size=40))
def test_same_errors(redis8: Redis, expressions: list[bytes]) -> None:
    text = to_json({"a": 1, "b": "2", "list": [1, "a"]})
    for expression, their, our in zip(
        expressions,
        ask_redis(redis8, [text], expressions),
        ask_engram([text], expressions),
        strict=True,
    ):
        assert their == our, expression


@pytest.mark.parametrize(
    ("expression", "text", "theirs", "ours"),
    [
        (b"(.a == null)", b'{"a":null}', "near: (.a == null)", True),
        (b"null==.a", b'{"a":null}', "near: .a", True),
        (b"'it\\'s' == .a", b'{"a":"it\'s"}', False, True),
        (".a == 'é'".encode(), b'{"a":"\\u00e9"}', False, True),
        (b".a == 2", b'{"a":1,"a":2}', False, True),
        (b".a == 2", b'{"a":2, nonsense', True, False),
        (b".a == 2", b'{"a":2,"b":"\xff"}', True, False),
        (b".a > 1", b'{"a":1e400}', True, False),
        (b".a > 1", b'{"a":2,"b":' + b"[" * 5000 + b"]" * 5000 + b"}", True, False),
        (b".a > 1e299", b'{"a":' + b"9" * 300 + b"}", False, True),
        (b".a == .", b'{"a":1}', False, "near: ."),
        (b"1\0nonsense", b"{}", True, "near: \0nonsense"),
    ],
)
def test_known_differences(
    redis8: Redis, expression: bytes, text: bytes, theirs: bool | str, ours: bool | str
) -> None:
    for answer, expected in (
        (ask_redis(redis8, [text], [expression]), theirs),
        (ask_engram([text], [expression]), ours),
    ):
        if isinstance(expected, bool):
            assert answer == [[expected]]
        else:
            assert answer == [f"ERR syntax error in FILTER expression {expected}"]
