"""A whole OpenStack Swift on loopback, for tests: proxy, account, container and object server, one device, one replica.

    serve.py DIRECTORY PORT

Runs under the Python of .servers/swift. Everything lies in DIRECTORY, nothing in /etc: Swift is told where its
swift.conf is before it looks. The rings are built in-process, which takes milliseconds, for ports that are free now.
Swift is imported once; the servers are forks of this process and end with it.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from pathlib import Path
from types import FrameType

BACKENDS = ("account", "container", "object")
ACCOUNTS = """
user_test_tester = testing .admin
user_test_other = testing
user_elsewhere_someone = testing .admin
"""
MIDDLEWARE = {
    "catch_errors": "egg:swift#catch_errors",
    "gatekeeper": "egg:swift#gatekeeper",
    "healthcheck": "egg:swift#healthcheck",
    "listing_formats": "egg:swift#listing_formats",
    "bulk": "egg:swift#bulk",
    "tempurl": "egg:swift#tempurl",
    "s3api": "egg:swift#s3api",
    "tempauth": "egg:swift#tempauth",
    "copy": "egg:swift#copy",
    "slo": "egg:swift#slo",
    "dlo": "egg:swift#dlo",
    "versioned_writes": "egg:swift#versioned_writes",
    "symlink": "egg:swift#symlink",
}
OPTIONS = {
    "tempauth": f"storage_url_scheme = default\n{ACCOUNTS}",
    "s3api": "location = us-east-1\ns3_acl = no",
    "tempurl": "allowed_digests = sha1 sha256 sha512",
    "versioned_writes": "allow_object_versioning = true",
}


def main(directory: Path, port: int) -> None:
    ports = {name: free_port() for name in BACKENDS}
    write_files(directory, port, ports)
    from swift.common import utils

    utils.set_swift_dir(str(directory))
    build_rings(directory, ports)
    import_servers()
    children = [fork_server(directory, name) for name in (*BACKENDS, "proxy")]

    def stop(_signal: int, _frame: FrameType | None) -> None:
        for child in children:
            os.kill(child, signal.SIGTERM)
        sys.exit(0)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    os.waitpid(-1, 0)  # none of them ends unless something is wrong
    stop(signal.SIGTERM, None)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def write_files(directory: Path, port: int, ports: dict[str, int]) -> None:
    (directory / "devices" / "d1").mkdir(parents=True, exist_ok=True)
    (directory / "swift.conf").write_text(
        "[swift-hash]\nswift_hash_path_suffix = tests\n"
        "[storage-policy:0]\nname = only\ndefault = yes\n"
        "[swift-constraints]\nmax_file_size = 5368709122\n"
    )
    for name, its_port in ports.items():
        (directory / f"{name}.conf").write_text(
            f"{common(directory, its_port)}devices = {directory}/devices\nmount_check = false\n"
            f"[pipeline:main]\npipeline = {name}-server\n"
            f"[app:{name}-server]\nuse = egg:swift#{name}\n"
        )
    (directory / "proxy.conf").write_text(proxy(directory, port))


def common(directory: Path, port: int) -> str:
    return (
        f"[DEFAULT]\nbind_ip = 127.0.0.1\nbind_port = {port}\nworkers = 0\nuser = {user_name()}\n"
        f"swift_dir = {directory}\nlog_level = WARNING\n"
    )


def user_name() -> str:
    import pwd

    return pwd.getpwuid(os.geteuid()).pw_name


def proxy(directory: Path, port: int) -> str:
    order = [
        "catch_errors",
        "gatekeeper",
        "healthcheck",
        "cache",
        "listing_formats",
        "bulk",
        "tempurl",
        "s3api",
    ]
    order += ["tempauth", "copy", "slo", "dlo", "versioned_writes", "symlink", "proxy-server"]
    filters = [
        f"[filter:{name}]\nuse = {egg}\n{OPTIONS.get(name, '')}\n"
        for name, egg in MIDDLEWARE.items()
    ]
    return "".join(
        [
            common(directory, port),
            f"[pipeline:main]\npipeline = {' '.join(order)}\n",
            "[app:proxy-server]\nuse = egg:swift#proxy\naccount_autocreate = true\n",
            "[filter:cache]\npaste.filter_factory = memory_cache:filter_factory\n",
            *filters,
        ]
    )


def build_rings(directory: Path, ports: dict[str, int]) -> None:
    from swift.common.ring import RingBuilder

    for name, port in ports.items():
        builder = RingBuilder(part_power=2, replicas=1, min_part_hours=0)
        device = {
            "region": 1,
            "zone": 1,
            "ip": "127.0.0.1",
            "port": port,
            "device": "d1",
            "weight": 1,
        }
        builder.add_dev(device)
        builder.rebalance()
        builder.get_ring().save(str(directory / f"{name}.ring.gz"))


def import_servers() -> None:
    """Before the fork, so that it costs once."""
    import swift.account.server
    import swift.container.server
    import swift.obj.server
    import swift.proxy.server  # noqa: F401


def fork_server(directory: Path, name: str) -> int:
    child = os.fork()
    if child:
        return child
    from swift.common.wsgi import run_wsgi

    sys.exit(run_wsgi(str(directory / f"{name}.conf"), f"{name}-server", verbose=True))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), int(sys.argv[2]))
