# shellcheck shell=bash
# What the scripts share: the project, a Python, questions, and how a command is started. Sourced, not run.
#
# Settings come from flags (--arch NAME), then environment variables (ARCH=NAME), then questions where somebody is at a
# terminal and gave neither, then defaults. DRY_RUN=1 prints the command instead of running it.

PROJECT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
EXTRA=()

fail() {
  echo "$(basename "$0"): $*" >&2
  exit 2
}

# The Python that runs the project: $PYTHON, the project's own environment, the system's; it must have torch.
find_python() {
  local python
  if [ -n "${PYTHON:-}" ]; then
    python=$(command -v "$PYTHON") || fail "PYTHON=$PYTHON is not a program."
  elif [ -x "$PROJECT/.venv/bin/python" ]; then
    python=$PROJECT/.venv/bin/python
  else
    python=$(command -v python3) || fail "no python3 on this machine; Python 3.11 or newer is needed."
  fi
  "$python" -c 'import sys, importlib.util as i; sys.exit(i.find_spec("torch") is None)' 2>/dev/null || fail \
    "$python has no torch. Make an environment: python3 -m venv $PROJECT/.venv && $PROJECT/.venv/bin/pip install" \
    "-r $PROJECT/requirements.txt; or name the Python that has one: PYTHON=/path/to/python."
  echo "$python"
}

# make_environment GROUP...: the project's own .venv with requirements.txt and dependency groups of pyproject.toml, made or
# completed where something is missing. Prints its Python.
make_environment() {
  local python=$PROJECT/.venv/bin/python base candidate group wanted=(-r "$PROJECT/requirements.txt")
  if [ ! -x "$python" ]; then
    base=
    for candidate in ${PYTHON:-} python3.12 python3.11 python3 python; do
      if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        base=$candidate
        break
      fi
    done
    [ -n "$base" ] || fail "Python 3.11 or newer is needed; install it, or name it: PYTHON=/path/to/python3.12 $0"
    echo "making .venv with $("$base" --version) …" >&2
    "$base" -m venv "$PROJECT/.venv" || fail "$base cannot make .venv; on Debian and Ubuntu install python3-venv."
  fi
  if ! "$python" "$PROJECT/script/missing_packages.py" "$@"; then
    for group in "$@"; do wanted+=(--group "$PROJECT/pyproject.toml:$group"); done
    {
      # old versions of pip know no dependency groups
      [ $# -eq 0 ] || "$python" -m pip install --quiet --upgrade 'pip>=25.1'
      "$python" -m pip install --quiet --disable-pip-version-check "${wanted[@]}"
    } >&2 || fail "pip could not install the packages; its last lines above say why."
  fi
  echo "$python"
}

# parse_settings "NAMES" "$@": --name VALUE and --name=VALUE set NAME; what follows -- goes to $EXTRA, other words to
# the next of the names that has no value yet.
parse_settings() {
  local names=" $1 " flag name
  shift
  while [ $# -gt 0 ]; do
    case "$1" in
      --)
        shift
        EXTRA=("$@")
        return
        ;;
      -h | --help) usage && exit 0 ;;
      --*)
        flag=${1%%=*}
        name=$(echo "${flag#--}" | tr '[:lower:]-' '[:upper:]_')
        case "$names" in *" $name "*) ;; *) fail "$flag is not known here. Flags of the Python program go after --." ;; esac
        if [ "$flag" != "$1" ]; then
          printf -v "$name" '%s' "${1#*=}"
        else
          [ $# -gt 1 ] || fail "$flag needs a value."
          printf -v "$name" '%s' "$2"
          shift
        fi
        shift
        ;;
      *)
        for name in $names; do
          [ -n "${!name:-}" ] || break
        done
        [ -z "${!name:-}" ] || fail "'$1': unexpected. Flags of the Python program go after --."
        printf -v "$name" '%s' "$1"
        shift
        ;;
    esac
  done
}

# True where questions make sense: nothing was given, and somebody can answer.
interactive() {
  local name
  for name in $1; do [ -z "${!name:-}" ] || return 1; done
  [ -t 0 ] && [ -t 1 ]
}

# ask NAME "question" default: reads NAME from the terminal, empty takes the default.
ask() {
  local answer
  read -r -p "$2 [$3]: " answer
  printf -v "$1" '%s' "${answer:-$3}"
}

# start PROGRAM FLAGS...: run a Python program of the project on $GPUS ("0,1", "cpu" or empty: all) in $NPROC processes.
start() {
  local program=$1 python command=() count
  shift
  python=$(find_python)
  case "${GPUS:-}" in
    "") count=${NPROC:-1} ;;
    cpu)
      set -- --no_cuda "$@"
      count=${NPROC:-1}
      ;;
    *[!0-9,]*) fail "GPUS=$GPUS: expected numbers as in 0,1, or cpu." ;;
    *)
      export CUDA_VISIBLE_DEVICES=$GPUS
      count=${NPROC:-$(echo "$GPUS" | tr ',' '\n' | grep -c .)}
      ;;
  esac
  case "$count" in *[!0-9]* | "" | 0) fail "NPROC=$count: expected a number of processes." ;; esac
  command=("$python")
  [ "$count" -eq 1 ] || command+=(-m torch.distributed.run --standalone --nproc_per_node "$count")
  run "${command[@]}" "$PROJECT/$program" "$@" "${EXTRA[@]}"
}

# Run a command in place of this script, or print it.
run() {
  if [ "${DRY_RUN:-0}" = 1 ]; then
    printf '%q ' "$@" && echo
  else
    exec "$@"
  fi
}

# run_requeued JOB COMMAND...: in a Slurm job, run a command on all its tasks, and end as it does. One that is stopped,
# because the job is preempted or near its time limit, has saved a checkpoint, and JOB goes back into the queue.
run_requeued() {
  local id=$1 stopped=0 job code
  shift
  # since Slurm 22.05 srun takes no --cpus-per-task from sbatch, and would give all processes of a node one core
  if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
  srun --kill-on-bad-exit=1 "$@" &
  job=$!
  # srun hands the signal on to every process of the job
  trap 'stopped=1; kill -TERM "$job" 2>/dev/null' TERM INT
  wait "$job"
  code=$?
  while kill -0 "$job" 2>/dev/null; do wait "$job"; code=$?; done
  if [ "$stopped" -eq 1 ]; then
    echo "stopped before the end (exit code $code): back into the queue"
    exec scontrol requeue "$id"
  fi
  exit "$code"
}
