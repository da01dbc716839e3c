"""A model directory's tokenizer and chat template, without torch.

Reads ``tokenizer.json`` with the tokenizers library. A directory that has only older files (``vocab.json``,
``tokenizer.model``) is read through transformers' AutoTokenizer, which costs this process the memory of importing it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders

from distserve.core.errors import ConfigError, InvalidRequestError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
"""Any of them makes a directory one with a tokenizer."""

LONG_TEXT = 4_000
"""Characters from which encoding (about a microsecond each) releases the GIL, and is worth a thread."""

MANY_TOKENS = 1_000
"""Tokens from which decoding (up to some ten microseconds each) does the same."""

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_of_char() -> dict[str, int]:
    """GPT-2's table of printable stand-ins for bytes (``bytes_to_unicode`` in its encoder.py), inverted."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    table.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return table


_BYTE_OF_CHAR = _byte_of_char()


class TextTokenizer:
    """Encoding, decoding and chat formatting as transformers does them for the same directory.

    ``named_tokens`` are the special tokens that chat templates refer to by name (``bos_token``, ...).
    """

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, *, chat_template: str | None, named_tokens: Mapping[str, str]
    ) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._named_tokens = dict(named_tokens)
        self._bytes: dict[int, bytes] = {}
        self.special_ids = frozenset(i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special)
        self.is_byte_level = isinstance(tokenizer.decoder, decoders.ByteLevel)
        if chat_template is not None:
            # A second of imports, which the first conversation should not wait for.
            from transformers.utils.chat_template_utils import render_jinja_template

            self._render = render_jinja_template
        self.longest_token = max(map(len, tokenizer.get_vocab()), default=1)

    @property
    def eos_token_id(self) -> int | None:
        """The end-of-sequence token the tokenizer's configuration names."""
        name = self._named_tokens.get("eos_token")
        return None if name is None else self._tokenizer.token_to_id(name)

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be formatted."""
        return self._chat_template is not None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of ``text``; releases the GIL for a long one."""
        if len(text) < LONG_TEXT:
            encoding = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        else:
            # Only batched calls give the GIL up.
            [encoding] = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Text of ``token_ids``; ids the vocabulary lacks are ignored. Releases the GIL where they are many."""
        text: str
        if len(token_ids) < MANY_TOKENS:
            text = self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        else:
            [text] = self._tokenizer.decode_batch([token_ids], skip_special_tokens=skip_special_tokens)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for in running text; empty for an id the vocabulary lacks."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._read_token_bytes(token_id)
        return found

    def _read_token_bytes(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self.is_byte_level:
            # An added token may hold characters outside the table: it stands for itself, as in the library's decoder.
            if all(char in _BYTE_OF_CHAR for char in token):
                return bytes(_BYTE_OF_CHAR[char] for char in token)
            return token.encode()
        if match := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(match[1], 16)])
        return token.replace("▁", " ").encode()

    def token_text(self, token_id: int) -> str:
        """A token alone, as OpenAI's log-probability entries show it: escaped bytes if it is no whole character."""
        data = self.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def vocabulary_token(self, token_id: int) -> str:
        """A token as the vocabulary spells it; empty for an id it lacks."""
        return self._tokenizer.id_to_token(token_id) or ""

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
        template_kwargs: Mapping[str, Any],
    ) -> str:
        """The conversation as the model's own template writes it, special tokens included.

        Raises InvalidRequestError when there is no template or the template refuses the conversation.
        """
        if self._chat_template is None:
            raise InvalidRequestError("this model has no chat template; use /v1/completions", param="messages")
        try:
            rendering: Any = self._render(
                conversations=[[dict(message) for message in messages]],
                chat_template=self._chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **{**self._named_tokens, **template_kwargs},
            )
        except Exception as error:
            raise InvalidRequestError(
                f"the model's chat template refuses this conversation: {error}", param="messages"
            ) from error
        text: str = rendering[0][0]
        return text


def load_tokenizer(directory: Path) -> TextTokenizer | None:
    """The tokenizer in a model directory, or None if it has none.

    Raises ConfigError when its files cannot be read.
    """
    if not any((directory / name).exists() for name in TOKENIZER_FILES):
        return None
    config = _read_json(directory / "tokenizer_config.json")
    if (directory / "tokenizer.json").exists():
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
        except Exception as error:
            raise ConfigError(f"{directory / 'tokenizer.json'} cannot be read: {error}") from error
    else:
        tokenizer = _convert(directory)
    named = {name: _content(value) for name, value in config.items() if name.endswith("_token")}
    return TextTokenizer(
        tokenizer,
        chat_template=_chat_template(directory, config),
        named_tokens={name: value for name, value in named.items() if value is not None},
    )


def _convert(directory: Path) -> tokenizers.Tokenizer:
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"the tokenizer in {directory} cannot be loaded: {error}") from error
    backend = getattr(loaded, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        raise ConfigError(
            f"the tokenizer in {directory} has no tokenizer.json and none can be derived from its files; "
            "convert it once with transformers and save it there"
        )
    return backend


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path} does not hold a JSON object")
    return loaded


def _content(token: Any) -> str | None:
    """A special token's text, which older files wrap into an object."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _chat_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several named ones: transformers' default is the one called so
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template if isinstance(template, str) else None
