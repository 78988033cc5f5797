"""One transfer by the agent's engine in a process of its own, whose environment names proxies and authorities.

    python -m tests.support.transfer_process get|put URL FILE

prints what was moved as JSON, or the error's kind and words.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from valohai_agent.errors import TransferError
from valohai_agent.protocol import Transfer, UploadGrant
from valohai_agent.transfer import Transferer


def transfer(
    direction: str, url: str, file: Path, environment: Mapping[str, str]
) -> dict[str, Any]:
    """Nothing of this process's environment is there but the way to the programs."""
    command = [sys.executable, "-m", __spec__.name, direction, url, str(file)]
    done = subprocess.run(
        command,
        env={"PATH": "/usr/bin:/bin", **environment},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stderr == ""
    return json.loads(done.stdout)


def main(direction: str, url: str, file: str) -> None:
    engine = Transferer(attempts=1, timeout=(5.0, 5.0))
    try:
        if direction == "get":
            moved = engine.download(Transfer(url=url), Path(file), name="the file")
        else:
            grant = UploadGrant(upload_id="u", transfer=Transfer(url=url, method="PUT"))
            moved = engine.upload(Path(file), grant, name="the file")
    except TransferError as error:
        print(json.dumps({"error": type(error).__name__, "text": str(error)}))
    else:
        print(json.dumps({"size": moved.size, "sha256": moved.checksums.sha256}))
    finally:
        engine.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
