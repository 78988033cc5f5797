#!/bin/sh
# Makes this machine a worker of a group of valohai-dagster. The token is good for the machines of one launch and for a
# short time only; nothing else in here is secret.
set -eu
umask 022
PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"
export DEBIAN_FRONTEND=noninteractive
#VALUES#
home=/opt/valohai-agent
config=/etc/valohai-agent
file="$home/valohai-agent.pyz"

say() { printf '%s valohai: %s\n' "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$*"; }

has() { command -v "$1" >/dev/null 2>&1; }

with_systemd() { [ -d /run/systemd/system ]; }

power_off() {
    [ "$give_up_seconds" -gt 0 ] || return 0
    say "this machine powers itself off"
    if with_systemd; then systemctl poweroff --no-block; else kill -TERM $$; fi
}

ended() {
    code=$?
    trap - EXIT
    [ $code -eq 0 ] || { say "the bootstrap failed with $code"; power_off; }
    exit $code
}

# Whatever hangs below, a machine that nobody hears of does not stay.
watch_over() {
    [ "$give_up_seconds" -gt 0 ] || return 0
    trap ended EXIT
    trap 'exit 1' TERM
    if with_systemd; then
        shutdown -P "+$((give_up_seconds / 60 + 1))" >/dev/null 2>&1 || true
    else
        ( sleep "$give_up_seconds"; [ -e "$config/machine.json" ] || kill -TERM $$ ) >/dev/null 2>&1 &
    fi
}

# Package servers and locks have bad minutes while a machine boots.
persist() {
    for pause in 5 10 20 40 60 0; do
        "$@" && return 0
        say "failed: $1 $2; again in $pause s"
        sleep $pause
    done
    return 1
}

packages() {
    say "installing $*"
    if has apt-get; then
        persist apt-get -qq -o DPkg::Lock::Timeout=300 update
        persist apt-get -qqy -o DPkg::Lock::Timeout=300 install --no-install-recommends "$@"
    elif has dnf; then persist dnf -qy install "$@"
    elif has yum; then persist yum -qy install "$@"
    elif has zypper; then persist zypper -qn install "$@"
    else say "there is no package manager that is known here to install $*"; return 1
    fi
}

find_python() {
    for python in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do
        if has $python && $python -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then return 0; fi
    done
    return 1
}

need_python() {
    find_python && return 0
    packages python3 || true
    find_python || packages python3.11 && find_python && return 0
    say "Python 3.10 or newer is needed; choose an image that has it"
    return 1
}

need_docker() {
    if ! has docker; then
        if has apt-get; then packages docker.io; else packages docker; fi
    fi
    if with_systemd; then systemctl enable --now docker; fi
}

need_gpu_containers() {
    has nvidia-smi || { say "gpus are set, but this image has no NVIDIA driver"; return 1; }
    has nvidia-ctk || {
        source=https://nvidia.github.io/libnvidia-container
        if has apt-get; then
            packages ca-certificates curl gnupg
            keyring=/usr/share/keyrings/nvidia-container-toolkit.gpg
            persist curl -fsSL -o /tmp/nvidia.key $source/gpgkey
            gpg --batch --yes --dearmor -o $keyring /tmp/nvidia.key
            echo "deb [signed-by=$keyring] $source/stable/deb/\$(ARCH) /" >/etc/apt/sources.list.d/nvidia-container-toolkit.list
        else
            persist curl -fsSL -o /etc/yum.repos.d/nvidia-container-toolkit.repo $source/stable/rpm/nvidia-container-toolkit.repo
        fi
        packages nvidia-container-toolkit
    }
    nvidia-ctk runtime configure --runtime=docker
    if with_systemd; then systemctl restart docker; fi
}

# The address may be signed, so it is given through the environment and shown nowhere.
fetch_agent() {
    mkdir -p "$home"
    url="$agent_url" sha256="$agent_sha256" target="$file" "$python" - <<'PYTHON'
import hashlib, os, sys, time, urllib.error, urllib.request

url, wanted, target = (os.environ[name] for name in ("url", "sha256", "target"))
for pause in (1, 2, 4, 8, 15, 30, 60, 0):
    try:
        digest = hashlib.sha256()
        with urllib.request.urlopen(url, timeout=60) as answer, open(target + ".part", "wb") as out:
            while chunk := answer.read(1 << 20):
                digest.update(chunk)
                out.write(chunk)
        if digest.hexdigest() != wanted:
            sys.exit("valohai: the agent file is not the published one: its sha256 is " + digest.hexdigest())
        os.chmod(target + ".part", 0o755)
        os.rename(target + ".part", target)
        sys.exit(0)
    except (OSError, ValueError) as error:
        code = getattr(error, "code", None)
        print("valohai: the agent file cannot be fetched:", code or type(error).__name__, getattr(error, "reason", ""), flush=True)
        time.sleep(pause)
sys.exit("valohai: the agent file could not be fetched")
PYTHON
}

extra() {
    :
#EXTRA#
}

prepare() {
    say "becoming a worker of $group"
    extra
    need_python
    if [ "$docker" ]; then need_docker; fi
    if [ "$docker" ] && [ "$gpus" ]; then need_gpu_containers; fi
    fetch_agent
}

watch_over
if [ -e "$config/machine.json" ] && [ -e "$file" ]; then find_python; else prepare; fi
mkdir -p -m 0755 "$config"
(umask 077; printf '%s' "$token" >"$config/token")
set -- "$python" "$file" join "$join_url" --group "$group" --token-file "$config/token"
[ -z "$cloud" ] || set -- "$@" --cloud "$cloud"
say "joining with agent $agent_version"
if with_systemd; then
    "$@"
    if [ "$give_up_seconds" -gt 0 ]; then shutdown -c >/dev/null 2>&1 || true; fi
else
    trap - EXIT TERM
    exec "$@"
fi
