#!/bin/sh
# Make one result of docs/results.md again, from nothing or from where it was stopped.
# usage: benchmarks/reproduce.sh RESULT [FOCAL-CLI [STORES [RUNS]]]      (make reproduce RESULT=point)
set -eu
result=${1:?which result: point, point-joint or cheetah-dir}
cli=${2:-focal-cli} stores=${3:-stores} runs=${4:-runs}

run() { # name, collection, then what focal-cli train takes
    name=$1 collection=$2
    shift 2
    "$cli" train --collection "$collection" --name "$name" --runs "$runs" --resume "$@"
    "$cli" test "$runs/$name"
}

case $result in
point)
    "$cli" data generate --env point --scale laptop --engine sb3 -o "$stores/sparse-point-robot"
    run point-mixed "$stores/sparse-point-robot" --data mixed --seeds 3
    ;;
point-joint)
    "$cli" data generate --env point --scale laptop --engine sb3 -o "$stores/sparse-point-robot"
    run point-mixed-joint "$stores/sparse-point-robot" --data mixed --seeds 3 --set schedule=joint --set steps=9500
    ;;
cheetah-dir)
    # the laptop scale had stable-baselines3's stock settings when these results were measured
    "$cli" data generate --env cheetah-dir --scale laptop --engine sb3 \
        --set sac.hidden_sizes=256,256 --set sac.learning_rate=3e-4 -o "$stores/half-cheetah-fwd-back"
    for quality in expert mixed; do
        run cheetah-dir-$quality "$stores/half-cheetah-fwd-back" --data $quality --seeds 3
        run cheetah-dir-$quality-hide-x "$stores/half-cheetah-fwd-back" --data $quality --seeds 3 --set hide_x=true
    done
    ;;
*)
    echo "unknown result '$result', expected point, point-joint or cheetah-dir" >&2
    exit 2
    ;;
esac
