#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# tests/ptx.sh INTERPRETER PYTHON BUILD some|all   (make test-ptx, make test-ptx-modes)
# Runs the tests marked `cuda` on an interpreter of PTX, with the libraries that hold the PTX of each architecture:
# blocks, warps and lanes in their order and in random ones, one block after the other, as a device with 4
# multiprocessors and with 132. Loaded first, such a library takes the place of the installed one, whose name it has.
# `some` is one run of each architecture, one in a random order with 4, one in order with 132; `all` are five of each.
# All must end with the same bits, and every kernel of the library must have run. The two architectures run side by
# side, for the interpreter uses one thread.
set -euo pipefail
interpreter=$1 python=$2 build=$3 which=$4
one_by_one="PTXRUN_SMS=132 PTXRUN_RESIDENT=1"
random="PTXRUN_RANDOM=1 PTXRUN_SEED"
declare -A modes
if [ "$which" = all ]; then
  modes[80]="PTXRUN_SMS=4;$one_by_one;$random=1;$random=2;$random=3"
  modes[90]=${modes[80]}
else
  modes[80]="PTXRUN_SMS=4 $random=1"
  modes[90]=$one_by_one
fi

run_architecture() {
  local architecture=$1 library=$build/cmake/ptx_$1/libequipoise.so out=$build/ptx/$1 mode status
  mkdir "$out"
  grep -aoP '[.]entry \K\w+' "$library" | sort -u > "$out/kernels"
  IFS=';' read -ra list <<< "${modes[$architecture]}"
  for mode in "${list[@]}"; do
    echo "---- compute_$architecture $mode"
    rm -f "$out/bits"
    status=0
    # shellcheck disable=SC2016,SC2086
    env $mode PTXRUN_CC="$architecture" PTXRUN_STRICT=1 PTXRUN_VERBOSE=1 \
      EQUIPOISE_LIBRARY="$library" EQUIPOISE_DIGEST="$out/bits" \
      "$interpreter" sh -c 'LD_PRELOAD="$LD_PRELOAD:$EQUIPOISE_LIBRARY" exec "$@"' sh \
      "$python" -m pytest -q -m cuda --capture=sys -p no:cacheprovider tests/python \
      2> "$out/launches.unfinished" > "$out/log" || status=1
    cat "$out/log"
    ! grep -m 20 ERROR "$out/launches.unfinished" || status=1
    [ $status = 0 ] || return 1
    mv "$out/launches.unfinished" "$out/launches"  # make kernels reads it
    [ -e "$out/bits_of_all" ] || cp "$out/bits" "$out/bits_of_all"
    diff "$out/bits_of_all" "$out/bits" || { echo "not the bits of the first run"; return 1; }
    grep -oP '^\[ptxrun\] \K\w+(?=<<<)' "$out/launches" | sort -u | comm -23 "$out/kernels" - > "$out/missed"
    [ ! -s "$out/missed" ] || { cat "$out/missed"; echo "these kernels did not run"; return 1; }
    echo "compute_$architecture $mode: $(wc -l < "$out/kernels") kernels, $(tail -n 1 "$out/log")" >> "$out/summary"
  done
}

rm -rf "$build/ptx"
mkdir -p "$build/ptx"
"$interpreter" true  # builds itself, which two must not do at once
declare -A jobs
for architecture in 80 90; do
  run_architecture $architecture &
  jobs[$architecture]=$!
done
status=0
for architecture in 80 90; do wait "${jobs[$architecture]}" || status=1; done
[ $status = 0 ] || exit 1
diff "$build/ptx/80/bits_of_all" "$build/ptx/90/bits_of_all" || { echo "the architectures differ in bits"; exit 1; }
echo "---- summary of the PTX runs"
cat "$build"/ptx/*/summary
