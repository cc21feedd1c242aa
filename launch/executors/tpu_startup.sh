#!/bin/bash
# Startup script of a host of a Cloud TPU slice that trains one cell; launch/executors/tpu.py puts its settings in.
#
# Runs as root on every host at every boot. In order: fetch the code, make the environment, train, delete the slice. Whatever
# goes wrong on the way, the slice is deleted, for a slice that waits is billed like one that works; only a host that is told
# to end by SIGTERM (spot preemption, reboot) leaves that to whoever told it. Needs bash, curl, flock, sha256sum, tar, timeout;
# gcloud for gs://; and uv, or python3 with pip, to make the environment.
set -u -o pipefail

# @settings@

: "${HOST_FOLDER:=/var/lib/gqa_jax}"                  # what this host keeps
: "${TPU_API:=https://${ENDPOINT}}"                   # where the request for this slice can be deleted
: "${RESTART_SECONDS:=30}"                            # before a training that was preempted elsewhere is started again
: "${LEAVE_SECONDS:=20}"                              # that other hosts have to copy their logs before the slice goes
: "${PRIMARY_SECONDS:=150}"                           # that host 0 has to miss this one and say so (heartbeats: 100 s)
: "${KILL_SECONDS:=120}"                              # between SIGTERM and SIGKILL: to save
: "${LOG_SECONDS:=30}"                                # between copies of the log to gs://
: "${RETRY_SECONDS:=5}"                               # before the first retry of a download or a deletion; then doubled
METADATA="http://${GCE_METADATA_HOST:-metadata.google.internal}/computeMetadata/v1/instance"
CODE="${HOST_FOLDER}/${SHA256}/code"
export HOME="${HOME:-/root}"
export PATH="${PATH}:/snap/bin" # where some images have gcloud
ENVIRONMENT="${HOST_FOLDER}/${SHA256}/env"

say() { echo "$(date -u '+%Y-%m-%d %H:%M:%S') host ${HOST:-?}: $*"; }

is_remote() { [[ "$1" == gs://* ]]; }

# metadata PATH [CURL OPTION...]: prints a value of this machine's metadata
metadata() { curl --silent --fail --max-time 20 -H 'Metadata-Flavor: Google' "${@:2}" "${METADATA}/$1"; }

# copy FROM TO: one file; either may be on gs://
copy() {
    if is_remote "$1" || is_remote "$2"; then
        gcloud --quiet storage cp "$1" "$2"
    else
        mkdir -p "$(dirname "$2")" && cp "$1" "$2.${HOST}.tmp" && mv "$2.${HOST}.tmp" "$2"
    fi
}

# retry COUNT COMMAND...: until it succeeds, with growing pauses
retry() {
    local count="$1" pause="${RETRY_SECONDS}" i
    shift
    for ((i = 1; ; i++)); do
        "$@" && return 0
        ((i == count)) && return 1
        sleep "${pause}" 9>&-
        pause=$((pause < 300 ? pause * 2 : 300))
    done
}

# fail REASON: ends this host before training
fail() {
    REASON="$1"
    exit 1
}

text() { printf '%s' "$1" | tr '\000-\037' ' ' | tr -d '\177' | sed 's/\\/\\\\/g; s/"/\\"/g'; } # of a JSON string

# write_failure: why this host failed, where `python -m launch status` finds it
write_failure() {
    local file="${HOST_FOLDER}/host-failure.json"
    printf '{"host": "%s", "class": "infrastructure", "reason": "%s", "time": %s, "job": "%s"}\n' \
        "$(text "$(hostname) (${HOST})")" "$(text "host ${HOST}: ${REASON}")" "$(date +%s.%N)" "$(text "${JOB}")" >"${file}"
    retry 3 copy "${file}" "${FOLDER}/host-failure.json"
}

copy_log() { if is_remote "${FOLDER}"; then copy "${LOG}" "${FOLDER}/logs/${LOG##*/}" >/dev/null 2>&1; fi; }

copy_log_often() {
    trap exit TERM # a copy that has begun ends first, so that it does not overwrite the last one
    while true; do
        sleep "${LOG_SECONDS}" &
        wait $!
        copy_log
    done
}

# delete_once: asks for this slice's deletion; true when it is on its way
delete_once() {
    local token code
    token="$(metadata service-accounts/default/token | sed -n 's/.*"access_token" *: *"\([^"]*\)".*/\1/p')"
    code="$(curl --silent --output "${HOST_FOLDER}/delete.txt" --write-out '%{http_code}' --max-time 60 --request DELETE \
        -H "Authorization: Bearer ${token}" \
        "${TPU_API}/v2/projects/${PROJECT}/locations/${ZONE}/queuedResources/${JOB}?force=true")"
    if [[ "${code}" == 2?? || "${code}" == 404 ]]; then
        return 0
    fi
    say "the slice could not be deleted (HTTP ${code}): $(tr '\n' ' ' <"${HOST_FOLDER}/delete.txt" | head -c 500)"
    say "its service account needs the permission tpu.nodes.delete on project ${PROJECT}; trying again"
    copy_log
    return 1
}

# leave: the exit trap. Copies what was printed, says why, and sees that nothing goes on being billed.
leave() {
    local code=$?
    trap '' TERM
    trap - EXIT
    kill "${HELPERS[@]}" 2>/dev/null
    wait "${HELPERS[@]}" 2>/dev/null
    if [[ -n "${TOLD}" ]]; then
        say "ends with code ${code}: it was told to"
        copy_log
        exit "${code}"
    fi
    [[ -n "${REASON}" ]] && say "failed: ${REASON}" && write_failure
    echo "${code}" >"${HOST_FOLDER}/ended"
    say "ends with code ${code}"
    copy_log
    if [[ "${HOST}" == "${PRIMARY}" ]]; then
        sleep "${LEAVE_SECONDS}" 9>&-
    elif [[ "${code}" == 0 ]]; then
        exit 0 # host 0 deletes the slice
    elif [[ "${TRAINED}" ]]; then
        sleep "${PRIMARY_SECONDS}" 9>&-
    fi
    retry 1000000 delete_once
    exit "${code}"
}

# told: on SIGTERM. Training saves; then this host ends.
told() {
    TOLD=yes
    [[ -n "${TRAINING}" ]] && kill -TERM "${TRAINING}" 2>/dev/null
}

# watch_preemption: the metadata say it as soon as it is decided, SIGTERM comes when the machine goes down
watch_preemption() {
    local answer
    while true; do
        answer="$(metadata 'preempted?wait_for_change=true' --max-time 600)"
        if [[ "${answer}" == TRUE ]]; then
            say "this machine is being preempted"
            kill -TERM "$1"
            return
        fi
        sleep "${RETRY_SECONDS}"
    done
}

fetch() {
    [[ -e "${CODE}/COMMIT" ]] && return
    local file="${HOST_FOLDER}/${SHA256}.tar.gz"
    rm -rf "${CODE}" "${CODE}.tmp"
    mkdir -p "${CODE}.tmp" || fail "its disk can't be written"
    retry 5 copy "${BUNDLE}" "${file}" || fail "the bundle ${BUNDLE} could not be copied: $(tail -n 1 "${LOG}")"
    echo "${SHA256}  ${file}" | sha256sum --check --status ||
        fail "the bundle ${BUNDLE} is damaged: its SHA-256 is not its name"
    tar -xzf "${file}" --no-same-owner -C "${CODE}.tmp" && mv "${CODE}.tmp" "${CODE}" || fail "the bundle could not be unpacked"
}

install() {
    PATH="${PATH}:${HOST_FOLDER}/uv/bin"
    if ! command -v uv >/dev/null; then
        "${INSTALL_UV[@]}" --target="${HOST_FOLDER}/uv" <<<"${UV}" || return 1
    fi
    rm -rf "${ENVIRONMENT}"
    uv venv --quiet --python 3.12 "${ENVIRONMENT}" &&
        uv pip install --quiet --python "${ENVIRONMENT}/bin/python" --constraint "${CODE}/constraints.txt" "${CODE}[tpu,gcs]" &&
        touch "${ENVIRONMENT}/complete"
}

make_environment() {
    if [[ -z "${OWN_PYTHON}" && ! -e "${ENVIRONMENT}/complete" ]]; then
        retry 3 install || fail "the Python environment could not be made: $(tail -n 1 "${LOG}")"
    fi
    # A process of its own: bash ignores -e in a function whose outcome is asked for.
    (cd "${CODE}" && env "${VARIABLES[@]}" bash -e -o pipefail -c "${SETUP}") 9>&- ||
        fail "the lines of the option 'setup' ended with code $?: $(tail -n 1 "${LOG}")"
}

# train: until it ends for another reason than a preemption that this machine survives
train() {
    local code left
    VARIABLES+=("GQA_JAX_JOB=${JOB}" "GQA_JAX_COMMIT=$(<"${CODE}/COMMIT")")
    cd "${CODE}" || fail "its disk can't be read"
    [[ -e "${HOST_FOLDER}/first" ]] || date +%s >"${HOST_FOLDER}/first" # a reboot doesn't begin max_run anew
    TRAINED=yes
    while true; do
        left=$((MAX_RUN_SECONDS + $(<"${HOST_FOLDER}/first") - $(date +%s)))
        ((left > 0)) || left=1
        [[ -n "${TOLD}" ]] && exit 75
        say "training: ${COMMAND[*]}"
        timeout --signal=TERM --kill-after="${KILL_SECONDS}" "${left}" env "${VARIABLES[@]}" "${COMMAND[@]}" 9>&- &
        TRAINING=$!
        # SIGTERM interrupts `wait`, and the training that was told goes on for a while. It may have come before there was a
        # training to tell.
        [[ -n "${TOLD}" ]] && kill -TERM "${TRAINING}" 2>/dev/null
        while true; do
            wait "${TRAINING}"
            code=$?
            kill -0 "${TRAINING}" 2>/dev/null || break
        done
        TRAINING=""
        [[ -n "${TOLD}" ]] && exit "${code}"
        if [[ "${code}" != 0 ]] && ((MAX_RUN_SECONDS + $(<"${HOST_FOLDER}/first") <= $(date +%s))); then
            say "max_run_hours are over: training was told to end (code ${code})"
            exit 124
        fi
        case "${code}" in
            75) ;;
            12[67]) fail "training could not be started (code ${code}): $(tail -n 1 "${LOG}")" ;;
            1[3-9][0-9]) fail "training was ended by signal $(kill -l "${code}"), perhaps out of memory" ;;
            1) # a module that is missing, in the bundle or the environment, leaves training no way to say so
                env "${VARIABLES[@]}" "${COMMAND[0]}" -c 'import gqa_jax.train' 9>&- ||
                    fail "training can't be imported: $(tail -n 1 "${LOG}")"
                exit 1
                ;;
            *) exit "${code}" ;; # it has said why in exit.json, or it is done
        esac
        say "training was preempted on another host; it starts again in ${RESTART_SECONDS} s"
        sleep "${RESTART_SECONDS}" 9>&- &
        wait $!
    done
}

# From here on this host answers for the slice.
TOLD="" REASON="" TRAINED="" TRAINING="" HELPERS=()
HOST="?" PRIMARY="0" LOG="${HOST_FOLDER}/log.txt"
trap leave EXIT
trap told TERM

mkdir -p "${HOST_FOLDER}" && exec 9>"${HOST_FOLDER}/lock" || fail "its disk can't be written"
if ! flock --nonblock 9; then
    echo "another startup script runs on this host"
    trap - EXIT
    exit 0
fi

HOST="$(retry 5 metadata attributes/agent-worker-number)" || HOST="unknown"
if ((SLICES > 1)); then # of several slices each has a host 0
    slice="$(retry 5 metadata attributes/tpu-env | sed -n "s/^MEGASCALE_SLICE_ID *: *'\{0,1\}\([0-9]*\).*/\1/p")"
    HOST="${slice:-unknown}-${HOST}" PRIMARY="0-0"
fi
name="$(date -u '+%Y%m%dT%H%M%SZ')-host-${HOST}.txt"
if is_remote "${FOLDER}"; then LOG="${HOST_FOLDER}/${name}"; else LOG="${FOLDER}/logs/${name}"; fi
mkdir -p "$(dirname "${LOG}")" && echo "log: ${LOG}" && exec >>"${LOG}" 2>&1
[[ "${HOST}" == *unknown* ]] && fail "its metadata don't say which host of the slice it is"
if [[ -e "${HOST_FOLDER}/ended" ]]; then
    say "has ended before this boot"
    exit "$(<"${HOST_FOLDER}/ended")"
fi
say "is $(hostname), starts ${JOB}"
if is_remote "${FOLDER}"; then
    copy_log_often 9>&- &
    HELPERS+=($!)
fi
watch_preemption $$ 9>&- &
HELPERS+=($!)
fetch
make_environment
train
