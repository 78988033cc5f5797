"""What a machine and the control plane say to each other over HTTP when the machine joins its group.

A machine shows a token that is good for a few machines and a short time, and a fresh public key; the answer comes
sealed to that key, so that whoever only listens learns no password, and whoever repeats the request with the same key
learns nothing new. The answer holds a ticket, with which this machine alone asks again at each start of its agents:
for changed credentials and a newer agent.
"""

from __future__ import annotations

from nacl.encoding import HexEncoder
from nacl.exceptions import CryptoError
from nacl.public import PrivateKey, PublicKey, SealedBox
from pydantic import BaseModel, ConfigDict, Field

JOIN_PATH, REFRESH_PATH, FILE_PATH = "/agents/join", "/agents/refresh", "/agents/file"
MAX_REQUEST_BYTES = 16 * 1024


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)


class JoinRequest(_Message):
    """`token` is a join token, or at `REFRESH_PATH` the machine's ticket. `version`: of the agent that asks."""

    token: str = Field(repr=False, min_length=1, max_length=200)
    machine_id: str = Field(min_length=1, max_length=255, pattern=r"^[^\s\x00-\x1f]+$")
    public_key: str = Field(pattern=r"^[0-9a-f]{64}$")
    hostname: str = Field(default="", max_length=255)
    version: str = Field(default="", max_length=64)


class AgentFile(_Message):
    """The published agent that the machine is to run. `url` may be signed, so it is shown to nobody."""

    version: str
    sha256: str
    size: int
    url: str = Field(repr=False)


class JoinAnswer(_Message):
    """Content of the sealed answer.

    `environment` is that of the agent processes, Redis address with password among it. `files` are to be written into
    the machine's configuration directory, which stands for `{dir}` in the values of `environment`.
    """

    group: str
    deployment: str
    ticket: str = Field(repr=False)
    environment: dict[str, str] = Field(repr=False)
    files: dict[str, str] = Field(default_factory=dict, repr=False)
    agents: int = 1
    gpu_each: bool = Field(default=False, description="Agent n gets GPU n alone (E-31).")
    dead_man_seconds: float | None = Field(
        default=None, description="None: the machine never powers itself off."
    )
    release: AgentFile | None = Field(default=None, description="None: nothing is published.")


class SealedAnswer(_Message):
    sealed: str = Field(description="Hex.")


class NotForUs(Exception):
    """The answer was sealed for another key, or is damaged."""


def new_key() -> tuple[PrivateKey, str]:
    """A key pair for one joining, with the public half as a request holds it."""
    key = PrivateKey.generate()
    return key, key.public_key.encode(HexEncoder).decode()


def seal(answer: JoinAnswer, public_key: str) -> SealedAnswer:
    box = SealedBox(PublicKey(public_key.encode(), HexEncoder))
    return SealedAnswer(sealed=box.encrypt(answer.model_dump_json().encode()).hex())


def unseal(answer: SealedAnswer, key: PrivateKey) -> JoinAnswer:
    try:
        return JoinAnswer.model_validate_json(SealedBox(key).decrypt(bytes.fromhex(answer.sealed)))
    except (CryptoError, ValueError) as error:
        raise NotForUs("the answer was not sealed for this machine") from error
