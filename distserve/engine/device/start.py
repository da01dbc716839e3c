"""From a model directory to a runner on a device: the fast path where it agrees with the model's own, and graphs."""

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from distserve.core.config import KvConfig, KvLayout
from distserve.core.errors import ConfigError
from distserve.engine.description import ModelDescription
from distserve.engine.device.backend import Backend, Padding
from distserve.engine.device.cuda import CudaBackend
from distserve.engine.device.decode import DecodeGraphs
from distserve.engine.device.experts import use_grouped_experts
from distserve.engine.device.ladder import make_ladder
from distserve.engine.device.norms import fuse_norms
from distserve.engine.device.part import Stage
from distserve.engine.device.room import check_room
from distserve.engine.device.runner import DeviceRunner, Model
from distserve.engine.fused import FusedModel, can_fuse
from distserve.engine.kv import KvPool
from distserve.engine.loader import load_module
from distserve.engine.model import LanguageModel, TransformersModel
from distserve.engine.verify import check_agreement, run_trial

logger = logging.getLogger(__name__)


def backend_for(device: str) -> Backend | None:
    """The backend of ``cuda`` or ``cuda:N``; None for ``cpu``, which needs none.

    Raises ConfigError if there is no such device.
    """
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device {device!r} is not one of cpu, cuda or cuda:N") from error
    if where.type == "cpu":
        return None
    if where.type != "cuda":
        raise ConfigError(f"device {device!r} is not one of cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (where.index or 0) >= count:
        raise ConfigError(
            f"device {device} is not there: torch {torch.__version__} finds {count} CUDA devices"
            + ("" if torch.version.cuda else "; this torch is built without CUDA")
        )
    return CudaBackend(where)


def load_runner(
    config: PreTrainedConfig,
    model_dir: Path,
    description: ModelDescription,
    *,
    dtype: str,
    kv: KvConfig,
    kv_buffer: torch.Tensor | None,
    backend: Backend,
    max_batch_size: int,
    fused: bool,
    graphs: bool,
) -> tuple[KvPool, DeviceRunner]:
    """Load the model of ``config`` in ``model_dir`` onto a device; arguments as of :func:`start_runner`.

    Raises:
        UnsupportedModelError: the model cannot be served exactly.
        ConfigError: the directory is damaged, or the device has no room for weights and KV.
    """
    layout = description.layout(kv, dtype)
    check_room(description.weight_bytes(dtype), 0 if kv_buffer is not None else layout.num_bytes, backend.device)
    try:
        with backend.scope():
            pool = make_pool(layout, kv_buffer, backend)
            module: PreTrainedModel = load_module(config, model_dir, dtype).to(backend.device)  # type: ignore[arg-type]
        runner = start_runner(module, pool, backend, max_batch_size=max_batch_size, fused=fused, graphs=graphs)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"{backend.device} holds the model's weights and KV but has no room to compute: give it fewer KV blocks or "
            f"a smaller max_batch_size ({error})"
        ) from error
    return pool, runner


def make_pool(layout: KvLayout, buffer: torch.Tensor | None, backend: Backend) -> KvPool:
    """KV memory for ``backend``: ``buffer``, or memory of its own, with a spare block where padding needs one."""
    assert buffer is None or buffer.device == backend.device
    needs_spare = buffer is None and not backend.skips_padding
    return KvPool(layout, buffer, device=backend.device, num_spare=int(needs_spare))


def start_runner(
    module: PreTrainedModel,
    kv: KvPool,
    backend: Backend,
    *,
    max_batch_size: int,
    fused: bool = True,
    graphs: bool = True,
) -> DeviceRunner:
    """Try ``module``, which is on the device, choose its fast path if it has one, and capture its decode steps.

    Args:
        module: loaded with our attention; may be taken apart.
        kv: made by :func:`make_pool`.
        backend: of the device both are on.
        max_batch_size: the largest decode batch that is captured; larger ones run all the same.
        fused: take the fused path where the model allows; False runs transformers' own modules, the reference.
        graphs: capture decode steps.

    Raises:
        UnsupportedModelError: the model cannot be served exactly.
        ConfigError: its logits are not finite, or the pool is too small.
    """
    config = module.config
    with backend.scope(), torch.inference_mode():
        trial = run_trial(module, kv)
        model: LanguageModel
        if fused and can_fuse(module, kv, trial.settings):
            model = FusedModel(module, kv, trial.settings)
        else:
            if fused:
                use_grouped_experts(module)
                fuse_norms(module)
            model = TransformersModel(module, kv)
        check_agreement(model, trial, kv, config.model_type)
        captured = None
        if graphs:
            captured = capture_graphs(model, kv, backend, config, max_batch_size)
    return DeviceRunner(model, kv, backend, vocab_size=config.vocab_size, graphs=captured)


def capture_graphs(
    model: Model,
    kv: KvPool,
    backend: Backend,
    config: PreTrainedConfig,
    max_batch_size: int,
    stage: Stage | None = None,
) -> DecodeGraphs | None:
    """Capture the decode steps of ``model``, or of a rank's ``stage``; None if they cannot be padded.

    Called within the backend's scope; the rest is as of :func:`start_runner`.
    """
    layout = kv.layout
    if not backend.skips_padding and kv.num_spare == 0:
        logger.warning("decode steps run without graphs: padding would need a KV block of its own, or triton")
        return None
    sizes: Any = config
    # A sequence may overrun its longest by the token of a step that was launched ahead.
    max_blocks = min(layout.num_blocks, -(-(sizes.max_position_embeddings + 1) // layout.block_size))
    padding = Padding(-1, 0) if backend.skips_padding else Padding(0, layout.num_blocks)
    result = DecodeGraphs(
        model,
        backend,
        rungs=make_ladder(max_batch_size),
        block_size=layout.block_size,
        max_blocks=max_blocks,
        padding=padding,
        stage=stage,
    )
    result.capture(sizes.vocab_size, layout.num_blocks)
    return result
