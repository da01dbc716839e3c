"""When the steps of one decode batch end: its context grows evenly, so what a step takes is affine in its number."""


def affine_ends(
    start: float,
    num_steps: int,
    num_decodes: int,
    context: int,
    slope: float,
    base: float,
    fixed: float,
    floor: float = float("-inf"),
    serial: float = 0.0,
) -> list[float]:
    """The end of each of ``num_steps`` steps of ``num_decodes`` sequences, the first of which starts at ``start``.

    A step over ``context`` cached tokens, ``num_decodes`` more each time, takes ``slope * context + base + fixed``, or
    ``floor`` if that is more, and ``serial`` on top. Seconds, added up step by step: in this order, to the last bit.
    """
    tokens, more, end = float(context), float(num_decodes), start
    ends = []
    for _ in range(num_steps):
        time = slope * tokens + base + fixed
        end += serial + (time if time > floor else floor)  # noqa: FURB136 -- half the time of max()
        ends.append(end)
        tokens += more
    return ends
