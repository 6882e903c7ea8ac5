from __future__ import annotations

import errno
import hashlib
import hmac
import shlex
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engram import access as access_module
from engram.access import PROTECTED, Access, User, describe_users, file_of_users, open_access, parse_users
from engram.commands.registry import COMMANDS
from engram.config import LONGEST_PASSWORD, Config
from engram.errors import CommandError, ConfigError, OperatorError
from engram.files import DiskFiles
from engram.key_patterns import KeyMatcher, KeyPattern
from engram.permissions import (
    Denial,
    Reason,
    RuleError,
    Rules,
    UnmatchedParenthesisError,
    categories,
    hash_password,
)
from engram.protocol.glob import MAX_PATTERN_LENGTH, compile_glob

HASH_A = hashlib.sha256(b"a").hexdigest()
HASH_B = hashlib.sha256(b"b").hexdigest()


def rules_of(text: str, start: Rules | None = None) -> Rules:
    """The rules that the words of a text make of a new user, or of one that has rules."""
    words = [word.encode() for word in shlex.split(text)]
    return (Rules() if start is None else start).apply(COMMANDS, words)


# What is on the right is what Redis 8.6.3 lists after ACL SETUSER with what is on the left.
DESCRIPTIONS = {
    "": "off sanitize-payload resetchannels -@all",
    "on >a ~a:* %R~r:* %W~w:* &ch:* +get +set +client|list -@dangerous": (
        f"on sanitize-payload #{HASH_A} ~a:* %R~r:* %W~w:* resetchannels &ch:*"
        " -@all +get +set +client|list -@dangerous"
    ),
    "+@all -@read +get -get": "off sanitize-payload resetchannels +@all -@read -get",
    "+client -client|kill +client": "off sanitize-payload resetchannels -@all +client",
    "+client -client|kill +client|kill -client": "off sanitize-payload resetchannels -@all -client",
    "+@READ -@Read +GET +@all": "off sanitize-payload resetchannels +@all",
    "+CLIENT|LIST +Select|0 +select|1 +select": (
        "off sanitize-payload resetchannels -@all +client|list +select"
    ),
    "+select|0 +SELECT|0 +select|1 +select|0": "off sanitize-payload resetchannels -@all +select|1 +select|0",
    "nopass >a >b >a": f"off sanitize-payload #{HASH_A} #{HASH_B} resetchannels -@all",
    ">a >b <a": f"off sanitize-payload #{HASH_B} resetchannels -@all",
    f"#{HASH_A} #{HASH_B} !{HASH_A}": f"off sanitize-payload #{HASH_B} resetchannels -@all",
    ">a nopass": "off nopass sanitize-payload resetchannels -@all",
    ">a nopass resetpass": "off sanitize-payload resetchannels -@all",
    "ON OFF NOPASS ResetPass AllKeys ResetKeys AllChannels ResetChannels AllCommands skip-sanitize-payload": (
        "off skip-sanitize-payload resetchannels +@all"
    ),
    "%RW~z %WR~q ~z %R~z ~z &x &x allkeys": "off sanitize-payload ~* resetchannels &x -@all",
    "%RW~z %WR~q ~z %r~z %w~p": "off sanitize-payload ~z ~q %W~p resetchannels -@all",
    # Redis shows "~* ~b", which it does not take back.
    "%R~* ~b %RW~*": "off sanitize-payload %RW~* ~b resetchannels -@all",
    "~** &*": "off sanitize-payload ~** &* -@all",
    "%RW~ %R": "off sanitize-payload ~ resetchannels -@all",
    "allkeys (+@all ~k &a) (-@all +get|x &* ~*)": (
        "off sanitize-payload ~* resetchannels -@all (~k resetchannels &a +@all) (~* &* -@all +get|x)"
    ),
    "(+get ~a %R~x) (-@all '')": (
        "off sanitize-payload resetchannels -@all (~a %R~x resetchannels -@all +get) (resetchannels -@all)"
    ),
    "() '(  )' ''": "off sanitize-payload resetchannels -@all (resetchannels -@all) (resetchannels -@all)",
    "on +get (+set) clearselectors": "on sanitize-payload resetchannels -@all +get",
    "on >a ~x &x +get (+set) reset": "off sanitize-payload resetchannels -@all",
    "+@all -select +select|3": "off sanitize-payload resetchannels +@all -select +select|3",
}


@pytest.mark.parametrize(("rules", "described"), DESCRIPTIONS.items())
def test_rules_are_described_as_in_redis(rules: str, described: str) -> None:
    found = rules_of(rules)
    assert found.describe().decode() == described
    assert rules_of(described) == found


SYNTAX = "Syntax error"
UNMATCHED = "Unmatched parenthesis in selector definition"
UNKNOWN = "Unknown command or category name in ACL"
BAD_HASH = "The password hash must be exactly 64 characters and contain only lowercase hexadecimal characters"
NO_PASSWORD = "The password you are trying to remove from the user does not exist"
NO_MORE_KEYS = (
    "Adding a pattern after the * pattern (or the 'allkeys' flag) is not valid and does not have any effect."
    " Try 'resetkeys' to start with an empty list of patterns"
)
NO_MORE_CHANNELS = (
    "Adding a pattern after the * pattern (or the 'allchannels' flag) is not valid and does not have any"
    " effect. Try 'resetchannels' to start with an empty list of channels"
)

ERRORS = {
    "foo": ("foo", SYNTAX),
    "+nosuch": ("+nosuch", UNKNOWN),
    "-nosuch": ("-nosuch", UNKNOWN),
    "+@nosuch": ("+@nosuch", UNKNOWN),
    "-@nosuch": ("-@nosuch", UNKNOWN),
    "+client|nosuch": ("+client|nosuch", UNKNOWN),
    "-client|nosuch": ("-client|nosuch", UNKNOWN),
    "-select|0": ("-select|0", UNKNOWN),
    "+|get": ("+|get", UNKNOWN),
    "+get)": ("+get)", UNKNOWN),
    "+client|kill|x": ("+client|kill|x", "Allowing first-arg of a subcommand is not supported"),
    "+get|": ("+get|", SYNTAX),
    "<nopw": ("<nopw", NO_PASSWORD),
    f"!{HASH_A}": (f"!{HASH_A}", NO_PASSWORD),
    "#zz": ("#zz", BAD_HASH),
    f"#{HASH_A.upper()}": (f"#{HASH_A.upper()}", BAD_HASH),
    "!zz": ("!zz", BAD_HASH),
    "allkeys ~x": ("~x", NO_MORE_KEYS),
    "~* ~x": ("~x", NO_MORE_KEYS),
    "allchannels &x": ("&x", NO_MORE_CHANNELS),
    "%X~a": ("%X~a", SYNTAX),
    "%~a": ("%~a", SYNTAX),
    "%RR~a": ("%RR~a", SYNTAX),
    "%RWR~a": ("%RWR~a", SYNTAX),
    "'~a b'": ("~a b", SYNTAX),
    "'&a b'": ("&a b", SYNTAX),
    "(on)": ("(on)", SYNTAX),
    "(>x)": ("(>x)", SYNTAX),
    "(foo)": ("(foo)", SYNTAX),
    "((+get))": ("((+get))", SYNTAX),
    "(+get) )": (")", SYNTAX),
    "(+get foo)": ("(+get foo)", SYNTAX),
    "(+get +nosuch)": ("(+get +nosuch)", UNKNOWN),
    "(+get ( ~k)": ("(+get ( ~k)", SYNTAX),
    "'~a\nuser b on'": ("~a\nuser b on", SYNTAX),
    "'&a\tb'": ("&a\tb", SYNTAX),
    "'+get|a b'": ("+get|a b", SYNTAX),
    "(~a))": ("(~a))", SYNTAX),
    "(+get ~k": ("(+get", UNMATCHED),
    "<unknown (+get": ("(+get", UNMATCHED),
}


@pytest.mark.parametrize(("rules", "expected"), ERRORS.items())
def test_wrong_rules_are_refused_in_the_words_of_redis(rules: str, expected: tuple[str, str]) -> None:
    with pytest.raises(RuleError) as caught:
        rules_of(rules)
    assert (caught.value.rule.decode(), str(caught.value)) == expected
    assert isinstance(caught.value, UnmatchedParenthesisError) == (expected[1] == UNMATCHED)


def test_a_password_nobody_could_send_is_refused() -> None:
    rules_of(f">{'x' * LONGEST_PASSWORD}")
    with pytest.raises(RuleError, match=f"no more than {LONGEST_PASSWORD} bytes") as caught:
        rules_of(f">{'x' * (LONGEST_PASSWORD + 1)}")
    assert caught.value.rule == b">"


names = st.sampled_from(["get", "set", "select", "client", "client|list", "client|kill", "select|0", "get|x"])
categories_drawn = st.sampled_from(categories(COMMANDS)).map("@{}".format)
patterns = st.one_of(
    st.sampled_from([b"*", b"**", b"a*", b""]),
    st.binary(max_size=4).filter(lambda pattern: not set(pattern) & set(b" \0\t\n\r\v\f")),
)
selector_rules = st.one_of(
    st.sampled_from([b"allcommands", b"nocommands", b"+@all", b"-@all", b"allkeys", b"~*", b"resetkeys"]),
    st.sampled_from([b"allchannels", b"resetchannels", b"&*"]),
    names.map(lambda name: b"+" + name.encode()),
    names.filter(lambda name: name not in ("select|0", "get|x")).map(lambda name: b"-" + name.encode()),
    st.tuples(st.sampled_from("+-"), categories_drawn).map(lambda parts: "".join(parts).encode()),
    st.tuples(st.sampled_from([b"~", b"%R~", b"%W~", b"%RW~", b"&"]), patterns).map(b"".join),
)
user_rules = st.one_of(
    selector_rules,
    st.sampled_from([b"on", b"off", b"nopass", b"resetpass", b"reset", b"clearselectors"]),
    st.sampled_from([b"sanitize-payload", b"skip-sanitize-payload"]),
    st.binary(max_size=4).map(lambda password: b">" + password),
)


@given(st.lists(user_rules, max_size=12), st.lists(st.lists(selector_rules, max_size=6), max_size=2))
def test_described_rules_make_the_same_user(plain: list[bytes], selectors: list[list[bytes]]) -> None:
    rules = Rules()
    for rule in [*plain, *(b"(%b)" % b" ".join(selector) for selector in selectors)]:
        try:
            rules = rules.apply(COMMANDS, [rule])
        except RuleError:
            continue
    line = rules.describe()
    assert Rules().apply(COMMANDS, line.split(b" ")) == rules
    assert parse_users(COMMANDS, b"user x " + line, "file") == {b"x": rules}


@given(
    st.lists(user_rules, max_size=8), st.sampled_from(["get", "set", "client|list", "client|kill", "select"])
)
def test_what_is_unrestricted_allows_everything(rules: list[bytes], name: str) -> None:
    found = Rules()
    for rule in rules:
        try:
            found = found.apply(COMMANDS, [rule])
        except RuleError:
            continue
    if found.unrestricted:
        head, _, tail = name.partition("|")
        request = [word.encode() for word in (head, *filter(None, [tail]), "1", "2")]
        assert denial(found, *request) is None


def denial(rules: Rules, *request: bytes) -> Denial | None:
    return rules.denial(COMMANDS, COMMANDS[request[0].lower()].resolve(request), request)


def allowed(rules: str, request: str) -> str:
    """What is denied to a user with those rules: nothing, the command, or a key."""
    words = [word.encode() for word in request.split()]
    found = denial(rules_of(rules), *words)
    if found is None:
        return "allowed"
    return words[found.position].decode() if found.reason is Reason.KEY else "command"


READS_AND_WRITES = "+@all ~a:* %R~r:* %W~w:*"

# Each is what Redis 8.6.3 answers to ACL DRYRUN.
PERMISSIONS = [
    ("", "GET k", "command"),
    ("", "AUTH x", "allowed"),
    ("", "HELLO 3", "allowed"),
    ("", "RESET", "allowed"),
    ("", "QUIT", "allowed"),
    ("", "PING", "command"),
    ("+ping", "PING", "allowed"),
    ("+get", "GET k", "k"),
    ("+get ~k", "GET k", "allowed"),
    ("+get ~k", "GET kk", "kk"),
    ("+get ~h?llo", "GET hallo", "allowed"),
    ("+@read ~*", "GET k", "allowed"),
    ("+@read ~*", "SET k v", "command"),
    ("+@all -@write ~*", "SET k v", "command"),
    ("+@all -@write +set ~*", "SET k v", "allowed"),
    ("+@vectorset ~*", "VINFO k", "allowed"),
    ("+@all -@vectorset ~*", "VINFO k", "command"),
    ("+client|list", "CLIENT LIST", "allowed"),
    ("+client|list", "CLIENT ID", "command"),
    ("+client -client|kill", "CLIENT ID", "allowed"),
    ("+client -client|kill", "CLIENT KILL x", "command"),
    ("+@all -acl", "ACL WHOAMI", "command"),
    ("+@slow", "ACL SETUSER x", "allowed"),
    ("+select|0 +SELECT|1", "SELECT 0", "allowed"),
    ("+select|0 +SELECT|1", "SELECT 1", "allowed"),
    ("+select|0 +SELECT|1", "SELECT 2", "command"),
    ("+@all -select +select|3", "SELECT 0", "command"),
    ("+@all -select +select|3", "SELECT 3", "allowed"),
    ("+select|3 -@all", "SELECT 3", "command"),
    ("+select|3 -@fast", "SELECT 3", "command"),
    (READS_AND_WRITES, "GET x", "x"),
    (READS_AND_WRITES, "GET r:x", "allowed"),
    (READS_AND_WRITES, "GET w:x", "w:x"),
    (READS_AND_WRITES, "SET r:1 v", "r:1"),
    (READS_AND_WRITES, "SET w:1 v", "allowed"),
    (READS_AND_WRITES, "SET w:1 v GET", "w:1"),
    (READS_AND_WRITES, "SET w:1 v PX 1 get", "w:1"),
    (READS_AND_WRITES, "SET w:1 get", "allowed"),
    (READS_AND_WRITES, "MSET a:1 1 x 2", "x"),
    (READS_AND_WRITES, "MSET a:1 1 w:1 2", "allowed"),
    (READS_AND_WRITES, "GETEX r:1", "r:1"),
    (READS_AND_WRITES, "GETEX w:1", "w:1"),
    (READS_AND_WRITES, "INCR w:1", "w:1"),
    (READS_AND_WRITES, "EXISTS w:1", "allowed"),
    (READS_AND_WRITES, "TTL w:1", "w:1"),
    (READS_AND_WRITES, "EXPIRE w:1 1", "allowed"),
    (READS_AND_WRITES, "EXPIRE r:1 1", "r:1"),
    (READS_AND_WRITES, "COPY r:1 w:1", "allowed"),
    (READS_AND_WRITES, "COPY w:1 r:1", "w:1"),
    (READS_AND_WRITES, "RENAME r:1 w:1", "r:1"),
    (READS_AND_WRITES, "RENAME a:1 w:1", "allowed"),
    ("%R~x %W~x +incr", "INCR x", "allowed"),
    ("%R~x* %W~*x +incr", "INCR x", "x"),
    ("+get ~a (+set ~b)", "GET a", "allowed"),
    ("+get ~a (+set ~b)", "SET b 1", "allowed"),
    ("+get ~a (+set ~b)", "SET a 1", "a"),
    ("+get ~a (+set ~b)", "DEL a", "command"),
    ("(+mget ~a) (+mget ~a ~b)", "MGET a b c", "c"),
    ("(+@all ~*)", "FLUSHALL", "allowed"),
    ("+@all", "KEYS *", "allowed"),
]


@pytest.mark.parametrize(("rules", "request_", "expected"), PERMISSIONS)
def test_permissions(rules: str, request_: str, expected: str) -> None:
    assert allowed(rules, request_) == expected


def test_a_first_argument_is_taken_in_any_case_and_only_where_it_is_allowed() -> None:
    assert allowed("+object", "OBJECT HELP") == "allowed"
    assert allowed("+get|K ~*", "GET k") == "allowed"
    assert allowed("+get|K ~*", "GET K") == "allowed"
    assert allowed("+get|K ~*", "GET x") == "command"


@pytest.mark.parametrize(
    ("rules", "unrestricted"),
    [
        ("+@all ~*", True),
        ("+@all +get ~*", True),
        ("+@all -get ~*", False),
        ("+@all ~k", False),
        ("~*", False),
        ("+get (+@all ~*)", True),
        ("on nopass +@all ~* -@admin (+get ~*)", False),
    ],
)
def test_whether_a_user_is_unrestricted(rules: str, *, unrestricted: bool) -> None:
    assert User(b"x", rules_of(rules)).unrestricted == unrestricted


@attrs.define
class Visitor:
    """A client, as far as access knows one."""

    user: User
    transaction: object | None = None
    executing: bool = False


def visitor(rules: str, access: Access, transaction: object | None = None) -> Visitor:
    access.put(b"bob", rules_of(rules))
    return Visitor(access.users[b"bob"], transaction)


def check(access: Access, client: Visitor, request: str) -> str:
    """The error that a request ends in; an empty text when it is allowed."""
    words = [word.encode() for word in request.split()]
    try:
        access.check(client, COMMANDS[words[0].lower()].resolve(words), words)
    except CommandError as error:
        return str(error)
    return ""


def test_denials_in_the_words_of_redis() -> None:
    access = Access(COMMANDS)
    client = visitor("+get +client|list ~k", access)
    assert check(access, client, "GET k") == ""
    assert check(access, client, "get x") == "NOPERM No permissions to access a key"
    assert check(access, client, "DEL k") == "NOPERM User bob has no permissions to run the 'del' command"
    assert (
        check(access, client, "CLIENT KILL x")
        == "NOPERM User bob has no permissions to run the 'client|kill' command"
    )
    assert access.denied == {"key": 1, "command": 2}


def test_the_log_counts_what_is_alike_within_a_minute() -> None:
    now = [1000.0]
    access = Access(COMMANDS, describe=lambda client: f"at {now[0]:g}", now=lambda: now[0])
    client = visitor("+get ~k", access)
    check(access, client, "GET x")
    check(access, client, "DEL k")
    now[0] += 60
    check(access, client, "GET x")
    (first, age), (second, _) = access.log(10)
    assert (first.number, first.subject, first.reason, first.count) == (0, b"x", Reason.KEY, 2)
    assert (first.created, first.updated, first.client, age) == (1000.0, 1060.0, "at 1060", 0.0)
    assert (second.number, second.subject, second.reason, second.count) == (1, b"del", Reason.COMMAND, 1)
    now[0] += 61
    check(access, client, "GET x")
    assert [entry.count for entry, _ in access.log(10)] == [1, 2, 1]
    inside = visitor("+get ~k", access, transaction=object())
    check(access, inside, "GET x")
    assert [entry.context for entry, _ in access.log(2)] == ["multi", "toplevel"]
    assert access.log(-1) == []
    access.forget_log()
    assert access.log(10) == []


def test_the_log_is_bounded() -> None:
    lengths = [3]
    access = Access(COMMANDS, log_length=lambda: lengths[0])
    client = visitor("+get", access)
    for number in range(5):
        check(access, client, f"GET {number}{'x' * 5000}")
    assert [entry.number for entry, _ in access.log(10)] == [4, 3, 2]
    assert all(len(entry.subject) == 1024 for entry, _ in access.log(10))
    lengths[0] = 0
    check(access, client, "GET x")
    assert access.log(10) == []


def people() -> Access:
    access = Access(COMMANDS)
    access.put(b"one", rules_of("on >a"))
    access.put(b"two", rules_of("on >a >b"))
    access.put(b"off", rules_of(">a"))
    access.put(b"any", rules_of("on nopass"))
    access.put(b"none", rules_of("on"))
    return access


@pytest.mark.parametrize(
    ("name", "password", "known"),
    [
        (b"one", b"a", True),
        (b"one", b"b", False),
        (b"one", b"", False),
        (b"one", HASH_A.encode(), False),
        (b"two", b"a", True),
        (b"two", b"b", True),
        (b"off", b"a", False),
        (b"any", b"whatever", True),
        (b"none", b"", False),
        (b"none", b"0" * 64, False),
        (b"nobody", b"a", False),
        (b"default", b"whatever", True),
        (b"any", b"x" * (LONGEST_PASSWORD + 1), True),
    ],
)
def test_authentication(name: bytes, password: bytes, *, known: bool) -> None:
    access = people()
    assert access.authenticate(name, password) is (access.users[name] if known else None)


def test_a_password_is_compared_whole() -> None:
    access = Access(COMMANDS)
    access.put(b"x", rules_of(f"on >{'x' * LONGEST_PASSWORD}"))
    assert access.authenticate(b"x", b"x" * LONGEST_PASSWORD) is not None
    assert access.authenticate(b"x", b"x" * (LONGEST_PASSWORD + 1)) is None


@pytest.mark.parametrize("name", [b"one", b"off", b"any", b"none", b"nobody"])
@pytest.mark.parametrize("password", [b"a", b"wrong", b"x" * 100_000])
def test_authentication_takes_the_same_work_for_anybody(
    name: bytes, password: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    access, compared, hashed = people(), [], []

    def compare(given: bytes, known: bytes) -> bool:
        compared.append((len(given), len(known)))
        return hmac.compare_digest(given, known)

    def hash_counted(password: bytes) -> bytes:
        hashed.append(len(password))
        return hash_password(password)

    monkeypatch.setattr(
        access_module, "hmac", type("Comparing", (), {"compare_digest": staticmethod(compare)})
    )
    monkeypatch.setattr(access_module, "hash_password", hash_counted)
    access.authenticate(name, password)
    assert compared == [(64, 64)]
    assert hashed == [min(len(password), LONGEST_PASSWORD)]


def test_every_password_of_a_user_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    access, calls = people(), []

    def compare(given: bytes, known: bytes) -> bool:
        calls.append(known)
        return given == known

    monkeypatch.setattr(
        access_module, "hmac", type("Comparing", (), {"compare_digest": staticmethod(compare)})
    )
    access.authenticate(b"two", b"a")
    assert [call.decode() for call in calls] == [HASH_A, HASH_B]


def test_requirepass_is_the_password_of_the_default_user() -> None:
    access = Access(COMMANDS, password=b"a")
    assert not access.is_open
    assert describe_users(access.all_rules()) == [
        f"user default on sanitize-payload #{HASH_A} ~* &* +@all".encode()
    ]
    access.put(b"default", rules_of(">b", access.default.rules))
    access.require(b"a")
    assert access.authenticate(b"default", b"b") is not None
    access.require(b"c")
    assert access.authenticate(b"default", b"b") is None
    assert access.authenticate(b"default", b"c") is access.default
    access.require(b"")
    assert access.is_open
    assert access.default.unrestricted


@pytest.mark.parametrize(
    ("host", "refused"),
    [
        ("127.0.0.1", False),
        ("127.8.9.1", False),
        ("::1", False),
        ("::ffff:127.0.0.1", False),
        ("192.0.2.1", True),
        ("::ffff:192.0.2.1", True),
        ("fe80::1%eth0", True),
        ("", True),
    ],
)
def test_protected_mode_keeps_out_those_from_elsewhere(host: str, *, refused: bool) -> None:
    assert Access(COMMANDS).refuses_peer(host, protected=True) == refused
    assert not Access(COMMANDS).refuses_peer(host, protected=False)
    assert not Access(COMMANDS, password=b"a").refuses_peer(host, protected=True)


def test_what_protected_mode_says_is_one_error_reply() -> None:
    assert PROTECTED.startswith(
        b"-DENIED Redis is running in protected mode because protected mode is enabled"
    )
    assert PROTECTED.count(b"\r\n") == 1


UNCHANGED = "WARNING: ACL errors detected, no change to the previously active ACL rules was performed"

# Contents of files and what Redis 8.6.3 answers to ACL LOAD; it crashes on an open parenthesis.
BAD_FILES = {
    "user bob on foo": "f:1: Syntax error. ",
    "foo bar": "f:1 should start with user keyword followed by the username. ",
    "user": "f:1 should start with user keyword followed by the username. ",
    "# comment": "f:1 should start with user keyword followed by the username. ",
    "user bob on\nuser bob off": "WARNING: Duplicate user 'bob' found on line 2. ",
    'user "a b" on': "f:1: Syntax error. ",
    "user bob on +nosuch\nfoo\nuser x bar\n": (
        f"f:1: Error in applying operation '+nosuch': {UNKNOWN}."
        " f:2 should start with user keyword followed by the username. f:3: Syntax error. "
    ),
    "user bob on (+get": "f:1: Unmatched parenthesis in selector definition. ",
}


@pytest.mark.parametrize(("content", "errors"), BAD_FILES.items())
def test_errors_in_a_file_of_users(content: str, errors: str) -> None:
    with pytest.raises(CommandError) as caught:
        parse_users(COMMANDS, content.encode(), "f")
    assert str(caught.value) == f"ERR {errors}{UNCHANGED}"


def test_a_file_of_users() -> None:
    users = parse_users(COMMANDS, b"\n  user bob on  >a   ~k\t\r\n\r\nuser carl\nuser d (+get ~a)", "f")
    assert users == {b"bob": rules_of("on >a ~k"), b"carl": Rules(), b"d": rules_of("(+get ~a)")}


def opened(config: Config, directory: Path | None = None, warnings: list[str] | None = None) -> Access:
    return open_access(
        COMMANDS,
        config,
        directory,
        describe=lambda client: "",
        warn=(lambda text: None) if warnings is None else warnings.append,
    )


def test_users_of_the_config_file(tmp_path: Path) -> None:
    config = Config(users=[("bob", "on", ">a", "+get"), ("default", "on", ">b", "+@all", "~*")])
    access = opened(config)
    assert [line.split()[1] for line in describe_users(access.all_rules())] == [b"bob", b"default"]
    assert access.path is None
    assert access.authenticate(b"default", b"b") is not None
    assert not opened(config, tmp_path).is_open


@pytest.mark.parametrize(
    ("users", "reason"),
    [
        ([("bob", "foo")], "Error in user declaration 'bob': Syntax error"),
        (
            [("a b", "on")],
            "Error in user declaration 'a b': Usernames can't contain spaces or null characters",
        ),
        (
            [("bob", "on"), ("bob", "on")],
            "Duplicate user found. A user can only be defined once in config files",
        ),
    ],
)
def test_bad_users_in_the_config_file(users: list[tuple[str, ...]], reason: str) -> None:
    with pytest.raises(ConfigError, match=f"^{reason}$"):
        opened(Config(users=users))


def test_users_in_two_places_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^Configuring Redis with users defined in redis\.conf and at the same"
    ):
        opened(Config(users=[("bob", "on")], aclfile=str(tmp_path / "users")))


def test_a_file_of_users_that_is_not_there_or_wrong(tmp_path: Path) -> None:
    path = tmp_path / "users"
    with pytest.raises(OperatorError, match=f"^Error loading ACLs, opening file '{path}': No such file"):
        opened(Config(aclfile=str(path)))
    path.write_text("user bob foo\n")
    with pytest.raises(OperatorError, match=rf"^{path}:1: Syntax error\.$"):
        opened(Config(aclfile=str(path)))


def test_a_file_that_does_not_name_the_default_user_leaves_it_its_password(tmp_path: Path) -> None:
    path = tmp_path / "users"
    path.write_text("user bob on >b\n")
    access = opened(Config(aclfile=str(path), requirepass="a"))
    assert not access.is_open
    assert access.authenticate(b"default", b"a") is not None
    path.write_text("user default on >c\n")
    access.replace(access.read())
    assert access.authenticate(b"default", b"c") is not None
    assert b"bob" not in access.users


def test_users_of_a_data_directory(tmp_path: Path) -> None:
    access = opened(Config(requirepass="a"), tmp_path)
    assert access.automatic
    access.put(b"bob", rules_of("on >b +get ~k"))
    access.save(file_of_users(access.kept()))
    assert access.path == tmp_path / "users.acl"
    assert access.path.stat().st_mode & 0o777 == 0o600
    # Another password may be required at the next start.
    again = opened(Config(requirepass="c"), tmp_path)
    assert again.users[b"bob"].rules == access.users[b"bob"].rules
    assert again.authenticate(b"default", b"c") is not None
    # Unless ACL SETUSER has said what the default user's is.
    again.put(b"default", rules_of("on >d ~* +@all"))
    again.save(file_of_users(again.kept({b"bob": None})))
    warnings: list[str] = []
    last = opened(Config(requirepass="c", users=[("carl", "on")]), tmp_path, warnings)
    assert set(last.users) == {b"default"}
    assert last.authenticate(b"default", b"d") is not None
    assert last.authenticate(b"default", b"c") is None
    assert warnings == [f"users are those of {last.path}, not those of the config file"]


class FullDisk(DiskFiles):
    """A disk that takes no new file."""

    def write_file(self, path: Path, chunks: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_file_of_the_operators_keeps_its_mode_and_the_link_to_it(tmp_path: Path) -> None:
    path, link, other = tmp_path / "people", tmp_path / "link", tmp_path / "people.new"
    path.write_text("user bob on\n")
    path.chmod(0o640)
    link.symlink_to(path)
    other.write_text("somebody's")
    access = Access(COMMANDS, path=link)
    access.save(b"user carl on\n")
    assert link.is_symlink()
    assert (path.read_text(), path.stat().st_mode & 0o777) == ("user carl on\n", 0o640)
    assert sorted(tmp_path.iterdir()) == [link, path, other]


def test_a_file_that_cannot_be_written_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "users.acl"
    path.write_text("user bob on\n")
    access = Access(COMMANDS, path=path, automatic=True, files=FullDisk())
    with pytest.raises(OSError, match="No space left"):
        access.save(b"user carl on\n")
    assert path.read_text() == "user bob on\n"


def test_a_change_holds_for_who_is_that_user_already() -> None:
    access = Access(COMMANDS)
    client = visitor("+get ~k", access)
    access.put(b"bob", access.changed(b"bob", [b"-get"]))
    assert check(access, client, "GET k")
    access.put(b"bob", access.changed(b"bob", [b"+@all", b"~*"]))
    assert client.user.unrestricted
    assert access.delete(b"bob")
    assert not access.delete(b"bob")
    assert not access.delete(b"default")


def test_patterns_that_differ_in_rights_only_are_one() -> None:
    assert rules_of("%R~a %W~a").root.keys == (KeyPattern(b"a"),)


PATTERNS = st.text(alphabet="ab*?[]\\", max_size=5).map(str.encode)


@given(st.lists(PATTERNS, max_size=6), st.lists(st.text(alphabet="ab*", max_size=5).map(str.encode)))
def test_a_key_matches_when_one_of_the_patterns_does(patterns: list[bytes], keys: list[bytes]) -> None:
    matchers = [compile_glob(pattern) for pattern in patterns]
    expected = [not any(matches(key) for matches in matchers) for key in keys]
    first = KeyMatcher(patterns).first_unmatched(keys, range(len(keys)))
    assert first == (expected.index(True) if True in expected else None)


def test_a_pattern_that_is_too_long_matches_nothing() -> None:
    long = b"k" * MAX_PATTERN_LENGTH
    assert KeyMatcher([long + b"*"]).first_unmatched([long], [0]) == 0
    assert KeyMatcher([long + b"k"]).first_unmatched([long + b"k"], [0]) is None


def test_the_rights_to_many_keys_are_looked_at_in_turns() -> None:
    rules = rules_of("+mget ~a* ~*b* (+mget ~a* ~c*)")
    keys = [b"a%d" % number for number in range(3000)]
    for last, expected in ((b"a", None), (b"d", Denial(Reason.KEY, 3001))):
        found: list[Denial | None] = []

        def look(request: list[bytes], found: list[Denial | None] = found) -> Iterator[None]:
            found.append((yield from rules.search(COMMANDS, COMMANDS[b"mget"], request)))

        assert len(list(look([b"MGET", *keys, last]))) > 2
        assert found == [expected]


def test_many_patterns_are_added_in_the_order_in_which_they_came() -> None:
    words = [*(b"~k%d*" % number for number in range(5000)), b"%R~k1*", b"resetkeys", b"~b", b"%R~a", b"~a"]
    assert Rules().apply(COMMANDS, words[:-4]).root.keys[4999] == KeyPattern(b"k4999*")
    assert Rules().apply(COMMANDS, words).root.describe_keys() == b"~b ~a"
