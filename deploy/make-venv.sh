#!/bin/sh
# Makes and fills the virtual environment of a checkout, for the Makefile.
#
#   make-venv.sh create PYTHON VENV
#   make-venv.sh install VENV ARGUMENTS-OF-PIP-INSTALL...
#
# uv is used when it is on PATH, else Python's own venv and pip.
set -eu

fail() {
    printf '\n%s\n' "$@" >&2
    exit 1
}

create() {
    python=$1 venv=$2
    command -v "$python" >/dev/null 2>&1 ||
        fail "There is no '$python' on PATH. Install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "$python is $("$python" -V 2>&1); 3.10 or newer is needed. Name one: make PYTHON=/path/to/python3.12"
    echo "Making the virtual environment $venv with $("$python" -V 2>&1)"
    if command -v uv >/dev/null 2>&1; then
        uv venv -q --allow-existing --python "$(command -v "$python")" "$venv"
    elif "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        "$python" -m venv "$venv"
    elif "$python" -c 'import virtualenv' 2>/dev/null; then
        "$python" -m virtualenv -q "$venv"
    else
        rm -rf "$venv"
        fail "This Python cannot make virtual environments: its modules 'venv' and 'ensurepip' are not complete." \
            "On Debian and Ubuntu they come in a package of their own:  apt install python3-venv" \
            "Anywhere, uv does without them:  https://docs.astral.sh/uv/  Then run make again."
    fi
}

install() {
    venv=$1
    shift
    echo "Installing packages into $venv (a minute the first time)"
    if command -v uv >/dev/null 2>&1; then
        uv pip install -q --python "$venv/bin/python" "$@"
    else
        "$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$venv/bin/python" -m ensurepip -q ||
            fail "$venv has no pip. Run:  make clean"
        # --group needs pip 25.1
        "$venv/bin/python" -m pip install -q --disable-pip-version-check --upgrade 'pip>=25.1'
        "$venv/bin/python" -m pip install -q --disable-pip-version-check "$@"
    fi
}

command=$1
shift
"$command" "$@"
