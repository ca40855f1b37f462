"""Renders the chat template on stdin, with little time and memory; see `polylens.chat_templates`.

A program of its own, which imports nothing of the package: it has to start in no time. It ends
with 0 unless the template wants too much; one that fails in another way will fail again where it is
used.
"""

import contextlib
import itertools
import json
import sys
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

_SECONDS = 2
_BYTES = 2**30
_CHARACTERS = 10**6  # of a conversation of three short turns

_TURNS = (
    {"role": "user", "content": "What is rain?"},
    {"role": "assistant", "content": "Water."},
    {"role": "user", "content": "Asante, na theluji?"},
)


class _Generation(Extension):
    """transformers' tag around what the model says."""

    tags = {"generation"}  # noqa: RUF012 - as jinja declares it

    def parse(self, parser: Any) -> Any:
        """Return the body as it is."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _fail(message: str) -> None:
    raise jinja2.TemplateError(message)


def _limit() -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    for kind, most in ((resource.RLIMIT_CPU, _SECONDS), (resource.RLIMIT_AS, _BYTES)):
        with contextlib.suppress(ValueError, OSError):  # a system without it, or a lower limit
            resource.setrlimit(kind, (most, most))


def main() -> int:
    """Render some conversations; return the exit code."""
    text = sys.stdin.buffer.read().decode(errors="replace")
    _limit()
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **_: json.dumps(value)
    environment.globals.update(raise_exception=_fail, strftime_now=lambda form: form)
    try:
        template = environment.from_string(text)
    except MemoryError:
        return 1
    except Exception:  # no harm done; whoever renders it for use says what is wrong
        return 0
    for n_turns, add_generation_prompt in itertools.product((1, 3), (True, False)):
        n_characters = 0
        try:
            for piece in template.generate(
                messages=_TURNS[:n_turns],
                add_generation_prompt=add_generation_prompt,
                bos_token="<s>",
                eos_token="</s>",
                tools=None,
                documents=None,
            ):
                n_characters += len(piece)
                if n_characters > _CHARACTERS:
                    return 1
        except MemoryError:
            return 1
        except Exception:  # as above; another conversation may still do harm
            continue
    return 0


if __name__ == "__main__":
    sys.exit(main())
