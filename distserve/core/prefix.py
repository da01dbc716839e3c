"""Keys of KV blocks: equal keys stand for equal content.

The KV of a token depends on every token before it, so the key of a full block stands for its own tokens and for all
before them: a chain of hashes, as in vLLM's automatic prefix caching. Knows tokens, nothing of blocks in memory.

Every part makes the keys of a request by :func:`extend_keys`, so router, prefill and decode instances mean the same by
them. Of what a request says, only its tokens change its KV (a deployment serves one model in one precision); its
``cache_salt`` goes in because its sender wants it to.
"""

from array import array
from collections.abc import Hashable, Sequence
from hashlib import blake2b

from distserve.core.request import Request

BlockKey = Hashable
"""What a full block of KV holds, with all that comes before it."""

_KEY_BYTES = 16


def chain_keys(token_ids: Sequence[int], block_size: int, salt: bytes = b"", parent: bytes = b"") -> list[bytes]:
    """One key for each full block of ``token_ids``; a rest that fills no block has none.

    ``parent`` is the key of the block before the first one, empty at a sequence's beginning, where ``salt`` goes in:
    sequences of different salts share nothing. Keys are 128 bits of BLAKE2b, so that no prompt can be made that has
    the key of another.
    """
    num_blocks = len(token_ids) // block_size
    content = array("q", token_ids[: num_blocks * block_size]).tobytes()
    size = 8 * block_size
    key = parent or blake2b(salt, digest_size=_KEY_BYTES).digest()
    keys = []
    for start in range(0, len(content), size):
        key = blake2b(key + content[start : start + size], digest_size=_KEY_BYTES).digest()
        keys.append(key)
    return keys


def extend_keys(
    keys: list[BlockKey],
    request: Request,
    output_token_ids: Sequence[int],
    num_blocks: int,
    block_size: int,
    choice: int = 0,
) -> None:
    """Make ``keys``, the first ones of a request's tokens, those of its first ``num_blocks`` full blocks.

    ``output_token_ids`` are what ``choice`` has emitted. Where the request's own keys end, or say nothing of the tokens
    (its output), a block has a key that only attempts at the same request share: whose it is, and its place.
    """
    if len(keys) >= num_blocks:
        return
    num_prompt = len(request.prompt_token_ids)
    if request.block_keys is None:
        start, end = len(keys) * block_size, num_blocks * block_size
        tokens = list(request.prompt_token_ids[start:end])
        tokens += output_token_ids[max(0, start - num_prompt) : max(0, end - num_prompt)]
        parent = keys[-1] if keys else b""
        assert isinstance(parent, bytes), "keys are given or made from tokens, never both"
        keys += chain_keys(tokens, block_size, request.cache_salt.encode(), parent)
        return
    keys += request.block_keys[len(keys) : num_blocks]
    for index in range(len(keys), num_blocks):
        is_prompts = (index + 1) * block_size <= num_prompt
        keys.append((request.request_id, -1 if is_prompts else choice, index))


def split_keys(keys: Sequence[int], tokens_per_key: float, num_tokens: int, block_size: int) -> tuple[int, ...]:
    """The keys of blocks of ``block_size`` tokens, given those of blocks of another size.

    ``keys[i]`` stands for the first ``(i + 1) * tokens_per_key`` tokens of a prompt, or for all of them where it has
    no more; only full blocks of its ``num_tokens`` tokens get a key. A block is known by the key of the given one that
    its last token lies in, and by its place there.
    """
    pieces = int(-(-tokens_per_key // block_size)) + 1
    blocks = []
    for index in range(num_tokens // block_size):
        given = int(((index + 1) * block_size - 1) // tokens_per_key)
        if given >= len(keys):
            break
        blocks.append(keys[given] * pieces + index - int(given * tokens_per_key // block_size))
    return tuple(blocks)
