"""Makes tokens of rows: what is learned, where a prompt ends, and what a chat template puts around a turn."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from salience.core.errors import ParameterError, first_line

IGNORED = -100  # the label of what is not learned

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")

# a stretch of a row, as text or already as tokens, and whether it is learned
Piece = tuple[str | list[int], bool]
# input ids and labels of a row, int32 [T]
Encoded = tuple[np.ndarray, np.ndarray]


class Encoder:
    """Rows to tokens and labels, for one tokenizer."""

    def __init__(self, tokenizer: Any, *, chat: bool, name: str) -> None:
        self.tokenizer, self.chat, self.name = tokenizer, chat, name
        self.marked = chat and bool(_GENERATION_MARK.search(tokenizer.get_chat_template()))
        self.before, self.after = _surroundings(tokenizer)
        self.anchor, self.anchor_length = _anchor(tokenizer)
        end = tokenizer.eos_token_id
        self.end = self.after or ([end] if end is not None else [])

    def encode(self, rows: Mapping[str, Sequence[Any]], start: int) -> list[Encoded]:
        """Each row's tokens; `start` is the number of the first."""
        pieces = [self._pieces(row, start + index) for index, row in enumerate(_each(rows))]
        found = iter(self._tokens(pieces))
        return [
            _joined([(next(found) if isinstance(part, str) else part, learned) for part, learned in row])
            for row in pieces
        ]

    def _tokens(self, rows: Sequence[Sequence[Piece]]) -> list[list[int]]:
        """Tokens of all stretches of text, in order."""
        texts, cuts = [], []
        for row in rows:
            first = True
            for part in (part for part, _ in row if isinstance(part, str)):
                texts.append(part if first else self.anchor + part)
                cuts.append(0 if first else self.anchor_length)
                first = first and not part
        # one call for all: a fast tokenizer works on a list in parallel
        found = _plain(self.tokenizer, texts) if texts else []
        return [tokens[cut:] for tokens, cut in zip(found, cuts)]

    def _pieces(self, row: Mapping[str, Any], index: int) -> list[Piece]:
        if "text" in row:
            end = self.after if "label" in row else self.end
            return [(self.before, True), (row["text"], True), (end, True)]
        messages = row.get("messages")
        if self.chat:
            return self._chat(messages or _turns(row["prompt"], row["completion"]), index)
        if messages:
            return self._plain_chat(messages)
        return [(self.before, False), (row["prompt"], False), (row["completion"], True), (self.end, True)]

    def _plain_chat(self, messages: Sequence[Mapping[str, str]]) -> list[Piece]:
        """A conversation without a template: `User: ...` and `Assistant: ...`, a line each."""
        pieces: list[Piece] = [(self.before, False)]
        for index, turn in enumerate(messages):
            header = ("\n" if index else "") + turn["role"].capitalize() + ":"
            if turn["role"] == "assistant":
                pieces += [(header, False), (f" {turn['content']}", True), (self.end, True)]
            else:
                pieces.append((f"{header} {turn['content']}", False))
        return pieces

    def _chat(self, messages: Sequence[Mapping[str, str]], index: int) -> list[Piece]:
        from jinja2.exceptions import TemplateError

        try:
            return self._marked(messages) if self.marked else _cut(*self._spans(messages))
        except (TemplateError, ValueError) as error:
            raise ParameterError(
                f"{self.name} must be conversations that the chat template takes (or pass chat=False), "
                f"got row {index + 1}: {first_line(error)}"
            ) from error

    def _marked(self, messages: Sequence[Mapping[str, str]]) -> list[Piece]:
        """The template itself says what the assistant generates."""
        found = self.tokenizer.apply_chat_template(
            list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        learned = zip(found["input_ids"], found["assistant_masks"])
        return [
            ([one for one, _ in run], bool(mark)) for mark, run in groupby(learned, key=lambda pair: pair[1])
        ]

    def _spans(self, messages: Sequence[Mapping[str, str]]) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as text, and [start, end) of the assistant's turns: each begins where the conversation
        so far, with the prompt for an answer, ends, and goes on to where it ends with the answer."""
        whole, spans = self._render(messages), []
        for index, turn in enumerate(messages):
            if turn["role"] == "assistant":
                start = self._start(messages, index, whole)
                spans.append((start, self._end(messages, index, whole, start)))
        return whole, spans

    def _start(self, messages: Sequence[Mapping[str, str]], index: int, whole: str) -> int:
        if index == 0:
            # many templates refuse to render a conversation of no turns
            return max(whole.find(messages[0]["content"].strip()), 0)
        for prompt in (True, False):
            before = self._render(messages[:index], prompt=prompt)
            if whole.startswith(before):
                return len(before)
        raise ValueError("what comes before an answer is rendered differently without the answer")

    def _end(self, messages: Sequence[Mapping[str, str]], index: int, whole: str, start: int) -> int:
        if index + 1 == len(messages):
            return len(whole)
        upto = self._render(messages[: index + 1])
        if whole.startswith(upto):
            return len(upto)
        # a template may show a last answer differently from earlier ones (an empty thought before it, in Qwen3's):
        # then the answer is found by its text, and what closed it as the last one closes it here too
        content = messages[index]["content"].strip()
        place = whole.find(content, start)
        close = upto[upto.rfind(content) + len(content) :]
        if place < 0 or not whole.startswith(close, place + len(content)):
            raise ValueError("an earlier answer is not shown as it is, so its end cannot be found")
        return place + len(content) + len(close)

    def _render(self, messages: Sequence[Mapping[str, str]], *, prompt: bool = False) -> str:
        text: str = self.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=prompt
        )
        return text


def _each(rows: Mapping[str, Sequence[Any]]) -> Iterable[dict[str, Any]]:
    return [dict(zip(rows, values)) for values in zip(*rows.values())]


def _turns(prompt: str, completion: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]


def _surroundings(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and behind a text of its own accord: for BERT's, [CLS] and [SEP]."""
    whole, plain = tokenizer("a")["input_ids"], _plain(tokenizer, ["a"])[0]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    return [], []


def _anchor(tokenizer: Any) -> tuple[str, int]:
    """What to put before a text that goes on from another one, and how many tokens of it to cut off again.

    Llama 2's kind of tokenizer begins every text with a space; behind a prompt that would be a second one.
    """
    plain, alone, behind = _plain(tokenizer, ["a", "\n", "\na"])
    spaced = bool(alone) and behind[: len(alone)] == alone and behind[len(alone) :] != plain
    return ("\n", len(alone)) if spaced else ("", 0)


def _plain(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    found: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return found


def _cut(text: str, spans: Sequence[tuple[int, int]]) -> list[Piece]:
    pieces: list[Piece] = []
    done = 0
    for start, end in spans:
        pieces += [(text[done:start], False), (text[start:end], True)]
        done = end
    return [*pieces, (text[done:], False)]


def _joined(parts: Sequence[tuple[list[int], bool]]) -> Encoded:
    ids = np.array([token for tokens, _ in parts for token in tokens], np.int32)
    learned = np.repeat([mark for _, mark in parts], [len(tokens) for tokens, _ in parts])
    return ids, np.where(learned, ids, np.int32(IGNORED))
