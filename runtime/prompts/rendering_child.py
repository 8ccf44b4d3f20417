"""The program that renders chat templates, in a process of its own: a template is a program from the model file.

Run by `rendering` as a script, with the module path and the CPU seconds and bytes of memory that one rendering may
take. It imports nothing of this package, so that it starts fast. Requests and replies are one line of JSON each.
"""

from __future__ import annotations

import json
import math
import resource
import sys
from contextlib import suppress
from datetime import datetime
from typing import Any

SPARE_CHARACTERS = 1 << 20
TIMES_LONGER = 8


def serve(max_cpu_s: int, max_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError, ValueError):  # macOS; the limits on time and output remain
        resource.setrlimit(resource.RLIMIT_AS, (max_bytes, max_bytes))
    environment = _environment()
    compiled: dict[str, Any] = {}
    print("ready", flush=True)
    for line in sys.stdin:
        used = resource.getrusage(resource.RUSAGE_SELF)
        now = math.ceil(used.ru_utime + used.ru_stime)
        resource.setrlimit(resource.RLIMIT_CPU, (now + max_cpu_s, resource.RLIM_INFINITY))
        try:
            reply = _reply(environment, compiled, line)
        except MemoryError:
            reply = {"limit": "memory"}
        print(json.dumps(reply), flush=True)


def _environment() -> Any:
    """The one that transformers and llama_cpp use for chat templates."""
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """Renders the content of `{% generation %}` as it is."""

        tags = {"generation"}  # noqa: RUF012  (so declared by jinja2)

        def parse(self, parser: Any) -> Any:
            parser.stream.skip(1)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    return environment


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _reply(environment: Any, compiled: dict[str, Any], line: str) -> dict[str, str]:
    request = json.loads(line)
    source = request["template"]
    if source not in compiled:
        try:
            compiled[source] = environment.from_string(source)
        except MemoryError:
            raise
        except Exception as error:
            number = getattr(error, "lineno", None)
            where = f" (line {number} of the template)" if number else ""
            return {"syntax": f"{_text(error)}{where}"}
    try:
        return _render(compiled[source], request, TIMES_LONGER * len(line) + SPARE_CHARACTERS)
    except MemoryError:
        raise
    except Exception as error:
        return {"error": _text(error)}


def _render(template: Any, request: dict[str, Any], max_characters: int) -> dict[str, str]:
    def raise_exception(message: object) -> None:
        raise ValueError(message)

    variables = {
        **request["variables"],
        "raise_exception": raise_exception,
        "strftime_now": datetime.fromisoformat(request["now"]).strftime,
    }
    pieces, length = [], 0
    for piece in template.generate(variables):
        pieces.append(piece)
        length += len(piece)
        if length > max_characters:
            return {"limit": "output"}
    return {"text": "".join(pieces)}


def _text(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


if __name__ == "__main__":
    sys.path[:] = json.loads(sys.argv[1])
    serve(int(sys.argv[2]), int(sys.argv[3]))
