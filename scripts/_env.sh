# Sourced by the scripts in this folder: changes to the repository root and prepares .venv with what they need.
#
#   use_env         the library          use_env dev         the library with an extra of pyproject.toml
#
# Sets ROOT and VENV. Installs only if pyproject.toml, constraints.txt, the checkout's path or the interpreter changed
# since last time, so later runs need no network. PYTHON names the interpreter that makes a new .venv.

ROOT="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
VENV="$ROOT/.venv"
cd -- "$ROOT"

say() { printf '%s\n' "scripts/$(basename -- "$0"): $*" >&2; }

die() {
    say "$@"
    exit 1
}

# One line that changes whenever an installation would; ruff's settings, at the end of pyproject.toml, install nothing.
fingerprint() {
    {
        printf '%s\n' "$ROOT" && "$VENV/bin/python" -V && sed '/^\[tool\.ruff/,$d' pyproject.toml && cat constraints.txt
    } | cksum
}

make_venv() {
    local python="${PYTHON:-python3}"
    command -v "$python" >/dev/null ||
        die "expected a Python interpreter, found no '$python'; install Python 3.10 or newer, or set PYTHON to one."
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        die "expected Python 3.10 or newer, '$python' is $("$python" -V 2>&1); set PYTHON to a newer one."
    say "creating .venv ($("$python" -V))"
    "$python" -m venv "$VENV" || {
        rm -rf -- "$VENV"
        die "'$python -m venv' failed, see above; some systems have it in a separate package (python3-venv)."
    }
}

use_env() {
    local extra="${1:-}" now stamp
    [ -e "$VENV" ] || make_venv
    "$VENV/bin/python" -c '' 2>/dev/null ||
        die "expected an interpreter at $VENV/bin/python, found none that starts; remove .venv and run this again."

    now="$(fingerprint)"
    for stamp in "$VENV/.installed-${extra:-base}" "$VENV/.installed-dev"; do # dev includes all but clients
        [ "$(cat -- "$stamp" 2>/dev/null)" = "$now" ] && return
    done

    say "installing hf_specdec${extra:+[$extra]} into .venv; the first time takes minutes"
    "$VENV/bin/python" -m pip --version >/dev/null 2>&1 || "$VENV/bin/python" -m ensurepip >/dev/null ||
        die "expected pip in .venv, found none and could not add it; remove .venv and run this again."
    pip_install -c constraints.txt -e ".${extra:+[$extra]}" ||
        die "pip could not install hf_specdec${extra:+[$extra]}, see above; if you have no network, install it first."
    printf '%s\n' "$now" >"$VENV/.installed-${extra:-base}"
    say "installed"
}

pip_install() {
    "$VENV/bin/python" -m pip install -qq --no-input --disable-pip-version-check "$@" </dev/null
}

# overlay NAME PACKAGES...: an environment .venv/NAME that falls back on .venv: only packages that differ are installed twice.
overlay() {
    local env="$VENV/$1" now
    shift
    now="$(fingerprint) $*"
    [ "$(cat -- "$env/.installed" 2>/dev/null)" = "$now" ] && return
    say "installing $* into .venv/$(basename -- "$env")"
    rm -rf -- "$env"
    "$VENV/bin/python" -m venv --without-pip "$env" &&
        "$env/bin/python" - "$VENV" <<'PYTHON' &&
import pathlib, sys, sysconfig
own = sysconfig.get_path("purelib")
shared = pathlib.Path(sys.argv[1]) / pathlib.Path(own).relative_to(sys.prefix)
pathlib.Path(own, "shared.pth").write_text(f"import site; site.addsitedir({str(shared)!r})\n")
PYTHON
        VENV="$env" pip_install "$@" &&
        printf '%s\n' "$now" >"$env/.installed"
}
