"""Reading text: from many threads, with the tokenizer's options, and where each token stands."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from transformers.utils import PaddingStrategy

from c3_hf.modeling.prompt_c3 import ESCAPE, TokenReader
from factories import NUM_LATENTS, make_encoder_tokenizer, make_processor, make_tokenizer


def ask(processor, text):
    content = [{"type": "context", "text": f"{text} <|im_end|>"}, {"type": "text", "text": f"{text}<img>"}]
    inputs = processor.apply_chat_template([{"role": "user", "content": content}])
    return {name: tensor.tolist() for name, tensor in inputs.items()}


class TestThreads:
    @pytest.mark.parametrize("two_vocabularies", [False, True])
    def test_right_ids_from_every_thread(self, two_vocabularies):
        processor = make_processor(encoder_tokenizer=make_encoder_tokenizer() if two_vocabularies else None)
        texts = [f"text {i} " * (i % 7 + 1) for i in range(400)]
        expected = [ask(processor, text) for text in texts]
        # Somebody beside uses the same tokenizer in his own way.
        beside = {"padding": "max_length", "max_length": 50, "truncation": True, "split_special_tokens": True}
        with ThreadPoolExecutor(9) as pool:
            other = pool.submit(lambda: [processor.tokenizer("a<|im_end|>", **beside)["input_ids"] for _ in texts])
            found = list(pool.map(lambda text: ask(processor, text), texts))
        assert found == expected
        assert {len(ids) for ids in other.result()} == {50}

    def test_the_tokenizer_stays_as_it_is(self):
        processor = make_processor()
        backend = processor.tokenizer.backend_tokenizer
        for split in (True, False):
            backend.encode_special_tokens = split
            backend.enable_padding(length=77)
            backend.enable_truncation(3)
            inputs = ask(processor, "a longer text")
            assert backend.encode_special_tokens is split
            assert backend.padding["length"] == 77
            assert backend.truncation["max_length"] == 3
            assert inputs == ask(make_processor(), "a longer text")

    def test_a_token_added_later_is_read(self):
        processor = make_processor()
        assert len(processor(text="<new>")["input_ids"][0]) == 5
        processor.tokenizer.add_tokens(["<new>"])
        assert processor(text="<new>")["input_ids"].tolist() == [[264]]

    def test_another_tokenizer_in_its_place(self):
        processor = make_processor()
        processor.tokenizer = make_tokenizer()
        processor.tokenizer.add_tokens(["<new>"])
        assert processor(text="<new>")["input_ids"].tolist() == [[264]]

    def test_copies_and_pickles(self):
        processor = make_processor(encoder_tokenizer=make_encoder_tokenizer())
        expected = ask(processor, "the other")
        assert ask(copy.deepcopy(processor), "the other") == expected
        assert ask(pickle.loads(pickle.dumps(processor)), "the other") == expected


class TestPlain:
    @pytest.mark.parametrize("text", ["a <img> é <", f"a <{ESCAPE}b<{ESCAPE}{ESCAPE}", "", "<<|im_end|><", ESCAPE])
    def test_offsets_are_those_of_the_text(self, text):
        ids, offsets = TokenReader(make_tokenizer()).read_plain([text])[0]
        assert len(ids) == len(text.encode())
        expected = [(i, i + 1) for i, character in enumerate(text) for _ in character.encode()]
        assert offsets == expected

    def test_no_texts(self):
        assert TokenReader(make_tokenizer()).read_plain([]) == []
        assert TokenReader(make_tokenizer()).read_markup([]) == []

    @pytest.mark.parametrize("arguments", [{"text": "a\ud800"}, {"text": "<imgpad>", "contexts": "b\udc80"}])
    def test_lone_surrogates(self, processor, arguments):
        with pytest.raises(
            ValueError, match="has the lone surrogate U+D.*, which is no character".replace("+", r"\+")
        ):
            processor(**arguments)

    def test_only_fast_tokenizers(self):
        with pytest.raises(TypeError, match="`tokenizer` must be a fast tokenizer, got str"):
            TokenReader("tokenizer")


MESSAGES = [{"role": "user", "content": [{"type": "context", "text": "abc"}, {"type": "text", "text": "and?"}]}]


class TestOptions:
    """Every option of a tokenizer is honoured, as transformers' own tokenizer would, or refused."""

    def plain(self, processor):
        return processor.apply_chat_template(MESSAGES)["input_ids"][0].tolist()

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_max_length_padding(self, processor, side):
        own = self.plain(processor)
        inputs = processor.apply_chat_template(
            MESSAGES, padding="max_length", max_length=200, padding_side=side, return_dict=True
        )
        filling = [processor.tokenizer.pad_token_id] * (200 - len(own))
        ids, mask = (inputs[name][0].tolist() for name in ("input_ids", "attention_mask"))
        assert ids == (filling + own if side == "left" else own + filling)
        assert mask == ([0] * len(filling) + [1] * len(own) if side == "left" else [1] * len(own) + [0] * len(filling))
        assert inputs["context_input_ids"].shape == (1, 1, 3)

    @pytest.mark.parametrize(
        "options",
        [
            {"padding": True},
            {"padding": "longest"},
            {"padding": PaddingStrategy.LONGEST},
            {"pad_to_multiple_of": 64},
            {"padding": "max_length", "max_length": 30, "truncation": True},
            {"padding": "max_length", "max_length": 40, "pad_to_multiple_of": 16},
            {"truncation": "longest_first", "max_length": 9},
            {"return_attention_mask": False},
            {"padding_side": "right"},
        ],
    )
    def test_as_the_tokenizer_itself(self, processor, options):
        texts = ["a longer prompt of the two", "short"]
        ours = processor(text=texts, **options)
        theirs = processor.tokenizer(
            texts, **{"padding": True, "return_tensors": "pt", "return_token_type_ids": False, **options}
        )
        assert set(ours) == set(theirs)
        for name in theirs:
            assert torch.equal(ours[name], theirs[name]), name
            assert ours[name].dtype == torch.long

    def test_without_padding(self, processor):
        texts = ["ab", "c"]
        assert processor(text=texts, padding=False, return_tensors=None)["input_ids"] == [[64, 65], [66]]
        assert processor(text=["ab", "cd"], padding=False)["input_ids"].shape == (2, 2)
        with pytest.raises(ValueError, match=r"needs prompts of one length, got \[1, 2\] tokens"):
            processor(text=texts, padding=False)

    def test_in_a_dictionary(self, processor):
        options = {"padding": "max_length", "max_length": 150}
        expected = processor.apply_chat_template(MESSAGES, **options)["input_ids"]
        by_dict = processor.apply_chat_template(MESSAGES, padding="max_length", tokenizer_kwargs={"max_length": 150})
        assert torch.equal(by_dict["input_ids"], expected)
        # By the names of transformers, and what the signature names too.
        for name in ("tokenizer_kwargs", "processor_kwargs", "text_kwargs"):
            inputs = processor.apply_chat_template(MESSAGES, **{name: {**options, "return_tensors": "np"}})
            assert np.array_equal(inputs["input_ids"], expected.numpy()), name

    def test_with_latents(self, processor):
        latents = torch.zeros(2, NUM_LATENTS, 8)
        inputs = processor.apply_chat_template(
            processor.restore_messages(latents), padding="max_length", max_length=200, return_tensors="np"
        )
        assert inputs["input_ids"].shape == (1, 200)
        assert inputs["context_latents"].shape == (1, 2, NUM_LATENTS, 8)
        assert isinstance(inputs["context_latents"], np.ndarray)

    def test_numpy(self, processor):
        inputs = processor.apply_chat_template(MESSAGES, return_tensors="np")
        tensors = processor.apply_chat_template(MESSAGES)
        assert set(inputs) == set(tensors)
        for name, array in inputs.items():
            assert isinstance(array, np.ndarray), name
            assert array.dtype == np.int64
            assert np.array_equal(array, tensors[name].numpy())

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"stride": 3}, "`stride`=3 cannot be had from a C3Processor: a prompt cannot be cut into several"),
            ({"return_offsets_mapping": True}, "`return_offsets_mapping`=True cannot be had from a C3Processor"),
            ({"return_assistant_tokens_mask": True}, "`return_assistant_tokens_mask`=True cannot be had"),
            ({"add_special_tokens": True}, "`add_special_tokens`=True cannot be had from a C3Processor"),
            ({"split_special_tokens": True}, "`split_special_tokens`=True cannot be had from a C3Processor"),
            ({"return_token_type_ids": True}, "`return_token_type_ids`=True cannot be had from a C3Processor"),
            ({"tokenizer_kwargs": {"colour": 3}}, "`colour` is no option of a C3Processor; it takes `padding`"),
            ({"max_length": 30}, r"`max_length`=30 does nothing by itself: add `truncation=True`, or `padding="),
            ({"max_length": 30, "truncation": True}, "has .* tokens, and cutting it to `max_length`=30 would cut a"),
            ({"max_length": 0, "truncation": True}, "`max_length` must be a positive int, got 0"),
            ({"pad_to_multiple_of": "8"}, "`pad_to_multiple_of` must be a positive int, got '8'"),
            ({"padding": "longer"}, "`padding` must be one of 'longest', 'max_length', 'do_not_pad', got 'longer'"),
            ({"padding": "max_length"}, "`max_length` must be given: the tokenizer states no `model_max_length`"),
            ({"truncation": "only_second"}, "`truncation` must be one of True, False, got 'only_second'"),
            ({"padding_side": "top"}, "`padding_side` must be one of 'left', 'right', got 'top'"),
            ({"return_tensors": "tf"}, "`return_tensors` must be one of 'pt', 'np', None, got 'tf'"),
            ({"tools": [{"name": "f"}]}, "`tools` have no place in this chat template"),
            (
                {"continue_final_message": True, "add_generation_prompt": True},
                "`continue_final_message` and `add_generation_prompt` exclude each other",
            ),
            (
                {"continue_final_message": True, "chat_template": "{{ messages[0].role }}", "context_block": ""},
                "`continue_final_message` needs a chat template that ends the last turn with",
            ),
        ],
    )
    def test_refusals(self, processor, options, message):
        with pytest.raises(ValueError, match=message):
            processor.apply_chat_template(MESSAGES, **options)

    def test_asking_for_nothing_is_no_mistake(self, processor):
        nothing = {"return_offsets_mapping": False, "stride": None, "add_special_tokens": False, "tools": None}
        assert torch.equal(processor.apply_chat_template(MESSAGES, **nothing)["input_ids"][0],
                           torch.tensor(self.plain(processor)))  # fmt: skip

    def test_a_begun_reply(self, processor):
        chat = [*MESSAGES, {"role": "assistant", "content": "It is <b>"}]
        begun = processor.apply_chat_template(chat, continue_final_message=True, tokenize=False)
        asked = processor.apply_chat_template(MESSAGES, tokenize=False)
        assert begun == asked + processor.escape("It is <b>")


class TestMessages:
    @pytest.mark.parametrize(
        ("chat", "documents", "message"),
        [
            ([{"role": "user", "content": None}], None, "`content` of a message must be a string or a list of parts"),
            (
                [{"role": "user", "content": ["a"]}],
                None,
                'a part of a message must be a dict whose `type` is "text" or',
            ),
            ([{"role": "user", "content": [{"type": "image"}]}], None, "a part of a message must be a dict whose"),
            ([{"role": "system", "content": "s"}], [{"text": "d"}], "`documents` stand in the first user message"),
            (MESSAGES, ["d"], "`documents` must be dicts with `text` and perhaps `title`, got a str"),
            (MESSAGES, [{"title": "d"}], "`text` of a document must be a string, got None"),
            ("Hello", None, "`conversation` must be a list of messages such as .*, got str"),
            ({"role": "user", "content": "x"}, None, "`conversation` must be a list of messages such as .*, got dict"),
            ([[]], None, r"`conversation` holds \[\] in the place of a chat"),
            (["Hello"], None, "`conversation` holds 'Hello' in the place of a chat"),
            (
                [{"content": "x"}],
                None,
                "a message must be a dict with `content` and a string as `role`, got {'content'",
            ),
            ([{"role": None, "content": "x"}], None, "a message must be a dict with `content` and a string as `role`"),
            (
                [{"role": "user", "content": [{"type": "text"}]}],
                None,
                "`text` of a text part must be a string, got None",
            ),
            ([{"role": "user", "content": [{"type": "text", "text": 5}]}], None, "`text` of a text part .* got 5"),
        ],
    )
    def test_mistakes(self, processor, chat, documents, message):
        with pytest.raises(ValueError, match=message):
            processor.apply_chat_template(chat, documents=documents)
