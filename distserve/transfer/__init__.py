"""KV migration: what to move is pure (:mod:`~distserve.transfer.plan`), how it travels is a transport.

Every rank of an instance owns one :class:`~distserve.transfer.transport.Transport`. It provides the memory the KV
cache lives in, publishes how far the running step is, and pulls blocks out of other ranks' memory:

- :class:`~distserve.transfer.shm.ShmTransport`: between processes of one host, over memory shared by descriptor;
- :class:`~distserve.transfer.tcp.TcpTransport`: between hosts;
- :class:`~distserve.transfer.choose.HostTransport`: either, by where the peer is;
- :class:`~distserve.transfer.cuda_ipc.transport.CudaIpcTransport`: between processes of one host, over GPU memory;
- :class:`~distserve.transfer.nccl.transport.NcclTransport`: between GPUs, over NCCL;
- :class:`~distserve.transfer.gpu.GpuTransport`: either of the two, by what the card reaches;
- :class:`~distserve.transfer.local.LocalTransport`: between pools of one process, for tests and single processes;
- :class:`~distserve.transfer.sharded.ShardedTransport`: on top of any of them, between instances of different shapes.

The package knows nothing of schedulers, requests or Ray.
"""
