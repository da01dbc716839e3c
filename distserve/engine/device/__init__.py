"""Steps on an accelerator: none waits for the device, and decode batches are replayed from captured graphs.

:class:`distserve.engine.device.runner.DeviceRunner` does what :class:`distserve.engine.worker.Worker` does on a CPU,
with drawn tokens that stay on the device: the next step reads them there while they travel to the host. What is CUDA's
is behind :class:`distserve.engine.device.backend.Backend`; a second backend rehearses everything else on the CPU.
"""
