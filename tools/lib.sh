# Shared by the tools: a Python that is new enough, and an environment of the project's own.
# To be sourced by bash scripts, after `set -euo pipefail`.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$ROOT/.venv

say() { printf '%s\n' "$*" >&2; }

is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

# Prints the path of a Python 3.11 or newer that can make environments, or says what is missing.
find_python() {
    local candidate found_old=""
    for candidate in python3.13 python3.12 python3.11 python3 python \
        "$HOME"/.pyenv/versions/*/bin/python3 /usr/local/bin/python3 /opt/*/bin/python3; do
        candidate=$(command -v "$candidate" 2>/dev/null) || continue
        if ! is_new_enough "$candidate"; then
            found_old=$("$candidate" --version 2>/dev/null || printf '%s' "$found_old")
        elif ! "$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1; then
            say "$candidate cannot make environments (its venv or ensurepip is missing)."
        else
            printf '%s\n' "$candidate"
            return 0
        fi
    done
    say "No Python 3.11 or newer was found${found_old:+ (only $found_old)}."
    say "Install one (for example: apt install python3.11 python3.11-venv, or pyenv install 3.11)"
    say "and run this again."
    return 1
}

# What the environment must have been made from to be used as it is.
environment_stamp() {
    cksum <"$ROOT/pyproject.toml"
}

# Makes $VENV with the project and its test tools in it, unless it is there and up to date.
ensure_environment() {
    local stamp=$VENV/.aegis-stamp python
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(environment_stamp)" ] &&
        is_new_enough "$VENV/bin/python"; then
        return 0
    fi
    # An environment that is there is brought up to date; one that was cut short is made anew.
    if ! is_new_enough "$VENV/bin/python" ||
        ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        python=$(find_python) || return 1
        say "Making an environment in .venv with $("$python" --version) (once; a minute or so)."
        rm -rf "$VENV"
        "$python" -m venv "$VENV"
    fi
    install_project || return 1
    environment_stamp >"$stamp"
}

install_project() {
    local log=$VENV/install.log
    say "Installing the project and its tools into .venv."
    if "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check \
        -e "$ROOT[test]" >"$log" 2>&1; then
        return 0
    fi
    # Without a network, an environment that has all it needs is good enough.
    if "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-index \
        --no-build-isolation --no-deps -e "$ROOT" >>"$log" 2>&1 &&
        "$VENV/bin/python" -m pip check >>"$log" 2>&1 &&
        "$VENV/bin/python" -c 'import hypothesis, mypy, pytest, pytest_timeout, xdist' \
            >>"$log" 2>&1; then
        say "The package index was not reached; what is installed already is enough."
        return 0
    fi
    say "The installation failed. The last lines of $log:"
    tail -n 15 "$log" >&2
    say "It needs the Python package index (or PIP_INDEX_URL, PIP_FIND_LINKS) once."
    return 1
}
