"""KV between processes whose pools are in GPU memory of one host: a peer's pool is mapped, a kernel copies out of it.

This is the transport for shared memory with another copier: memory travels as descriptors over the same greeting, and
progress through the same words. What differs is that work is launched and ends later: a layer is announced once the
device has computed it, and a pull ends once the device has copied it.
"""
