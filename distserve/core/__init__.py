"""Decisions only: sans-IO state machines and the vocabulary they share.

Pure Python, but for what records are made of (:mod:`distserve.core.records`). No torch, ray, asyncio, time, threads or
sockets: ``now`` is always an argument, and everything a machine wants done leaves it as a command
(:mod:`distserve.core.commands`). The cluster and the simulator are two drivers of the same machines.
"""
