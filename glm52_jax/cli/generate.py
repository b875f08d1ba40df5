"""``glm52 generate``: prompt text or chat messages in, text out as it comes."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glm52_jax.cli import common, make_tiny, several

if TYPE_CHECKING:
    from glm52_jax.compile_cache import Compiling
    from glm52_jax.generate import Model, Token
    from glm52_jax.sampling import Sampling
    from glm52_jax.tokenizer import Tokenizer

DEFAULT_SAMPLING = {"temperature": 1.0, "top_p": 0.95}  # GLM-5.2's generation_config.json
TINY_PROMPT = "Hello"
_CONTROLS = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"}


def generate(
    directory: Annotated[Path | None, typer.Argument(metavar="DIR", help="Checkpoint directory; or --tiny.")] = None,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="Use a tiny random model, made once in the cache folder.")
    ] = False,
    prompt: Annotated[str | None, typer.Option("--prompt", help="Text to continue; - is stdin.")] = None,
    chat: Annotated[
        str | None, typer.Option("--chat", help="One user message, through the template; - is stdin.")
    ] = None,
    messages: Annotated[
        Path | None, typer.Option("--messages", metavar="FILE", help="JSON list of {role, content}; - is stdin.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="System message of the chat.")] = None,
    template_args: Annotated[
        list[str] | None,
        typer.Option("--template-arg", metavar="NAME=JSON", help="For the chat template, as enable_thinking=false."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 128,
    temperature: Annotated[float | None, typer.Option("--temperature", min=0.0, help="0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", min=0.0, max=1.0)] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", min=0, help="0 is off.")] = None,
    min_p: Annotated[float | None, typer.Option("--min-p", min=0.0, max=1.0)] = None,
    seed: Annotated[int, typer.Option("--seed", help="Same seed, same text.")] = 0,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the ids that end a reply.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Also say what loading and compiling took.")] = False,
    dtype: common.DTypeOption = "bfloat16",
    weights: common.WeightsOption = "checkpoint",
    cache: common.CacheOption = "auto",
    linear: common.LinearOption = "w8a16",
    latent_norm_eps: common.LatentNormEpsOption = None,
    parallel: several.ParallelOption = None,
    devices: several.DevicesOption = None,
    coordinator: several.CoordinatorOption = None,
    process_id: several.ProcessIdOption = None,
    num_processes: several.NumProcessesOption = None,
) -> None:
    """Generate text. Text goes to stdout as it comes, statistics to stderr.

    What is not given on the command line comes from the checkpoint's generation_config.json, else temperature 1.0 and
    top-p 0.95.
    """
    directory = _directory(directory, tiny)
    if tiny and prompt is None and chat is None and messages is None:
        prompt = TINY_PROMPT
    request = Request(prompt, chat, messages, system, _template_args(template_args))
    request.check()

    from glm52_jax.sampling import Sampling
    from glm52_jax.tokenizer import Tokenizer

    defaults = common.read_optional_json(directory / "generation_config.json")
    flags = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p}
    with common.refusals():
        sampling = Sampling(**sampling_options(defaults, flags), seed=seed)  # type: ignore[arg-type]
    tokenizer = Tokenizer.from_dir(directory)
    ids = request.encode(tokenizer)
    _check_length(ids, max_new_tokens, common.read_optional_json(directory / "config.json"))
    # None lets the model stop on its config's ids.
    stop_ids = () if ignore_eos else tokenizer.eos_ids or None
    options = {"dtype": dtype, "weights": weights, "cache": cache, "linear": linear, "latent_norm_eps": latent_norm_eps}
    group = several.Several(parallel, devices, coordinator, process_id, num_processes)
    with group.running():
        group.agree(ids, sampling, max_new_tokens, stop_ids, options)
        start = time.perf_counter()
        model = common.load_model(directory, **options, several=group)
        if verbose:
            common.note(f"loaded in {time.perf_counter() - start:.1f} s")
        stream(model, tokenizer, ids, max_new_tokens, sampling, stop_ids, verbose)


@dataclass(frozen=True)
class Request:
    """What to continue, as given on the command line: exactly one of prompt, chat and messages."""

    prompt: str | None = None
    chat: str | None = None
    messages: Path | None = None
    system: str | None = None
    template_args: Mapping[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        given = [name for name in ("prompt", "chat", "messages") if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(f"--{name}" for name in given) or "none"
            raise common.CliError(f"give one of --prompt, --chat and --messages, not {found}")
        if self.prompt is not None and (self.system is not None or self.template_args):
            raise common.CliError("--system and --template-arg need --chat or --messages: --prompt is plain text")

    def encode(self, tokenizer: Tokenizer) -> list[int]:
        """Ids of the prompt, at least one."""
        if self.prompt is not None:
            ids = tokenizer.encode(_text(self.prompt))
        else:
            ids = tokenizer.chat(self.chat_messages(), **self.template_args)
        if not ids:
            raise common.CliError("the prompt is empty: at least one token is needed")
        return ids

    def chat_messages(self) -> list[dict[str, Any]]:
        if self.messages is not None:
            messages = read_messages(self.messages)
        else:
            messages = [{"role": "user", "content": _text(self.chat or "")}]
        return messages if self.system is None else [{"role": "system", "content": self.system}, *messages]


def read_messages(file: Path) -> list[dict[str, Any]]:
    """A non-empty JSON list of chat messages; CliError says what is wrong with it."""
    value = common.read_json(file, 'a list of messages such as [{"role": "user", "content": "Hello"}]')
    if not isinstance(value, list) or not value:
        raise common.CliError(f"{file}: must hold a non-empty JSON list of messages")
    for position, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise common.CliError(
                f"{file}: message {position} must be an object with role and content, is {message!r:.80}"
            )
    return value


def sampling_options(defaults: Mapping[str, Any], flags: Mapping[str, float | int | None]) -> dict[str, float | int]:
    """Fields of ``Sampling``: flags, else generation_config.json, else GLM-5.2's own values.

    A file without temperature and top_p leaves them at 1 and off, except that no file at all means GLM-5.2's.
    """
    base = dict(defaults) if defaults else dict(DEFAULT_SAMPLING)
    if base.get("do_sample") is False:
        base["temperature"] = 0.0
    options: dict[str, float | int] = {}
    for name, flag in flags.items():
        value = base.get(name) if flag is None else flag
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise common.CliError(f"generation_config.json: {name}={value!r} must be a number")
        options[name] = int(value) if name == "top_k" else float(value)
    return options


@dataclass
class Statistics:
    """When the tokens of one generation came, in seconds from its start; compiled: seconds of compiling before the first came.

    The first two carry the compilation of prefill and of the decode step, so the rate is that of the tokens after them.
    """

    prompt_tokens: int
    times: list[float] = field(default_factory=list)
    compiled: float = 0.0

    def line(self, ending: str) -> str:
        parts = [f"prompt {self.prompt_tokens} tokens"]
        for what, seconds in zip(("first token", "second"), self.times, strict=False):
            own = f" ({self.compiled:.2f} s of it compiling)" if what == "first token" and self.compiled else ""
            parts.append(f"{what} after {seconds:.2f} s{own}")
        parts.append(f"{len(self.times)} new tokens")
        if len(self.times) > 2 and self.times[-1] > self.times[1]:
            parts.append(f"{(len(self.times) - 2) / (self.times[-1] - self.times[1]):.1f} tok/s after the second")
        return ", ".join([*parts, ending])


def stream(
    model: Model,
    tokenizer: Tokenizer,
    ids: list[int],
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: Sequence[int] | None,
    verbose: bool = False,
) -> None:
    """Generates to stdout, then prints the statistics to stderr, also after Ctrl-C, which is raised again.

    CliError where the logits were not finite; the text up to there is written.
    """
    from glm52_jax.compile_cache import Compiling
    from glm52_jax.generate import NotFiniteError

    statistics, ending = Statistics(len(ids)), "stopped by --max-new-tokens"
    stops = frozenset(model.config.eos_token_ids if stop_ids is None else stop_ids)
    with common.refusals():
        tokens = model.generate(ids, max_new_tokens=max_new_tokens, sampling=sampling, stop_ids=stop_ids)
    with Compiling() as compiling:

        def tell(ending: str) -> None:
            common.note(statistics.line(ending))
            if verbose:
                common.note(_compiled(compiling))

        try:
            if _written(tokens, tokenizer, statistics, stops, compiling):
                ending = "stopped by an end-of-text id"
        except KeyboardInterrupt:
            tell("interrupted")
            raise
        except NotFiniteError as error:
            tell("broken off")
            raise common.CliError(str(error)) from error
        tell(ending)


def _written(
    tokens: Iterator[Token], tokenizer: Tokenizer, statistics: Statistics, stops: frozenset[int], compiling: Compiling
) -> bool:
    """Writes tokens as they come and notes when they do; whether one of ``stops`` ended them."""
    decoder, start, stopped = tokenizer.stream(), time.perf_counter(), False
    with _writing() as write:
        for token in tokens:
            if not statistics.times:
                statistics.compiled = compiling.seconds
            statistics.times.append(time.perf_counter() - start)
            if stopped := token.id in stops:
                break
            write(decoder.push(token.id))
        write(decoder.flush())
    return stopped


def _compiled(compiling: Compiling) -> str:
    import jax

    folder = jax.config.jax_compilation_cache_dir
    kept = f", {compiling.from_cache} of them read from {folder}" if folder else ", none kept for the next start"
    return f"compiled {compiling.programs} programs in {compiling.seconds:.1f} s{kept}"


@contextlib.contextmanager
def _writing() -> Iterator[Any]:
    """A function that writes text to stdout at once; a line break ends the text, also after Ctrl-C."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")  # a terminal that is not UTF-8 shows ? instead of failing

    # A terminal obeys control characters, and a random model writes many; a file or a pipe gets the text as it is.
    controls = _CONTROLS if sys.stdout.isatty() else {}

    def write(text: str) -> None:
        if text:
            sys.stdout.write(text.translate(controls))
            sys.stdout.flush()

    try:
        yield write
    finally:
        sys.stdout.write("\n")
        sys.stdout.flush()


def _directory(directory: Path | None, tiny: bool) -> Path:
    if tiny == (directory is not None):
        raise common.CliError("give a checkpoint directory or --tiny" + (", not both" if tiny else ""))
    if directory is not None:
        return directory
    path = make_tiny.cached_tiny()
    common.note(f"tiny random model in {path}: the text it generates is noise")
    return path


def _text(value: str) -> str:
    return sys.stdin.read() if value == "-" else value


def _template_args(pairs: list[str] | None) -> dict[str, Any]:
    args = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        try:
            args[name] = json.loads(value)
        except ValueError:
            raise common.CliError(f"--template-arg {pair}: must be NAME=JSON, as enable_thinking=false") from None
        if not (name.isidentifier() and equals):
            raise common.CliError(f"--template-arg {pair}: must be NAME=JSON, as enable_thinking=false")
    return args


def _check_length(ids: list[int], max_new_tokens: int, config: Mapping[str, Any]) -> None:
    limit = config.get("max_position_embeddings")
    if isinstance(limit, int) and len(ids) + max_new_tokens > limit:
        raise common.CliError(
            f"{len(ids)} prompt tokens + --max-new-tokens {max_new_tokens} exceed max_position_embeddings={limit}"
        )
