from __future__ import annotations

import pytest
from trio.testing import wait_all_tasks_blocked

from engram.large_string import LONGEST_PLAIN, LargeString
from tests.commands.conftest import Conversation, Converse
from tests.conftest import Client, House, ManualJournal, OpenHouse

CONVERSATIONS: dict[str, Conversation] = {
    "set and get": (
        ("SET k v", b"+OK\r\n"),
        ("GET k", b"$1\r\nv\r\n"),
        ([b"SET", b"k", b""], b"+OK\r\n"),
        ("GET k", b"$0\r\n\r\n"),
        ("GET nosuch", b"$-1\r\n"),
    ),
    "set if absent": (
        ("SET k v NX", b"+OK\r\n"),
        ("SET k w NX", b"$-1\r\n"),
        ("GET k", b"$1\r\nv\r\n"),
        ("SET k w nx", b"$-1\r\n"),
    ),
    "set if present": (
        ("SET k v XX", b"$-1\r\n"),
        ("GET k", b"$-1\r\n"),
        ("SET k v", b"+OK\r\n"),
        ("SET k w XX", b"+OK\r\n"),
        ("GET k", b"$1\r\nw\r\n"),
    ),
    "set and get the old value": (
        ("SET k v GET", b"$-1\r\n"),
        ("SET k w GET", b"$1\r\nv\r\n"),
        ("SET k x NX GET", b"$1\r\nw\r\n"),
        ("GET k", b"$1\r\nw\r\n"),
        ("SET n x NX GET", b"$-1\r\n"),
        ("GET n", b"$1\r\nx\r\n"),
        ("SET m x XX GET", b"$-1\r\n"),
        ("EXISTS m", b":0\r\n"),
        ("SET k y GET XX", b"$1\r\nw\r\n"),
        ("GET k", b"$1\r\ny\r\n"),
        ("SET k z GET GET", b"$1\r\ny\r\n"),
    ),
    "set if equal, or not": (
        ("SET k v", b"+OK\r\n"),
        ("SET k w IFEQ x", b"$-1\r\n"),
        ("SET k w IFEQ v", b"+OK\r\n"),
        ("SET k x ifne w", b"$-1\r\n"),
        ("SET k x IFNE v", b"+OK\r\n"),
        ("GET k", b"$1\r\nx\r\n"),
        ("SET k y IFEQ v GET", b"$1\r\nx\r\n"),
        ("SET k y IFEQ GET GET", b"$1\r\nx\r\n"),
        ("SET k y GET IFEQ x", b"$1\r\nx\r\n"),
        ("GET k", b"$1\r\ny\r\n"),
        ("SET n v IFEQ v", b"$-1\r\n"),
        ("SET n v IFEQ v GET", b"$-1\r\n"),
        ([b"SET", b"n", b"v", b"IFEQ", b""], b"$-1\r\n"),
        ("EXISTS n", b":0\r\n"),
        ("SET n v IFNE v GET", b"$-1\r\n"),
        ("GET n", b"$1\r\nv\r\n"),
        ("DEL n", b":1\r\n"),
        ("SET n v IFNE v", b"+OK\r\n"),
        ("SET k z IFEQ y EX 100", b"+OK\r\n"),
        ("SET k v KEEPTTL IFEQ z", b"+OK\r\n"),
        ("TTL k", b":100\r\n"),
        ("SET k v IFEQ EX EX 5", b"$-1\r\n"),
        ("TTL k", b":100\r\n"),
    ),
    "set if the digest is equal, or not": (
        ("SET k v", b"+OK\r\n"),
        ("SET k v IFDEQ f7042be43fb80714", b"+OK\r\n"),
        ("SET k v IFDEQ F7042BE43FB80714", b"+OK\r\n"),
        ("SET k w IFDEQ f7042be43fb80715", b"$-1\r\n"),
        ("SET k w IFDEQ zzzzzzzzzzzzzzzz GET", b"$1\r\nv\r\n"),
        ("SET k w IFDNE F7042BE43FB80714", b"$-1\r\n"),
        ("SET k w IFDEQ 7042be43fb80714", b"-ERR must be exactly 16 hexadecimal characters\r\n"),
        ("SET k w IFDNE 0f7042be43fb80714", b"-ERR must be exactly 16 hexadecimal characters\r\n"),
        ("SET k w IFDNE x GET", b"-ERR must be exactly 16 hexadecimal characters\r\n"),
        ("GET k", b"$1\r\nv\r\n"),
        ("SET k w IFDNE 0000000000000000 GET", b"$1\r\nv\r\n"),
        ("GET k", b"$1\r\nw\r\n"),
        ("SET n v IFDEQ f7042be43fb80714", b"$-1\r\n"),
        ("SET n v IFDEQ x", b"$-1\r\n"),
        ("SET n v IFDNE x", b"+OK\r\n"),
        ("SET n w IFDEQ x EX 0", b"-ERR invalid expire time in 'set' command\r\n"),
    ),
    "conditions of set that go together": (
        ("SET k v", b"+OK\r\n"),
        ("SET k w NX IFEQ v", b"-ERR syntax error\r\n"),
        ("SET k w XX IFDEQ f7042be43fb80714", b"-ERR syntax error\r\n"),
        ("SET k w IFEQ v IFNE w", b"-ERR syntax error\r\n"),
        ("SET k w IFEQ v IFDEQ f7042be43fb80714", b"-ERR syntax error\r\n"),
        ("SET k w IFEQ", b"-ERR syntax error\r\n"),
        ("SET k w GET IFDNE", b"-ERR syntax error\r\n"),
        ("SET k w IFEQ v NX", b"$-1\r\n"),
        ("SET k w IFEQ x XX", b"$-1\r\n"),
        ("SET n v IFNE v XX", b"$-1\r\n"),
        ("SET k w IFEQ v IFEQ x", b"$-1\r\n"),
        ("SET k w IFEQ v XX", b"+OK\r\n"),
        ("SET k x IFEQ v IFEQ w", b"+OK\r\n"),
        ("SET n v IFNE v NX", b"+OK\r\n"),
        ("VNEW i 2", b"+OK\r\n"),
        ("SET i v IFNE v", b"-WRONGTYPE Operation against a key holding the wrong kind of value\r\n"),
        ("SET i v IFDEQ x", b"-WRONGTYPE Operation against a key holding the wrong kind of value\r\n"),
        ("SET i v IFEQ v NX", b"$-1\r\n"),
        ("SET i v IFEQ v GET", b"-WRONGTYPE Operation against a key holding the wrong kind of value\r\n"),
    ),
    "digest": (
        ("SET k v", b"+OK\r\n"),
        ("DIGEST k", b"$16\r\nf7042be43fb80714\r\n"),
        ([b"SET", b"k", b""], b"+OK\r\n"),
        ("DIGEST k", b"$16\r\n2d06800538d394c2\r\n"),
        ("SET k 14", b"+OK\r\n"),
        ("DIGEST k", b"$16\r\n014908a81dd43806\r\n"),
        ("DIGEST nosuch", b"$-1\r\n"),
        ("VNEW i 2", b"+OK\r\n"),
        ("DIGEST i", b"-WRONGTYPE Operation against a key holding the wrong kind of value\r\n"),
    ),
    "delete on a condition": (
        ("SET k v", b"+OK\r\n"),
        ("DELEX k IFEQ w", b":0\r\n"),
        ("DELEX k IFNE v", b":0\r\n"),
        ("DELEX k IFDEQ 0000000000000000", b":0\r\n"),
        ("DELEX k IFDNE F7042BE43FB80714", b":0\r\n"),
        ("DELEX k IFDEQ x", b"-ERR must be exactly 16 hexadecimal characters\r\n"),
        ("DELEX k XX v", b"-ERR Invalid condition. Use IFEQ, IFNE, IFDEQ, or IFDNE\r\n"),
        ("DELEX k IFEQ", b"-ERR wrong number of arguments for 'delex' command\r\n"),
        ("DELEX k IFEQ v x", b"-ERR wrong number of arguments for 'delex' command\r\n"),
        ("EXISTS k", b":1\r\n"),
        ("DELEX k ifeq v", b":1\r\n"),
        ("EXISTS k", b":0\r\n"),
        ("DELEX k", b":0\r\n"),
        ("DELEX k IFNE v", b":0\r\n"),
        ("DELEX k IFDEQ x", b":0\r\n"),
        ("DELEX k XX v", b":0\r\n"),
        ("SET k v", b"+OK\r\n"),
        ("DELEX k IFDEQ f7042be43fb80714", b":1\r\n"),
        ("SET k v", b"+OK\r\n"),
        ("DELEX k IFNE w", b":1\r\n"),
        ("SET k v", b"+OK\r\n"),
        ("DELEX k", b":1\r\n"),
        ("VNEW i 2", b"+OK\r\n"),
        ("DELEX i IFNE v", b"-ERR Key should be of string type if conditions are specified\r\n"),
        ("DELEX i", b":1\r\n"),
    ),
    "set with an expiry": (
        ("SET k v EX 100", b"+OK\r\n"),
        ("TTL k", b":100\r\n"),
        ("SET k v px 100000", b"+OK\r\n"),
        ("TTL k", b":100\r\n"),
        ("SET k v EXAT 99999999999", b"+OK\r\n"),
        ("EXPIRETIME k", b":99999999999\r\n"),
        ("SET k v PXAT 99999999999123", b"+OK\r\n"),
        ("PEXPIRETIME k", b":99999999999123\r\n"),
        ("EXPIRETIME k", b":99999999999\r\n"),
        ("SET k v PXAT 99999999999700", b"+OK\r\n"),
        ("EXPIRETIME k", b":100000000000\r\n"),
        ("SET k w", b"+OK\r\n"),
        ("TTL k", b":-1\r\n"),
        ("SET k v EX 100 NX", b"$-1\r\n"),
        ("TTL k", b":-1\r\n"),
        ("SET k v EX 100 XX GET", b"$1\r\nw\r\n"),
        ("TTL k", b":100\r\n"),
    ),
    "set keeps an expiry when asked": (
        ("SET k v EX 100", b"+OK\r\n"),
        ("SET k w KEEPTTL", b"+OK\r\n"),
        ("TTL k", b":100\r\n"),
        ("GET k", b"$1\r\nw\r\n"),
        ("SET n v KEEPTTL", b"+OK\r\n"),
        ("TTL n", b":-1\r\n"),
        ("SET k x KEEPTTL KEEPTTL", b"+OK\r\n"),
        ("TTL k", b":100\r\n"),
    ),
    "set to a time that has passed": (
        ("SET k v PXAT 1", b"+OK\r\n"),
        ("GET k", b"$-1\r\n"),
        ("EXISTS k", b":0\r\n"),
        ("SET k v EXAT 1", b"+OK\r\n"),
        ("TTL k", b":-2\r\n"),
    ),
    "options of set that do not go together": (
        ("SET k v NX XX", b"-ERR syntax error\r\n"),
        ("SET k v XX NX", b"-ERR syntax error\r\n"),
        ("SET k v EX", b"-ERR syntax error\r\n"),
        ("SET k v EX 10 PX 10", b"-ERR syntax error\r\n"),
        ("SET k v EX 10 EX 10", b"+OK\r\n"),
        ("SET k v KEEPTTL EX 10", b"-ERR syntax error\r\n"),
        ("SET k v EX 10 KEEPTTL", b"-ERR syntax error\r\n"),
        ("SET k v foo", b"-ERR syntax error\r\n"),
        ("SET k v EX 10 foo", b"-ERR syntax error\r\n"),
        ("EXISTS k", b":1\r\n"),
    ),
    "bad expiries of set": (
        ("SET k v EX 0", b"-ERR invalid expire time in 'set' command\r\n"),
        ("SET k v EX -1", b"-ERR invalid expire time in 'set' command\r\n"),
        ("SET k v EX a", b"-ERR value is not an integer or out of range\r\n"),
        ("SET k v EX 1.5", b"-ERR value is not an integer or out of range\r\n"),
        ("SET k v PX 0", b"-ERR invalid expire time in 'set' command\r\n"),
        ("SET k v EXAT 0", b"-ERR invalid expire time in 'set' command\r\n"),
        ("SET k v PXAT -5", b"-ERR invalid expire time in 'set' command\r\n"),
        ("SET k v EX 9223372036854775807", b"-ERR invalid expire time in 'set' command\r\n"),
        ("SET k v EX 9223372036854776", b"-ERR invalid expire time in 'set' command\r\n"),
        ("SET k v PX 9223372036854775807", b"-ERR invalid expire time in 'set' command\r\n"),
        ("SET k v EX 9223372036854775808", b"-ERR value is not an integer or out of range\r\n"),
        ("EXISTS k", b":0\r\n"),
    ),
    "append and strlen": (
        ("APPEND k abc", b":3\r\n"),
        ([b"APPEND", b"k", b""], b":3\r\n"),
        ("APPEND k de", b":5\r\n"),
        ("GET k", b"$5\r\nabcde\r\n"),
        ("STRLEN k", b":5\r\n"),
        ("STRLEN nosuch", b":0\r\n"),
        ("SET e 5 EX 100", b"+OK\r\n"),
        ("APPEND e 7", b":2\r\n"),
        ("TTL e", b":100\r\n"),
        ("GET e", b"$2\r\n57\r\n"),
    ),
    "lifetimes of set": (
        ("SET k v EX 10 EX 20", b"+OK\r\n"),
        ("TTL k", b":20\r\n"),
        ("SET k v KEEPTTL KEEPTTL", b"+OK\r\n"),
        ("TTL k", b":20\r\n"),
        ("SET k w XX KEEPTTL GET", b"$1\r\nv\r\n"),
        ("TTL k", b":20\r\n"),
        ("SET k v EX 10 PX 20", b"-ERR syntax error\r\n"),
        ("SET k v KEEPTTL EX 5", b"-ERR syntax error\r\n"),
        ("SET k v EX 5 KEEPTTL", b"-ERR syntax error\r\n"),
        ("SET k v PERSIST", b"-ERR syntax error\r\n"),
        ("SET k v EX NX", b"-ERR value is not an integer or out of range\r\n"),
        ("SET k v EXAT 1", b"+OK\r\n"),
        ("EXISTS k", b":0\r\n"),
        ("SET k v PXAT 5 GET", b"$-1\r\n"),
        ("EXISTS k", b":0\r\n"),
    ),
    "conditions of set and what was there": (
        ("SET k v NX XX", b"-ERR syntax error\r\n"),
        ("SET k v XX NX", b"-ERR syntax error\r\n"),
        ("SET k v XX", b"$-1\r\n"),
        ("SET k v XX GET", b"$-1\r\n"),
        ("SET k v NX NX", b"+OK\r\n"),
        ("SET k w NX", b"$-1\r\n"),
        ("SET k w NX GET", b"$1\r\nv\r\n"),
        ("GET k", b"$1\r\nv\r\n"),
        ("SET k w XX GET GET", b"$1\r\nv\r\n"),
        ("GET k", b"$1\r\nw\r\n"),
        ("VNEW v 2", b"+OK\r\n"),
        ("SET v 1 GET", b"-WRONGTYPE Operation against a key holding the wrong kind of value\r\n"),
        ("SET v 1 NX GET", b"-WRONGTYPE Operation against a key holding the wrong kind of value\r\n"),
        ("SET v 1 NX", b"$-1\r\n"),
        ("SET v 1 XX", b"+OK\r\n"),
        ("GET v", b"$1\r\n1\r\n"),
    ),
    "mget and mset": (
        ("MSET a 1 b 2", b"+OK\r\n"),
        ("MGET a b nosuch a", b"*4\r\n$1\r\n1\r\n$1\r\n2\r\n$-1\r\n$1\r\n1\r\n"),
        ("VNEW v 2", b"+OK\r\n"),
        ("MGET v a", b"*2\r\n$-1\r\n$1\r\n1\r\n"),
        ("SET a x EX 100", b"+OK\r\n"),
        ("MSET a 1 v 2 a 3", b"+OK\r\n"),
        ("MGET a v", b"*2\r\n$1\r\n3\r\n$1\r\n2\r\n"),
        ("TTL a", b":-1\r\n"),
        ("MSET a", b"-ERR wrong number of arguments for 'mset' command\r\n"),
        ("MSET a 1 b", b"-ERR wrong number of arguments for 'mset' command\r\n"),
        ("MGET", b"-ERR wrong number of arguments for 'mget' command\r\n"),
    ),
    "msetnx": (
        ("MSETNX a 1 b 2 a 3", b":1\r\n"),
        ("MGET a b", b"*2\r\n$1\r\n3\r\n$1\r\n2\r\n"),
        ("MSETNX c 1 b 2", b":0\r\n"),
        ("EXISTS c", b":0\r\n"),
        ("VNEW v 2", b"+OK\r\n"),
        ("MSETNX c 1 v 2", b":0\r\n"),
        ("MSETNX c 1 d", b"-ERR wrong number of arguments for 'msetnx' command\r\n"),
        ("MSETNX c", b"-ERR wrong number of arguments for 'msetnx' command\r\n"),
    ),
    "setnx, setex and psetex": (
        ("SETNX k v", b":1\r\n"),
        ("SETNX k w", b":0\r\n"),
        ("GET k", b"$1\r\nv\r\n"),
        ("SETEX k 10 w", b"+OK\r\n"),
        ("TTL k", b":10\r\n"),
        ("GET k", b"$1\r\nw\r\n"),
        ("PSETEX k 20000 x", b"+OK\r\n"),
        ("TTL k", b":20\r\n"),
        ("SETEX k 0 v", b"-ERR invalid expire time in 'setex' command\r\n"),
        ("SETEX k -1 v", b"-ERR invalid expire time in 'setex' command\r\n"),
        ("SETEX k a v", b"-ERR value is not an integer or out of range\r\n"),
        ("SETEX k 9223372036854775807 v", b"-ERR invalid expire time in 'setex' command\r\n"),
        ("SETEX k 9223372036854775 v", b"-ERR invalid expire time in 'setex' command\r\n"),
        ("PSETEX k 0 v", b"-ERR invalid expire time in 'psetex' command\r\n"),
        ("PSETEX k 9223372036854775807 v", b"-ERR invalid expire time in 'psetex' command\r\n"),
        ("GET k", b"$1\r\nx\r\n"),
        ("VNEW v 2", b"+OK\r\n"),
        ("SETNX v 1", b":0\r\n"),
        ("SETEX v 10 1", b"+OK\r\n"),
        ("GET v", b"$1\r\n1\r\n"),
        ("SETNX k", b"-ERR wrong number of arguments for 'setnx' command\r\n"),
        ("SETEX k 1", b"-ERR wrong number of arguments for 'setex' command\r\n"),
        ("PSETEX k 1", b"-ERR wrong number of arguments for 'psetex' command\r\n"),
    ),
    "getset and getdel": (
        ("GETSET k 1", b"$-1\r\n"),
        ("SET k 1 EX 100", b"+OK\r\n"),
        ("GETSET k 2", b"$1\r\n1\r\n"),
        ("TTL k", b":-1\r\n"),
        ("GETDEL k", b"$1\r\n2\r\n"),
        ("GETDEL k", b"$-1\r\n"),
        ("VNEW v 2", b"+OK\r\n"),
        ("GETSET v 1", b"-WRONGTYPE Operation against a key holding the wrong kind of value\r\n"),
        ("GETDEL v", b"-WRONGTYPE Operation against a key holding the wrong kind of value\r\n"),
        ("GETSET k", b"-ERR wrong number of arguments for 'getset' command\r\n"),
        ("GETDEL k x", b"-ERR wrong number of arguments for 'getdel' command\r\n"),
    ),
    "getex": (
        ("SET k v", b"+OK\r\n"),
        ("GETEX k", b"$1\r\nv\r\n"),
        ("GETEX k EX 10", b"$1\r\nv\r\n"),
        ("TTL k", b":10\r\n"),
        ("GETEX k", b"$1\r\nv\r\n"),
        ("TTL k", b":10\r\n"),
        ("GETEX k PX 20000 PX 30000", b"$1\r\nv\r\n"),
        ("TTL k", b":30\r\n"),
        ("GETEX k PERSIST PERSIST", b"$1\r\nv\r\n"),
        ("TTL k", b":-1\r\n"),
        ("GETEX k PERSIST", b"$1\r\nv\r\n"),
        ("GETEX k EXAT 99999999999", b"$1\r\nv\r\n"),
        ("EXPIRETIME k", b":99999999999\r\n"),
        ("GETEX k PXAT 99999999999999", b"$1\r\nv\r\n"),
        ("PEXPIRETIME k", b":99999999999999\r\n"),
        ("GETEX k PXAT 1", b"$1\r\nv\r\n"),
        ("EXISTS k", b":0\r\n"),
    ),
    "getex misused": (
        ("GETEX nosuch EX 0", b"$-1\r\n"),
        ("GETEX nosuch EX a", b"$-1\r\n"),
        ("GETEX nosuch FOO", b"-ERR syntax error\r\n"),
        ("SET k v", b"+OK\r\n"),
        ("GETEX k EX 10 PERSIST", b"-ERR syntax error\r\n"),
        ("GETEX k PERSIST EX 10", b"-ERR syntax error\r\n"),
        ("GETEX k EX 10 PX 10", b"-ERR syntax error\r\n"),
        ("GETEX k EX abc PX 5", b"-ERR syntax error\r\n"),
        ("GETEX k EX", b"-ERR syntax error\r\n"),
        ("GETEX k KEEPTTL", b"-ERR syntax error\r\n"),
        ("GETEX k EX 0", b"-ERR invalid expire time in 'getex' command\r\n"),
        ("GETEX k EX -1", b"-ERR invalid expire time in 'getex' command\r\n"),
        ("GETEX k EX 1.5", b"-ERR value is not an integer or out of range\r\n"),
        ("GETEX k EX 9223372036854775807", b"-ERR invalid expire time in 'getex' command\r\n"),
        ("GETEX k PX 9223372036854775807", b"-ERR invalid expire time in 'getex' command\r\n"),
        ("GETEX k EXAT 0", b"-ERR invalid expire time in 'getex' command\r\n"),
        ("TTL k", b":-1\r\n"),
        ("VNEW v 2", b"+OK\r\n"),
        ("GETEX v", b"-WRONGTYPE Operation against a key holding the wrong kind of value\r\n"),
        ("GETEX v EX 0", b"-WRONGTYPE Operation against a key holding the wrong kind of value\r\n"),
        ("GETEX", b"-ERR wrong number of arguments for 'getex' command\r\n"),
    ),
    "getrange": (
        ("SET k hello", b"+OK\r\n"),
        ("GETRANGE k 0 -1", b"$5\r\nhello\r\n"),
        ("GETRANGE k -3 -1", b"$3\r\nllo\r\n"),
        ("GETRANGE k -100 1", b"$2\r\nhe\r\n"),
        ("GETRANGE k -1 -100", b"$0\r\n\r\n"),
        ("GETRANGE k -100 -200", b"$0\r\n\r\n"),
        ("GETRANGE k -200 -100", b"$1\r\nh\r\n"),
        ("GETRANGE k -5 -6", b"$0\r\n\r\n"),
        ("GETRANGE k 4 100", b"$1\r\no\r\n"),
        ("GETRANGE k 5 100", b"$0\r\n\r\n"),
        ("GETRANGE k 3 2", b"$0\r\n\r\n"),
        ("GETRANGE k 9223372036854775807 9223372036854775807", b"$0\r\n\r\n"),
        ("GETRANGE k -9223372036854775808 9223372036854775807", b"$5\r\nhello\r\n"),
        ("SUBSTR k 1 2", b"$2\r\nel\r\n"),
        ("GETRANGE nosuch 0 1", b"$0\r\n\r\n"),
        ("GETRANGE nosuch a 1", b"-ERR value is not an integer or out of range\r\n"),
        ("GETRANGE k 0 b", b"-ERR value is not an integer or out of range\r\n"),
        ("VNEW v 2", b"+OK\r\n"),
        ("GETRANGE v 0 1", b"-WRONGTYPE Operation against a key holding the wrong kind of value\r\n"),
        ("GETRANGE v a 1", b"-ERR value is not an integer or out of range\r\n"),
        ("GETRANGE k 0", b"-ERR wrong number of arguments for 'getrange' command\r\n"),
        ("SUBSTR k", b"-ERR wrong number of arguments for 'substr' command\r\n"),
    ),
    "setrange": (
        ("SETRANGE nosuch 5 ''", b":0\r\n"),
        ("SETRANGE nosuch -1 ''", b"-ERR offset is out of range\r\n"),
        ("SETRANGE nosuch 9223372036854775807 ''", b":0\r\n"),
        ("EXISTS nosuch", b":0\r\n"),
        ("SET k hello EX 100", b"+OK\r\n"),
        ("SETRANGE k 1 XY", b":5\r\n"),
        ("SETRANGE k 4 Z!", b":6\r\n"),
        ("SETRANGE k 100 ''", b":6\r\n"),
        ("GET k", b"$6\r\nhXYlZ!\r\n"),
        ("TTL k", b":100\r\n"),
        ("SETRANGE k 8 z", b":9\r\n"),
        ("GET k", b"$9\r\nhXYlZ!\x00\x00z\r\n"),
        ("SETRANGE p 2 ab", b":4\r\n"),
        ("GET p", b"$4\r\n\x00\x00ab\r\n"),
        ("SETRANGE k -1 z", b"-ERR offset is out of range\r\n"),
        ("SETRANGE k x z", b"-ERR value is not an integer or out of range\r\n"),
        ("SETRANGE k 536870912 x", b"-ERR string exceeds maximum allowed size (proto-max-bulk-len)\r\n"),
        ("SETRANGE k 536870911 xx", b"-ERR string exceeds maximum allowed size (proto-max-bulk-len)\r\n"),
        (
            "SETRANGE k 9223372036854775807 x",
            b"-ERR string exceeds maximum allowed size (proto-max-bulk-len)\r\n",
        ),
        ("SETRANGE nosuch 536870912 x", b"-ERR string exceeds maximum allowed size (proto-max-bulk-len)\r\n"),
        ("EXISTS nosuch", b":0\r\n"),
        ("VNEW v 2", b"+OK\r\n"),
        ("SETRANGE v 5 ''", b"-WRONGTYPE Operation against a key holding the wrong kind of value\r\n"),
        ("SETRANGE v 5 x", b"-WRONGTYPE Operation against a key holding the wrong kind of value\r\n"),
        ("SETRANGE k 0", b"-ERR wrong number of arguments for 'setrange' command\r\n"),
    ),
    "numbers of arguments": (
        ("SET k", b"-ERR wrong number of arguments for 'set' command\r\n"),
        ("SET", b"-ERR wrong number of arguments for 'set' command\r\n"),
        ("GET", b"-ERR wrong number of arguments for 'get' command\r\n"),
        ("GET a b", b"-ERR wrong number of arguments for 'get' command\r\n"),
        ("APPEND k", b"-ERR wrong number of arguments for 'append' command\r\n"),
        ("STRLEN", b"-ERR wrong number of arguments for 'strlen' command\r\n"),
    ),
}


@pytest.mark.parametrize("topic", CONVERSATIONS)
async def test_replies(topic: str, converse: Converse) -> None:
    await converse(CONVERSATIONS[topic])


async def test_no_string_is_longer_than_an_argument_may_be(house: House) -> None:
    house.server.config.proto_max_bulk_len = 1 << 20
    client = house.connect()
    refused = b"-ERR string exceeds maximum allowed size (proto-max-bulk-len)\r\n"
    assert await client.call("SETRANGE k 1048575 xy") == refused
    assert await client.call("EXISTS k") == b":0\r\n"
    assert await client.call("SETRANGE k 1048575 x") == b":1048576\r\n"
    assert await client.call("SETRANGE k 0 abc") == b":1048576\r\n"
    assert await client.call("APPEND k x") == refused
    assert await client.call("GETRANGE k 1048570 -1") == b"$6\r\n\0\0\0\0\0x\r\n"


async def test_a_string_is_not_sent_more_often_than_memory_holds(house: House) -> None:
    house.server.config.proto_max_bulk_len = house.server.config.client_output_buffer_limit = 1 << 20
    client = house.connect()
    await client.call("SETRANGE k 99999 x")
    assert len(await client.call([b"MGET", *[b"k"] * 10])) > 1_000_000
    assert await client.call([b"MGET", *[b"k"] * 11]) == (
        b"-ERR the reply would take 1100000 bytes, more than client-output-buffer-limit and"
        b" proto-max-bulk-len\r\n"
    )


async def test_what_has_lapsed_is_not_there(house: House) -> None:
    client = house.connect()
    await client.call("MSET a 1 b 2")
    await client.call("PEXPIRE a 10")
    house.clock.time += 10
    assert await client.call("MGET a b") == b"*2\r\n$-1\r\n$1\r\n2\r\n"
    await client.call("SETEX a 1 x")
    house.clock.time += 1000
    assert await client.call("GETEX a PERSIST") == b"$-1\r\n"
    assert await client.call("MSETNX a 1 c 2") == b":1\r\n"
    await client.call("GETEX a PX 10")
    house.clock.time += 10
    assert await client.call("GETDEL a") == b"$-1\r\n"
    await client.call("SETEX a 1 x")
    house.clock.time += 1000
    assert await client.call("SETRANGE a 1 x") == b":2\r\n"
    assert await client.call("TTL a") == b":-1\r\n"


LENGTH = LONGEST_PLAIN + 5


async def large(house: House) -> Client:
    """A client of a server that holds a string in blocks: zeros and an x at the end."""
    client = house.connect()
    assert await client.call(f"SETRANGE k {LENGTH - 1} x") == b":%d\r\n" % LENGTH
    assert isinstance(house.database.logical(0).string(b"k"), LargeString)
    return client


VALUE = b"$%d\r\n%b\r\n" % (LENGTH, bytes(LENGTH - 1) + b"x")


@pytest.mark.parametrize(
    ("request_", "reply"),
    [
        ("GET k", VALUE),
        ("MGET k k", b"*2\r\n" + VALUE + VALUE),
        ("GETSET k 1", VALUE),
        ("GETDEL k", VALUE),
        ("GETEX k EX 10", VALUE),
        ("SET k 1 GET", VALUE),
        ("STRLEN k", b":%d\r\n" % LENGTH),
        ("GETRANGE k -3 -1", b"$3\r\n\x00\x00x\r\n"),
        ("GETRANGE k 65530 65540", b"$11\r\n" + bytes(11) + b"\r\n"),
        ("APPEND k y", b":%d\r\n" % (LENGTH + 1)),
        ("SETRANGE k 3 yz", b":%d\r\n" % LENGTH),
        ("SETBIT k 9 1", b":0\r\n"),
        (f"GETBIT k {8 * LENGTH - 4}", b":1\r\n"),
        ("BITCOUNT k", b":4\r\n"),
        ("INCR k", b"-ERR value is not an integer or out of range\r\n"),
        ("INCRBYFLOAT k 1", b"-ERR value is not a valid float\r\n"),
        ("TYPE k", b"+string\r\n"),
        ("OBJECT ENCODING k", b"$3\r\nraw\r\n"),
        ("OBJECT REFCOUNT k", b":1\r\n"),
        ("SCAN 0 TYPE string", b"*2\r\n$1\r\n0\r\n*1\r\n$1\r\nk\r\n"),
        ("RENAME k l", b"+OK\r\n"),
        ("VINFO k", b"-WRONGTYPE Operation against a key holding the wrong kind of value\r\n"),
    ],
)
async def test_a_large_string(house: House, request_: str, reply: bytes) -> None:
    assert await (await large(house)).call(request_) == reply


async def test_a_copy_of_a_large_string_is_another_one(house: House) -> None:
    client = await large(house)
    await client.send("COPY k l", "SETRANGE l 100000 y", "APPEND l z", "STRLEN l")
    assert (await client.arrived()).endswith(b":%d\r\n" % (LENGTH + 1))
    assert await client.call("GET k") == VALUE
    expected = bytes(100_000) + b"y" + bytes(LENGTH - 100_002) + b"xz"
    assert await client.call("GET l") == b"$%d\r\n%b\r\n" % (LENGTH + 1, expected)


async def test_a_reply_shows_a_large_string_as_it_was(open_house: OpenHouse) -> None:
    journal = ManualJournal()
    async with open_house(journal=journal) as house:
        client = await large_unseen(house)
        await client.send("GET k", "SETRANGE k 3 yz")
        await wait_all_tasks_blocked()
        journal.release()
        assert (await client.arrived()).startswith(b":%d\r\n" % LENGTH + VALUE)


async def large_unseen(house: House) -> Client:
    client = house.connect()
    await client.send(f"SETRANGE k {LENGTH - 1} x")
    await wait_all_tasks_blocked()
    return client


async def test_bytes_of_a_large_string_are_counted(house: House) -> None:
    keyspace = house.engine.keyspace
    client = await large(house)
    keyspace.counting = True
    held = keyspace.bytes_held()
    assert held > LENGTH
    await client.call("APPEND k " + 1000 * "y")
    assert keyspace.bytes_held() == held + 1000
    usage = int((await client.call("MEMORY USAGE k"))[1:-2])
    assert LENGTH + 1000 < usage < LENGTH + 1200
    await client.call("DEL k")
    assert keyspace.bytes_held() < 1000
