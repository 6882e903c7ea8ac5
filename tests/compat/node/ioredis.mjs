// ioredis: node ioredis.mjs PORT PROTOCOL; silent when all is well.

import assert from "node:assert/strict";
import Redis from "ioredis";
import { NOT_AN_INTEGER, WRONGTYPE, refused, vector } from "./check.mjs";

const [port, protocol] = process.argv.slice(2).map(Number);
const options = { port, protocol, maxRetriesPerRequest: 0, retryStrategy: null };

// Connecting waits for INFO to say that the server is not loading.
const redis = new Redis({ ...options, connectionName: "tester", db: 0 });
const other = new Redis(options);
assert.equal(await redis.ping(), "PONG");
assert.equal(await redis.client("GETNAME"), "tester");
assert.match(await redis.client("INFO"), new RegExp(` resp=${protocol} `));
assert.match(await redis.client("INFO"), / lib-name=ioredis/);

// Strings
assert.equal(await redis.set("key", "value"), "OK");
assert.equal(await redis.get("key"), "value");
assert.equal(await redis.get("missing"), null);
assert.equal(await redis.set("key", "other", "NX"), null);
assert.equal(await redis.set("key", "other", "EX", 100, "XX", "GET"), "value");
assert.equal(await redis.mset({ first: 1, second: "two" }), "OK");
assert.deepEqual(await redis.mget("first", "missing", "second"), ["1", null, "two"]);
assert.equal(await redis.msetnx("first", 1, "third", 3), 0);
assert.equal(await redis.getrange("second", 0, 1), "tw");
assert.equal(await redis.setrange("second", 3, "!"), 4);
assert.equal(await redis.getdel("second"), "two!");
assert.equal(await redis.incrbyfloat("first", 0.5), "1.5");
assert.equal(await redis.setbit("bits", 7, 1), 0);
assert.equal(await redis.getbit("bits", 7), 1);
assert.equal(await redis.bitcount("bits"), 1);
const binary = Buffer.from(Array.from({ length: 256 }, (_, byte) => byte));
await redis.set(binary, binary);
assert.deepEqual(await redis.getBuffer(binary), binary);

// Keys
assert.ok((await redis.ttl("key")) > 90);
assert.equal(await redis.persist("key"), 1);
assert.equal(await redis.expire("key", 100), 1);
assert.equal(await redis.rename("key", "renamed"), "OK");
assert.equal(await redis.copy("renamed", "copied"), 1);
assert.equal(await redis.type("copied"), "string");
assert.equal(await redis.object("ENCODING", "copied"), "embstr");
assert.equal(await redis.touch("copied", "renamed", "missing"), 2);
const found = [];
for await (const keys of redis.scanStream({ match: "*ed", count: 2 })) found.push(...keys);
assert.deepEqual(found.sort(), ["copied", "renamed"]);

// Errors, each of which leaves the connection usable
await refused(redis.incr("copied"), NOT_AN_INTEGER);
await refused(redis.rename("missing", "key"), "ERR no such key");
await refused(redis.call("FOOBAR", "x"), "ERR unknown command 'FOOBAR', with args beginning with: 'x' ");
await refused(redis.call("GET"), "ERR wrong number of arguments for 'get' command");
await refused(redis.select(16), "ERR DB index is out of range");
assert.equal(await redis.select(0), "OK");

// Pipelines and transactions
const pipeline = redis.pipeline();
for (let number = 0; number < 1000; number++) pipeline.incr("counter");
assert.deepEqual((await pipeline.exec()).at(-1), [null, 1000]);
assert.deepEqual(await redis.multi().set("a", 1).incr("a").get("a").exec(), [
  [null, "OK"],
  [null, 2],
  [null, "2"],
]);
const [[, done], [failure], [, after]] = await redis.multi().set("a", "x").incr("a").get("a").exec();
assert.deepEqual([done, failure.message, after], ["OK", NOT_AN_INTEGER, "x"]);
await refused(
  redis.multi().set("a", 1).call("GET").exec(),
  "EXECABORT Transaction discarded because of previous errors.",
);
assert.equal(await redis.get("a"), "x");
await redis.watch("a");
await other.set("a", "changed");
assert.equal(await redis.multi().set("a", "lost").exec(), null);
assert.equal(await redis.get("a"), "changed");

// Vectors
assert.equal(await redis.call("VNEW", "colours", 3, "METRIC", "l2"), "OK");
assert.equal(await redis.call("VADD", "colours", "red", vector(1, 0, 0)), 1);
assert.equal(await redis.call("VADD", "colours", "blue", vector(0, 0, 2)), 1);
const nearest = await redis.call("VSEARCH", "colours", vector(0, 0, 1), 1);
assert.deepEqual(nearest, ["blue", "1"]);
await refused(redis.get("colours"), WRONGTYPE);

// What an operator does
assert.match(await redis.info("keyspace"), /db0:keys=\d+/);
assert.deepEqual(await redis.config("GET", "databases"), ["databases", "16"]);
assert.ok((await redis.command("COUNT")) > 50);
const monitor = await other.monitor();
const seen = new Promise((resolve) => monitor.once("monitor", (_, words) => resolve(words)));
await redis.set("watched", "yes");
assert.deepEqual(await seen, ["set", "watched", "yes"]);
monitor.disconnect();

assert.equal(await redis.quit(), "OK");
other.disconnect();
