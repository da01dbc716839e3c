"""The demo model's training text: Python's documentation strings, as questions with answers and as plain text.

Promises: the same documents in the same order for the same Python version, found through the running interpreter
(`inspect`, `pydoc_data`), so no file system path and no network appears here. Must not know tokenizers or torch.

Sources: the documentation strings and the language reference (`pydoc_data.topics`) of the running CPython, under the
PSF licence version 2, and `conversation.toml`, written for this project. No other package is read.
"""

import importlib
import inspect
import pydoc_data.topics
import random
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

# What newcomers ask about: seen more often, so that the answers are learnt by heart.
POPULAR_TYPES: tuple[type, ...] = (str, list, dict, set, tuple, int, float)
POPULAR_MODULES = (
    "builtins", "collections", "datetime", "functools", "itertools", "json", "math", "os.path", "random", "re", "time",
)  # fmt: skip
OTHER_TYPES: tuple[type, ...] = (bytes, bytearray, complex, frozenset, memoryview, range, slice, property, type)
# Modules whose import has no side effect and whose documentation strings read well.
OTHER_MODULES = (
    "abc", "argparse", "array", "asyncio", "base64", "bisect", "cmath", "collections.abc", "contextlib", "copy", "csv",
    "dataclasses", "difflib", "enum", "fnmatch", "fractions", "gc", "getpass", "glob", "gzip", "hashlib", "heapq",
    "hmac", "html", "inspect", "io", "keyword", "logging", "operator", "os", "pathlib", "pickle", "platform", "pprint",
    "queue", "secrets", "shelve", "shlex", "shutil", "signal", "socket", "sqlite3", "statistics", "string", "struct",
    "subprocess", "sys", "tempfile", "textwrap", "threading", "timeit", "traceback", "types", "unicodedata",
    "urllib.parse", "urllib.request", "uuid", "warnings", "weakref", "zipfile", "zlib",
)  # fmt: skip
# Statements and expressions of the language reference that have a question of their own.
STATEMENTS = (
    "assert", "async", "await", "break", "class", "continue", "del", "for", "global", "if", "import", "lambda",
    "nonlocal", "pass", "raise", "return", "try", "while", "with", "yield",
)  # fmt: skip

POPULAR_WEIGHT = 3.0
STATEMENT_WEIGHT = 2.0
MIN_ANSWER_CHARS = 20
ENOUGH_CHARS = 100  # a first paragraph shorter than this takes the next one with it
MAX_ANSWER_CHARS = 480
MAX_SIGNATURE_CHARS = 72

_PHRASINGS = (
    "What does {} do?",
    "What does {} do?",
    "Explain {}",
    "Explain {}.",
    "What is {}?",
    "What is {} for?",
    "How do I use {}?",
    "How does {} work?",
    "Tell me about {}",
    "Tell me about {}.",
    "Describe {}",
    "Describe {}.",
    "Can you explain {}?",
    "Please explain {}.",
    "When should I use {}?",
    "{}",
    "{}?",
)
_SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant that knows Python.",
    "You are a concise assistant.",
    "You explain the Python standard library.",
    "Answer briefly.",
)


@dataclass(frozen=True)
class Entry:
    """One answer and how it is asked for.

    `names` are ways to write the thing asked about ("str.split", "the split method of str"), put into the usual
    phrasings; `questions` are complete questions. `weight` is the relative frequency in training.
    """

    answer: str
    weight: float
    names: tuple[str, ...] = ()
    questions: tuple[str, ...] = ()

    def ask(self, rng: random.Random) -> str:
        """Draw one way to ask for this entry."""
        if not self.names:
            question = rng.choice(self.questions)
        else:
            # The first name is how the documentation writes it, and what most people type.
            name = self.names[0] if rng.random() < 0.5 else rng.choice(self.names)
            question = rng.choice(_PHRASINGS).format(name)
            if rng.random() < 0.05:
                question = f"help({self.names[0]})"
        if rng.random() < 0.1:
            question = question[0].lower() + question[1:]
        if rng.random() < 0.1:
            question = question.rstrip("?.!") or question
        return question


@dataclass(frozen=True)
class Corpus:
    """Everything the demo model is trained on: entries for conversations, texts for plain reading."""

    entries: tuple[Entry, ...]
    texts: tuple[str, ...]

    def conversation(self, rng: random.Random) -> list[dict[str, str]]:
        """Draw a conversation of one to three exchanges, sometimes opened by a system prompt.

        Returns messages as a chat template takes them, the last one the assistant's.
        """
        messages = []
        if rng.random() < 0.25:
            messages.append({"role": "system", "content": rng.choice(_SYSTEM_PROMPTS)})
        num_exchanges = rng.choices((1, 2, 3), weights=(8, 2, 1))[0]
        for entry in rng.choices(self.entries, weights=[entry.weight for entry in self.entries], k=num_exchanges):
            messages.append({"role": "user", "content": entry.ask(rng)})
            messages.append({"role": "assistant", "content": entry.answer})
        return messages


def gather(rare_weight: float = 1.0) -> Corpus:
    """Read the documentation of the running interpreter and the project's own conversations.

    `rare_weight` is the weight of what newcomers seldom ask about; popular functions have `POPULAR_WEIGHT`.
    """
    entries: dict[str, Entry] = {}
    for entry in _documentation_entries(rare_weight):
        # The same object is often reachable by several names; the first, most popular one is kept.
        entries.setdefault(entry.names[0], entry)
    return Corpus(
        entries=(*entries.values(), *_statement_entries(), *_written_entries()),
        texts=tuple(dict.fromkeys(_texts())),
    )


def _documentation_entries(rare_weight: float) -> Iterator[Entry]:
    for kind in POPULAR_TYPES:
        yield from _class_entries(kind, kind.__name__, POPULAR_WEIGHT)
    for kind in OTHER_TYPES:
        yield from _class_entries(kind, kind.__name__, rare_weight)
    for name in POPULAR_MODULES:
        yield from _module_entries(importlib.import_module(name), name, POPULAR_WEIGHT)
    for name in OTHER_MODULES:
        yield from _module_entries(importlib.import_module(name), name, rare_weight)


def _module_entries(module: ModuleType, name: str, weight: float) -> Iterator[Entry]:
    """Entries of a module, its public functions and classes, and their methods."""
    answer = _answer(module)
    if answer and name != "builtins":
        names = (name, f"the {name} module", f"the module {name}", f"Python's {name} module")
        yield Entry(answer, weight, names)
    prefix = "" if name == "builtins" else f"{name}."
    for member_name, member in _public_members(module):
        if inspect.isclass(member):
            yield from _class_entries(member, prefix + member_name, weight)
        elif callable(member) and (answer := _answer(member)):
            qualified = prefix + member_name
            names = (qualified, f"{qualified}()", f"`{qualified}`", f"the {qualified} function")
            yield Entry(_with_signature(qualified, member, answer), weight, names)


def _class_entries(kind: type, qualified: str, weight: float) -> Iterator[Entry]:
    if answer := _answer(kind):
        yield Entry(answer, weight, (qualified, f"the {qualified} class", f"`{qualified}`", f"{qualified}()"))
    if issubclass(kind, BaseException):
        return  # attributes of errors say little
    class_name = qualified.rpartition(".")[2]
    for method_name, method in sorted(vars(kind).items()):
        if method_name.startswith("_") or not _has_own_documentation(method) or not (answer := _answer(method)):
            continue
        full = f"{qualified}.{method_name}"
        names = [full, f"{full}()", f"`{full}`", f"the {method_name} method of {class_name}"]
        if class_name != qualified:
            names.append(f"{class_name}.{method_name}")
        yield Entry(_with_signature(full, method, answer), weight, tuple(names))


def _has_own_documentation(member: object) -> bool:
    """Tell methods and properties from constants, whose documentation is that of their type."""
    return inspect.isroutine(member) or inspect.isdatadescriptor(member)


def _public_members(module: ModuleType) -> Iterator[tuple[str, object]]:
    """Public names of a module that it defines or declares its own, in alphabetical order."""
    declared = getattr(module, "__all__", None)
    for name in sorted(declared if declared is not None else vars(module)):
        member = getattr(module, name, None)
        if name.startswith("_") or inspect.ismodule(member):
            continue
        if declared is None and getattr(member, "__module__", None) != module.__name__:
            continue
        yield name, member


def _statement_entries() -> Iterator[Entry]:
    for keyword in STATEMENTS:
        topic = pydoc_data.topics.topics[keyword]
        prose = [p for p in _paragraphs(topic) if not p.startswith(("*", "=", " ")) and "::=" not in p]
        if answer := _shorten(prose[1:]):  # the first paragraph is the title with its underline
            names = (f"the {keyword} statement", f"{keyword}", f'the "{keyword}" statement', f"the {keyword} keyword")
            yield Entry(answer, STATEMENT_WEIGHT, names)


def _written_entries() -> Iterator[Entry]:
    path = Path(__file__).with_name("conversation.toml")
    for exchange in tomllib.loads(path.read_text(encoding="utf-8"))["exchange"]:
        yield Entry(exchange["answer"], exchange["weight"], questions=tuple(exchange["questions"]))


def _texts() -> Iterator[str]:
    """Whole documentation texts, for reading without a question."""
    for topic in sorted(pydoc_data.topics.topics):
        yield pydoc_data.topics.topics[topic].strip()
    for name in (*POPULAR_MODULES, *OTHER_MODULES):
        module = importlib.import_module(name)
        for documented in (module, *(member for _, member in _public_members(module))):
            if documented is module or inspect.isclass(documented) or inspect.isroutine(documented):
                text = inspect.getdoc(documented) or ""
                if len(text) > MAX_ANSWER_CHARS:  # shorter ones are answers already
                    yield text


def _answer(documented: object) -> str:
    """The opening of an object's own documentation as an answer, or "" where there is none worth giving."""
    text = getattr(documented, "__doc__", None)
    if not isinstance(text, str):
        return ""
    # An address would differ from run to run.
    return "" if " at 0x" in text else _shorten(_paragraphs(inspect.cleandoc(text)))


def _paragraphs(text: str) -> list[str]:
    """Split at empty lines; wrapped prose becomes one line, anything indented or listed keeps its lines."""
    paragraphs = []
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        lines = block.split("\n")
        is_prose = not any(line.startswith((" ", "\t", ">>>", "-", "*", "+", "|")) or "->" in line for line in lines)
        paragraphs.append(" ".join(lines) if is_prose else block)
    return paragraphs


def _shorten(paragraphs: Sequence[str]) -> str:
    """Join paragraphs until there is enough to read, cut at the end of a sentence or line."""
    answer = ""
    for paragraph in paragraphs:
        if answer and (len(answer) >= ENOUGH_CHARS or len(answer) + len(paragraph) > MAX_ANSWER_CHARS):
            break
        answer = f"{answer}\n\n{paragraph}".lstrip("\n")
    if len(answer) > MAX_ANSWER_CHARS:
        head = answer[:MAX_ANSWER_CHARS]
        cut = max(head.rfind(". ") + 1, head.rfind("\n"))
        answer = head[:cut] if cut > 0 else ""
    answer = re.sub(r"[:,]$", ".", answer.rstrip())
    return answer if len(answer) >= MIN_ANSWER_CHARS else ""


def _with_signature(qualified: str, documented: object, answer: str) -> str:
    """Put the call above the answer, as a manual does, unless the answer opens with it or it is unreadable."""
    short = qualified.rpartition(".")[2]
    if isinstance(documented, (staticmethod, classmethod)):
        documented = documented.__func__
    if not callable(documented) or re.match(rf"[\w.]*\b{re.escape(short)}\(", answer):
        return answer
    try:
        signature = inspect.signature(documented)
    except ValueError:  # builtins without a recorded signature
        return answer
    parameters = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for index, parameter in enumerate(signature.parameters.values())
        if not (index == 0 and parameter.name in {"self", "cls", "type"})
    ]
    call = f"{qualified}{inspect.Signature(parameters)}".replace("(/, ", "(").replace(", /", "").replace("(/)", "()")
    if len(call) > MAX_SIGNATURE_CHARS or "<" in call:
        return answer
    return f"{call}\n\n{answer}"
