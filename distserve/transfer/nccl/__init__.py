"""KV between the memories of GPUs, moved by NCCL. Opens with its rules; every module below keeps one of them.

1. A pair of ranks has a communicator of two, made when the first pull needs it, under a deadline, on a thread that can
   be abandoned. Each has a *generation*, which only grows. (:mod:`~distserve.transfer.nccl.link`)
2. A rank holds at most so many communicators; the least recently used idle one makes way. A communicator that hangs
   while it is made or ended still counts. (:mod:`~distserve.transfer.nccl.room`)
3. The source packs a piece into a slot of its staging ring and says READY; the destination, which has reserved the
   blocks and a slot of its own ring, says GO and launches its receive; on GO the source launches its send. So nothing
   spins on a GPU while a prefill computes, and there is no send without its receive.
   (:mod:`~distserve.transfer.nccl.outbound`, :mod:`~distserve.transfer.nccl.inbound`)
4. Pieces have 16 MB or more, or are the only one of their blocks; two are under way per pair.
   (:mod:`~distserve.transfer.nccl.pieces`)
5. NCCL writes into staging only. KV blocks are written by the unpack kernel, which is launched for a piece that has
   arrived, of a pull that is alive, on a stream that no NCCL kernel is ever on. So a pull may end at any time, with its
   blocks free, whatever NCCL is stuck in.
6. Nothing waits for a GPU but by looking at events. An operation that outlives its deadline, or fails, ends its
   generation on both sides: aborted by a thread of its own, and the next pull opens the next one.

The state machines are pure and know nothing of sockets, threads, torch or NCCL; :mod:`~distserve.transfer.nccl.driver`
does what they say, through :mod:`~distserve.transfer.nccl.collectives` and :mod:`~distserve.transfer.nccl.device`.
"""
