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
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from mm.errors import UserError
from mm.reading import parse_json

SECONDS = 10  # of the processor's time that one conversation may take
WAIT_SECONDS = 120.0  # of the clock's: so many that a busy machine is no fault
MEMORY_BYTES = 1 << 30
TODAY = "today"  # of the variables: what `strftime_now` tells
OUTPUT_CHARACTERS = 8_000_000  # of one rendering


class TemplateError(UserError):
    """The template cannot be used: no Jinja, or it exceeds its bounds."""


class RefusedConversation(ValueError):
    """The template has no rendering of this conversation; the message is the reason."""


class Sandbox:
    """A child process that renders one template.

    Args:
        source: the template.
        seconds: of the processor's time that one conversation may take.
    """

    def __init__(self, source: str, seconds: int = SECONDS):
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
                _exchange(self._child, b"", time.monotonic() + WAIT_SECONDS)
            first = json.dumps({"source": self.source, "seconds": self.seconds})
            request = first.encode() + b"\n" + request
        try:
            return parse_json(_exchange(self._child, request, time.monotonic() + WAIT_SECONDS))
        except TimeoutError:
            self.close()
            raise TemplateError(f"it does not end: no answer in {WAIT_SECONDS:g} seconds") from None
        except (OSError, ValueError):
            try:
                code = self._child.wait(2)
            except subprocess.TimeoutExpired:  # it lives: what it said is no text
                self.close()
                raise TemplateError("its text holds half a character, or is too long") from None
            self.close()
            if code == -signal.SIGXCPU:
                raise TemplateError(
                    f"it does not end: stopped after {self.seconds} seconds on one conversation"
                ) from None
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
    first = parse_json(sys.stdin.buffer.readline())
    _limit(first["seconds"])
    try:
        template = environment().from_string(first["source"])
    except TemplateSyntaxError as error:
        broken = f"no Jinja template (line {error.lineno}: {error.message})"
    except Exception as error:
        broken = f"no Jinja template ({type(error).__name__}: {str(error)[:200]})"
    for line in sys.stdin.buffer:
        _limit(first["seconds"])
        _answer({"broken": broken} if template is None else _served(template, parse_json(line)))


def _answer(value: Any) -> None:
    sys.stdout.buffer.write(json.dumps(value).encode() + b"\n")
    sys.stdout.buffer.flush()


def _limit(seconds: int) -> None:
    """Let the system refuse memory, and time from now on, that no template needs."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # not every system has it
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        used, hard = int(time.process_time()) + 1, resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (used + seconds, hard))


def _served(template: Any, request: dict[str, Any]) -> dict[str, Any]:
    messages, texts = request["messages"], []
    variables = dict(request["variables"])
    if TODAY in variables:  # no clock: what is packed again must be the same
        today = datetime.fromisoformat(variables.pop(TODAY))
        variables["strftime_now"] = today.strftime
    try:
        for n, prompt in request["cuts"]:
            parts, length = [], 0
            for part in template.generate(
                **variables, messages=messages[:n], add_generation_prompt=prompt
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
