// What the scripts of both clients need.

import assert from "node:assert/strict";

/** A vector as engram's own commands take it: little-endian 32-bit floats. */
export const vector = (...numbers) => Buffer.from(new Float32Array(numbers).buffer);

/** Asserts that a call fails with this text, Redis's error code included. */
export const refused = (promise, message) =>
  assert.rejects(promise, (error) => {
    assert.equal(error.message, message);
    return true;
  });

export const WRONGTYPE = "WRONGTYPE Operation against a key holding the wrong kind of value";
export const NOT_AN_INTEGER = "ERR value is not an integer or out of range";
