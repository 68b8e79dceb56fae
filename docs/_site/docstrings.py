"""Our docstrings begin a line with the argument or field it tells of, "noise: a level". On the site that is a list."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

# At the docstring's own indentation; what goes on is indented. "a, b: ..." names two.
NAMED = re.compile(r"^([a-z]\w*(?:, [a-z]\w*)*): (?=\S)")


def as_list(text: str) -> str:
    lines, within = [], False
    for line in text.splitlines():
        if match := NAMED.match(line):
            if not within and lines and lines[-1]:
                lines.append("")
            names = ", ".join(f"`{name}`" for name in match[1].split(", "))
            lines.append(f"- {names}: {line[match.end() :]}")
            within = True
        else:
            if within and line and not line.startswith(" "):
                lines.append("")
                within = False
            lines.append(line)
    return "\n".join(lines)


class NamedLines(Extension):
    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_list(obj.docstring.value)
