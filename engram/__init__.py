"""engram: a vector memory that any Redis client can talk to."""

__version__ = "0.1.0"

# The release of Redis whose behaviour clients may expect.
REDIS_VERSION = "8.4.0"
