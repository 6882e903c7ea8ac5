"""Bytes to requests, and replies to bytes: the Redis protocol (RESP2 and RESP3) without input or output."""
