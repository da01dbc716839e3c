"""A rank's part of a model: which slices of which weights it has, and the module that computes with them.

Tensor-parallel shards split attention heads and hidden widths of MLPs and experts; pipeline stages split the layers.
:mod:`distserve.core.shards` says who has which heads and layers. Nothing here starts a process or opens a connection:
what ranks exchange goes through :class:`distserve.engine.sharding.comm.Communicator`.
"""
