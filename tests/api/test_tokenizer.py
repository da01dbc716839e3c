"""A model directory read without torch: the same tokens and chats as transformers makes of it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from distserve.api.model import load_served_model
from distserve.api.tokenizer import load_tokenizer
from distserve.core.errors import ConfigError, InvalidRequestError
from tests.api.conftest import MODEL_DIR

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Say naïve 日本 🦊."},
    {"role": "assistant", "content": "naïve"},
]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A copy of the demo model without its weights."""
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL_DIR / name, tmp_path)
    shutil.copy(MODEL_DIR / "chat_template.jinja", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("add_generation_prompt", "continue_final_message"), [(True, False), (False, True), (False, False)]
)
def test_chats_and_tokens_equal_those_of_transformers(
    add_generation_prompt: bool, continue_final_message: bool
) -> None:
    theirs, ours = AutoTokenizer.from_pretrained(MODEL_DIR), load_tokenizer(MODEL_DIR)
    assert ours is not None
    options = {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
    chat = theirs.apply_chat_template(MESSAGES, tokenize=False, **options)
    assert ours.render_chat(MESSAGES, template_kwargs={}, **options) == chat
    assert ours.encode(chat, add_special_tokens=False) == theirs.encode(chat, add_special_tokens=False)
    assert ours.encode("Hello 🦊", add_special_tokens=True) == theirs.encode("Hello 🦊")
    long = "Hello 🦊, naïve 日本!\n" * 1000
    assert ours.encode(long, add_special_tokens=True) == theirs.encode(long)
    assert ours.eos_token_id == theirs.eos_token_id


def test_a_template_that_refuses_says_why() -> None:
    tokenizer = load_tokenizer(MODEL_DIR)
    assert tokenizer is not None
    with pytest.raises(InvalidRequestError, match="roles are system, user and assistant, not tool"):
        tokenizer.render_chat(
            [{"role": "tool", "content": "x"}],
            add_generation_prompt=True,
            continue_final_message=False,
            template_kwargs={},
        )


def test_the_template_in_the_configuration_counts_too(directory: Path) -> None:
    (directory / "chat_template.jinja").unlink()
    config = json.loads((directory / "tokenizer_config.json").read_text())
    templates = [{"name": "rag", "template": "no"}, {"name": "default", "template": "{{ messages[0].content }}!"}]
    for value, expected in ((templates, "hi!"), ("{{ bos_token }}", "<|begin|>")):
        (directory / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": value}))
        tokenizer = load_tokenizer(directory)
        assert tokenizer is not None
        rendered = tokenizer.render_chat(
            [{"role": "user", "content": "hi"}],
            add_generation_prompt=False,
            continue_final_message=False,
            template_kwargs={},
        )
        assert rendered == expected


def test_limits_and_defaults_come_from_the_model(directory: Path) -> None:
    (directory / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [2, 7], "temperature": 0.6, "top_k": 20, "max_new_tokens": 100})
    )
    model = load_served_model(directory)
    assert model.names == (directory.name,)
    assert (model.max_model_len, model.vocab_size, model.eos_token_ids) == (2048, 3072, (2, 7))
    assert (model.defaults.temperature, model.defaults.top_k, model.defaults.max_tokens) == (0.6, 20, 100)
    assert model.defaults.top_p == 1.0
    assert load_served_model(directory, max_model_len=99).max_model_len == 99


def test_a_directory_without_tokenizer_files_has_none(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()
    assert load_served_model(directory).tokenizer is None


def test_only_older_files_are_read_too(directory: Path) -> None:
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    (directory / "tokenizer.json").unlink()
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in tokenizer["model"]["merges"]]
    (directory / "vocab.json").write_text(json.dumps(tokenizer["model"]["vocab"]))
    (directory / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
    config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|begin|>", "eos_token": "<|end|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps({**config, "unk_token": "<|end|>"}))
    loaded = load_tokenizer(directory)
    assert loaded is not None
    assert loaded.decode(loaded.encode("Hello 🦊", add_special_tokens=False), skip_special_tokens=True) == "Hello 🦊"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"])
def test_a_broken_file_is_named(directory: Path, name: str) -> None:
    (directory / name).write_text('{"half":')
    with pytest.raises(ConfigError, match=name):
        load_served_model(directory)


def test_no_model_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        load_served_model(tmp_path / "nowhere")


def test_serving_needs_neither_torch_nor_ray() -> None:
    code = (
        "import sys; from pathlib import Path; import distserve.api.app; from distserve.api.model import *;"
        f"load_served_model(Path({str(MODEL_DIR)!r}));"
        "print([name for name in ('torch', 'ray', 'zmq', 'distserve.cluster') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
