"""The training text: the same every time, readable, and free of traces of the machine it was gathered on."""

import random
import tomllib
from pathlib import Path

import pytest

import distserve.demo
from distserve.demo.corpus import MAX_ANSWER_CHARS, MAX_SIGNATURE_CHARS, Entry, gather


@pytest.fixture(scope="module")
def corpus():
    return gather()


def test_gathering_twice_gives_the_same_documents(corpus):
    assert gather() == corpus


def test_well_known_functions_are_there_once(corpus):
    names = [entry.names[0] for entry in corpus.entries if entry.names]
    assert len(names) == len(set(names))
    assert {"str.split", "json.dumps", "os.path.join", "itertools.chain", "the for statement", "math"} <= set(names)


def test_answers_open_with_the_call_and_say_what_it_does(corpus):
    (split,) = (entry for entry in corpus.entries if entry.names[:1] == ("str.split",))
    assert split.answer.startswith("str.split(sep=None, maxsplit=-1)\n\nReturn a list of the substrings")


def test_answers_are_short_and_without_addresses(corpus):
    for entry in corpus.entries:
        written = not entry.names
        assert written or 0 < len(entry.answer) <= MAX_ANSWER_CHARS + MAX_SIGNATURE_CHARS + 2, entry
        assert " at 0x" not in entry.answer, entry


def test_conversations_alternate_and_end_with_the_assistant(corpus):
    rng = random.Random(0)
    for _ in range(200):
        roles = [message["role"] for message in corpus.conversation(rng)]
        if roles[0] == "system":
            roles = roles[1:]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert roles


def test_conversations_depend_on_the_seed_alone(corpus):
    draw = [[corpus.conversation(random.Random(seed)) for _ in range(3)] for seed in (1, 1, 2)]
    assert draw[0] == draw[1] != draw[2]


def test_rare_functions_can_be_made_rarer_without_losing_any(corpus):
    rarer = gather(rare_weight=0.25)
    assert [entry.answer for entry in rarer.entries] == [entry.answer for entry in corpus.entries]
    weights = {entry.names[0]: entry.weight for entry in rarer.entries if entry.names}
    assert weights["str.split"] > 1 > weights["zlib.crc32"] == 0.25


def test_a_question_names_what_it_asks_for():
    entry = Entry("An answer.", 1.0, names=("str.split", "the split method of str"))
    rng = random.Random(0)
    assert all("split" in entry.ask(rng) for _ in range(200))


def test_written_questions_have_one_answer_each():
    path = Path(distserve.demo.__file__).with_name("conversation.toml")
    exchanges = tomllib.loads(path.read_text(encoding="utf-8"))["exchange"]
    questions = [question for exchange in exchanges for question in exchange["questions"]]
    assert len(questions) == len(set(questions))
    assert all(exchange["answer"].strip() and exchange["weight"] > 0 for exchange in exchanges)
