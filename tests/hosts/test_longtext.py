"""Files are opened with care, the prompt is put together as documented, and times hold no work of ours."""

import pytest
import torch
from conftest import WORDS, tiny_llama

import salience as sal
from salience.core.errors import ConflictError, ParameterError, StructureError
from salience.hosts import longtext, prefill
from salience.hosts.checkpoints import load_model

TEMPLATE = "<s> {% for one in messages %}{{ one.role }} : {{ one.content }}{% endfor %} Answer"


@pytest.fixture
def loaded(checkpoint):
    model, tokenizer = load_model(checkpoint, dtype="float32")
    return model, tokenizer


@pytest.fixture
def text():
    draw = torch.Generator().manual_seed(3)
    return " ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (80,), generator=draw).tolist())


def test_files(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfthe caf\xc3\xa9\r\nsits\n")
    assert longtext.open_text(path) == "the café\nsits\n"

    def forbidden(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "read_text", forbidden)
    with pytest.raises(
        ParameterError, match=r"file must be one that can be read, got .*\(Permission denied\)"
    ):
        longtext.open_text(path)


def test_the_prompt_is_text_empty_line_question(loaded):
    model, tokenizer = loaded
    question = longtext.ask_about(model, tokenizer, "\tthe cat\nsits \n\n", " a dog ? ")
    assert question.text == "\tthe cat\nsits\n\na dog ?\n" and not question.chat
    assert question.ids.tolist() == tokenizer(question.text, return_tensors="pt")["input_ids"].tolist()
    assert (question.limit, question.unknown) == (128, 0)
    assert longtext.ask_about(model, tokenizer, "the zebra sits", "what ?").unknown == 2
    tokenizer.chat_template = TEMPLATE
    question = longtext.ask_about(model, tokenizer, "the cat\n", "a dog ?")
    assert question.text == "<s> user : the cat\n\na dog ? Answer" and question.chat
    # one start token, written by the template
    assert question.ids[0, 0] == 1 and (question.ids == 1).sum() == 1


def test_prompts_that_do_not_fit(loaded, text):
    model, tokenizer = loaded
    fits = longtext.ask_about(model, tokenizer, text, "a dog ?", max_new_tokens=45)
    assert fits.tokens + 45 == 128
    with pytest.raises(
        ParameterError, match=r"the model's 128 positions, got 83 and 46 tokens: cut the file"
    ):
        longtext.ask_about(model, tokenizer, text, "a dog ?", max_new_tokens=46)
    with pytest.raises(ParameterError, match="about its first 0 of"):
        longtext.ask_about(model, tokenizer, text, "a dog ?", max_new_tokens=500)
    for file, ask, parameter in ((" ", "a", "file"), (text, " ", "ask")):
        with pytest.raises(ParameterError, match=f"{parameter} must be a text"):
            longtext.ask_about(model, tokenizer, file, ask)
    tokenizer.chat_template = "{{ raise_exception('no user may ask') }}"
    with pytest.raises(ParameterError, match="the model's chat template takes, got no user may ask"):
        longtext.ask_about(model, tokenizer, text, "a dog ?")


def test_positions_are_what_the_config_promises():
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
    assert longtext.positions(tiny_llama(rope_parameters=rope)) == 512
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    assert longtext.positions(tiny_llama(rope_parameters=rope)) == 128
    assert longtext.positions(tiny_llama()) == 128


@pytest.mark.parametrize("chunk", [None, 24])
def test_what_is_told_is_what_the_handle_tells(loaded, text, chunk):
    model, tokenizer = loaded
    question = longtext.ask_about(model, tokenizer, text, "a dog ?")
    method = sal.StreamingLLM(sinks=2, window=12, q_block=8)
    found = longtext.answer(model, tokenizer, question, method, max_new_tokens=5, chunk=chunk)
    with sal.focus(model, method) as handle, torch.no_grad():
        made = model.generate(
            input_ids=question.ids, max_new_tokens=5, do_sample=False, prefill_chunk_size=chunk
        )
        spent = handle.spent["streaming-llm"]
    assert found.text == tokenizer.decode(made[0, question.tokens :], skip_special_tokens=True).strip()
    assert found.tokens == made.shape[1] - question.tokens
    for key in ("prompts", "tokens", "kept share", "estimated recall", "kernel"):
        assert found.spent[key] == spent[key], key
    assert [one.layer for one in found.layers] == [0, 1]


def test_nothing_stays_on_the_model(loaded, text):
    model, tokenizer = loaded
    question = longtext.ask_about(model, tokenizer, text, "a dog ?")
    with torch.no_grad():
        before = model(question.ids).logits
    plain = longtext.answer(model, tokenizer, question)
    assert plain.layers == () and plain.spent == {}
    assert longtext.answer(model, tokenizer, question, sal.DenseAttention()).text == plain.text
    longtext.first_token(model, question, sal.StreamingLLM())
    with torch.no_grad():
        assert torch.equal(model(question.ids).logits, before)


def test_times_hold_no_sampling_of_ours(loaded, text, monkeypatch):
    model, tokenizer = loaded
    question = longtext.ask_about(model, tokenizer, text, "a dog ?")
    sampled = []
    original = prefill.sampled
    monkeypatch.setattr(prefill, "sampled", lambda *given: sampled.append(1) or original(*given))
    method = sal.BlockTopK(keep=0.5, q_block=8, k_block=4)
    longtext.answer(model, tokenizer, question, method, max_new_tokens=1)
    assert len(sampled) == 2
    timed = longtext.first_token(model, question, method)
    assert len(sampled) == 2 and timed.choosing > 0 and timed.attending > 0
    assert timed.choosing + timed.attending < timed.seconds
    plain = longtext.first_token(model, question)
    assert plain.seconds > 0 and (plain.choosing, plain.attending) == (0.0, 0.0)


def test_a_gpu_is_waited_for_only_while_times_are_taken(loaded, text, monkeypatch):
    model, tokenizer = loaded
    question = longtext.ask_about(model, tokenizer, text, "a dog ?")
    waited, now = [], prefill.Prefill._now
    monkeypatch.setattr(
        prefill.Prefill, "_now", lambda part, states: waited.append(part.timed) or now(part, states)
    )
    longtext.answer(model, tokenizer, question, sal.StreamingLLM(), max_new_tokens=1)
    assert waited and not any(waited)
    waited.clear()
    longtext.first_token(model, question, sal.StreamingLLM())
    assert waited and all(waited)


def test_a_prompt_that_does_not_fit_the_memory(loaded, text, monkeypatch):
    model, tokenizer = loaded
    question = longtext.ask_about(model, tokenizer, text, "a dog ?")

    def generate(**_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(model, "generate", generate)
    with pytest.raises(ParameterError, match=r"fit the memory of cpu, got 83 tokens: a smaller --chunk"):
        longtext.answer(model, tokenizer, question)


def test_methods_that_cannot_act(loaded, checkpoint):
    model, _ = loaded
    with pytest.raises(ConflictError, match="method must choose key blocks for read, got lisa"):
        longtext.check_method(model, _elsewhere())
    with sal.focus(model, sal.StreamingLLM()), pytest.raises(ConflictError, match="by one method at a time"):
        longtext.check_method(model, sal.StreamingLLM())
    from transformers import GPT2Config, GPT2LMHeadModel

    crossed = GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, add_cross_attention=True)
    )
    with pytest.raises(StructureError, match="got cross-attention in layer 0"):
        longtext.check_method(crossed, sal.StreamingLLM())


def _elsewhere():
    """A method whose part is of another kind."""
    from dataclasses import dataclass
    from typing import ClassVar

    from salience.core.method import Method
    from salience.core.part import Part

    @dataclass(frozen=True, kw_only=True)
    class Lisa(Method):
        unit: ClassVar[str] = "layer"

        def attach_model(self, model, record, data=None):
            return Part()

        @classmethod
        def slug(cls):
            return "lisa"

    return Lisa()
