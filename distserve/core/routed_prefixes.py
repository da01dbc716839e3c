"""What the router believes of instances' prefix caches: the keys of the prompts that it sent there.

Soft state. Instances say nothing of their caches, so a belief may be wrong where memory was short; then a prompt is
computed that was thought to be there, and nothing else goes wrong. Both notes are bounded, and the first to be
forgotten is what was used longest ago, as in the caches themselves.
"""

from collections import OrderedDict
from collections.abc import Sequence

from distserve.core.messages import RequestKey
from distserve.core.prefix import BlockKey, extend_keys
from distserve.core.request import Request


class RoutedPrefixes:
    """Keys of blocks that one instance has been sent; at most ``capacity``, the blocks of its memory."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._keys: OrderedDict[BlockKey, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._keys)

    def num_held(self, keys: Sequence[BlockKey]) -> int:
        """How many of ``keys``, from the first on, the instance should have."""
        known = self._keys
        for index, key in enumerate(keys):
            if key not in known:
                return index
        return len(keys)

    def note(self, keys: Sequence[BlockKey]) -> None:
        """A prompt of these blocks was sent there: its head is used last, since most have that in common with it."""
        known = self._keys
        for key in reversed(keys[: self._capacity]):
            known[key] = None
            known.move_to_end(key)
        while len(known) > self._capacity:
            known.popitem(last=False)


class PromptKeys:
    """Keys of requests, made once and kept until a decode instance is wanted, which may be asked for several times.

    At most ``capacity`` in all, requests counting as one more each.
    """

    def __init__(self, capacity: int = 1 << 17) -> None:
        self._capacity = capacity
        self._num_keys = 0
        self._entries: OrderedDict[tuple[RequestKey, int], list[BlockKey]] = OrderedDict()

    def make(self, request: Request, block_size: int) -> Sequence[BlockKey]:
        """The keys of the request's full blocks of ``block_size`` tokens."""
        entry = (request.key, block_size)
        keys = self._entries.get(entry)
        if keys is None:
            keys = []
            num_blocks = request.num_prefill_tokens // block_size
            extend_keys(keys, request, request.output_token_ids, num_blocks, block_size, request.choices[0])
            self._entries[entry] = keys
            self._num_keys += len(keys) + 1
            while self._num_keys > self._capacity:
                _, oldest = self._entries.popitem(last=False)
                self._num_keys -= len(oldest) + 1
        return keys

    def find(self, key: RequestKey, block_size: int) -> Sequence[BlockKey]:
        """The keys of a request, empty if they were not made or are forgotten."""
        return self._entries.get((key, block_size), ())
