# Sourced by the other scripts, from the repository's root, with the extras that they need:  source scripts/environment.sh dev
# Makes .venv unless it is there, with uv where that is installed, and installs NanoJAX into it unless pyproject.toml is unchanged.
extras=$1
python=
for candidate in python3 python3.13 python3.12 python3.11; do
  if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; then python=$candidate; break; fi
done
if [ -z "$python" ]; then
  echo "NanoJAX needs Python 3.11 to 3.13, and no python3 on the PATH is one; install one, or uv" >&2
  command -v uv >/dev/null || exit 2
  python=3.12
fi
stamp=.venv/.installed-$extras
wanted="$python $(cksum < pyproject.toml)"
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
  echo "installing NanoJAX with the extra '$extras' into .venv"
  if command -v uv >/dev/null; then
    [ -x .venv/bin/python ] || uv venv --quiet --python "$python" .venv
    uv pip install --quiet --python .venv/bin/python -e ".[$extras]"
  else
    if [ ! -x .venv/bin/pip ]; then
      "$python" -m venv --clear .venv || { echo "python3 -m venv failed; on Debian: apt install python3-venv" >&2; exit 2; }
    fi
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".[$extras]"
  fi
  echo "$wanted" > "$stamp"
fi
