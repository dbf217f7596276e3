#!/usr/bin/env bash
# bench/gpu.sh [PYTHON] [OUT] [STEP...]: self check, tests and bench with the torch and triton of PYTHON, on its GPU; or
# the steps named, of check, tests, bench and xmc.
#
# Installs nothing into PYTHON and needs no network: the package runs from a copy, and test tools that are missing come
# from ./wheels (make wheels). Logs and results go to OUT. BERTLOSS_FAST_ALLOW_CPU=1 tries the script without a GPU.
# Ends within 9 minutes; status 2 without a GPU, 1 if a step failed.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$(command -v "${1:-python3}") || { echo "gpu.sh: no such python: ${1:-python3}" >&2; exit 2; }
case $python in /*) ;; *) python=$PWD/$python ;; esac
mkdir -p "${2:-$root/bench/results}" || exit 2
out=$(cd "${2:-$root/bench/results}" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

device=cuda
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    if [ "${BERTLOSS_FAST_ALLOW_CPU:-0}" != 1 ]; then
        echo "gpu.sh: the torch of $python finds no GPU (BERTLOSS_FAST_ALLOW_CPU=1 runs everything on the CPU)" >&2
        exit 2
    fi
    device=cpu
fi

# Where kernels/ is a folder of the package, as in a wheel; the copy comes before any installed one.
for part in bertloss_fast bench tests examples docs kernels pyproject.toml setup.py Makefile README.md; do
    if [ -e "$root/$part" ]; then cp -r "$root/$part" "$work/"; fi
done
cp -r "$root/kernels" "$work/bertloss_fast/kernels"
export PYTHONPATH="$work:$work/site" PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
cd "$work" || exit 2

missing=()
for tool in pytest hypothesis mpmath tqdm tabulate; do
    "$python" -c "import $tool" 2>/dev/null || missing+=("$tool")
done
if [ ${#missing[@]} -gt 0 ] && [ -d "$root/wheels" ]; then
    "$python" -m pip install --quiet --no-index --find-links "$root/wheels" --target "$work/site" "${missing[@]}"
fi

names=() states=() times=()
wanted=" ${*:3} "
[ $# -gt 2 ] || wanted=" check tests bench "
step() { # NAME SECONDS ARGUMENTS...: run PYTHON with them, keep going, remember how it went
    local name=$1 limit=$2 begin=$SECONDS status
    shift 2
    case $wanted in *" $name "*) ;; *) return ;; esac
    echo "== $name: python $*"
    timeout --kill-after=10 "$limit" "$python" "$@" 2>&1 | tee "$out/$name.log"
    status=${PIPESTATUS[0]}
    names+=("$name") times+=($((SECONDS - begin)))
    case $status in
        0) states+=(passed) ;;
        124 | 137) states+=("stopped after $limit s") ;;
        *) states+=("failed with status $status") ;;
    esac
}

step check 40 -m bertloss_fast
# What these two test needs no GPU, and the one a model.
step tests 270 -m pytest tests -p no:cacheprovider \
    --ignore=tests/test_compiled.py --ignore=tests/test_demo.py ${BERTLOSS_FAST_GPU_TESTS:-}
step bench 200 -m bench --device "$device" --minutes 3 --out "$out" ${BERTLOSS_FAST_GPU_BENCH:-}
step xmc 500 -m bench.xmc --device "$device" --out "$out" ${BERTLOSS_FAST_GPU_XMC:-}

failed=0
printf '\n%-8s %6s  %s\n' step seconds result
for i in "${!names[@]}"; do
    printf '%-8s %6s   %s\n' "${names[$i]}" "${times[$i]}" "${states[$i]}"
    [ "${states[$i]}" = passed ] || failed=1
done
exit $failed
