// node-redis: node node_redis.mjs PORT PROTOCOL; silent when all is well.

import assert from "node:assert/strict";
import { createClient, createClientPool, RESP_TYPES, WatchError } from "redis";
import { NOT_AN_INTEGER, WRONGTYPE, refused, vector } from "./check.mjs";

const [port, RESP] = process.argv.slice(2).map(Number);
const options = { socket: { port, reconnectStrategy: false }, RESP };

const connect = (more = {}) =>
  createClient({ ...options, ...more })
    .on("error", (error) => {
      throw error;
    })
    .connect();

const client = await connect({ name: "tester", database: 0 });
const other = await connect();
assert.equal(await client.ping(), "PONG");
assert.equal(await client.clientGetName(), "tester");
const information = await client.sendCommand(["CLIENT", "INFO"]);
assert.match(information, new RegExp(` resp=${RESP} `));
assert.match(information, / lib-name=node-redis/);

// Strings
assert.equal(await client.set("key", "value"), "OK");
assert.equal(await client.get("key"), "value");
assert.equal(await client.get("missing"), null);
assert.equal(await client.set("key", "other", { condition: "NX" }), null);
const expiration = { type: "EX", value: 100 };
assert.equal(await client.set("key", "other", { expiration, condition: "XX", GET: true }), "value");
assert.equal(await client.mSet({ first: "1", second: "two" }), "OK");
assert.deepEqual(await client.mGet(["first", "missing", "second"]), ["1", null, "two"]);
assert.equal(await client.mSetNX({ first: "1", third: "3" }), 0);
assert.equal(await client.getRange("second", 0, 1), "tw");
assert.equal(await client.setRange("second", 3, "!"), 4);
assert.equal(await client.getDel("second"), "two!");
assert.equal(await client.incrByFloat("first", 0.5), "1.5");
assert.equal(await client.setBit("bits", 7, 1), 0);
assert.equal(await client.getBit("bits", 7), 1);
assert.equal(await client.bitCount("bits"), 1);
const binary = Buffer.from(Array.from({ length: 256 }, (_, byte) => byte));
await client.set(binary, binary);
const buffers = client.withTypeMapping({ [RESP_TYPES.BLOB_STRING]: Buffer });
assert.deepEqual(await buffers.get(binary), binary);

// Keys
assert.ok((await client.ttl("key")) > 90);
assert.equal(await client.persist("key"), 1);
assert.equal(await client.expire("key", 100, "NX"), 1);
assert.equal(await client.rename("key", "renamed"), "OK");
assert.equal(await client.copy("renamed", "copied"), 1);
assert.equal(await client.type("copied"), "string");
assert.equal(await client.objectEncoding("copied"), "embstr");
assert.equal(await client.touch(["copied", "renamed", "missing"]), 2);
const found = [];
for await (const keys of client.scanIterator({ MATCH: "*ed", COUNT: 2 })) found.push(...keys);
assert.deepEqual(found.sort(), ["copied", "renamed"]);

// Errors, each of which leaves the connection usable
await refused(client.incr("copied"), NOT_AN_INTEGER);
await refused(client.rename("missing", "key"), "ERR no such key");
await refused(
  client.sendCommand(["FOOBAR", "x"]),
  "ERR unknown command 'FOOBAR', with args beginning with: 'x' ",
);
await refused(client.sendCommand(["GET"]), "ERR wrong number of arguments for 'get' command");
await refused(client.select(16), "ERR DB index is out of range");

// Pipelines and transactions
const counts = await Promise.all(Array.from({ length: 1000 }, () => client.incr("counter")));
assert.deepEqual(counts, Array.from({ length: 1000 }, (_, number) => number + 1));
assert.deepEqual(await client.multi().set("a", "1").incr("a").get("a").exec(), ["OK", 2, "2"]);
const failing = client.multi().set("a", "x").incr("a").get("a").exec();
await assert.rejects(failing, (error) => {
  assert.deepEqual(error.replies.map(String), ["OK", `Error: ${NOT_AN_INTEGER}`, "x"]);
  return true;
});
await assert.rejects(client.multi().set("a", "1").addCommand(["GET"]).exec());
assert.equal(await client.get("a"), "x");
await client.watch("a");
await other.set("a", "changed");
await assert.rejects(client.multi().set("a", "lost").exec(), WatchError);
assert.equal(await client.get("a"), "changed");

// A pool
const pool = await createClientPool(options, { minimum: 2, maximum: 8 }).connect();
await Promise.all(Array.from({ length: 100 }, () => pool.incr("shared")));
assert.equal(await pool.get("shared"), "100");
await pool.close();

// Vectors: engram's own commands, then those of Redis 8 that the client knows
assert.equal(await client.sendCommand(["VNEW", "colours", "3", "METRIC", "l2"]), "OK");
assert.equal(await client.sendCommand(["VADD", "colours", "red", vector(1, 0, 0)]), 1);
assert.equal(await client.sendCommand(["VADD", "colours", "blue", vector(0, 0, 2)]), 1);
const nearest = await client.sendCommand(["VSEARCH", "colours", vector(0, 0, 1), "1"]);
assert.deepEqual(nearest, ["blue", "1"]);
await refused(client.get("colours"), WRONGTYPE);

// What an operator does
assert.match(await client.info("keyspace"), /db0:keys=\d+/);
assert.deepEqual({ ...(await client.configGet("databases")) }, { databases: "16" });
assert.ok((await client.commandCount()) > 50);
assert.ok((await client.clientList()).some((each) => each.name === "tester"));
const monitor = await connect();
const lines = [];
await monitor.monitor((line) => lines.push(line.toString()));
await client.set("watched", "yes");
// What happened before the server has answered this one is in the feed.
while (!lines.some((line) => line.includes('"watched"'))) await client.ping();
assert.match(lines[0], /^\d+\.\d+ \[0 127\.0\.0\.1:\d+\] "SET" "watched" "yes"$/);
monitor.destroy();

other.destroy();
await client.close();
