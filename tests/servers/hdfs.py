"""A real HDFS of one NameNode and one DataNode, from Hadoop's jars, in a temporary folder.

with Hdfs(tmp_path) as hdfs:
    Storage(hdfs.uri("a"))                 # hdfs://127.0.0.1:41234/a
    hdfs.stop_datanode(); hdfs.start_datanode()
"""

import contextlib
import subprocess
import time
import urllib.request
from pathlib import Path

from tests.servers.running import WAIT_S, free_port, installed, process

HEAP = "-Xmx256m"
LOG4J = """log4j.rootLogger=INFO,out
log4j.appender.out=org.apache.log4j.ConsoleAppender
log4j.appender.out.layout=org.apache.log4j.PatternLayout
log4j.appender.out.layout.ConversionPattern=%d{HH:mm:ss} %p %c{1}: %m%n
"""


class Hdfs(contextlib.ExitStack):
    """Both processes, from the beginning of the block to its end."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._jars = installed("hdfs") / "jars"
        self._folder = folder
        self.port, self.web_port, self.data_port = free_port(), free_port(), free_port()
        self._datanode: contextlib.ExitStack | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def uri(self, *parts: str) -> str:
        """Of a path in it."""
        return "/".join([f"hdfs://127.0.0.1:{self.port}", *parts])

    def __enter__(self) -> "Hdfs":
        super().__enter__()
        self._configure()
        log = self._folder / "namenode.log"
        formats = self._java("namenode.NameNode", "-format", "-force", "-nonInteractive")
        with log.open("ab") as out:
            subprocess.run(formats, cwd=self._folder, stdout=out, stderr=out, check=True, timeout=WAIT_S)
        self.enter_context(process(self._java("namenode.NameNode"), log, [self.port, self.web_port]))
        self.callback(self.stop_datanode)
        self.start_datanode()
        return self

    def start_datanode(self) -> None:
        """Start it and wait until the NameNode counts it and writes are taken."""
        self._datanode = contextlib.ExitStack()
        command = self._java("datanode.DataNode")
        started = process(command, self._folder / "datanode.log", [self.data_port])
        self._process = self._datanode.enter_context(started)
        deadline_s = time.monotonic() + WAIT_S
        while b'"NumLiveDataNodes" : 1' not in self._state() or b'"FSState" : "Operational"' not in self._state():
            assert time.monotonic() < deadline_s, "the NameNode sees no DataNode: see namenode.log, datanode.log"
            time.sleep(0.2)

    def stop_datanode(self) -> None:
        """Kill it; its blocks stay on disk."""
        if self._datanode is not None:
            self._datanode.close()
            self._datanode = None

    def signal_datanode(self, number: int) -> None:
        """Send it a signal: SIGSTOP makes it silent without closing a connection."""
        assert self._process is not None
        self._process.send_signal(number)

    def _state(self) -> bytes:
        address = f"http://127.0.0.1:{self.web_port}/jmx?qry=Hadoop:service=NameNode,name=FSNamesystemState"
        with urllib.request.urlopen(address, timeout=10) as answer:
            return bytes(answer.read())

    def _java(self, name: str, *arguments: str) -> list[str]:
        path = f"{self._folder / 'conf'}:{self._jars}/*"
        return ["java", HEAP, "-cp", path, f"org.apache.hadoop.hdfs.server.{name}", *arguments]

    def _configure(self) -> None:
        conf = self._folder / "conf"
        for application in ("hdfs", "datanode"):
            web = conf / "webapps" / application / "WEB-INF"
            web.mkdir(parents=True)
            (web / "web.xml").write_text("<web-app/>")
        (conf / "log4j.properties").write_text(LOG4J)
        self._write("core-site.xml", {"fs.defaultFS": self.uri(), "hadoop.tmp.dir": str(self._folder / "tmp")})
        settings = {
            "dfs.namenode.name.dir": str(self._folder / "name"),
            "dfs.datanode.data.dir": str(self._folder / "data"),
            "dfs.namenode.http-address": f"127.0.0.1:{self.web_port}",
            "dfs.datanode.address": f"127.0.0.1:{self.data_port}",
            "dfs.datanode.http.address": "127.0.0.1:0",
            "dfs.datanode.ipc.address": "127.0.0.1:0",
            "dfs.webhdfs.enabled": "false",
            "dfs.replication": "1",
            "dfs.permissions.enabled": "false",
            "dfs.namenode.safemode.extension": "0",
            "dfs.namenode.fs-limits.min-block-size": "1024",
            "dfs.heartbeat.interval": "1",
            "dfs.namenode.heartbeat.recheck-interval": "2000",
        }
        self._write("hdfs-site.xml", settings)

    def _write(self, name: str, settings: dict[str, str]) -> None:
        made = "".join(f"<property><name>{key}</name><value>{to}</value></property>" for key, to in settings.items())
        (self._folder / "conf" / name).write_text(f"<configuration>{made}</configuration>")
