#!/usr/bin/env bash
# The whole path on this machine: start the local Ray head, submit the lifecycle, say where everything is.
set -euo pipefail
cd "$(dirname "$0")/.."

started=$SECONDS
cluster/local.sh start
# shellcheck disable=SC1091
. .rayloop/cluster.env

config=${CONFIG:-jobs/configs/demo.yaml}
echo "submitting the lifecycle with $config; each stage is a Ray job of its own"
# Ray's own lines about the submission are kept in the job's log and left out here.
.venv/bin/ray job submit --working-dir . --address "$RAY_DASHBOARD" -- \
    python -m jobs.lifecycle --config "$config" --set "serving.port=$RAYLOOP_HTTP_PORT" ${SETTINGS:-} 2>&1 |
    tee .rayloop/lifecycle.log | { grep --line-buffered '^lifecycle: ' || true; }
[ "${PIPESTATUS[0]}" -eq 0 ] || {
    echo "the lifecycle did not finish; its whole log is in .rayloop/lifecycle.log, each stage's under $RAY_DASHBOARD/#/jobs"
    exit 1
}

api=http://127.0.0.1:$RAYLOOP_HTTP_PORT
key=$(cat "$RAYLOOP_API_KEY_FILE")
store=$(.venv/bin/python -c 'import sys; from app.config import load; from app.storage import resolve
print(resolve(load(sys.argv[1]).storage.uri))' "$config")
cat <<END

The chatbot answers, $((SECONDS - started)) s after the start.

  Chat page      $api/#key=$key
  API            $api/v1, key in .rayloop/api_key
                 curl $api/v1/chat/completions -H "Authorization: Bearer \$(cat .rayloop/api_key)" \\
                   -H 'Content-Type: application/json' \\
                   -d '{"model": "support", "messages": [{"role": "user", "content": "Where is my order 4512?"}]}'
  Ray dashboard  $RAY_DASHBOARD (token: cat .rayloop/token)
  MLflow         .venv/bin/mlflow ui --backend-store-uri sqlite:///$store/mlflow.db --port 5000
  Metrics        $RAYLOOP_METRICS
  Reports        $store/reports
  Stop           make stop
END
