"""Makes one script of the command items (C-20 to C-24)."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

SHELLS = frozenset({"sh", "bash", "dash", "ash", "ksh", "zsh"})
TRAPS = "trap 'exit 130' INT; trap 'exit 143' TERM; "
"""Without them a shell dies of the stop signal at once, and the container with it, while the program it
waits for is still handling the interruption (K-53). With them it waits, then ends with 128+n (C-29)."""
CHOOSE_SHELL = 'if b=$(command -v bash); then exec "$b" "$1"; fi; exec /bin/sh "$1"'
_NAMES_VALOHAI = re.compile(r"(?<![\w.~+-])/valohai(?![\w.-])")


@dataclass(frozen=True, kw_only=True)
class Script:
    """Text of the script file; `direct` when its own shebang chooses the interpreter."""

    text: str
    direct: bool

    def argv(self, path: str) -> list[str]:
        """How the file at `path` is started: bash if there is one, else sh (C-23), or by its shebang."""
        return [path] if self.direct else ["/bin/sh", "-c", CHOOSE_SHELL, "sh", path]


def build_script(commands: Sequence[str], *, fail_fast: bool = False) -> Script:
    """One shell for all items, separated by newlines, no `set -e`: the last exit code decides (C-22).

    With `fail_fast` shell items are joined by `&&`. A leading `#!` line stays first, on its own (C-24).
    """
    items = [item.strip() for item in commands if item.strip()]
    shebang = ""
    if items and items[0].startswith("#!"):
        shebang, _, rest = items[0].partition("\n")
        items = [item for item in (rest, *items[1:]) if item.strip()]
    shell = not shebang or _interpreter(shebang) in SHELLS
    body = (" && " if fail_fast and shell else "\n").join(items) + "\n"
    if shebang:
        return Script(text=f"{shebang.rstrip()}\n{body}", direct=True)
    return Script(text=TRAPS + body, direct=False)


def names_valohai(commands: Sequence[str]) -> str | None:
    """The first command item that names the absolute path `/valohai`, or None."""
    return next((item for item in commands if _NAMES_VALOHAI.search(item)), None)


def _interpreter(shebang: str) -> str:
    try:
        words = shlex.split(shebang[2:])
    except ValueError:
        return ""
    if words and words[0].rpartition("/")[2] == "env":
        words = [word for word in words[1:] if not word.startswith("-")]
    return words[0].rpartition("/")[2] if words else ""
