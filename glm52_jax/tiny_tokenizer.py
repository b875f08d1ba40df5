"""A working tokenizer for tiny models: one token a byte, the special tokens of GLM, a small chat template.

Standard library only, so that it runs wherever tiny.py does. The real tokenizer has merges and other ids; the files and
their formats (tokenizer.json, tokenizer_config.json, chat_template.jinja) are the same.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NUM_BYTES = 256
SPECIAL_TOKENS = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|system|>", "[gMASK]", "<sop>")
_EOS_TOKENS = ("<|endoftext|>", "<|user|>", "<|observation|>")

# Own text in GLM's manner: a role token, a line break, the content; the reply is opened by <|assistant|>.
CHAT_TEMPLATE = """\
[gMASK]<sop>
{%- macro text_of(content) -%}
  {%- if content is string -%}{{ content }}
  {%- else -%}{%- for part in content if part.type == "text" -%}{{ part.text }}{%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- if tools -%}<|system|>
Tools, one JSON object a line:
{% for tool in tools -%}{{ tool | tojson }}
{% endfor -%}
{%- endif -%}
{%- for message in messages -%}
  {%- set role = "observation" if message.role == "tool" else message.role -%}
  {%- if role not in ["system", "user", "assistant", "observation"] -%}
    {{- raise_exception("unknown role " ~ message.role) -}}
  {%- endif -%}
<|{{ role }}|>
{{ text_of(message.content) }}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>
{% endif -%}
"""


def tiny_special_ids(vocab_size: int) -> dict[str, int]:
    """Special token -> id, for those that fit: they take the ids from 256 on, in the order of SPECIAL_TOKENS."""
    if vocab_size < NUM_BYTES:
        raise ValueError(f"{vocab_size=} must be at least {NUM_BYTES}: the tokenizer has one token a byte")
    return {token: NUM_BYTES + i for i, token in enumerate(SPECIAL_TOKENS) if NUM_BYTES + i < vocab_size}


def tiny_eos_ids(vocab_size: int) -> list[int]:
    """Ids that end a reply (endoftext, user, observation) in this tokenizer; empty when vocab_size is exactly 256."""
    ids = tiny_special_ids(vocab_size)
    return [ids[token] for token in _EOS_TOKENS if token in ids]


def write_tokenizer(directory: str | Path, vocab_size: int) -> None:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja for a model of vocab_size ids.

    Ids 0..255 are the bytes of the same value, then come the special tokens as far as they fit; further ids have no
    text, like the padding at the end of the real vocabulary. ValueError when vocab_size < 256.
    """
    directory = Path(directory)
    special = tiny_special_ids(vocab_size)
    _write_json(directory / "tokenizer.json", _tokenizer_json(special))
    _write_json(directory / "tokenizer_config.json", _tokenizer_config(special))
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8", newline="\n")


def byte_alphabet() -> list[str]:
    """The printable character that byte-level BPE uses for each byte, by byte value.

    Printable Latin-1 bytes stand for themselves; the others take the code points from 256 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(NUM_BYTES, 2 * NUM_BYTES))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(NUM_BYTES)]


def _tokenizer_json(special: dict[str, int]) -> dict[str, Any]:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    unset = dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"))
    off = dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False)
    vocab = {char: byte for byte, char in enumerate(byte_alphabet())}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token, **flags} for token, i in special.items()],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", **unset, **off, "vocab": vocab, "merges": []},
    }


def _tokenizer_config(special: dict[str, int]) -> dict[str, Any]:
    end = SPECIAL_TOKENS[0] if special else None
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "eos_token": end,
        "pad_token": end,
        "additional_special_tokens": list(special),
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8", newline="\n")
