#!/bin/sh
# need.sh SUDO PACKAGE:WHAT...: installs the Debian packages whose program (or file, when it is a path) is not there.
sudo=$1
shift
PATH=$PATH:/usr/sbin:/sbin
missing=
for want in "$@"; do
    package=${want%%:*}
    what=${want#*:}
    case $what in
        /*) [ -e "$what" ] || missing="$missing $package" ;;
        *) command -v "$what" >/dev/null 2>&1 || missing="$missing $package" ;;
    esac
done
[ -n "$missing" ] || exit 0
echo "installing:$missing"
export DEBIAN_FRONTEND=noninteractive
# shellcheck disable=SC2086 # words are package names
$sudo apt-get update -qq && $sudo apt-get install -y -qq --no-install-recommends $missing >/dev/null
