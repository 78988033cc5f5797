"""Where a machine that has joined keeps what it was given, and what that is."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from valohai_agent.errors import AgentError
from valohai_agent.machine.messages import JoinAnswer
from valohai_agent.machine.program import SUPERVISED_VARIABLE


class NotJoined(AgentError):
    """This machine belongs to no group yet."""


class Machine(BaseModel):
    """Content of `machine.json`: how this machine reaches its group, and what it was told last."""

    model_config = ConfigDict(frozen=True, hide_input_in_errors=True)

    url: str
    machine_id: str
    answer: JoinAnswer = Field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Places:
    """`config` is for root alone (or the one user who runs all); `work` is the agents' work directory."""

    config: Path
    work: Path

    @property
    def machine_file(self) -> Path:
        return self.config / "machine.json"

    @property
    def environment_file(self) -> Path:
        return self.config / "agent.env"

    @property
    def word_mark(self) -> Path:
        """Touched with every word from the control plane."""
        return self.config / "word"

    @property
    def asked_mark(self) -> Path:
        """Touched when it asks only to renew its ticket, whether anybody answers or not."""
        return self.config / "asked"

    def load(self) -> Machine:
        """Raises NotJoined."""
        try:
            return Machine.model_validate_json(self.machine_file.read_text())
        except FileNotFoundError:
            raise NotJoined(
                f"This machine has joined no group: there is no {self.machine_file}. `valohai-agent join` does it."
            ) from None
        except (OSError, ValidationError) as error:
            raise NotJoined(
                f"{self.machine_file} cannot be used ({type(error).__name__}); join again with `valohai-agent join`."
            ) from error

    def save(self, machine: Machine) -> None:
        """The certificate first, then the settings that name it, then the proof that all is there."""
        self.config.mkdir(parents=True, exist_ok=True)
        for name, content in machine.answer.files.items():
            _write(self.config / Path(name).name, content, 0o644)
        lines = (f"{name}={_quoted(value)}" for name, value in self.environment(machine).items())
        _write(self.environment_file, "\n".join(lines) + "\n", 0o600)
        _write(self.machine_file, machine.model_dump_json(), 0o600)
        self.word_mark.touch()

    def environment(self, machine: Machine) -> Mapping[str, str]:
        """Of every agent of this machine."""
        given = machine.answer.environment
        ours = {"VALOHAI_AGENT_WORK_DIR": str(self.work), SUPERVISED_VARIABLE: "1"}
        return {**ours, **{k: v.replace("{dir}", str(self.config)) for k, v in given.items()}}

    def environment_of(self, machine: Machine, number: int) -> Mapping[str, str]:
        """Of agent `number`, from 0 (E-31, E-32)."""
        return {"VALOHAI_AGENT_GPUS": str(number)} if machine.answer.gpu_each else {}


def default_places(config: Path | None = None, work: Path | None = None) -> Places:
    """Those of the system for root, else those of the user."""
    root = os.geteuid() == 0
    home = Path("~").expanduser()
    return Places(
        config=config or (Path("/etc/valohai-agent") if root else home / ".config/valohai-agent"),
        work=work or (Path("/var/lib/valohai-agent") if root else home / ".cache/valohai-agent"),
    )


def _quoted(value: str) -> str:
    """As EnvironmentFile= of systemd reads it."""
    return json.dumps(value, ensure_ascii=False)


def _write(path: Path, content: str, mode: int) -> None:
    """Complete or not at all, and never readable by others for a moment."""
    half = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(half, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(descriptor, "w") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    half.replace(path)
