"""Chat templates come with models from anywhere, and are small programs.

transformers runs them in jinja's sandbox: no attribute that leads to Python's own objects, nothing
changed from within, ranges of at most 100,000. That keeps a template from the machine, but not from
its time and memory: nested loops or doubled strings take as much as they like. So a template is
first rendered once in a process of its own that may use little of both, and refused if it does not
end there. One that behaves until it sees a certain text is not found out; it can be interrupted,
and nothing worse.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polylens.errors import ConfigError

_SCRIPT = Path(__file__).with_name("_render_template.py")

# Where a process cannot be limited in its own time, as on Windows.
_TIMEOUT_SECONDS = None if sys.platform != "win32" else 60.0


def check_template(template: str, name: str) -> None:
    """Check that rendering a template takes little time and memory.

    Args:
        template: Jinja text.
        name: for the message.

    Raises:
        ConfigError: it does not.
    """
    if _is_greedy(template):
        raise ConfigError(
            f"a chat template must render a short conversation in seconds and a gigabyte, but "
            f"{name} does not; use template 'plain', or give a template that you trust"
        )


@functools.lru_cache(maxsize=64)
def _is_greedy(template: str) -> bool:
    try:
        result = subprocess.run(
            [sys.executable, "-P", str(_SCRIPT)],
            input=template.encode(errors="replace"),
            capture_output=True,
            timeout=_TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return True
    return result.returncode != 0


def render_conversation(
    tokenizer: Any,
    template: str,
    messages: Sequence[Mapping[str, str]],
    *,
    add_generation_prompt: bool = False,
) -> str:
    """Return a conversation as a template writes it.

    Args:
        tokenizer: the model's tokenizer.
        template: one that `check_template` let pass.
        messages: each with role and content.
        add_generation_prompt: end with what an answer follows.

    Raises:
        ConfigError: the template does something forbidden, is no Jinja, or refuses the messages.
    """
    try:
        rendered: str = tokenizer.apply_chat_template(
            list(messages),
            chat_template=template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except Exception as error:  # whatever the template's own code raises
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConfigError(
            f"a chat template must render turns of user and assistant, but it fails ({reason}); "
            "use template 'plain' or give another"
        ) from error
    return rendered
