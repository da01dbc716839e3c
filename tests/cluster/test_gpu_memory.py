"""How a card is divided: everything fits, everyone can work, and a user is told what is missing and what would help."""

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distserve.cluster.gpu_memory import (
    CardMemory,
    Limits,
    ModelMemory,
    activation_bytes,
    split_card,
)
from distserve.cluster.sizing import KvRequest
from distserve.core.config import Role
from distserve.core.errors import ConfigError

GIB = 2**30
H200 = CardMemory(0, "NVIDIA H200", 140 * GIB, 139 * GIB)
LLAMA_8B = ModelMemory("bfloat16", 16 * GIB, 131072, 200_000, 6 * 128256, 32 * 128256)
LIMITS = Limits(max_batch_tokens=4096, max_batch_size=64, max_model_len=8192)
BOTH = (Role.PREFILL, Role.DECODE)

roles = st.sampled_from(
    [BOTH, (Role.MIXED,), (Role.PREFILL, Role.PREFILL, Role.DECODE), (Role.DECODE,), (Role.PREFILL,)]
)
models = st.builds(
    ModelMemory,
    dtype=st.sampled_from(["float32", "bfloat16"]),
    weights=st.integers(1, 90 * GIB),
    token_kv=st.integers(64, 2**22),
    token_activations=st.integers(1, 10**6),
    row_logits=st.integers(1, 10**6),
    row_sampling=st.integers(1, 10**7),
)
limits = st.builds(
    Limits,
    max_batch_tokens=st.integers(1, 8192),
    max_batch_size=st.integers(1, 512),
    max_model_len=st.integers(1, 131072),
)
requests = st.builds(
    KvRequest,
    num_tokens=st.none() | st.integers(1, 10**6),
    num_bytes=st.none() | st.integers(2**26, 2**36),
    block_size=st.sampled_from([1, 4, 16, 256]),
)


@st.composite
def cards(draw):
    total = draw(st.integers(GIB, 192 * GIB))
    return CardMemory(draw(st.integers(0, 7)), "card", total, draw(st.integers(total // 2, total)))


@given(cards(), roles, models, limits, requests)
def test_what_is_given_fits_and_suffices(card, roles, model, limits, request):
    try:
        parts = split_card(card, roles, model, limits, request)
    except ConfigError:
        return
    assert tuple(part.role for part in parts) == tuple(roles)
    assert sum(part.num_bytes for part in parts) <= card.free - int(0.02 * card.total)
    for part in parts:
        assert part.weights == model.weights
        assert part.activations == activation_bytes(part.role, model, limits)
        assert part.kv_bytes == part.kv.num_blocks * request.block_size * model.token_kv
        if request.num_tokens is not None:
            assert part.kv.num_blocks == -(-request.num_tokens // request.block_size)
        elif request.num_bytes is not None:
            assert part.kv_bytes <= request.num_bytes < part.kv_bytes + request.block_size * model.token_kv
        else:
            assert part.kv.num_tokens > limits.max_model_len, "a sequence of full length runs on it"
            assert part.kv.num_blocks <= limits.max_batch_size * part.kv.blocks_for(limits.max_model_len + 1) or (
                part.role is Role.PREFILL
            )


@given(cards(), roles, models, limits, requests)
def test_what_is_missing_is_just_what_is_missing(card, roles, model, limits, request):
    """Refused only where there is no room; with the bytes that were missing there is."""
    try:
        split_card(card, roles, model, limits, request)
    except ConfigError as error:
        found = re.search(r"; (\d+) bytes \(.* GiB\) are missing", str(error))
        if found is None:
            # The KV asked for is less than a block: room is not what is missing.
            assert request.num_bytes is not None
            return
        roomier = replace(card, free=card.free + int(found[1]))
        split_card(roomier, roles, model, limits, request)
        with pytest.raises(ConfigError):
            split_card(replace(roomier, free=roomier.free - 1), roles, model, limits, request)


@given(cards(), roles, models, limits, requests)
def test_what_is_advised_does_help(card, roles, model, limits, request):
    try:
        split_card(card, roles, model, limits, request)
    except ConfigError as error:
        text = str(error)
        if found := re.search(r"--max-model-len (\d+)", text.partition("What would do")[2]):
            shorter = replace(limits, max_model_len=int(found[1]))
            split_card(card, roles, model, shorter, request)
            with pytest.raises(ConfigError):
                split_card(card, roles, model, replace(shorter, max_model_len=int(found[1]) + 1), request)
        if "(--mixed 1)" in text:
            split_card(card, (Role.MIXED,), model, limits, request)
        if "(--dtype bfloat16)" in text:
            split_card(card, roles, model.halved(), limits, request)


@given(cards(), models, limits)
def test_decode_gets_the_rest(card, model, limits):
    """Prefill has what its queue and leases need, and no more than a quarter beyond a full-length prompt's."""
    try:
        prefill, decode = split_card(card, BOTH, model, limits, KvRequest())
    except ConfigError:
        return
    least = prefill.kv.blocks_for(limits.max_model_len + 1)
    both = prefill.kv.num_blocks + decode.kv.num_blocks
    assert prefill.kv.num_blocks <= max(least, (2 * limits.max_model_len + 4 * limits.max_batch_tokens) // 16 + 1)
    if decode.kv.num_blocks < limits.max_batch_size * least:
        assert prefill.kv.num_blocks <= max(least, both // 4 + 1)
        left = card.free - int(0.02 * card.total) - prefill.num_bytes - decode.num_bytes
        assert left < 16 * model.token_kv, "memory is left that decode could use"


def test_an_8b_model_on_one_large_card():
    prefill, decode = split_card(H200, BOTH, LLAMA_8B, LIMITS, KvRequest())
    assert prefill.kv.num_tokens == 2 * 8192 + 4 * 4096
    assert decode.kv.num_tokens > 500_000
    assert prefill.weights + decode.weights == 32 * GIB


def test_a_card_that_is_too_small_says_how_much_is_missing_and_what_would_help():
    small = CardMemory(1, "NVIDIA L4", 23 * GIB, 22 * GIB)
    with pytest.raises(ConfigError) as caught:
        split_card(small, BOTH, LLAMA_8B, replace(LIMITS, max_batch_tokens=512), KvRequest())
    text = str(caught.value)
    assert text.startswith("GPU 1 (NVIDIA L4) has no room for prefill and decode: they need ")
    assert "not shared between processes" in text
    assert "What would do: one mixed instance, which holds the weights once (--mixed 1)." in text


def test_where_nothing_helps_it_says_so():
    with pytest.raises(ConfigError, match="use a larger card or a smaller model"):
        split_card(replace(H200, free=10 * GIB), BOTH, LLAMA_8B, LIMITS, KvRequest())
