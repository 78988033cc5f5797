"""A local object store that is faster than its clients: nginx, which answers like S3 as far as the tools look.

Objects are files. GET and HEAD know ranges and ETags, PUT writes a file, parts of a multipart upload stay files of their
own (joining them is no transfer), lists are files that were written before. Nobody checks signatures.
"""

from __future__ import annotations

import contextlib
import getpass
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BUCKET = "bench"

CONFIG = """\
worker_processes {workers};
daemon off;
pid {root}/nginx.pid;
error_log {root}/error.log warn;
user {user};
events {{ worker_connections 1024; }}
http {{
  access_log off;
  sendfile on;
  tcp_nopush on;
  keepalive_requests 1000000;
  client_max_body_size 0;
  client_body_buffer_size 1m;
  client_body_temp_path {root}/temporary;
  default_type application/octet-stream;
  open_file_cache off;
  etag on;
  server {{
    listen 127.0.0.1:{port} backlog=1024;
    root {root}/data;
    location / {{
      if ($args ~ "prefix=(?<prefix>[a-z0-9]*)") {{ rewrite ^ /lists/$prefix.xml last; }}
      if (-d $request_filename) {{ return 404; }}
    }}
    location /lists/ {{ types {{ application/xml xml; }} }}
    location /{bucket}/up/ {{
      if ($args ~ "^uploads") {{
        add_header Content-Type application/xml;
        return 200 '<?xml version="1.0"?><InitiateMultipartUploadResult><Bucket>{bucket}</Bucket><Key>k</Key><UploadId>u</UploadId></InitiateMultipartUploadResult>';
      }}
      if ($request_method = POST) {{
        return 200 '<?xml version="1.0"?><CompleteMultipartUploadResult><Bucket>{bucket}</Bucket><Key>k</Key><ETag>"e-1"</ETag></CompleteMultipartUploadResult>';
      }}
      if ($args ~ "partNumber=([0-9]+)") {{ rewrite ^/{bucket}/up/(.*)$ /parts/$1.$arg_partNumber last; }}
      dav_methods PUT;
      create_full_put_path on;
      add_header ETag '"0123456789abcdef0123456789abcdef"' always;
    }}
    location /parts/ {{
      dav_methods PUT;
      create_full_put_path on;
      add_header ETag '"0123456789abcdef0123456789abcdef"' always;
    }}
  }}
}}
"""


class NoServer(Exception):
    """nginx is not installed."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """A running one. `uploads` is where what was sent lies."""

    root: Path
    port: int

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def objects(self) -> Path:
        return self.root / "data" / BUCKET

    def uploaded_bytes(self) -> int:
        return sum(
            path.stat().st_size
            for folder in (self.objects / "up", self.root / "data" / "parts")
            for path in folder.rglob("*")
            if path.is_file()
        )

    def forget_uploads(self) -> None:
        for folder in (self.objects / "up", self.root / "data" / "parts"):
            shutil.rmtree(folder, ignore_errors=True)

    def write_list(self, prefix: str) -> None:
        """What a list request for `prefix` answers."""
        items = []
        for path in sorted((self.objects / prefix).iterdir()):
            status = path.stat()
            items.append(
                f"<Contents><Key>{prefix}/{path.name}</Key>"
                f"<LastModified>{_iso(status.st_mtime)}</LastModified>"
                f"<ETag>&quot;{int(status.st_mtime):x}-{status.st_size:x}&quot;</ETag>"
                f"<Size>{status.st_size}</Size><StorageClass>STANDARD</StorageClass></Contents>"
            )
        folder = self.root / "data" / "lists"
        folder.mkdir(exist_ok=True)
        (folder / f"{prefix}.xml").write_text(
            '<?xml version="1.0" encoding="UTF-8"?>'
            '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>{BUCKET}</Name><Prefix>{prefix}/</Prefix><KeyCount>{len(items)}</KeyCount>"
            f"<MaxKeys>10000</MaxKeys><IsTruncated>false</IsTruncated>{''.join(items)}</ListBucketResult>"
        )


def binary() -> str | None:
    return shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")


@contextlib.contextmanager
def serve(root: Path) -> Iterator[Server]:
    """Serves until the block ends. Raises NoServer."""
    nginx = binary()
    if nginx is None:
        raise NoServer("there is no nginx on this machine: apt install nginx-light")
    for folder in ("data", "temporary", f"data/{BUCKET}"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = CONFIG.format(workers=2, root=root, user=getpass.getuser(), port=port, bucket=BUCKET)
    (root / "nginx.conf").write_text(config)
    process = subprocess.Popen(
        [nginx, "-c", str(root / "nginx.conf"), "-p", str(root)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait(port, process, root)
        yield Server(root=root, port=port)
    finally:
        process.terminate()
        process.wait()


def _wait(port: int, process: subprocess.Popen[bytes], root: Path) -> None:
    until = time.monotonic() + 10
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    log = root / "error.log"
    raise NoServer(f"nginx did not start: {log.read_text()[-500:] if log.exists() else ''}")


def _iso(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(seconds))
