"""The demo model's tokenizer: byte-level BPE, so any text survives a round trip, and a chat template.

Promises a Hugging Face fast tokenizer whose special tokens have the ids of their order in `SPECIAL_TOKENS`. Encoding a
plain prompt puts `<|begin|>` in front, as Llama's tokenizer does; the chat template writes it itself, so a rendered
template is encoded with `add_special_tokens=False`. Must not know where the text comes from.
"""

from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BEGIN = "<|begin|>"
END = "<|end|>"  # ends every turn and every text: the end-of-sequence token
PAD = "<|pad|>"
SPECIAL_TOKENS = (PAD, BEGIN, END, "<|system|>", "<|user|>", "<|assistant|>")

# <|begin|><|user|>\nquestion<|end|>\n<|assistant|>\nanswer<|end|>\n
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] not in ['system', 'user', 'assistant'] %}
        {{- raise_exception("the demo model's roles are system, user and assistant, not " ~ message['role']) }}
    {%- endif %}
    {{- '<|' ~ message['role'] ~ '|>\\n' ~ message['content'] ~ eos_token ~ '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\\n' }}
{%- endif %}
"""


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer of `vocab_size` entries, special tokens and the 256 bytes included.

    `max_length` is the model's context in tokens, recorded in the tokenizer's configuration.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A",
        pair=f"{BEGIN} $A {BEGIN} $B",
        special_tokens=[(BEGIN, bpe.token_to_id(BEGIN))],
    )
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=bpe,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def render(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = False
) -> str:
    """Return the conversation as the prompt text that the chat template makes of it."""
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=add_generation_prompt)
    assert isinstance(text, str)
    return text
