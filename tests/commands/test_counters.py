from __future__ import annotations

import pytest

from engram.operations import Operation, encode
from tests.commands.conftest import Conversation, Converse
from tests.conftest import ManualJournal, OpenHouse

CONVERSATIONS: dict[str, Conversation] = {
    "counters": (
        ("INCR c", b":1\r\n"),
        ("INCR c", b":2\r\n"),
        ("DECR c", b":1\r\n"),
        ("INCRBY c 10", b":11\r\n"),
        ("DECRBY c 3", b":8\r\n"),
        ("INCRBY c -20", b":-12\r\n"),
        ("GET c", b"$3\r\n-12\r\n"),
        ("DECR d", b":-1\r\n"),
    ),
    "counters keep an expiry": (
        ("SET c 5 EX 100", b"+OK\r\n"),
        ("INCR c", b":6\r\n"),
        ("TTL c", b":100\r\n"),
    ),
    "counters at their limits": (
        ("SET c 9223372036854775807", b"+OK\r\n"),
        ("INCR c", b"-ERR increment or decrement would overflow\r\n"),
        ("INCRBY c 1", b"-ERR increment or decrement would overflow\r\n"),
        ("GET c", b"$19\r\n9223372036854775807\r\n"),
        ("DECR c", b":9223372036854775806\r\n"),
        ("SET c -9223372036854775808", b"+OK\r\n"),
        ("DECR c", b"-ERR increment or decrement would overflow\r\n"),
        ("INCRBY c -1", b"-ERR increment or decrement would overflow\r\n"),
        ("DECRBY c 1", b"-ERR increment or decrement would overflow\r\n"),
        ("GET c", b"$20\r\n-9223372036854775808\r\n"),
        ("INCRBY n 9223372036854775807", b":9223372036854775807\r\n"),
        ("INCRBY n 9223372036854775807", b"-ERR increment or decrement would overflow\r\n"),
        ("DECRBY n -9223372036854775808", b"-ERR decrement would overflow\r\n"),
    ),
    "counters of what is no number": (
        ("SET c abc", b"+OK\r\n"),
        ("INCR c", b"-ERR value is not an integer or out of range\r\n"),
        ([b"SET", b"c", b" 1"], b"+OK\r\n"),
        ("INCR c", b"-ERR value is not an integer or out of range\r\n"),
        ([b"SET", b"c", b"1 "], b"+OK\r\n"),
        ("DECR c", b"-ERR value is not an integer or out of range\r\n"),
        ("SET c +1", b"+OK\r\n"),
        ("INCR c", b"-ERR value is not an integer or out of range\r\n"),
        ("SET c 01", b"+OK\r\n"),
        ("INCR c", b"-ERR value is not an integer or out of range\r\n"),
        ("SET c -0", b"+OK\r\n"),
        ("INCR c", b"-ERR value is not an integer or out of range\r\n"),
        ("SET c 1_0", b"+OK\r\n"),
        ("INCR c", b"-ERR value is not an integer or out of range\r\n"),
        ([b"SET", b"c", b""], b"+OK\r\n"),
        ("INCR c", b"-ERR value is not an integer or out of range\r\n"),
        ("SET c 1.5", b"+OK\r\n"),
        ("INCRBY c 1", b"-ERR value is not an integer or out of range\r\n"),
        ("SET c 99999999999999999999999", b"+OK\r\n"),
        ("INCR c", b"-ERR value is not an integer or out of range\r\n"),
        ("GET c", b"$23\r\n99999999999999999999999\r\n"),
        ("INCRBY n abc", b"-ERR value is not an integer or out of range\r\n"),
        ("INCRBY n 9223372036854775808", b"-ERR value is not an integer or out of range\r\n"),
        ("DECRBY n 1.0", b"-ERR value is not an integer or out of range\r\n"),
        ("EXISTS n", b":0\r\n"),
    ),
    "counters of other kinds": (
        ("VNEW v 2", b"+OK\r\n"),
        ("INCR v", b"-WRONGTYPE Operation against a key holding the wrong kind of value\r\n"),
        ("INCRBY v 1", b"-WRONGTYPE Operation against a key holding the wrong kind of value\r\n"),
        ("INCRBY v x", b"-ERR value is not an integer or out of range\r\n"),
        ("DECRBY v -9223372036854775808", b"-ERR decrement would overflow\r\n"),
        ("INCRBYFLOAT v 1", b"-WRONGTYPE Operation against a key holding the wrong kind of value\r\n"),
        ("INCRBYFLOAT v x", b"-WRONGTYPE Operation against a key holding the wrong kind of value\r\n"),
    ),
    "incrbyfloat": (
        ("INCRBYFLOAT f 0.1", b"$3\r\n0.1\r\n"),
        ("INCRBYFLOAT f 0.2", b"$3\r\n0.3\r\n"),
        ("INCRBYFLOAT f 1e5", b"$24\r\n100000.29999999999999716\r\n"),
        ("INCRBYFLOAT f 1.5e-7", b"$24\r\n100000.30000014999999536\r\n"),
        ("INCRBYFLOAT f -3", b"$23\r\n99997.30000014999999536\r\n"),
        ("GET f", b"$23\r\n99997.30000014999999536\r\n"),
        ("SET f 5.0e3", b"+OK\r\n"),
        ("INCRBYFLOAT f 2.0e2", b"$4\r\n5200\r\n"),
        ("SET f 3", b"+OK\r\n"),
        ("INCRBYFLOAT f 1", b"$1\r\n4\r\n"),
        ("SET f 1 EX 100", b"+OK\r\n"),
        ("INCRBYFLOAT f -1.5", b"$4\r\n-0.5\r\n"),
        ("TTL f", b":100\r\n"),
        ("SET f 17179869184", b"+OK\r\n"),
        ("INCRBYFLOAT f 1.5", b"$13\r\n17179869185.5\r\n"),
        ("SET f 0", b"+OK\r\n"),
        ("INCRBYFLOAT f 3.14159265358979323846", b"$19\r\n3.14159265358979324\r\n"),
        ("SET f 0", b"+OK\r\n"),
        ("INCRBYFLOAT f 1e20", b"$21\r\n100000000000000000000\r\n"),
        ("INCRBYFLOAT f 1", b"$21\r\n100000000000000000000\r\n"),
        ("INCRBYFLOAT f 1e30", b"$31\r\n1000000000100000000035918970880\r\n"),
        ("SET f 0", b"+OK\r\n"),
        ("INCRBYFLOAT f 1e-17", b"$19\r\n0.00000000000000001\r\n"),
        ("INCRBYFLOAT f 1e-18", b"$19\r\n0.00000000000000001\r\n"),
        ("INCRBYFLOAT f -0.0", b"$19\r\n0.00000000000000001\r\n"),
        ("INCRBYFLOAT g -0.0", b"$1\r\n0\r\n"),
        ("INCRBYFLOAT g -1e-18", b"$1\r\n0\r\n"),
        ("INCRBYFLOAT g 0x10", b"$2\r\n16\r\n"),
        ("INCRBYFLOAT g 0x1p-3", b"$6\r\n16.125\r\n"),
        ("INCRBYFLOAT g .5", b"$6\r\n16.625\r\n"),
        ("INCRBYFLOAT g 5.", b"$6\r\n21.625\r\n"),
        ("INCRBYFLOAT g +5", b"$6\r\n26.625\r\n"),
        ("INCRBYFLOAT g 00012", b"$6\r\n38.625\r\n"),
    ),
    "incrbyfloat of what is no number": (
        ("SET f 1", b"+OK\r\n"),
        ("INCRBYFLOAT f inf", b"-ERR increment would produce NaN or Infinity\r\n"),
        ("INCRBYFLOAT f -Infinity", b"-ERR increment would produce NaN or Infinity\r\n"),
        ("INCRBYFLOAT f nan", b"-ERR value is not a valid float\r\n"),
        ("INCRBYFLOAT f 1e5000", b"-ERR value is not a valid float\r\n"),
        ("INCRBYFLOAT f 1e-5000", b"-ERR value is not a valid float\r\n"),
        ("INCRBYFLOAT f 1e", b"-ERR value is not a valid float\r\n"),
        ("INCRBYFLOAT f .", b"-ERR value is not a valid float\r\n"),
        ("INCRBYFLOAT f 1_0", b"-ERR value is not a valid float\r\n"),
        ("INCRBYFLOAT f ' 1'", b"-ERR value is not a valid float\r\n"),
        ("INCRBYFLOAT f '1 '", b"-ERR value is not a valid float\r\n"),
        ("INCRBYFLOAT f ''", b"-ERR value is not a valid float\r\n"),
        ("INCRBYFLOAT f 0x", b"-ERR value is not a valid float\r\n"),
        ("INCRBYFLOAT f", b"-ERR wrong number of arguments for 'incrbyfloat' command\r\n"),
        ("GET f", b"$1\r\n1\r\n"),
        ("SET f ' 1'", b"+OK\r\n"),
        ("INCRBYFLOAT f 1", b"-ERR value is not a valid float\r\n"),
        ("SET f ''", b"+OK\r\n"),
        ("INCRBYFLOAT f 1", b"-ERR value is not a valid float\r\n"),
        ("SET f inf", b"+OK\r\n"),
        ("INCRBYFLOAT f 1", b"-ERR increment would produce NaN or Infinity\r\n"),
        ("SET f 1e4932", b"+OK\r\n"),
        ("INCRBYFLOAT f 1e4932", b"-ERR increment would produce NaN or Infinity\r\n"),
        ("GET f", b"$6\r\n1e4932\r\n"),
    ),
    "numbers of arguments": (
        ("INCR", b"-ERR wrong number of arguments for 'incr' command\r\n"),
        ("INCR a b", b"-ERR wrong number of arguments for 'incr' command\r\n"),
        ("INCRBY a", b"-ERR wrong number of arguments for 'incrby' command\r\n"),
        ("DECRBY a 1 2", b"-ERR wrong number of arguments for 'decrby' command\r\n"),
    ),
}


@pytest.mark.parametrize("topic", CONVERSATIONS)
async def test_replies(topic: str, converse: Converse) -> None:
    await converse(CONVERSATIONS[topic])


async def test_a_long_number_has_room_in_the_log(open_house: OpenHouse) -> None:
    """What is logged is many times what was sent."""
    margins: list[int] = []

    class Journal(ManualJournal):
        asked = 0

        def has_room(self, size: int) -> bool:
            self.asked = size
            return True

        def append(self, lsn: int, operation: Operation, payload: bytes) -> None:
            super().append(lsn, operation, payload)
            self.asked -= len(payload)
            margins.append(self.asked)

    journal = Journal(automatic=True)
    async with open_house(journal) as house:
        client = house.connect()
        requests = ["INCRBYFLOAT a 1e4931", "INCRBYFLOAT a 1", "SET b 1"]
        await client.send(*requests)
        assert (await client.arrived()).startswith(b"$4932\r\n")
        assert len(encode(journal.records[0][1])) > 4932
        await client.send("MULTI", *requests, "EXEC")
        await client.arrived()
    assert len(margins) == 6
    assert min(margins) > 0
