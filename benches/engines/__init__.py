"""Engines that answer the same question about the same frames, each in its own process. See `client`, `worker`."""
