"""Rows from files, tokens from rows, batches from tokens, and one clear line for each thing that can be wrong."""

import json
import logging

import pytest
import torch

from salience.core.errors import ParameterError
from salience.hosts.data import QUESTION_TEMPLATE, Collator, load_rows, tokenize

FORMS = "prompt and completion, question and answer, messages, text and label, or text"
CHATML = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|end|>' }}"
    "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# as Qwen3's: an empty thought stands before an answer only while it is the last one
THINKING = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
    "{{ m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
STRICT = (
    "{% if messages[0]['role'] != 'user' %}{{ raise_exception('must start with user') }}{% endif %}" + CHATML
)
TALK = [
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "1."},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "2."},
]


def wrap(backend, template=None, **special):
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.chat_template = template
    return tokenizer


def byte_tokenizer(template=None, bos=False, **special):
    """Byte-level BPE over a few words, with `<s>`, `</s>` and chat marks; a BOS in front if asked for."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    marks = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
    words = [
        "Question: one plus one\nAnswer: two three",
        "Question: what is it\nAnswer: four",
        "User: Assistant:",
    ]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=marks, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(words, trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return wrap(
        backend, template, **{"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", **special}
    )


def bert_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "b", "c", "good", "bad"]
    backend = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return wrap(backend, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]")


def spaced_tokenizer():
    """As Llama 2's: every text begins with a space mark of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = ["<s>", "</s>", "▁", "\n", "a", "b", ":", "▁a", "▁b", "▁▁", "c"]
    backend = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [("▁", "a"), ("▁", "b"), ("▁", "▁")])
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    return wrap(backend, bos_token="<s>", eos_token="</s>")


def rows_of(**columns):
    from datasets import Dataset

    return Dataset.from_dict(columns)


def learned(row, tokenizer):
    """The runs of learned tokens as text."""
    runs, before = [], False
    for token, label in zip(row["input_ids"], row["labels"]):
        assert label in (-100, token)
        if label == token:
            runs = [*runs[:-1], [*runs[-1], token]] if before else [*runs, [token]]
        before = label == token
    return [tokenizer.decode(run) for run in runs]


def write(path, *lines):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def refusal(call, *args, **kwargs):
    with pytest.raises(ParameterError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "given, expected",
    [
        ({"prompt": "p", "completion": "c", "id": 3}, {"prompt": "p", "completion": "c"}),
        ({"question": "2+2?", "answer": "4"}, {"prompt": "Question: 2+2?\nAnswer:", "completion": " 4"}),
        ({"question": "{answer}", "answer": "{x}"}, {"prompt": "Question: {answer}\nAnswer:", "completion": " {x}"}),
        ({"messages": [{**TALK[0], "more": 1}]}, {"messages": TALK[:1]}),
        ({"text": "t", "label": 1}, {"text": "t", "label": 1}),
        ({"text": "naïve 日本", "other": [1]}, {"text": "naïve 日本"}),
        ({"text": "t", "prompt": "p", "completion": ""}, {"prompt": "p", "completion": ""}),
    ],
    ids=["prompt", "question", "braces", "messages", "class", "text", "two-forms"],
)  # fmt: skip
@pytest.mark.parametrize("ending", ["jsonl", "json", "list.json", "parquet"])
def test_each_form_from_each_kind_of_file(tmp_path, given, expected, ending):
    from datasets import Dataset

    path = tmp_path / f"data.{ending}"
    if ending == "parquet":
        Dataset.from_list([given, given]).to_parquet(path)
    elif ending == "list.json":
        path.write_text(json.dumps([given, given], indent=2))
    else:
        write(path, given, "\n", given)
    rows = load_rows(path)
    assert rows.to_list() == [expected, expected]
    assert rows.column_names == list(expected)


def test_text_file_has_a_row_a_line(tmp_path):
    path = write(tmp_path / "a.txt", "\ufeffone\r\n", "\n", " two\u2028still two\n", "three")
    assert load_rows(str(path))["text"][:] == ["one", " two\u2028still two", "three"]
    assert load_rows(path, limit=2)["text"][:] == ["one", " two\u2028still two"]


def test_limit_reads_no_further(tmp_path):
    path = write(tmp_path / "a.jsonl", {"text": "a"}, {"text": "b"}, "not json\n")
    assert len(load_rows(path, limit=2)) == 2
    assert refusal(load_rows, path, limit=0) == "limit must be >= 1, got 0"


def test_saved_datasets_are_read(tmp_path):
    from datasets import DatasetDict

    rows = rows_of(text=["a", "b"])
    rows.save_to_disk(tmp_path / "one")
    DatasetDict(train=rows, test=rows.select([1])).save_to_disk(tmp_path / "two")
    assert load_rows(tmp_path / "one").to_list() == [{"text": "a"}, {"text": "b"}]
    assert load_rows(tmp_path / "two", split="test").to_list() == [{"text": "b"}]
    text = refusal(load_rows, tmp_path / "two", split="validation")
    assert text == "split must be one of train, test, got 'validation'"


def test_columns_are_mapped(tmp_path):
    row = {"instruction": "i", "output": "o", "text": "t", "prompt": "another"}
    path = write(tmp_path / "a.jsonl", row)
    rows = load_rows(path, columns={"prompt": "instruction", "completion": "output"})
    assert rows.to_list() == [{"prompt": "i", "completion": "o"}]
    assert load_rows(path, columns={"text": "output"}).to_list() == [{"text": "o"}]
    assert load_rows(path, columns={"completion": "text"}).to_list() == [
        {"prompt": "another", "completion": "t"}
    ]


def test_another_template(tmp_path):
    path = write(tmp_path / "a.jsonl", {"question": "q", "answer": "a"})
    rows = load_rows(path, template=("Q {question}", "A {answer}"))
    assert rows.to_list() == [{"prompt": "Q q", "completion": "A a"}]
    assert QUESTION_TEMPLATE == ("Question: {question}\nAnswer:", " {answer}")
    text = refusal(load_rows, path, template=("Q", "A {answer}"))
    assert text == "template must be of {question} and {answer}, got ('Q', 'A {answer}')"


def test_classes_are_numbered(tmp_path):
    from datasets import ClassLabel, Features, Value

    words = write(tmp_path / "a.jsonl", *({"text": "t", "label": label} for label in ("good", "bad", "good")))
    rows = load_rows(words)
    assert rows["label"][:] == [1, 0, 1] and rows.features["label"].names == ["bad", "good"]
    numbers = write(tmp_path / "b.jsonl", *({"text": "t", "label": label} for label in (2, 0, True)))
    rows = load_rows(numbers)
    assert rows["label"][:] == [2, 0, 1] and rows.features["label"].names == ["0", "1", "2"]
    features = Features({"text": Value("string"), "label": ClassLabel(names=["x", "y"])})
    rows_of(text=["t"], label=[0]).cast(features).save_to_disk(tmp_path / "c")
    assert load_rows(tmp_path / "c").features["label"].names == ["x", "y"]


WRONG_FILES = {
    "missing": ("no.jsonl", None, "data must be an existing file or a datasets name, got {path}"),
    "empty": ("a.jsonl", b"", "data must be a file with rows, got the empty file {path}"),
    "empty-parquet": ("a.parquet", b"", "data must be a file with rows, got the empty file {path}"),
    "blank": ("a.txt", b" \n\n", "data must be at least one row, got none in {path}"),
    "no-rows": ("a.json", b"[]", "data must be at least one row, got none in {path}"),
    "malformed": (
        "a.jsonl",
        b'{"text": "a"}\n\n{"text": }\n',
        "data must be one JSON object a line, got line 3 of {path}: Expecting value (column 10)",
    ),
    "cut-off": (
        "a.jsonl",
        b'{"text": "a"}\n{"text": "b',
        "data must be one JSON object a line, got line 2 of {path}: Unterminated string starting at (column 10)",
    ),
    "deep": ("a.jsonl", b"[" * 100_000, "data must be one JSON object a line, got line 1 of {path}: nested too deep"),
    "list-line": (
        "a.jsonl",
        b'{"text": "a"}\n["b"]\n',
        "data must be one JSON object a line, got list '[\"b\"]' at line 2 of {path}",
    ),
    "list-of-text": (
        "a.json",
        b'[{"text": "a"}, "b"]',
        "data must be a list of JSON objects, got str at row 2 of {path}",
    ),
    "latin1": ("a.txt", b"one\nna\xefve\n", "data must be UTF-8 text, got byte 0xef at line 2 of {path}"),
    "utf16": (
        "a.jsonl",
        '{"text": "a"}\n'.encode("utf-16"),
        "data must be UTF-8 text, got byte 0xff at line 1 of {path}",
    ),
    "ending": ("a.csv", b"x,y\n", "data must be a .jsonl, .json, .txt, .parquet file, got {path}"),
    "columns": (
        "a.jsonl",
        b'{"input": "a", "output": "b"}\n',
        f"data must be rows with {FORMS}, got columns input, output: map yours with columns (--column OURS=THEIRS)",
    ),
    "no-columns": (
        "a.jsonl",
        b"{}\n",
        "data must be at least one row, got none in {path}",
    ),
    "not-everywhere": (
        "a.jsonl",
        b'{"text": "a"}\n\n{"other": "b"}\n',
        "data must be strings in column text, got nothing at line 3",
    ),
    "number": ("a.jsonl", b'{"text": 3}\n', "data must be strings in column text, got 3 at line 1"),
    "half-character": (
        "a.jsonl",
        b'{"text": "\\ud800"}\n',
        "data must be strings in column text, got '\\ud800' at line 1",
    ),
    "sharegpt": (
        "a.jsonl",
        b'{"messages": [{"from": "human", "value": "x"}]}\n',
        "data must be lists of {{role, content}} with strings in column messages, "
        "got [{{'from': 'human', 'value': 'x'}}] at line 1",
    ),
    "no-messages": (
        "a.jsonl",
        b'{"messages": []}\n',
        "data must be lists of {{role, content}} with strings in column messages, got [] at line 1",
    ),
    "label": (
        "a.jsonl",
        b'{"text": "a", "label": -1}\n',
        "data must be whole numbers >= 0 or strings in column label, got -1 at line 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_FILES)
def test_wrong_files_are_refused(tmp_path, case):
    name, content, text = WRONG_FILES[case]
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    assert refusal(load_rows, path) == text.format(path=path)
    assert refusal(load_rows, str(path)) == text.format(path=path)


def test_the_parameter_is_named_as_asked(tmp_path):
    assert refusal(load_rows, tmp_path / "a.txt", name="test_data").startswith(
        "test_data must be an existing file"
    )


def test_unreadable_parquet_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 not really")
    text = refusal(load_rows, path)
    assert text.startswith(f"data must be a readable parquet file, got {path} (")


def test_a_folder_that_is_no_dataset_is_refused(tmp_path):
    assert refusal(load_rows, tmp_path) == (
        "data must be a .jsonl, .json, .txt, .parquet file, a folder written by save_to_disk or salience select, "
        f"or a datasets name, got the folder {tmp_path}"
    )
    (tmp_path / "state.json").write_text("{")
    assert refusal(load_rows, tmp_path).startswith(
        f"data must be a whole folder of save_to_disk, got {tmp_path} ("
    )


@pytest.mark.parametrize(
    "source", ["nobody/nothing", "nothing", "nobody/nothing:main", "nobody/OpenHermes-2.5"]
)
def test_a_name_that_cannot_be_reached_is_refused(tmp_path, monkeypatch, source):
    import datasets

    def refuse(name, configuration, *, split):
        assert (name, configuration) == (source.partition(":")[0], source.partition(":")[2] or None)
        raise ConnectionError(f"Couldn't reach '{name}' on the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    assert refusal(load_rows, source) == (
        f"data must be an existing file or a datasets name that can be reached, got {source} "
        f"(Couldn't reach '{source.partition(':')[0]}' on the Hub)"
    )


def test_the_hub_is_really_asked():
    from datasets import config

    if not config.HF_HUB_OFFLINE:
        pytest.skip("asks the network")
    text = refusal(load_rows, "nobody/nothing")
    assert text.startswith(
        "data must be an existing file or a datasets name that can be reached, got nobody/nothing ("
    )


@pytest.mark.parametrize("source", ["./a", "/no/where", "~/none", "a/b/c", "data.csv", "x/train.jsonl"])
def test_what_looks_like_a_path_is_not_asked_for_on_the_hub(source):
    assert refusal(load_rows, source) == f"data must be an existing file or a datasets name, got {source}"


@pytest.mark.parametrize(
    "columns, text",
    [
        (
            {"promt": "instruction"},
            "column must be one of prompt, completion, question, answer, messages, text, label, got 'promt' "
            "(did you mean prompt?)",
        ),
        (
            {"prompt": "instructions"},
            "column prompt must be one of instruction, output, got 'instructions' (did you mean instruction?)",
        ),
        (
            {"prompt": "instruction"},
            f"data must be rows with {FORMS}, got columns instruction, output with prompt=instruction: "
            "map yours with columns (--column OURS=THEIRS)",
        ),
    ],
    ids=["ours", "theirs", "incomplete"],
)
def test_wrong_mappings_are_refused(tmp_path, columns, text):
    path = write(tmp_path / "a.jsonl", {"instruction": "i", "output": "o"})
    assert refusal(load_rows, path, columns=columns) == text


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize(
    "prompt, completion", [("Question: what", " two"), ("Answer:", "Answer:"), ("", " x"), ("p", "")]
)
def test_prompt_and_completion_meet_at_a_token(bos, prompt, completion):
    tokenizer = byte_tokenizer(bos=bos)
    (row,) = tokenize(rows_of(prompt=[prompt], completion=[completion]), tokenizer, max_length=64)
    first = tokenizer(prompt)["input_ids"]
    second = tokenizer(completion, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    assert row["input_ids"] == first + second
    assert row["labels"] == [-100] * len(first) + second
    assert row["attention_mask"] == [1] * len(first + second)
    assert row["input_ids"].count(tokenizer.bos_token_id) == int(bos)


def test_what_the_tokenizer_puts_around_a_text_is_kept():
    tokenizer = bert_tokenizer()
    (row,) = tokenize(rows_of(prompt=["a b"], completion=["c"]), tokenizer, max_length=9)
    assert row["input_ids"] == [1, 4, 5, 6, 2]
    assert row["labels"] == [-100, -100, -100, 6, 2]
    (row,) = tokenize(rows_of(text=["a b"]), tokenizer, max_length=9)
    assert row["input_ids"] == row["labels"] == [1, 4, 5, 2]


def test_no_second_space_goes_before_a_completion():
    tokenizer = spaced_tokenizer()
    assert tokenizer("a: b", add_special_tokens=False)["input_ids"] == [7, 6, 8]
    (row,) = tokenize(rows_of(prompt=["a:"], completion=[" b"]), tokenizer, max_length=9)
    assert row["input_ids"] == [7, 6, 8, 1]
    (row,) = tokenize(rows_of(prompt=["a:"], completion=["b"]), tokenizer, max_length=9)
    assert row["input_ids"] == [7, 6, 5, 1]
    (row,) = tokenize(rows_of(prompt=[""], completion=["b"]), tokenizer, max_length=9)
    assert row["input_ids"] == [8, 1]


def test_text_is_learned_whole_and_ended_once():
    tokenizer = byte_tokenizer(bos=True)
    (row,) = tokenize(rows_of(text=["one two"]), tokenizer, max_length=64)
    assert row["input_ids"] == row["labels"]
    assert tokenizer.decode(row["input_ids"]) == "<s>one two</s>"


def test_classes_are_labels_of_one_number():
    from datasets import Value

    tokenizer = bert_tokenizer()
    rows = tokenize(rows_of(text=["a", "b c"], label=[1, 0]), tokenizer, max_length=9)
    assert rows["input_ids"][:] == [[1, 4, 2], [1, 5, 6, 2]]
    assert rows["labels"][:] == [1, 0] and rows.features["labels"] == Value("int64")
    batch = Collator(tokenizer)(list(rows))
    assert batch["labels"].tolist() == [1, 0]
    assert batch["input_ids"].tolist() == [[1, 4, 2, 0], [1, 5, 6, 2]]


@pytest.mark.parametrize("template", [CHATML, MARKED, THINKING], ids=["chatml", "marked", "thinking"])
def test_the_assistants_turns_are_learned(template):
    tokenizer = byte_tokenizer(template)
    end = "<|end|>" if template == MARKED else "<|end|>\n"
    last = "<think></think>" if template == THINKING else ""
    (row,) = tokenize(rows_of(messages=[TALK]), tokenizer, max_length=99)
    assert tokenizer.decode(row["input_ids"]) == tokenizer.apply_chat_template(TALK, tokenize=False)
    assert learned(row, tokenizer) == [f"1.{end}", f"{last}2.{end}"]
    (row,) = tokenize(rows_of(prompt=["one?"], completion=["1."]), tokenizer, max_length=99)
    assert tokenizer.decode(row["input_ids"]) == tokenizer.apply_chat_template(TALK[:2], tokenize=False)
    assert learned(row, tokenizer) == [f"{last}1.{end}"]


def test_the_tokens_before_an_answer_are_those_of_generation():
    tokenizer = byte_tokenizer(CHATML)
    (row,) = tokenize(rows_of(messages=[TALK]), tokenizer, max_length=99)
    for count in (1, 3):
        before = tokenizer.apply_chat_template(TALK[:count], add_generation_prompt=True)["input_ids"]
        assert row["input_ids"][: len(before)] == before
        assert row["labels"][len(before) - 1] == -100 and row["labels"][len(before)] != -100


def test_an_assistant_may_speak_first_and_a_user_last():
    tokenizer = byte_tokenizer(CHATML)
    (row,) = tokenize(rows_of(messages=[TALK[1:3]]), tokenizer, max_length=99)
    assert learned(row, tokenizer) == ["1.<|end|>\n"]
    assert tokenizer.decode(row["input_ids"]) == "<|assistant|>1.<|end|>\n<|user|>two?<|end|>\n"


@pytest.mark.parametrize("template", [None, CHATML], ids=["no-template", "chat-false"])
def test_conversations_without_a_template(template):
    tokenizer = byte_tokenizer(template, bos=True)
    (row,) = tokenize(rows_of(messages=[TALK]), tokenizer, max_length=99, chat=False)
    assert (
        tokenizer.decode(row["input_ids"])
        == "<s>User: one?\nAssistant: 1.</s>\nUser: two?\nAssistant: 2.</s>"
    )
    assert learned(row, tokenizer) == [" 1.</s>", " 2.</s>"]


def test_a_row_that_the_template_refuses_is_named():
    tokenizer = byte_tokenizer(STRICT)
    rows = rows_of(messages=[TALK, TALK[1:]])
    assert refusal(tokenize, rows, tokenizer, max_length=99) == (
        "data must be conversations that the chat template takes (or pass chat=False), "
        "got row 2: must start with user"
    )


@pytest.mark.parametrize(
    "template, reason",
    [
        (
            "{{ messages | length }}" + CHATML,
            "what comes before an answer is rendered differently without the answer",
        ),
        (
            "{% for m in messages %}{{ m['content'] if loop.last or m['role'] == 'user' else 'hidden' }}{% endfor %}",
            "an earlier answer is not shown as it is, so its end cannot be found",
        ),
    ],
    ids=["start", "end"],
)
def test_a_template_that_cannot_be_cut_is_refused(template, reason):
    text = refusal(tokenize, rows_of(messages=[TALK]), byte_tokenizer(template), max_length=99)
    assert text == (
        f"data must be conversations that the chat template takes (or pass chat=False), got row 1: {reason}"
    )


def test_long_rows_are_refused_or_cut():
    tokenizer = bert_tokenizer()
    rows = rows_of(text=["a", "a b c", "a b c a b"])
    assert refusal(tokenize, rows, tokenizer, max_length=4) == (
        "data must be rows of at most max_length=4 tokens, got 5 in row 2 "
        "(2 of 3 rows are longer, the longest has 7): raise max_length, or set truncate to cut them"
    )
    cut = tokenize(rows, tokenizer, max_length=4, truncate=True)
    assert cut["input_ids"][:] == cut["labels"][:] == [[1, 4, 2], [1, 4, 5, 6], [1, 4, 5, 6]]
    assert len(tokenize(rows, tokenizer, max_length=None)["input_ids"][2]) == 7
    assert refusal(tokenize, rows, tokenizer, max_length=1) == "max_length must be >= 2, got 1"


def test_rows_with_nothing_to_learn_are_left_out(caplog):
    tokenizer = byte_tokenizer(CHATML)
    rows = rows_of(messages=[TALK[:1], TALK, TALK[2:3]])
    with caplog.at_level(logging.WARNING, "salience"):
        assert len(tokenize(rows, tokenizer, max_length=99)) == 1
    assert caplog.messages == ["2 of 3 rows have no response to learn and are left out"]
    text = "data must be rows with a response to learn, got none in 1 rows: all labels are masked"
    assert refusal(tokenize, rows.select([0]), tokenizer, max_length=99) == text
    long = rows_of(prompt=["one two three four"], completion=["1"])
    assert refusal(tokenize, long, byte_tokenizer(), max_length=3, truncate=True) == text


def test_a_dataset_of_another_form_is_refused():
    assert refusal(tokenize, rows_of(question=["q"], answer=["a"]), byte_tokenizer(), max_length=9) == (
        "data must be rows with prompt and completion, messages, or text, got columns question, answer"
    )


def test_many_rows_keep_their_order():
    tokenizer = byte_tokenizer()
    texts = [f"{number} two" for number in range(2311)]
    rows = tokenize(rows_of(text=texts, other=texts), tokenizer, max_length=64)
    assert [tokenizer.decode(ids[:-1]) for ids in rows["input_ids"]] == texts


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("multiple_of, length", [(1, 3), (4, 4)])
def test_batches_are_padded(side, multiple_of, length):
    rows = [
        {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": [-100, 6, 7], "other": "x"},
        {"input_ids": [8], "attention_mask": [1], "labels": [8], "other": "y"},
    ]
    batch = Collator(byte_tokenizer(), side=side, multiple_of=multiple_of)(rows)
    assert list(batch) == ["input_ids", "attention_mask", "labels"]
    for name, filler in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
        wanted = [
            row[name] + [filler] * (length - len(row[name]))
            if side == "right"
            else [filler] * (length - len(row[name])) + row[name]
            for row in rows
        ]
        assert batch[name].dtype == torch.int64
        assert batch[name].tolist() == wanted, name


def test_batches_without_labels_or_masks_and_of_other_tokenizers():
    batch = Collator(byte_tokenizer(pad_token=None))([{"input_ids": [5]}, {"input_ids": [6, 7]}])
    assert batch["input_ids"].tolist() == [[5, 2], [6, 7]]
    assert batch["attention_mask"].tolist() == [[1, 0], [1, 1]]
    assert "labels" not in batch


@pytest.mark.parametrize(
    "settings, text",
    [
        ({"side": "middle"}, "side must be right or left, got 'middle'"),
        ({"multiple_of": 0}, "multiple_of must be >= 1, got 0"),
    ],
)
def test_wrong_collators_are_refused(settings, text):
    assert refusal(Collator, byte_tokenizer(), **settings) == text
    nothing = byte_tokenizer(pad_token=None, eos_token=None)
    assert refusal(Collator, nothing) == "tokenizer must be one with a pad or an end token, got neither"


def test_formatted_rows_are_padded_too():
    rows = rows_of(input_ids=[[5, 6], [7]], labels=[1, 0]).with_format("torch")
    batch = Collator(byte_tokenizer())([rows[0], rows[1]])
    assert batch["input_ids"].tolist() == [[5, 6], [7, 0]] and batch["labels"].tolist() == [1, 0]


def test_a_model_learns_from_the_batches():
    from conftest import tiny_llama

    tokenizer = byte_tokenizer()
    model = tiny_llama(vocab=len(tokenizer))
    rows = rows_of(prompt=["Question: one\nAnswer:", "one"], completion=[" two", " two"])
    batch = Collator(tokenizer)(list(tokenize(rows, tokenizer, max_length=64)))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(9):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
