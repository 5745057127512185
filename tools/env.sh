# shellcheck shell=bash
# Sourced by the tools: finds or makes the project's own Python environment, and Debian packages where it may.
#
#   need_python [EXTRA] .venv with incbak and its extra (test, check) installed; puts it first on PATH
#   need_debian PKG...  installs the packages that are missing, as root with apt; else says which are missing

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

say() { printf '%s\n' "$*" >&2; }

_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11; do
        if command -v "$candidate" >/dev/null &&
            "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            printf '%s' "$candidate"
            return
        fi
    done
    return 1
}

need_python() {
    local python stamp
    local venv=${INCBAK_VENV:-$top/.venv}
    if [ ! -x "$venv/bin/python" ]; then
        python=$(_python) || { need_debian python3-venv && python=$(_python); } ||
            { say "incbak needs Python 3.11 or later with venv (Debian: python3-venv)"; return 1; }
        say "making a Python environment in $venv"
        "$python" -m venv "$venv" || return 1
    fi
    stamp=$venv/.incbak-${1:-run}
    if [ ! -e "$stamp" ] || [ "$top/pyproject.toml" -nt "$stamp" ]; then
        say "installing incbak and what it needs${1:+ to $1}"
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e "$top${1:+[$1]}" || return 1
        touch "$stamp"
    fi
    export PATH=$venv/bin:$PATH
}

_missing_debian() {
    local package
    for package in "$@"; do
        dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || printf '%s ' "$package"
    done
}

need_debian() {
    local missing
    command -v dpkg-query >/dev/null || { say "not Debian: please have these yourself: $*"; return 0; }
    missing=$(_missing_debian "$@")
    [ -z "$missing" ] && return 0
    if [ "$(id -u)" -ne 0 ] || [ -n "${INCBAK_NO_APT:-}" ]; then
        say "missing Debian packages: $missing"
        say "install them with: sudo apt-get install --no-install-recommends $missing"
        return 1
    fi
    say "installing Debian packages: $missing"
    # shellcheck disable=SC2086
    { apt-get update -qq &&
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing; } >/dev/null ||
        { say "apt-get could not install: $missing"; return 1; }
}
