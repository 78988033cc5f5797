"""Keeps the files that links in the outputs lead to, outside of /valohai, before their container is removed (O-16)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from valohai_agent.beneath import Place
from valohai_agent.checksums import decimal_size
from valohai_agent.errors import OutputError
from valohai_agent.output_tree import MAX_LINKS, Unresolved, outside_links, resolve
from valohai_agent.runtimes.base import Elsewhere
from valohai_agent.workspace import Workspace

CopyOut = Callable[[str, Path], "Elsewhere | str | None"]


class LinkedFiles:
    """`found` tells by output what to upload in its place, or why nothing; `problems` are files that could not be kept.

    Each file is copied once, whatever the number of links to it, into `run/linked`; only the disk bounds the size.
    """

    def __init__(self, workspace: Workspace, valohai_dir: str) -> None:
        self._workspace, self._valohai_dir = workspace, valohai_dir
        self._by_path: dict[str, Place | Unresolved] = {}
        self.found: dict[str, Place | Unresolved] = {}
        self.problems: list[str] = []

    def keep(self, copy_out: CopyOut, status: Callable[[str], None]) -> None:
        """`copy_out` is `Running.copy_out`."""
        for relative, path in outside_links(self._workspace, self._valohai_dir):
            if path not in self._by_path:
                self._by_path[path] = self._kept(relative, path, copy_out, status)
            self.found[relative] = self._by_path[path]

    def _kept(
        self, relative: str, path: str, copy_out: CopyOut, status: Callable[[str], None]
    ) -> Place | Unresolved:
        directory = self._workspace.run / "linked"
        directory.mkdir(exist_ok=True)
        target = Place(root=directory, relative=str(len(self._by_path)))
        try:
            kept = self._follow(path, target, copy_out)
        except OutputError as error:
            self.problems.append(f"Output {relative!r} could not be stored: {error}.")
            return Unresolved(path=path, reason="which could not be copied")
        if kept == target:
            status(
                f"output {relative!r} links to {path!r}: copied {decimal_size(target.status().st_size)}"
            )
        return kept

    def _follow(self, path: str, target: Place, copy_out: CopyOut) -> Place | Unresolved:
        """Goes from link to link, which may lead back into the job's directories."""
        for _ in range(MAX_LINKS):
            answer = copy_out(path, target.root / target.relative)
            if answer is None:
                return target
            if isinstance(answer, str):
                return Unresolved(path=path, reason=answer)
            found = resolve(self._workspace, self._valohai_dir, answer.path)
            if isinstance(found, Place) or not found.outside:
                return found
            path = found.path
        return Unresolved(path=path, reason="which leads back to itself")
