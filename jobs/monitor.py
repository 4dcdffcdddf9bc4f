"""Watch the service: measure its traffic and feedback, write a report, and keep watching.

    ray job submit --working-dir . -- python -m jobs.monitor --config jobs/configs/demo.yaml

It is never up to date: each run reads the window that ends now. With `monitoring.deploy` it leaves the Serve
application `monitor` behind, which repeats the pass and keeps the metrics exported; with `monitoring.grafana_url`
it pushes the dashboard.
"""

import os
import sys
from typing import Any

from app.config import Config
from app.job import Job, Outcome
from app.storage import Storage


def traffic(config: Config) -> Storage:
    """Where serving logs its traffic."""
    return Storage(config.serving.storage_uri or config.storage.uri)


def inputs(config: Config) -> dict[str, Any]:
    """The traffic's place and the window; what is in it changes all the time."""
    return {"traffic": traffic(config).uri("traffic"), "window_s": config.monitoring.window_s}


def run(config: Config, inputs: dict[str, Any]) -> Outcome:
    """Measure and report; then the dashboard; then the application that keeps watching."""
    from app.deployment import deploy, package_code
    from app.monitoring import grafana
    from app.monitoring.report import monitor

    report = monitor(config)
    say(report.sentence)
    figures = report.figures | {"dashboard": "not pushed: monitoring.grafana_url is not set"}
    if config.monitoring.grafana_url:
        token = os.environ.get(grafana.TOKEN_VARIABLE)
        figures["dashboard"] = grafana.push(config.monitoring.grafana_url, token)
    if config.monitoring.deploy:
        code = package_code(Storage(config.storage.uri))
        http = {"host": config.serving.host, "port": config.serving.port}
        ready = application(config) | {"runtime_env": {"working_dir": code}}
        took_s = deploy(ready, http, timeout_s=config.serving.deploy_timeout_s)
        say(f"keeps watching as the Serve application `monitor`, deployed in {took_s:.0f} s")
    return Outcome(outputs={"report": report.uri}, figures=figures)


def say(text: str) -> None:
    """One line for the person who follows the job."""
    print(f"monitor: {text}", flush=True)


def application(config: Config) -> dict[str, Any]:
    """The application `monitor` as Serve's REST API takes it."""
    return {
        "name": "monitor",
        "route_prefix": None,
        "import_path": "app.monitoring.application:build_app",
        "args": {
            "storage_uri": traffic(config).root_uri,
            "window_s": config.monitoring.window_s,
            "interval_s": config.monitoring.interval_s,
        },
    }


def plan(config: Config, inputs: dict[str, Any]) -> dict[str, Any]:
    """Traffic files and bytes, and where the report, the dashboard and the application would go."""
    from pyarrow import fs

    storage = traffic(config)
    selector = fs.FileSelector(storage.path("traffic"), recursive=True, allow_not_found=True)
    sizes = [info.size or 0 for info in storage.filesystem.get_file_info(selector) if info.type == fs.FileType.File]
    return {
        "reads": {"traffic": inputs["traffic"], "files": len(sizes), "bytes": sum(sizes)},
        "writes": {"report": Storage(config.storage.uri).uri("reports", "monitor", "<time>")},
        "deploys": application(config) if config.monitoring.deploy else None,
        "pushes": {"dashboard": config.monitoring.grafana_url} if config.monitoring.grafana_url else None,
    }


JOB = Job(
    stage="monitor",
    run=run,
    inputs=inputs,
    plan=plan,
    sections=("storage", "serving", "monitoring"),
    packages=("monitoring",),
    still_there=lambda config, outputs: False,  # the window moves on: no run stands for the next
)

if __name__ == "__main__":
    sys.exit(JOB.main())
