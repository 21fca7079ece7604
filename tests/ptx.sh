#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# tests/ptx.sh INTERPRETER PYTHON BUILD ARCHITECTURE...   (make test-ptx)
# Runs the tests marked `cuda` on an interpreter of PTX, with the libraries that hold the PTX of each architecture:
# blocks, warps and lanes in their order and in random ones, one block after the other, as a device with 4
# multiprocessors and with 132. Loaded first, such a library takes the place of the installed one, whose name it has.
# All must end with the same bits, and every kernel of the library must have run.
set -euo pipefail
interpreter=$1 python=$2 build=$3
shift 3
modes=("PTXRUN_SMS=4" "PTXRUN_SMS=132 PTXRUN_RESIDENT=1")
for seed in 1 2 3; do modes+=("PTXRUN_RANDOM=1 PTXRUN_SEED=$seed"); done

out=$build/ptx
rm -rf "$out"
mkdir -p "$out"
for architecture in "$@"; do
  library=$build/cmake/ptx_$architecture/libequipoise.so
  grep -aoP '[.]entry \K\w+' "$library" | sort -u > "$out/kernels"
  for mode in "${modes[@]}"; do
    echo "---- compute_$architecture $mode"
    rm -f "$out/bits"
    status=0
    # shellcheck disable=SC2016,SC2086
    env $mode PTXRUN_CC="$architecture" PTXRUN_STRICT=1 PTXRUN_VERBOSE=1 \
      EQUIPOISE_LIBRARY="$library" EQUIPOISE_DIGEST="$out/bits" \
      "$interpreter" sh -c 'LD_PRELOAD="$LD_PRELOAD:$EQUIPOISE_LIBRARY" exec "$@"' sh \
      "$python" -m pytest -q -m cuda --capture=sys tests/python \
      2> "$out/launches" | tee "$out/log" || status=1
    ! grep -m 20 ERROR "$out/launches" || status=1
    [ $status = 0 ] || exit 1
    [ -e "$out/bits_of_all" ] || cp "$out/bits" "$out/bits_of_all"
    diff "$out/bits_of_all" "$out/bits" || { echo "not the bits of the first run"; exit 1; }
    grep -oP '^\[ptxrun\] \K\w+(?=<<<)' "$out/launches" | sort -u | comm -23 "$out/kernels" - > "$out/missed"
    [ ! -s "$out/missed" ] || { cat "$out/missed"; echo "these kernels did not run"; exit 1; }
    echo "compute_$architecture $mode: $(wc -l < "$out/kernels") kernels, $(tail -n 1 "$out/log")" >> "$out/summary"
  done
done
echo "---- summary of the PTX runs"
cat "$out/summary"
