"""Text to ids and back through the checkpoint's own files: tokenizer.json and the chat template, and text as a stream.

The template is rendered with the settings and helpers of Hugging Face's ``apply_chat_template`` (transformers 5.23.0,
read), so the same files give the same ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import tokenizers

_REPLACEMENT = "\ufffd"


class TokenizerError(ValueError):
    """A tokenizer file that is missing or broken, or a text or chat that cannot be encoded; the message names it."""


class StreamDecoder:
    """Text of a growing list of ids: the pushes' results and the flush's, joined, are ``decode`` of all ids.

    Each push decodes a window of at most ``WINDOW`` recent tokens, whatever was generated before. A character that is
    still incomplete decodes to U+FFFD at the end of the window, so trailing ones are held back until they are settled.
    Exact for byte-level tokenizers (GLM's): a UTF-8 decoder that starts within a text is in step again after 3 bytes,
    so the window may begin anywhere if ``KEEP`` >= 3 + 3 * HELD tokens with text are left in it (a U+FFFD stands for 1
    to 3 bytes).
    """

    WINDOW = 24
    KEEP = 12
    HELD = 3

    def __init__(self, tokenizer: tokenizers.Tokenizer, silent: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._silent = silent
        self._window: list[int] = []
        self._emitted = 0  # characters of the window's text already given out

    def push(self, token_id: int) -> str:
        """Adds one id; returns the text that is now complete, often one token's, possibly empty."""
        if token_id in self._silent or self._tokenizer.id_to_token(token_id) is None:
            return ""  # special, or past the tokenizer's vocabulary: no text, and no help to keep the window in step
        self._window.append(token_id)
        text = self._decode()
        held = min(len(text) - len(text.rstrip(_REPLACEMENT)), self.HELD)
        out = text[self._emitted : len(text) - held]
        self._emitted += len(out)
        if len(self._window) >= self.WINDOW:
            pending = len(text) - self._emitted
            self._window = self._window[-self.KEEP :]
            self._emitted = len(self._decode()) - pending
        return out

    def flush(self) -> str:
        """Returns what was held back, incomplete characters as U+FFFD, and starts anew."""
        out = self._decode()[self._emitted :]
        self._window, self._emitted = [], 0
        return out

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=True)


class Tokenizer:
    """A checkpoint's tokenizer. ``eos_ids``: ids that end a reply, from generation_config.json, else config.json."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, template: ChatTemplate, eos_ids: tuple[int, ...] = ()) -> None:
        # Files saved from training may cut or pad what they encode: never wanted here.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._template = template
        self._silent = frozenset(i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special)
        self.eos_ids = eos_ids

    @classmethod
    def from_dir(cls, path: str | Path) -> Tokenizer:
        """Reads tokenizer.json and, where present, tokenizer_config.json and chat_template.jinja.

        Raises:
          TokenizerError: no such directory, tokenizer.json missing, or a file that cannot be read. A missing or broken
          chat template is
            reported by ``chat`` only: a base model has none.
        """
        path = Path(path)
        file = path / "tokenizer.json"
        if not file.is_file():
            raise TokenizerError(
                f"{file}: no such file. Copy tokenizer.json of the model into the checkpoint directory"
            )
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(
                f"{file}: not a readable tokenizer ({error}). Copy it again from the model's repository"
            ) from error
        return cls(tokenizer, ChatTemplate.from_dir(path), _eos_ids(path))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text; special tokens written out in it are recognised, the file's post-processor may add more."""
        try:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except Exception as error:  # lone surrogates: TypeError; broken pre-tokenizers: bare Exception
            raise TokenizerError(f"cannot encode {text[:80]!r}: {error}") from error

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD, ids past the tokenizer's vocabulary have no text."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def render(self, messages: Sequence[Mapping[str, Any]], **template_args: Any) -> str:
        """The chat as text, by the chat template; ``add_generation_prompt`` is True unless given."""
        return self._template.render(messages, **template_args)

    def chat(self, messages: Sequence[Mapping[str, Any]], **template_args: Any) -> list[int]:
        """Ids of a chat: ``messages`` as [{"role": "user", "content": "..."}], ``template_args`` such as tools or
        enable_thinking.

        Raises TokenizerError when there is no template, or it is broken, or it refuses the messages.
        """
        # The template writes the special tokens itself.
        return self.encode(self.render(messages, **template_args), add_special_tokens=False)

    def stream(self) -> StreamDecoder:
        return StreamDecoder(self._tokenizer, self._silent)


class ChatTemplate:
    """The chat template(s) of a checkpoint and the special tokens they may name; compiled when first used.

    Args:
      templates: name -> Jinja source; a checkpoint with one template has it under "default".
      origin: the file they come from, for messages.
      variables: special tokens, such as eos_token, that templates see as variables.
    """

    def __init__(self, templates: Mapping[str, str], origin: Path, variables: Mapping[str, Any]) -> None:
        self._templates = dict(templates)
        self._origin = origin
        self._variables = dict(variables)

    @classmethod
    def from_dir(cls, path: Path) -> ChatTemplate:
        """chat_template.jinja, else chat_template of tokenizer_config.json: a string, or a list of named ones."""
        config_file, template_file = path / "tokenizer_config.json", path / "chat_template.jinja"
        config = _read_json(config_file) if config_file.is_file() else {}
        variables = _special_tokens(config)
        if template_file.is_file():
            try:
                return cls({"default": template_file.read_text(encoding="utf-8")}, template_file, variables)
            except UnicodeDecodeError as error:
                raise TokenizerError(f"{template_file}: not UTF-8 text ({error})") from error
        found = config.get("chat_template")
        if found is None or isinstance(found, str):
            return cls({} if found is None else {"default": found}, config_file, variables)
        try:
            return cls({str(entry["name"]): str(entry["template"]) for entry in found}, config_file, variables)
        except (TypeError, KeyError) as error:
            raise TokenizerError(
                f"{config_file}: chat_template must be a string or a list of objects with name and template"
            ) from error

    def render(self, messages: Sequence[Mapping[str, Any]], **template_args: Any) -> str:
        """Text of a chat; ``chat_template`` among the arguments picks one of several by name."""
        name = template_args.pop("chat_template", None) or self._pick(template_args.get("tools"))
        if name not in self._templates:
            raise TokenizerError(f"{self._origin}: no chat template {name!r}, only {sorted(self._templates)}")
        args = {"add_generation_prompt": True, "tools": None, "documents": None, **self._variables, **template_args}
        try:
            return _environment().from_string(self._templates[name]).render(messages=messages, **args)
        except jinja2.TemplateSyntaxError as error:
            raise TokenizerError(f"{self._origin}: broken chat template, line {error.lineno}: {error}") from error
        except Exception as error:  # the template's own refusals, and whatever its expressions do with the data
            raise TokenizerError(f"{self._origin}: the chat template refuses these messages: {error}") from error

    def _pick(self, tools: Any) -> str:
        if not self._templates:
            raise TokenizerError(
                f"{self._origin.parent}: no chat template (chat_template.jinja, or chat_template in "
                "tokenizer_config.json). Copy it from the model's repository, or give a plain prompt"
            )
        return "tool_use" if tools and "tool_use" in self._templates else "default"


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks the assistant's part for training masks; here it only has to render its body."""

    tags = {"generation"}  # noqa: RUF012 (the base class declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.Environment:
    """Sandboxed, because templates are downloaded code; whitespace rules, filters and functions as in transformers."""
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = _tojson
    env.globals["raise_exception"] = _raise
    env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return env


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON without Jinja's HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _special_tokens(config: Mapping[str, Any]) -> dict[str, Any]:
    """eos_token and its like, as strings; they are stored as strings or as objects with "content"."""

    def content(token: Any) -> Any:
        return token.get("content") if isinstance(token, Mapping) else token

    named = {k: content(v) for k, v in config.items() if k.endswith("_token") and isinstance(v, str | Mapping)}
    extra = config.get("additional_special_tokens") or config.get("extra_special_tokens")
    if isinstance(extra, list):
        named["additional_special_tokens"] = [content(token) for token in extra]
    return named


def _eos_ids(path: Path) -> tuple[int, ...]:
    for name in ("generation_config.json", "config.json"):
        file = path / name
        value = _read_json(file).get("eos_token_id") if file.is_file() else None
        if value is not None:
            ids = value if isinstance(value, list) else [value]
            if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
                raise TokenizerError(f"{file}: eos_token_id={value!r} must be an integer or a list of integers")
            return tuple(ids)
    return ()


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerError(f"{file}: not valid JSON ({error}). Copy it again from the model's repository") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{file}: must hold a JSON object, holds {type(value).__name__}")
    return value
