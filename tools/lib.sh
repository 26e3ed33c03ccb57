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
    if install_project; then
        environment_stamp >"$stamp"
    elif has_everything; then
        say "That failed, but what is installed already will do for now."
    else
        say "The installation failed. The last lines of $VENV/install.log:"
        tail -n 15 "$VENV/install.log" >&2
        say "It needs the Python package index (or PIP_INDEX_URL, PIP_FIND_LINKS) once."
        return 1
    fi
}

install_project() {
    say "Installing the project and its tools into .venv."
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check \
        -e "$ROOT[test]" >"$VENV/install.log" 2>&1
}

# Without a network, an environment from an earlier time may be good enough.
has_everything() {
    (cd "$ROOT" && "$VENV/bin/python" -m pip check && "$VENV/bin/python" -c \
        'import aegis_cluster, hypothesis, mypy, psutil, pytest, pytest_timeout, rich, xdist, zmq'
    ) >/dev/null 2>&1
}
