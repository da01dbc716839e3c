"""Keys are equal exactly where tokens are, from the first one on."""

from hypothesis import given
from hypothesis import strategies as st

from distserve.core.prefix import chain_keys, split_keys

TOKENS = st.lists(st.integers(0, 2), max_size=20)


@given(one=TOKENS, other=TOKENS, block_size=st.integers(1, 4))
def test_keys_are_equal_as_far_as_the_tokens_are(one: list[int], other: list[int], block_size: int) -> None:
    left, right = chain_keys(one, block_size), chain_keys(other, block_size)
    assert len(left) == len(one) // block_size
    for index, (key, its) in enumerate(zip(left, right, strict=False)):
        end = (index + 1) * block_size
        assert (key == its) == (one[:end] == other[:end])


@given(tokens=TOKENS, block_size=st.integers(1, 4), cut=st.integers(0, 20))
def test_a_chain_can_be_made_in_parts(tokens: list[int], block_size: int, cut: int) -> None:
    cut -= cut % block_size
    first = chain_keys(tokens[:cut], block_size, b"salt")
    parent = first[-1] if first else b""
    rest = chain_keys(tokens[cut:], block_size, b"salt", parent)
    assert first + rest == chain_keys(tokens, block_size, b"salt")


def test_salts_keep_sequences_apart() -> None:
    assert not {*chain_keys([1, 2, 3], 1, b"mine")} & {*chain_keys([1, 2, 3], 1, b"yours")}


@given(
    shared=st.integers(0, 40),
    lengths=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    tokens_per_key=st.integers(1, 12) | st.floats(1, 12),
    block_size=st.integers(1, 8),
)
def test_split_keys_are_equal_up_to_where_the_given_ones_are(
    shared: int, lengths: tuple[int, int], tokens_per_key: float, block_size: int
) -> None:
    """Two prompts that begin with the same ``shared`` keys."""
    split = []
    for which, rest in enumerate(lengths):
        keys = [*range(shared), *(1000 * (which + 1) + index for index in range(rest))]
        num_tokens = int(len(keys) * tokens_per_key)
        split.append(split_keys(keys, tokens_per_key, num_tokens, block_size))
        assert len(split[-1]) == num_tokens // block_size
        assert len(set(split[-1])) == len(split[-1])
    for index, (one, other) in enumerate(zip(*split, strict=False)):
        assert (one == other) == ((index + 1) * block_size - 1 < shared * tokens_per_key)
    assert not set(split[0][len(split[1]) :]) & set(split[1])


def test_a_prompt_without_keys_has_none() -> None:
    assert split_keys((), 512, 2000, 16) == ()
