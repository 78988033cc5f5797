"""Starts a command with `/valohai` bound in a mount namespace of its own. Run as a file, standard library only.

    python -I -S namespace_entry.py SPEC

SPEC is a file, or the number of a descriptor: then the process may be started long before there is a command, and
ends in silence if none comes. Each import here delays the command by milliseconds: the spec comes marshalled, since `json` loads `re`, and signals
are set through libc.

A new root is put together in a tmpfs: everything of the host's root directory is bound into it, and
`/valohai` is added, so that nothing is created on the host. Needs root, or user namespaces. When a step
of that fails, the reason is written to `error_file` of the spec and the exit code is 125.
"""

from __future__ import annotations

import ctypes
import marshal
import os
import sys

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_BIND, MS_REC = 32, 4096, 16384
MS_UNBINDABLE, MS_PRIVATE = 1 << 17, 1 << 18
MS_NOATIME, MS_NODIRATIME, MS_RELATIME = 1024, 2048, 1 << 21
MNT_DETACH = 2
SIGNALS, SIG_DFL = range(1, 32), None  # the kernel refuses the two that nobody may change
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
FAILED = 125

_libc = ctypes.CDLL(None, use_errno=True)


def main(source: str) -> None:
    spec = read_spec(source)
    if spec is None:
        return
    try:
        enter_namespace()
        build_root(spec["root"])
        for bind in spec["binds"]:
            add_bind_or_name_it(spec["root"], bind)
        change_root(spec["root"])
        os.chdir(spec["cwd"])
    except OSError as error:
        with open(spec["error_file"], "w") as file:
            file.write(str(error))
        os._exit(FAILED)
    # Python ignores some, and an agent started by nohup or in a shell's background others: a stop must reach the command.
    for number in SIGNALS:
        _libc.signal(number, SIG_DFL)
    try:
        argv, environment = spec["argv"], spec["environment"]
        variables = os.environb if environment is None else environment
        os.execve(argv[0], argv, variables)  # noqa: S606 - the point of this program
    except OSError as error:
        sys.stderr.write(f"{spec['argv'][0]}: {error.strerror}\n")
        sys.stderr.flush()
        os._exit(127 if isinstance(error, FileNotFoundError) else 126)


def read_spec(source: str) -> dict | None:
    """None when the agent ended before it had a command."""
    with open(int(source) if source.isdigit() else source, "rb") as file:
        text = file.read()
    return marshal.loads(text) if text else None  # noqa: S302 - written by the agent


def enter_namespace() -> None:
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0:
        _check(_libc.unshare(CLONE_NEWNS), "unshare")
    else:
        _check(_libc.unshare(CLONE_NEWNS | CLONE_NEWUSER), "unshare")
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{uid} {uid} 1")
        _write("/proc/self/gid_map", f"{gid} {gid} 1")
    mount(None, "/", None, MS_REC | MS_PRIVATE)


def build_root(root: str) -> None:
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=1m")
    mount(None, root, None, MS_UNBINDABLE)  # binding its parent must not bind it into itself
    for name in sorted(os.listdir("/")):
        source, target = f"/{name}", f"{root}/{name}"
        if name == "valohai":
            continue
        if os.path.islink(source):
            os.symlink(os.readlink(source), target)
        else:
            try:
                make_mount_point(source, target)
                mount(source, target, None, MS_BIND | MS_REC)
            except OSError:
                if name in ("usr", "bin", "lib", "lib64", "etc", "proc", "dev", "tmp"):
                    raise


def add_bind_or_name_it(root: str, bind: dict) -> None:
    try:
        add_bind(root, **bind)
    except OSError as error:
        words = f"{bind['source']} could not be bound to {bind['target']}: {error.strerror}"
        raise OSError(words) from error


def add_bind(root: str, source: str, target: str, readonly: bool) -> None:
    place = root + target
    if target.split("/")[1] in os.listdir("/") and not target.startswith("/valohai/"):
        if not os.path.isdir(target):  # it would have to be made on the host
            raise FileNotFoundError(2, "mount point does not exist on this machine", target)
    else:
        make_mount_point(source, place)
    mount(source, place, None, MS_BIND | MS_REC)
    if readonly:
        flags = MS_BIND | MS_REMOUNT | MS_RDONLY | locked_flags(place)
        mount(None, place, None, flags)


def make_mount_point(source: str, target: str) -> None:
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "a"):
            pass


def locked_flags(path: str) -> int:
    """Flags that a remount in a user namespace has to repeat."""
    flags = os.statvfs(path).f_flag
    pairs = {2: MS_NOSUID, 4: MS_NODEV, 8: MS_NOEXEC, 1024: MS_NOATIME, 2048: MS_NODIRATIME}
    kept = sum(value for bit, value in pairs.items() if flags & bit)
    return kept | (MS_RELATIME if flags & 4096 else 0)


def change_root(root: str) -> None:
    """pivot_root where it works, so that programs may make user namespaces of their own; else chroot."""
    number = PIVOT_ROOT.get(os.uname().machine)
    os.chdir(root)
    if number is not None and _libc.syscall(number, b".", b".") == 0:
        _check(_libc.umount2(b".", MNT_DETACH), "umount")
        os.chdir("/")
    else:
        os.chroot(".")


def mount(
    source: str | None, target: str, kind: str | None, flags: int, data: str | None = None
) -> None:
    arguments = [None if a is None else os.fsencode(a) for a in (source, target, kind)]
    result = _libc.mount(*arguments, ctypes.c_ulong(flags), None if data is None else data.encode())
    _check(result, f"mount {source or ''} {target}")


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


if __name__ == "__main__":
    main(sys.argv[1])
