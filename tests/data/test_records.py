from __future__ import annotations

import pytest

from c3_hf.data.records import parse_record


def contexts_of(example):
    return [part["text"] for message in example.messages for part in message["content"] if part["type"] == "context"]


def test_plain_text_stays_text():
    assert parse_record({"text": "abc", "id": 1}) == "abc"


def test_contexts_fill_the_open_parts_in_order():
    example = parse_record(
        {
            "contexts": ["one", "two"],
            "messages": [
                {"role": "user", "content": [{"type": "context"}, {"type": "context"}, {"type": "text", "text": "q"}]},
                {"role": "assistant", "content": "a"},
            ],
        }
    )
    assert contexts_of(example) == ["one", "two"]
    assert example.loss == (False, True)


def test_contexts_without_parts_go_in_front_of_the_first_user_message():
    example = parse_record(
        {
            "contexts": "one",
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "a"},
            ],
        }
    )
    assert example.messages[1]["content"] == [{"type": "context", "text": "one"}, {"type": "text", "text": "q"}]


def test_missing_columns_are_none():
    record = {"text": "abc", "messages": None, "conversations": None, "contexts": None}
    assert parse_record(record) == "abc"


def test_loss_can_be_switched_off_by_message():
    turns = [
        {"role": "user", "content": "q", "loss": None},
        {"role": "assistant", "content": "a", "loss": False},
        {"role": "user", "content": "r", "loss": None},
        {"role": "assistant", "content": "b", "loss": None},
    ]
    assert parse_record({"messages": turns}).loss == (False, False, False, True)


def test_original_conversations():
    example = parse_record(
        {
            "conversations": [
                {"from": "context", "value": "text with <image> in it"},
                {"from": "human", "value": "<image>\nRepeat the text: "},
                {"from": "gpt", "value": "text with <image> in it"},
            ]
        }
    )
    user, assistant = example.messages
    assert user["content"] == [
        {"type": "context", "text": "text with <image> in it"},
        {"type": "text", "text": "Repeat the text: "},
    ]
    # The original turned the tag in the answer into a context block.
    assert assistant["content"] == [{"type": "text", "text": "text with <image> in it"}]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"body": "x"}, r"needs `text`, `messages` or `conversations`.*'body'"),
        ({"messages": [{"role": "tool", "content": "x"}]}, r"`messages` roles must be one of .* got 'tool'"),
        ({"messages": [{"role": "user", "content": "x"}]}, r"`messages` holds no assistant message"),
        ({"messages": [{"role": "user", "content": "x", "loss": True}]}, r"`loss` can be true for assistant messages"),
        ({"messages": [{"role": "user", "content": None}]}, r"needs `content`"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "text": "x"}]}]}, r"A content part must be"),
        ({"messages": [{"role": "user", "content": [{"type": "context"}]}]}, r"more .* parts without a text"),
        (
            {"contexts": ["a", "b"], "messages": [{"role": "user", "content": [{"type": "context"}]}]},
            r"`contexts` has 2 texts, but `messages` takes only 1",
        ),
        ({"contexts": ["a"], "messages": [{"role": "assistant", "content": "x"}]}, r"`contexts` needs a user message"),
        (
            {"conversations": [{"from": "human"}]},
            r"Every turn of `conversations` needs a string `value`, got .*'human'",
        ),
        ({"conversations": [{"from": "bot", "value": "x"}]}, r"`conversations` turns must come from .* got 'bot'"),
        (
            {"conversations": [{"from": "context", "value": "x"}, {"from": "human", "value": "no mark"}]},
            r"no human turn holds '<image>'",
        ),
        ({"conversations": [{"from": "human", "value": "x"}]}, r"`conversations` holds no assistant message"),
    ],
)
def test_records_that_break_the_schema(record, message):
    with pytest.raises(ValueError, match=message):
        parse_record(record)
