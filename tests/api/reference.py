"""What stop strings mean, said in the simplest way: on the whole text at once."""


def plain_search(text: str, stops: list[str], *, include: bool) -> tuple[str, str | None]:
    """The stop string that is complete first; of several, the longest."""
    found = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not found:
        return text, None
    end, minus_length, stop = min(found)
    return text[: end if include else end + minus_length], stop
