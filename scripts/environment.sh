# Sourced by the scripts beside it: makes .venv with everything pinned, or reuses what is there.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

python=""
for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11 python3.10; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then python=$candidate; break; fi
done
if [ -z "$python" ]; then
    echo "Python 3.10 or newer is needed; name one with PYTHON=/path/to/python3" >&2
    exit 1
fi

stamp=.venv/installed-$(cat pyproject.toml scripts/constraints.txt | sha256sum | cut -c1-16)
if [ ! -e "$stamp" ]; then
    echo "installing into .venv (a few minutes, once)"
    [ -x .venv/bin/python ] || "$python" -m venv .venv || exit 1
    .venv/bin/python -m pip install --quiet --disable-pip-version-check \
        -c scripts/constraints.txt -e ".[dev]" || { echo "the installation failed" >&2; exit 1; }
    rm -f .venv/installed-*
    touch "$stamp"
fi
PATH="$PWD/.venv/bin:$PATH"
export RAY_USAGE_STATS_ENABLED=0
