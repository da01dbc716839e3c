"""Splits a model's vocabulary over the shards of a stage: the rows of the embeddings, and those of the head.

Each shard looks up the tokens of its rows, and the sum over the shards has them all; each computes the logits of its
rows, and they are put side by side, if the model's plan allows it. Embeddings that are the head's weights as well are
split for both or for neither. What cannot be split evenly, or is stored under a name that tells nothing, stays whole on
every shard.
"""

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from distserve.engine.sharding.comm import Communicator
from distserve.engine.sharding.plan import splits_head
from distserve.engine.sharding.shard import Shard
from distserve.engine.sharding.slicing import Slicing

_OLD_HEAD = "embed_out.weight"
"""What GPT-NeoX's checkpoints call the head."""


class VocabularySplit:
    """Which rows of the vocabulary a shard has, and the hooks that make whole tensors of the shards' parts."""

    def __init__(self, module: PreTrainedModel, shard: Shard, comm: Communicator, stored: Collection[str]) -> None:
        """Split what rank ``shard`` holds of ``module``, which has no storage yet.

        ``stored`` are the names of the checkpoint's tensors; ``module`` still has its embeddings on the first stage,
        and on the last if they are the head's weights.
        """
        self._shard = shard
        self._comm = comm
        self._spans: dict[str, Slicing] = {}
        model: Any = module  # some of its methods are not typed
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        names = {part: name for name, part in module.named_modules()}
        is_tied = bool(getattr(module.config, "tie_word_embeddings", False)) and shard.is_last
        splits_head = shard.is_last and self._can_split_head(module, head, names.get(head, ""))
        has_embedding = isinstance(embedding, nn.Embedding) and (shard.is_first or is_tied)
        splits_embedding = (
            has_embedding
            and embedding.num_embeddings % shard.parallel.tp == 0
            and any(_is_called(name, f"{names[embedding]}.weight") for name in stored)
        )
        if is_tied and not (splits_head and splits_embedding):
            return
        if splits_embedding:
            self._split_embedding(embedding, names[embedding])
        if splits_head:
            self._split_rows(head, names[head])
            head.register_forward_hook(lambda _module, _args, output: comm.gather(output))

    def of_checkpoint(self, name: str) -> Slicing | None:
        """The shard's slice of a checkpoint's tensor; None: all of it."""
        return next((slicing for weight, slicing in self._spans.items() if _is_called(name, weight)), None)

    def _can_split_head(self, module: PreTrainedModel, head: Any, name: str) -> bool:
        return bool(
            splits_head(module, name) and head.bias is None and head.out_features % self._shard.parallel.tp == 0
        )

    def _split_rows(self, part: Any, name: str) -> None:
        slicing = Slicing(0, (self._shard.even_rows(part.weight.shape[0], name),))
        self._spans[f"{name}.weight"] = slicing
        part.weight = nn.Parameter(part.weight.new_empty(slicing.shape(part.weight.shape)), requires_grad=False)

    def _split_embedding(self, embedding: nn.Embedding, name: str) -> None:
        start, stop = self._shard.even_rows(embedding.num_embeddings, name)
        embedding.padding_idx = None  # of use in training alone, and another shard's row perhaps
        self._split_rows(embedding, name)
        is_other: list[Tensor] = []

        def enter(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            is_other.append((args[0] < start) | (args[0] >= stop))
            return ((args[0] - start).clamp(0, stop - start - 1), *args[1:])

        def leave(_: nn.Module, __: object, output: Tensor) -> Tensor:
            own = output.masked_fill(is_other.pop().unsqueeze(-1), 0)
            # A stage that is not the first has the embeddings for its head: what it looks up is not used.
            return self._comm.sum(own) if self._shard.is_first else own

        embedding.register_forward_pre_hook(enter)
        embedding.register_forward_hook(leave)


def _is_called(stored: str, weight: str) -> bool:
    """Whether a checkpoint's tensor is the model's ``weight``; checkpoints of bare models leave a prefix out."""
    is_old_head = stored == _OLD_HEAD and weight == "lm_head.weight"
    return stored == weight or weight.endswith(f".{stored}") or is_old_head
