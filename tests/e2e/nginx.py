"""Debian's nginx with deploy/nginx.conf, in front of a server, on free ports of 127.0.0.1."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
from pathlib import Path

from tests.e2e.server import ROOT
from tests.waiting import until

BINARY = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin")

MAIN = """
daemon off;
{user}
pid {folder}/pid;
error_log {folder}/error.log info;
worker_processes 2;
events {{}}
http {{
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {folder}/site.conf;
}}
"""


class Nginx:
    """Ended by its process id."""

    def __init__(self, folder: Path, upstream: int):
        self.folder = folder
        self.http, self.https = _free_port(), _free_port()
        self.url = f"https://127.0.0.1:{self.https}"
        self.log, self.errors = folder / "access.log", folder / "error.log"
        make = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=qwen.example.com"
        subprocess.run(
            [*make.split(), "-keyout", "key.pem", "-out", "cert.pem"],
            cwd=folder,
            check=True,
            capture_output=True,
            timeout=60,
        )
        (folder / "site.conf").write_text(self._site(upstream), encoding="utf-8")
        user = "user root;" if os.getuid() == 0 else ""
        (folder / "nginx.conf").write_text(MAIN.format(user=user, folder=folder))
        assert BINARY
        command = [BINARY, "-p", str(folder), "-e", str(self.errors), "-c", "nginx.conf"]
        checked = subprocess.run([*command, "-t"], capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stderr
        assert "warn" not in checked.stderr
        self.process = subprocess.Popen(command)
        self._wait()

    def _site(self, upstream: int) -> str:
        """deploy/nginx.conf with other addresses and files; each of them must be there."""
        text = (ROOT / "deploy" / "nginx.conf").read_text(encoding="utf-8")
        for pattern, replacement in (
            (r"127\.0\.0\.1:8000", f"127.0.0.1:{upstream}"),
            (r"listen \[::\]:.*;", ""),
            (r"listen 80;", f"listen 127.0.0.1:{self.http};"),
            (r"listen 443", f"listen 127.0.0.1:{self.https}"),
            (r"/etc/ssl/certs/qwen\.example\.com\.pem", f"{self.folder}/cert.pem"),
            (r"/etc/ssl/private/qwen\.example\.com\.key", f"{self.folder}/key.pem"),
            (r"/var/log/nginx/qwenvl\.log", str(self.log)),
        ):
            text, count = re.subn(pattern, replacement, text)
            assert count, pattern
        return text

    def _wait(self) -> None:
        def listens() -> bool:
            assert self.process.poll() is None, self.errors.read_text()
            socket.create_connection(("127.0.0.1", self.https), 1).close()
            return True

        until(listens)

    def reload(self) -> None:
        """Read the configuration again: new workers take over, the old ones finish."""
        self.process.send_signal(signal.SIGHUP)

    def stop(self) -> None:
        """End it and its workers."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
