"""Step times from tables over numbers of tokens and sequences: fast enough to be asked once per simulated step.

Knows no model and no GPU; whoever does fills the tables.
"""

from dataclasses import dataclass
from itertools import accumulate

from distserve.core.latency import StepShape
from simulator.latency.runs import affine_ends

# Steps of more tokens or sequences than this are extrapolated: kernels of that size run at a steady rate.
LARGEST = 8192


@dataclass(frozen=True, slots=True)
class TabulatedStepTime:
    """One instance shape's times: entry ``i`` of a table is that of ``i`` tokens or sequences, the last slope goes on.

    ``token`` is all that depends on the number of tokens alone, ``row`` on the rows whose logits are computed. Prompts'
    attention takes ``prefill`` by their tokens and ``pair`` of it for each (query, key) pair, decodes' attention
    ``decode`` by their number and ``context`` of it for each cached token, ``mixed`` times as long beside prompts.
    ``serial`` comes on top of kernels; ``floor_prefill`` and ``floor_decode`` are what the host needs to launch them.
    """

    token: list[float]
    row: list[float]
    prefill: list[float]
    pair: list[float]
    decode: list[float]
    context: list[float]
    mixed: float
    serial: float
    floor_prefill: float
    floor_decode: float
    send_latency: float
    send_per_token: float

    def seconds(self, shape: StepShape) -> float:
        """See :class:`distserve.core.latency.StepTime`."""
        num_prefill_tokens = shape.num_prefill_tokens
        num_decodes = shape.num_decodes
        num_tokens = num_prefill_tokens + num_decodes
        if num_tokens > LARGEST:
            return self._beyond(shape)
        time = self.token[num_tokens] + self.row[shape.num_prefills + num_decodes]
        floor = self.floor_decode
        if num_prefill_tokens:
            time += self.prefill[num_prefill_tokens] + shape.prefill_pairs * self.pair[num_prefill_tokens]
            floor = self.floor_prefill
        if num_decodes:
            attention = self.decode[num_decodes] + shape.decode_context * self.context[num_decodes]
            time += attention * self.mixed if num_prefill_tokens else attention
        return self.serial + (time if time > floor else floor)  # noqa: FURB136 -- half the time of max()

    def decode_ends(self, num_decodes: int, context: int, num_steps: int, start: float) -> list[float]:
        """See :class:`simulator.latency.interface.DecodeRunTime`."""
        if num_decodes > LARGEST:
            contexts = range(context, context + num_steps * num_decodes, num_decodes)
            steps = [self._beyond(StepShape(num_decodes=num_decodes, decode_context=tokens)) for tokens in contexts]
            return list(accumulate(steps, initial=start))[1:]
        fixed, base = self.token[num_decodes] + self.row[num_decodes], self.decode[num_decodes]
        slope, floor, serial = self.context[num_decodes], self.floor_decode, self.serial
        return affine_ends(start, num_steps, num_decodes, context, slope, base, fixed, floor, serial)

    def _beyond(self, shape: StepShape) -> float:
        num_prefill_tokens, num_decodes = shape.num_prefill_tokens, shape.num_decodes
        time = _extended(self.token, num_prefill_tokens + num_decodes)
        time += _extended(self.row, shape.num_prefills + num_decodes)
        if num_prefill_tokens:
            time += _extended(self.prefill, num_prefill_tokens)
            time += shape.prefill_pairs * self.pair[min(num_prefill_tokens, LARGEST)]
        if num_decodes:
            attention = _extended(self.decode, num_decodes)
            attention += shape.decode_context * self.context[min(num_decodes, LARGEST)]
            time += attention * self.mixed if num_prefill_tokens else attention
        return self.serial + max(time, self.floor_prefill if num_prefill_tokens else self.floor_decode)

    def handover(self, shape: StepShape) -> float:
        """See :class:`distserve.core.latency.StepTime`."""
        return self.send_latency + self.send_per_token * (shape.num_prefill_tokens + shape.num_decodes)


def _extended(table: list[float], index: int) -> float:
    if index <= LARGEST:
        return table[index]
    half = LARGEST // 2
    return table[LARGEST] + (table[LARGEST] - table[half]) / (LARGEST - half) * (index - LARGEST)
