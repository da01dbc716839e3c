"""Drawing by inverse CDF: the token at which the weight, summed up in vocabulary order, passes a uniform number."""

import torch
from torch import Tensor
from torch.nn.functional import pad

_CHUNK = 128


def draw(weights: Tensor, numbers: Tensor) -> Tensor:
    """Tokens [S] drawn with probabilities proportional to weights [S, V] float32, for numbers [S] float64 in [0, 1).

    Sums go over chunks of the vocabulary first: a running sum over all of it would cost several times the rest.
    """
    num_rows = len(weights)
    chunks = pad(weights, (0, -weights.shape[-1] % _CHUNK)).view(num_rows, -1, _CHUNK)
    chunk, rest = _locate(chunks.sum(-1).double(), numbers, relative=True)
    token, _ = _locate(chunks[torch.arange(num_rows), chunk].double(), rest, relative=False)
    return chunk * _CHUNK + token


def _locate(weights: Tensor, target: Tensor, *, relative: bool) -> tuple[Tensor, Tensor]:
    """The entry of each row of weights [S, n] in which the target [S] falls, and how far into it.

    A ``relative`` target is a share of the row's sum.
    """
    cumulated = weights.cumsum(-1)
    total = cumulated[:, -1]
    target = target * total if relative else target
    # Rounding must not carry the target up to the total, past the last entry with any weight.
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total))).unsqueeze(1)
    index = torch.searchsorted(cumulated, target, right=True)
    index.clamp_(max=weights.shape[-1] - 1)
    passed = torch.where(index > 0, cumulated.gather(1, (index - 1).clamp_(min=0)), 0.0)
    return index.squeeze(1), (target - passed).squeeze(1)
