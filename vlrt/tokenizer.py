"""Text to token ids and back, and messages to text: a tokenizer.json and its chat template.

Reads tokenizer.json through `tokenizers` and the chat template through a sandboxed jinja2, as transformers does. Knows
strings and ids, no model.

Text that users write can never become control tokens. Each occurrence of an added token's string in it (`<|im_end|>`,
`<|video_pad|>`, ...) is cut behind its first character, and the two sides are encoded apart: the same text, in ordinary
tokens. Where users write no such string, the ids are those of transformers' `apply_chat_template`.
"""

import codecs
import datetime
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers.decoders import ByteLevel

from vlrt.errors import ConfigError

TOKENIZER_FILE = "tokenizer.json"
# What a bundle needs of a checkpoint to build prompts; all but the first may be absent.
FILES = (TOKENIZER_FILE, "tokenizer_config.json", "chat_template.jinja", "chat_template.json")

# Qwen2.5-VL's chat format: a default system turn, turns in <|im_start|> ... <|im_end|>, one pad per medium.
CHAT_TEMPLATE = """\
{%- macro medium(kind) -%}<|vision_start|><|{{ kind }}_pad|><|vision_end|>{%- endmacro -%}
{%- if not messages or messages[0].role != 'system' -%}
    {{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif -%}
{%- for message in messages -%}
    {{ '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string -%}
        {{ message.content }}
    {%- else -%}
        {%- for part in message.content -%}
            {%- if part.type in ('image', 'image_url') or 'image' in part or 'image_url' in part -%}
                {{ medium('image') }}
            {%- elif part.type == 'video' or 'video' in part -%}
                {{ medium('video') }}
            {%- elif 'text' in part -%}
                {{ part.text }}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""


class Tokenizer:
    """A tokenizer and its chat template, read from a directory."""

    def __init__(self, core: tokenizers.Tokenizer, template: str, special: Mapping[str, str]) -> None:
        """Wrap a loaded tokenizer and a template that may name `special` tokens; `Tokenizer.open` reads all three."""
        self._core = core
        self._special = dict(special)
        self._byte_of = _bytes_of_characters()
        self._template = _compiled(template)
        added = core.get_added_tokens_decoder()
        self._special_ids = {key for key, token in added.items() if token.special}
        longest_first = sorted(filter(None, (token.content for token in added.values())), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    @classmethod
    def open(cls, directory: str | Path) -> "Tokenizer":
        """Read tokenizer.json and the chat template: chat_template.jinja, .json, tokenizer_config.json, or Qwen's own.

        Raises:
            ConfigError: a file is missing or damaged, or the template does not compile.
        """
        directory = Path(directory)
        file = directory / TOKENIZER_FILE
        if not file.is_file():
            raise ConfigError(f"{directory} has no {TOKENIZER_FILE}; accepted: a directory with a fast tokenizer")
        try:
            core = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises bare Exception on damaged files
            raise ConfigError(f"{file} is not a tokenizer: {error}") from error
        if not isinstance(core.decoder, ByteLevel):
            raise ConfigError(f"{file} has the decoder {core.decoder}; accepted: ByteLevel, as the Qwen family has")
        core.no_padding()
        core.no_truncation()
        return cls(core, *_template_of(directory))

    @property
    def num_tokens(self) -> int:
        """Ids that the tokenizer knows, added tokens included: the model's vocabulary must hold as many."""
        return max(self._core.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def token_id(self, token: str) -> int | None:
        """Return the id of one token by its string, None where there is no such token."""
        return self._core.token_to_id(token)

    def encode(self, text: str, *, control: bool = False) -> list[int]:
        """Return the ids of a text, without a beginning or end token.

        Args:
            text: any text.
            control: whether strings of added tokens (`<|im_end|>`) become those tokens; otherwise they stay text.
        """
        mark = _unused_mark(text)
        return self._encode_marked(text if control else self._defused(text, mark), mark)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Return the text of ids; ids that the tokenizer does not know are left out."""
        return self._core.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def decoder(self) -> "TextDecoder":
        """Return a decoder that takes one id at a time."""
        return TextDecoder(self._token_bytes)

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Return the chat template's text of messages, ending in the assistant's header.

        Raises:
            ConfigError: the template refuses the messages or fails on them.
        """
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=True, tools=None, documents=None, **self._special
            )
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise ConfigError(f"the chat template fails on these messages: {error}") from error

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> tuple[list[int], str]:
        """Return the ids and the text of messages; only what the template itself writes becomes control tokens.

        Raises:
            ConfigError: as `render`.
        """
        mark = _unused_mark(json.dumps(messages, ensure_ascii=False))
        text = self.render([_map_strings(message, lambda s: self._defused(s, mark)) for message in messages])
        return self._encode_marked(text, mark), text.replace(mark, "")

    def _token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one id: b"" for special and unknown ones, as `decode` has it."""
        token = self._core.id_to_token(token_id) if token_id >= 0 else None
        if token is None or token_id in self._special_ids:
            return b""
        if all(character in self._byte_of for character in token):
            return bytes(self._byte_of[character] for character in token)
        return token.encode()

    def _defused(self, text: str, mark: str) -> str:
        """Put `mark` behind the first character of every control token's string."""
        return self._control.sub(lambda found: f"{found[0][:1]}{mark}{found[0][1:]}", text)

    def _encode_marked(self, text: str, mark: str) -> list[int]:
        pieces = [piece for piece in text.split(mark) if piece]
        return [i for piece in pieces for i in self._core.encode(piece, add_special_tokens=False).ids]


class TextDecoder:
    """Turns ids into text as they come. The pieces joined equal the decoding of all ids at once.

    Bytes of an incomplete character are held back, so that no multi-byte character is split.
    """

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        """Start an empty text; `token_bytes` gives the bytes of one id."""
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Take one id and return the text that it completes: a word, a part of one, or ""."""
        return self._utf8.decode(self._token_bytes(int(token_id)))

    def finish(self) -> str:
        """Return what is still held back: a replacement character for an incomplete one, else ""."""
        return self._utf8.decode(b"", final=True)


def _unused_mark(text: str) -> str:
    """Return a private-use character that does not occur in a text."""
    for mark in map(chr, range(0xE000, 0xF900)):
        if mark not in text:
            return mark
    raise ConfigError("a text holds all 6400 characters of the private-use area; accepted: any that leaves one out")


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """Return a message with `change` applied to what users wrote: the content, or the text of its parts."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: part if key in ("role", "type") else _map_strings(part, change) for key, part in value.items()}
    return [_map_strings(part, change) for part in value] if isinstance(value, list | tuple) else value


def _template_of(directory: Path) -> tuple[str, dict[str, str]]:
    """Return a directory's chat template and the special tokens that it may name (eos_token, ...)."""
    settings = _json_object(directory / "tokenizer_config.json")
    tokens = {key: value.get("content") if isinstance(value, dict) else value for key, value in settings.items()}
    special = {key: value for key, value in tokens.items() if key.endswith("_token") and isinstance(value, str)}
    jinja_file = directory / "chat_template.jinja"
    if jinja_file.is_file():
        return _read_text(jinja_file), special
    for found in (_json_object(directory / "chat_template.json"), settings):
        template = found.get("chat_template")
        if isinstance(template, list):  # several, by name
            named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
            template = named.get("default")
        if isinstance(template, str):
            return template, special
    return CHAT_TEMPLATE, special


class _GenerationTag(Extension):
    """Accepts {% generation %} ... {% endgeneration %}, with which training code marks the assistant's words."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 declares it as an instance variable

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return the block's own statements."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compiled(template: str) -> jinja2.Template:
    """Compile a chat template as transformers does: sandboxed, blocks trimmed, its extra filters and functions."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().astimezone().strftime(form)
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise ConfigError(f"the chat template does not compile: {error}") from error


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)  # jinja2's own escapes HTML


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error


def _json_object(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file; {} where the file is absent."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(_read_text(file))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{file} holds a {type(found).__name__}; accepted: an object")
    return found


def _bytes_of_characters() -> dict[str, int]:
    """Return the byte that each character of a byte-level token means: its own, or hidden byte n for 256 + n."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(hidden)}
