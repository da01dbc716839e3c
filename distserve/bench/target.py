"""Which server is measured, and what a request to it looks like."""

from dataclasses import dataclass, field
from typing import Any

import msgspec


@dataclass(frozen=True)
class Target:
    """Where and how to ask.

    ``base_url`` ends before ``/v1``. ``plain`` leaves out every field that is not OpenAI's own (``ignore_eos``,
    ``min_tokens``, ``return_token_ids``), for servers that refuse unknown ones: output lengths are then upper bounds.
    """

    base_url: str
    model: str
    chat: bool = False
    plain: bool = False
    return_timeline: bool = False
    extra_body: dict[str, Any] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """Where requests are posted."""
        return self.base_url + ("/v1/chat/completions" if self.chat else "/v1/completions")

    def body(self, prompt: list[int] | str, num_output_tokens: int) -> bytes:
        """The JSON of a request for exactly ``num_output_tokens`` tokens (at most, if ``plain``)."""
        fields: dict[str, Any] = {
            "model": self.model,
            "max_tokens": num_output_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.chat:
            fields["messages"] = [{"role": "user", "content": prompt}]
        else:
            fields["prompt"] = prompt
        if not self.plain:
            fields |= {"ignore_eos": True, "min_tokens": num_output_tokens, "return_token_ids": True}
        if self.return_timeline:
            fields["return_timeline"] = True
        return msgspec.json.encode(fields | self.extra_body)
