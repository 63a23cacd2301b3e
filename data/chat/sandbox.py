"""Chat templates of strangers, rendered by a process that is bounded in time, memory and output.

Jinja's immutable sandbox keeps a template from the interpreter; it does not keep it from looping or
from asking for a terabyte. So it runs in a child process whose memory the system limits, and which
is killed when an answer takes too long.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from mm.errors import UserError

SECONDS = 10.0  # that one conversation may take
START_SECONDS = 60.0  # that importing Jinja may take, on a busy machine
MEMORY_BYTES = 1 << 30
OUTPUT_CHARACTERS = 8_000_000  # of one rendering


class TemplateError(UserError):
    """The template cannot be used: no Jinja, or it exceeds its bounds."""


class RefusedConversation(ValueError):
    """The template has no rendering of this conversation; the message is the reason."""


class Sandbox:
    """A child process that renders one template.

    Args:
        source: the template.
        seconds: that one conversation may take.
    """

    def __init__(self, source: str, seconds: float = SECONDS):
        self.source, self.seconds = source, seconds
        self._child: subprocess.Popen[bytes] | None = None

    def render(self, messages: Sequence[Any], variables: dict[str, Any], cuts: Any) -> list[str]:
        """Texts of the first ``n`` messages for each (n, add_generation_prompt) of ``cuts``.

        Raises RefusedConversation, and TemplateError where it is no template or leaves its bounds.
        """
        request = {"messages": list(messages), "variables": variables, "cuts": list(cuts)}
        answer = self._ask(json.dumps(request).encode() + b"\n")
        if "refused" in answer:
            raise RefusedConversation(answer["refused"])
        if "broken" in answer:
            raise TemplateError(answer["broken"])
        return answer["texts"]

    def _ask(self, request: bytes) -> Any:
        if self._child is None:
            self._child = _start()
            with contextlib.suppress(OSError, TimeoutError):  # the request then tells
                _exchange(self._child, b"", time.monotonic() + START_SECONDS)
            request = json.dumps(self.source).encode() + b"\n" + request
        try:
            return json.loads(_exchange(self._child, request, time.monotonic() + self.seconds))
        except TimeoutError:
            self.close()
            raise TemplateError(
                f"it does not end: stopped after {self.seconds:g} seconds on one conversation"
            ) from None
        except (OSError, ValueError):
            code = self._child.wait()
            self.close()
            raise TemplateError(f"its rendering ended the sandbox ({_ending(code)})") from None

    def close(self) -> None:
        """End the child."""
        if self._child is None:
            return
        child, self._child = self._child, None
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def __del__(self) -> None:
        self.close()

    def __reduce__(self) -> Any:
        return type(self), (self.source, self.seconds)


def _start() -> subprocess.Popen[bytes]:
    path = os.pathsep.join(p or os.getcwd() for p in sys.path)
    return subprocess.Popen(
        [sys.executable, "-P", "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": path},
    )


def _exchange(child: subprocess.Popen[bytes], request: bytes, limit: float) -> bytes:
    """Send a request and read one line.

    Raises TimeoutError, and OSError where the child is dead.
    """
    assert child.stdin is not None and child.stdout is not None
    inward, outward = child.stdin.fileno(), child.stdout.fileno()
    os.set_blocking(inward, False)
    left, got = memoryview(request), bytearray()
    while not got.endswith(b"\n"):
        ready = select.select([outward], [inward] if left else [], [], limit - time.monotonic())
        if time.monotonic() >= limit or not (ready[0] or ready[1]):
            raise TimeoutError
        if ready[1]:
            left = left[os.write(inward, left[:65536]) :]
        if ready[0]:
            block = os.read(outward, 1 << 20)
            if not block:
                raise OSError("the sandbox ended")
            got += block
    return bytes(got)


def _ending(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def environment() -> Any:
    """Jinja as `transformers` sets it up for chat templates, without clock and loader."""
    from jinja2 import TemplateError as Refused
    from jinja2 import ext, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(ext.Extension):
        """``{% generation %} .. {% endgeneration %}`` of others: its body, as it stands."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def raise_exception(message: Any) -> Any:
        raise Refused(str(message))

    def tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, **more: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **more)

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    return made


def main() -> None:
    """Serve one parent: first the template, then requests, until the pipe is closed."""
    from jinja2 import TemplateSyntaxError

    environment()  # what it imports is not the template's time

    template, broken = None, ""
    _answer("ready")
    source = json.loads(sys.stdin.buffer.readline())
    _limit()
    try:
        template = environment().from_string(source)
    except TemplateSyntaxError as error:
        broken = f"no Jinja template (line {error.lineno}: {error.message})"
    except Exception as error:
        broken = f"no Jinja template ({type(error).__name__}: {str(error)[:200]})"
    for line in sys.stdin.buffer:
        _answer({"broken": broken} if template is None else _served(template, json.loads(line)))


def _answer(value: Any) -> None:
    sys.stdout.buffer.write(json.dumps(value).encode() + b"\n")
    sys.stdout.buffer.flush()


def _limit() -> None:
    """Let the system refuse memory that no template needs."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # not every system has it
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))


def _served(template: Any, request: dict[str, Any]) -> dict[str, Any]:
    messages, texts = request["messages"], []
    try:
        for n, prompt in request["cuts"]:
            parts, length = [], 0
            for part in template.generate(
                **request["variables"], messages=messages[:n], add_generation_prompt=prompt
            ):
                length += len(part)
                if length > OUTPUT_CHARACTERS:
                    return {"broken": f"it writes more than {OUTPUT_CHARACTERS:,} characters"}
                parts.append(part)
            texts.append("".join(parts))
    except MemoryError:
        return {"broken": "it asks for more memory than a template may have"}
    except Exception as error:  # a stranger's template may raise anything
        said = " ".join(str(error).split())[:300]
        return {"refused": said or type(error).__name__}
    return {"texts": texts}


if __name__ == "__main__":
    main()
