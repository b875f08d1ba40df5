"""Tokenizer, chat template and the streaming decoder, on the tiny tokenizer and on one with merges."""

import json
from datetime import datetime
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from glm52_jax.tiny_tokenizer import SPECIAL_TOKENS, byte_alphabet, tiny_eos_ids, tiny_special_ids, write_tokenizer
from glm52_jax.tokenizer import StreamDecoder, Tokenizer, TokenizerError

VOCAB = 320
USER = [{"role": "user", "content": "Hi"}]
CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "日本語の文章 日本語",
    "😀😃😄👩‍👩‍👧 😀😀",
    "naïve café größer",
    "привет мир",
] * 20


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    write_tokenizer(directory, VOCAB)
    return directory


@pytest.fixture(scope="module")
def tiny(tiny_dir) -> Tokenizer:
    return Tokenizer.from_dir(tiny_dir)


@pytest.fixture(scope="module")
def merged(tmp_path_factory) -> Tokenizer:
    """Byte-level BPE whose tokens begin and end within characters, with a special token and a plain added one."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<|end|>"], initial_alphabet=byte_alphabet(), show_progress=False
    )
    inner.train_from_iterator(CORPUS, trainer)
    inner.add_tokens(["<think>", "語 é"])
    directory = tmp_path_factory.mktemp("merged")
    inner.save(str(directory / "tokenizer.json"))
    return Tokenizer.from_dir(directory)


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    decoder = tokenizer.stream()
    return "".join([decoder.push(i) for i in ids] + [decoder.flush()])


TEXT = st.text(
    alphabet=st.one_of(st.characters(codec="utf-8"), st.sampled_from("😀👩‍👧日本語é\u0301 \n<|user|>\ufffd")),
    max_size=60,
)


class TestTiny:
    @given(text=TEXT)
    def test_text_survives(self, tiny, text):
        assert tiny.decode(tiny.encode(text), skip_special_tokens=False) == text

    @given(data=st.binary(max_size=40))
    def test_ids_below_256_are_bytes(self, tiny, data):
        assert tiny.decode(list(data)) == data.decode("utf-8", "replace")

    def test_special_tokens_take_the_next_ids(self, tiny):
        assert [tiny.encode(token) for token in SPECIAL_TOKENS] == [[256 + i] for i in range(len(SPECIAL_TOKENS))]
        assert tiny.encode("<|use") == list(b"<|use")

    @pytest.mark.parametrize(
        ("vocab_size", "eos"), [(256, []), (257, [256]), (258, [256, 257]), (320, [256, 257, 259])]
    )
    def test_what_does_not_fit_is_left_out(self, tmp_path, vocab_size, eos):
        write_tokenizer(tmp_path, vocab_size)
        tokenizer = Tokenizer.from_dir(tmp_path)
        assert tiny_eos_ids(vocab_size) == eos
        assert max(tokenizer.encode("".join(SPECIAL_TOKENS) + "é")) < vocab_size
        assert max(tokenizer.chat(USER)) < vocab_size
        assert tokenizer.decode(tokenizer.encode("é<|user|>")).startswith("é")

    def test_too_small_a_vocabulary(self, tmp_path):
        with pytest.raises(ValueError, match="vocab_size=255"):
            write_tokenizer(tmp_path, 255)

    def test_files_are_the_same_every_time(self, tmp_path, tiny_dir):
        write_tokenizer(tmp_path, VOCAB)
        for file in tiny_dir.iterdir():
            assert (tmp_path / file.name).read_bytes() == file.read_bytes()


class TestStream:
    @given(text=TEXT)
    def test_text_tiny(self, tiny, text):
        ids = tiny.encode(text)
        assert streamed(tiny, ids) == tiny.decode(ids)

    @given(ids=st.lists(st.integers(0, VOCAB + 5), max_size=120))
    def test_any_ids_tiny(self, tiny, ids):
        assert streamed(tiny, ids) == tiny.decode(ids)

    @given(
        ids=st.lists(
            st.sampled_from([*b"\xf0\x9f\x98\x80\xe2\x82\xac\xc3\xed\xa0\xff\xef\xbf\xbdA", 257, 300]), max_size=150
        )
    )
    @settings(max_examples=300)
    def test_broken_utf8_tiny(self, tiny, ids):
        assert streamed(tiny, ids) == tiny.decode(ids)

    @given(text=st.one_of(TEXT, st.lists(st.sampled_from(CORPUS), max_size=3).map("".join)))
    def test_text_merged(self, merged, text):
        ids = merged.encode(text)
        assert streamed(merged, ids) == merged.decode(ids)

    @given(ids=st.lists(st.integers(0, 430), max_size=150))
    @settings(max_examples=300)
    def test_any_ids_merged(self, merged, ids):
        assert streamed(merged, ids) == merged.decode(ids)

    def test_long_runs_without_a_boundary(self, tiny):
        for unit in (b"\x80", b"\xf0\x9f\x98", b"\xc3", b"\xf0"):
            ids = list(unit) * 100
            assert streamed(tiny, ids) == tiny.decode(ids)

    @given(text=st.text(st.characters(codec="utf-8", exclude_characters="\ufffd"), max_size=40))
    def test_nothing_complete_is_held_back(self, tiny, text):
        decoder, out = tiny.stream(), ""
        for char in text:
            for byte in char.encode():
                out += decoder.push(byte)
            assert out.endswith(char)
        assert out == text and decoder.flush() == ""

    def test_incomplete_text_is_held_back_until_the_flush(self, tiny):
        decoder = tiny.stream()
        assert [decoder.push(b) for b in "€".encode()] == ["", "", "€"]
        assert decoder.push(0xE2) == ""
        assert decoder.flush() == "\ufffd"
        assert decoder.push(ord("a")) + decoder.flush() == "a"

    @pytest.mark.parametrize("unit", [b"a", b"\x80", "😀".encode(), b"\xf0\x9f\x98"])
    def test_work_of_a_push_does_not_grow(self, tiny, unit):
        lengths = []

        class Counting:
            id_to_token = staticmethod(tiny._tokenizer.id_to_token)

            def decode(self, ids, **options):
                lengths.append(len(ids))
                return tiny._tokenizer.decode(ids, **options)

        decoder = StreamDecoder(Counting(), frozenset())  # type: ignore[arg-type]
        for byte in unit * 500:
            decoder.push(byte)
        assert max(lengths) <= StreamDecoder.WINDOW
        assert len(lengths) <= 1.2 * 500 * len(unit)


class TestChat:
    def test_tiny_template(self, tiny):
        messages = [
            {"role": "system", "content": "Be brief."},
            {
                "role": "user",
                "content": [{"type": "text", "text": "Hi"}, {"type": "image"}, {"type": "text", "text": "!"}],
            },
            {"role": "assistant", "content": "Hello"},
            {"role": "tool", "content": "42"},
        ]
        expected = (
            "[gMASK]<sop><|system|>\nBe brief.<|user|>\nHi!<|assistant|>\nHello<|observation|>\n42<|assistant|>\n"
        )
        assert tiny.render(messages) == expected
        assert tiny.render(messages, add_generation_prompt=False) == expected.removesuffix("<|assistant|>\n")
        assert tiny.chat(messages) == tiny.encode(expected)
        ids = tiny_special_ids(VOCAB)
        assert tiny.chat(USER) == [
            *(ids["[gMASK]"], ids["<sop>"], ids["<|user|>"], *b"\nHi", ids["<|assistant|>"], *b"\n")
        ]

    def test_tools_are_plain_json(self, tiny):
        tool = {"name": "größe", "about": "<a> & 'b'"}
        assert json.dumps(tool, ensure_ascii=False) in tiny.render(USER, tools=[tool])

    def test_template_refuses(self, tiny):
        with pytest.raises(TokenizerError, match=r"chat_template\.jinja.*unknown role robot"):
            tiny.chat([{"role": "robot", "content": "x"}])

    def test_special_tokens_are_not_added_twice(self, tiny_dir, tmp_path):
        inner = tokenizers.Tokenizer.from_file(str(tiny_dir / "tokenizer.json"))
        ids = tiny_special_ids(VOCAB)
        prefix = [(token, ids[token]) for token in ("[gMASK]", "<sop>")]
        inner.post_processor = processors.TemplateProcessing(single="[gMASK] <sop> $A", special_tokens=prefix)
        inner.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "chat_template.jinja").write_text("[gMASK]<sop>{{ messages[0].content }}")
        tokenizer = Tokenizer.from_dir(tmp_path)
        assert tokenizer.encode("Hi") == [261, 262, *b"Hi"]
        assert tokenizer.chat(USER) == [261, 262, *b"Hi"]

    @pytest.mark.parametrize(
        ("template", "expected"),
        [
            ("{% for m in messages %}\n  {% if true %}\n{{ m.content }}\n  {% endif %}\n{% endfor %}\n", "Hi\n"),
            ("{{ messages | tojson }}", '[{"role": "user", "content": "Hi"}]'),
            ("{{ {'é': '<&'} | tojson(indent=1) }}", '{\n "é": "<&"\n}'),
            ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
            ("{% generation %}{{ messages[0].role }}{% endgeneration %}.", "user."),
            ("{{ eos_token }}{{ pad_token }}{{ additional_special_tokens | length }}", "</s><pad>2"),
            ("{{ add_generation_prompt }}{{ tools is none }}{{ enable_thinking }}", "TrueTrueFalse"),
            ("{{ missing }}|{{ missing is defined }}", "|False"),
        ],
    )
    def test_rendering_rules(self, tiny_dir, tmp_path, template, expected):
        tokens = {
            "eos_token": {"content": "</s>"},
            "pad_token": "<pad>",
            "additional_special_tokens": ["a", {"content": "b"}],
        }
        assert (
            from_config(tiny_dir, tmp_path, tokens | {"chat_template": template}).render(USER, enable_thinking=False)
            == expected
        )

    def test_today(self, tiny_dir, tmp_path):
        tokenizer = from_config(tiny_dir, tmp_path, {"chat_template": "{{ strftime_now('%Y') }}"})
        assert abs(int(tokenizer.render(USER)) - datetime.now().year) <= 1

    def test_the_sandbox_holds(self, tiny_dir, tmp_path):
        template = "{{ messages.append(1) }}"
        with pytest.raises(TokenizerError, match="refuses"):
            from_config(tiny_dir, tmp_path, {"chat_template": template}).render(USER)

    def test_named_templates(self, tiny_dir, tmp_path):
        named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
        tokenizer = from_config(tiny_dir, tmp_path, {"chat_template": named})
        assert tokenizer.render(USER) == "D"
        assert tokenizer.render(USER, tools=[{}]) == "T"
        assert tokenizer.render(USER, chat_template="tool_use") == "T"
        with pytest.raises(TokenizerError, match="no chat template 'rag', only"):
            tokenizer.render(USER, chat_template="rag")

    def test_the_jinja_file_comes_first(self, tiny_dir, tmp_path):
        (tmp_path / "chat_template.jinja").write_text("file")
        assert from_config(tiny_dir, tmp_path, {"chat_template": "config"}).render(USER) == "file"


def from_config(tiny_dir: Path, directory: Path, config: dict) -> Tokenizer:
    (directory / "tokenizer.json").write_bytes((tiny_dir / "tokenizer.json").read_bytes())
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.from_dir(directory)


class TestErrors:
    def test_no_tokenizer(self, tmp_path):
        with pytest.raises(TokenizerError, match=r"tokenizer\.json: no such file\. Copy"):
            Tokenizer.from_dir(tmp_path)

    @pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"version": "1.0"}', b"\xff\xfe"])
    def test_broken_tokenizer(self, tmp_path, content):
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(TokenizerError, match=r"tokenizer\.json: not a readable tokenizer"):
            Tokenizer.from_dir(tmp_path)

    @pytest.mark.parametrize("content", [b"{", b"[]", b"\xff"])
    def test_broken_config(self, tiny_dir, tmp_path, content):
        from_config(tiny_dir, tmp_path, {})
        (tmp_path / "tokenizer_config.json").write_bytes(content)
        with pytest.raises(TokenizerError, match=r"tokenizer_config\.json"):
            Tokenizer.from_dir(tmp_path)

    @pytest.mark.parametrize("value", [7, ["x"], [{"name": "default"}]])
    def test_misshapen_template(self, tiny_dir, tmp_path, value):
        with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: chat_template must be a string or a list"):
            from_config(tiny_dir, tmp_path, {"chat_template": value})

    def test_without_template_only_chat_fails(self, tiny_dir, tmp_path):
        tokenizer = from_config(tiny_dir, tmp_path, {})
        assert tokenizer.encode("Hi") == [*b"Hi"]
        with pytest.raises(TokenizerError, match=r"no chat template .*plain prompt"):
            tokenizer.chat(USER)

    def test_broken_template(self, tiny_dir, tmp_path):
        with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: broken chat template, line 2"):
            from_config(tiny_dir, tmp_path, {"chat_template": "\n{% if %}"}).chat(USER)

    def test_template_fails_on_data(self, tiny_dir, tmp_path):
        with pytest.raises(TokenizerError, match="refuses these messages"):
            from_config(tiny_dir, tmp_path, {"chat_template": "{{ messages[0].content + 1 }}"}).chat(USER)

    def test_lone_surrogate(self, tiny):
        with pytest.raises(TokenizerError, match="cannot encode"):
            tiny.encode("\udc80")

    def test_truncation_in_the_file_is_not_applied(self, tiny_dir, tmp_path):
        spec = json.loads((tiny_dir / "tokenizer.json").read_text())
        spec["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
        (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
        assert len(Tokenizer.from_dir(tmp_path).encode("abcdefgh")) == 8


class TestEos:
    def test_generation_config_comes_first(self, tiny_dir, tmp_path):
        assert from_config(tiny_dir, tmp_path, {}).eos_ids == ()
        (tmp_path / "config.json").write_text('{"eos_token_id": [1, 2]}')
        assert Tokenizer.from_dir(tmp_path).eos_ids == (1, 2)
        (tmp_path / "generation_config.json").write_text('{"eos_token_id": 5}')
        assert Tokenizer.from_dir(tmp_path).eos_ids == (5,)

    def test_wrong_type(self, tiny_dir, tmp_path):
        (tmp_path / "config.json").write_text('{"eos_token_id": "end"}')
        with pytest.raises(TokenizerError, match=r"config\.json: eos_token_id='end'"):
            from_config(tiny_dir, tmp_path, {})
