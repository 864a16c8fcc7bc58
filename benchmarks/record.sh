#!/usr/bin/env bash
# Records on a GPU what the documentation says: benchmarks/record.sh DATA OUT [part ...]
#
# DATA: folder with classics/{train-0,validation}.jsonl.xz, spec_bench/question.jsonl, gsm8k/test.jsonl. OUT: folder of the results.
# Each part runs under its own limit (seconds) and leaves a valid file if it is cut off.
set -uo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 2 ] || { sed -n '2,5p' "$0"; exit 2; }
data=$(realpath "$1"); mkdir -p "$2"; out=$(realpath "$2"); shift 2
parts=${*:-tests attention plans engine decode large lossless medusa hidden-transfer longspec moh landmark sinklora hip lightning2}
export PYTHONPATH=src:reproductions:tests PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=true
part() {
  local name=$1 limit=$2 began=$SECONDS; shift 2
  [[ " $parts " == *" $name "* ]] || return 0
  timeout -k 5 "$limit" "$@" >"$out/$name.log" 2>&1
  echo "$name: status $?, $((SECONDS - began)) s, $(grep -v '^$' "$out/$name.log" | tail -1 | cut -c1-150)"
}
python=${PYTHON:-python3}
part tests 600 $python -m pytest -q -p no:cacheprovider -m gpu tests/gpu
part attention 600 $python benchmarks/attention.py --out "$out"
part plans 60 $python benchmarks/cudnn_plans.py --out "$out/cudnn-plans.json"
part engine 300 $python benchmarks/engine.py --forms compiled --tokens 128 --out "$out/engine.json"
part decode 180 $python benchmarks/decode.py --device cuda --data "$data" --max-new-tokens 64 --time-limit 120 --out "$out/decode.json"
part large 180 $python benchmarks/large_model.py --data "$data" --out "$out/large" --seconds 60
part large 180 $python benchmarks/decode.py --model "$out/large" --device cuda --data "$data" --max-new-tokens 64 --time-limit 60 --out "$out/decode-large.json"
part lossless 500 $python reproductions/lossless.py --device cuda --data "$data" --out "$out/lossless.json"
part medusa 180 $python reproductions/medusa.py --device cuda --data "$data" --out "$out/medusa.json"
part hidden-transfer 180 $python reproductions/hidden_transfer.py --device cuda --data "$data" --out "$out/hidden-transfer.json"
part longspec 300 $python reproductions/longspec.py --device cuda --data "$data" --out "$out/longspec.json"
part moh 900 $python reproductions/moh.py --data "$data/classics" --out "$out/moh.json"
part landmark 600 $python reproductions/landmark.py --part classics --data "$data/classics" --out "$out/landmark.json"
part sinklora 400 $python reproductions/sinklora.py --data "$data/classics" --out "$out/sinklora.json"
part hip 300 $python reproductions/hip.py --out "$out/hip.json"
part lightning2 300 $python reproductions/lightning2.py --data "$data/classics" --out "$out/lightning2.json"
