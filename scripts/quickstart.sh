#!/usr/bin/env bash
# From a fresh clone to a GPT that has learnt some Python: environment, training, loss curve, sample. Needs Python 3.11 to 3.13.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh viz

run=runs/quickstart
resume=
compgen -G "$run/checkpoints/*/manifest.json" > /dev/null && resume=--resume   # run again: what is there is used, a finished run is not repeated
.venv/bin/nanojax train configs/tiny.py --out $run $resume

echo
echo 'A sample, prompt "def ":'
.venv/bin/nanojax sample $run --prompt 'def ' --tokens 100 --seed 1
cat <<END

The loss curve is in $run/loss.png, every number in $run/metrics.jsonl and $run/summary.json.
Next:
  .venv/bin/nanojax sample $run --prompt 'class ' --temperature 0.5
  .venv/bin/nanojax train configs/small.py                               # larger, longer
  .venv/bin/nanojax train configs/tiny.py --out runs/mine --data.path DIR --data.glob '**/*.md'
  .venv/bin/pip install -e '.[cuda]' && .venv/bin/nanojax train configs/d12.py   # on an NVIDIA GPU
END
