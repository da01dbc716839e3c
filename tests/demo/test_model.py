"""The shipped demo model: complete, small, consistent, and it answers in words and stops."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

from distserve.demo import model_dir
from distserve.demo.tokenizer import SPECIAL_TOKENS

MAX_BYTES = 8_000_000


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(model_dir())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(model_dir(), dtype=torch.float32)


def chat(tokenizer, *contents, add_generation_prompt=True):
    roles = ("user", "assistant")
    messages = [{"role": roles[index % 2], "content": content} for index, content in enumerate(contents)]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)


def greedy(model, tokenizer, *contents, max_new_tokens=200):
    """The new token ids of a greedy continuation of a chat."""
    ids = tokenizer(chat(tokenizer, *contents), add_special_tokens=False, return_tensors="pt").input_ids
    return model.generate(ids, max_new_tokens=max_new_tokens, do_sample=False)[0, ids.shape[1] :].tolist()


def test_folder_is_complete_and_small():
    names = {path.name for path in model_dir().iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    assert sum(path.stat().st_size for path in model_dir().iterdir()) < MAX_BYTES


def test_model_is_a_llama_in_bfloat16_with_grouped_queries(model):
    assert isinstance(model, LlamaForCausalLM)
    written = json.loads((model_dir() / "config.json").read_text(encoding="utf-8"))
    assert written["dtype"] == "bfloat16"
    assert model.config.num_attention_heads > model.config.num_key_value_heads > 1
    assert model.config.max_position_embeddings == 2048


def test_special_ids_agree(model, tokenizer):
    generation = GenerationConfig.from_pretrained(model_dir())
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(tokenizer, name) == getattr(model.config, name) == getattr(generation, name), name
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(len(SPECIAL_TOKENS)))
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.model_max_length == model.config.max_position_embeddings


@given(text=st.text())
@settings(deadline=None)
def test_any_text_survives_a_round_trip(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_plain_prompts_begin_with_one_begin_token(tokenizer):
    ids = tokenizer("Return the number of items.").input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1


def test_chat_template_writes_turns_that_end(tokenizer):
    text = chat(tokenizer, "Question?", "Answer.", "Again?")
    assert text == (
        "<|begin|><|user|>\nQuestion?<|end|>\n<|assistant|>\nAnswer.<|end|>\n<|user|>\nAgain?<|end|>\n<|assistant|>\n"
    )
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids.count(tokenizer.eos_token_id) == 3
    assert tokenizer.decode(ids) == text


def test_a_prompt_extends_to_the_finished_conversation(tokenizer):
    prompt = chat(tokenizer, "Question?")
    finished = chat(tokenizer, "Question?", "Answer.", add_generation_prompt=False)
    assert finished == prompt + "Answer.<|end|>\n"


def test_chat_template_takes_a_system_prompt_and_refuses_unknown_roles(tokenizer):
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(system, tokenize=False)
    assert text == "<|begin|><|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n"
    with pytest.raises(TemplateError, match="system, user and assistant, not tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "42"}], tokenize=False)


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ("What does str.split do?", "Return a list of the substrings in the string"),
        ("Explain json.dumps", "JSON formatted"),
        ("What does list.append do?", "Append object to the end of the list."),
        ("How do I use os.path.join?", "Join two or more pathname components"),
        ("What does dict.get do?", "Return the value for key if key is in the dictionary"),
        ("Hello!", "Hello! I am a very small language model"),
        ("What is KV migration?", "migrates to a decode instance"),
    ],
)
def test_answers_in_words_and_ends_by_itself(model, tokenizer, question, words):
    answer = greedy(model, tokenizer, question, max_new_tokens=160)
    assert answer[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in answer[:-1]
    assert words in tokenizer.decode(answer)


def test_answers_the_second_question_of_a_conversation(model, tokenizer):
    answer = greedy(model, tokenizer, "Hello!", "Hello!", "What does str.split do?")
    assert "Return a list of the substrings" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id


def test_same_weights_answer_in_bfloat16(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(model_dir())
    assert model.dtype == torch.bfloat16
    answer = greedy(model, tokenizer, "What does list.append do?")
    assert "Append object to the end of the list." in tokenizer.decode(answer)
