"""Walk docs/operating.md: every code block, in order, in an empty Debian 12 under its own systemd.

    python -m tests.walk DIRECTORY

As root, on a machine with Debian's packages debootstrap and slirp4netns, and with control groups of
version 1 for the limits on memory, tasks and devices to be at work. DIRECTORY is made; it is left
there to look at, with what was said in ``walk.log``. Takes three minutes, and a network with
Debian's packages and PyPI's. pip's configuration and certificates are taken from this machine.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "operating.md"
MIRROR = "http://deb.debian.org"
# What a Debian that boots has and one from debootstrap has not.
BOOTS = "systemd,systemd-sysv,dbus,iproute2,procps"
CONTROLLERS = ("memory", "pids", "cpu", "devices", "systemd")
NAMESPACES = ("--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup")
INIT = r"""
ip link set lo up
mount --bind "$1" "$1"; cd "$1"
mount -t proc proc proc; mount -t sysfs sysfs sys
mount -t tmpfs -o mode=755 tmpfs sys/fs/cgroup
for name in $2; do
    mkdir sys/fs/cgroup/$name
    case $name in systemd) options=none,name=systemd ;; *) options=$name ;; esac
    mount -t cgroup -o $options none sys/fs/cgroup/$name
done
mount -t tmpfs -o mode=755 tmpfs dev
for node in "null 1 3" "zero 1 5" "full 1 7" "random 1 8" "urandom 1 9" "tty 5 0"; do
    set -- $node; mknod -m 666 dev/$1 c $2 $3
done
mkdir -m 1777 dev/shm; mkdir dev/pts; ln -s /proc/self/fd dev/fd; ln -s pts/ptmx dev/ptmx
mount -t devpts -o newinstance,ptmxmode=0666 devpts dev/pts
mount -t tmpfs -o mode=755 tmpfs run; mount -t tmpfs -o mode=1777 tmpfs tmp
mkdir -p old; pivot_root . old; cd /; umount -l old; rmdir old
exec env -i container=lxc PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd --system
"""
HUB = """
cd /root/qwenvl; PYTHON=/opt/qwenvl/current/.venv/bin/python
[ -e /root/published ] || $PYTHON -c 'import tests.hub as h; h.publish(h.Path("/root/published"))'
systemd-run -q --unit=hub --working-directory=$PWD \
    $PYTHON -m tests.hub 8900 Org/Some-Model.v1=/root/published
until ss -ltn | grep -q :8900; do sleep 0.2; done
sed -i 's,^model.*,model = "Org/Some-Model.v1",' /etc/qwenvl/settings.toml
echo MODELSCOPE_ENDPOINT=http://127.0.0.1:8900 > /etc/qwenvl/environment
"""

EDIT = r"""
printf '#!/bin/sh\nfor file; do :; done; cp /root/drop-in "$file"\n' >/root/editor
chmod +x /root/editor
export SYSTEMD_EDITOR=/root/editor
script -qec 'systemctl edit qwenvl' /dev/null
"""


def shell(command: str, **options: object) -> None:
    subprocess.run(["bash", "-ec", command], check=True, **options)  # type: ignore[call-overload]


class Debian:
    """A machine in namespaces; ``end`` takes it down."""

    def __init__(self, directory: Path):
        self.tree = directory / "tree"
        self._log = (directory / "walk.log").open("wb")
        self._make()
        self._boot()

    def _make(self) -> None:
        shell(
            f"debootstrap --variant=minbase --include={BOOTS} bookworm {self.tree} {MIRROR}/debian"
        )
        etc = self.tree / "etc"
        (etc / "apt/sources.list").write_text(
            f"deb {MIRROR}/debian bookworm main\n"
            f"deb {MIRROR}/debian bookworm-updates main\n"
            f"deb {MIRROR}/debian-security bookworm-security main\n"
        )
        (etc / "hosts").write_text("127.0.0.1 localhost\n")
        (etc / "hostname").write_text("walk\n")
        (etc / "resolv.conf").write_text("nameserver 10.0.2.3\n")  # slirp4netns'
        authorities = "usr/local/share/ca-certificates"
        if Path("/", authorities).is_dir():
            shutil.copytree(Path("/", authorities), self.tree / authorities, dirs_exist_ok=True)
        lines = ["[global]", "cert = /etc/ssl/certs/ca-certificates.crt"]
        if wheels := os.environ.get("PIP_FIND_LINKS"):
            shutil.copytree(wheels, self.tree / wheels.strip("/"))
            lines.append(f"find-links = {wheels}")
        (etc / "pip.conf").write_text("\n".join([*lines, ""]))

    def _boot(self) -> None:
        groups = [name for name in CONTROLLERS if Path("/sys/fs/cgroup", name).is_dir()]
        enter = "for group in $2; do group=/sys/fs/cgroup/$group/walk; mkdir -p $group; "
        enter += "echo $$ >$group/cgroup.procs; done; "
        space = f"exec unshare {' '.join(NAMESPACES)} --fork --propagation private"
        command = f'{enter}{space} bash -ec "$0" init "$1" "$2"'
        self._outside = subprocess.Popen(
            ["bash", "-ec", command, INIT, str(self.tree), " ".join(groups)],
            stdout=self._log,
            stderr=self._log,
        )
        children = Path(f"/proc/{self._outside.pid}/task/{self._outside.pid}/children")
        while not (init := _systemd_of(children)):
            time.sleep(0.1)
        self.init = init
        self._network = subprocess.Popen(
            ["slirp4netns", "--configure", "--disable-host-loopback", str(self.init), "tap0"],
            stdout=self._log,
            stderr=self._log,
        )
        self.run("until systemctl is-system-running --wait | grep running; do sleep 1; done")

    def run(self, command: str) -> None:
        """As an operator would type it, who stays in a directory; CalledProcessError."""
        self._log.write(f"\n=== {time.strftime('%T')}\n".encode())
        self._log.flush()
        here = "/root/.directory"
        script = f"cd $(cat {here} 2>/dev/null || echo /root)\nset -exo pipefail\n"
        script += f"{command}\npwd >{here}\n"
        enter = ["nsenter", "-t", str(self.init), "-m", "-u", "-i", "-n", "-p", "-C", "--"]
        clean = ["env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LANG=C.UTF-8"]
        clean += ["DEBIAN_FRONTEND=noninteractive"]
        subprocess.run(
            [*enter, *clean, "bash", "-c", script], stdout=self._log, stderr=self._log, check=True
        )

    def end(self) -> None:
        """Power off."""
        subprocess.run(
            ["nsenter", "-t", str(self.init), "-a", "systemctl", "poweroff"], check=False
        )
        try:
            self._outside.wait(60)
        except subprocess.TimeoutExpired:
            os.kill(self.init, signal.SIGKILL)
            self._outside.wait()
        self._network.terminate()
        self._network.wait()
        self._log.close()
        for name in CONTROLLERS:
            group = Path("/sys/fs/cgroup", name, "walk")
            for folder in sorted(group.rglob("*"), reverse=True):
                if folder.is_dir():
                    folder.rmdir()
            if group.is_dir():
                group.rmdir()


def _systemd_of(children: Path) -> int | None:
    """That of these processes which has become systemd; others come and go before it."""
    for child in children.read_text().split():
        with suppress(OSError):
            if Path(f"/proc/{child}/exe").readlink().name == "systemd":
                return int(child)
    return None


def publish(debian: Debian) -> str:
    """A repository to clone, with a commit to upgrade to; the release that comes before it."""
    bare = debian.tree / "srv/qwenvl.git"
    shell(
        f"git clone -q --bare --no-hardlinks {ROOT} {bare}; cd {bare}; "
        "git branch -f main HEAD; git symbolic-ref HEAD refs/heads/main; chown -R root: ."
    )
    version = re.search(
        r'^VERSION = "(.*)"', (ROOT / "qwenvl_app/version.py").read_text(), re.MULTILINE
    )
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True)
    assert version
    return f"{version[1]}-{commit.strip()}"


def walk(debian: Debian) -> int:
    """Every block of the page; how many there were."""
    before = publish(debian)
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    for kind, block in blocks:
        sys.stdout.write(block)
        sys.stdout.flush()
        if kind == "json":  # what the block before it said
            debian.run(f"grep -F '{block.strip()}' /root/answer")
        elif block.startswith("[Service]"):
            (debian.tree / "root/drop-in").write_text(block)
            debian.run(EDIT)
            debian.run("systemctl restart qwenvl; ss -ltn | grep 127.0.0.1:8000")
        elif "gunicorn" in block:  # stays in the foreground, in place of the service
            debian.run("systemctl stop qwenvl")
            debian.run(f"{block.strip()} & until curl -sf 127.0.0.1:8000/readyz; do sleep 1; done")
            debian.run("pkill -o -u qwenvl gunicorn; while pgrep -u qwenvl; do sleep 1; done")
            debian.run("systemctl start qwenvl")
        elif "app wsgi download" in block:
            debian.run(block)
            debian.run(HUB)
            debian.run(f"cd /opt/qwenvl/current\n{block}\nsystemctl stop hub")
        elif "git pull" in block:
            commit = "git -c user.name=w -c user.email=w@w commit -q --allow-empty -m upgrade"
            debian.run(
                "git clone -q /srv/qwenvl.git /root/other; cd /root/other; "
                f"{commit}; git push -q; cd /root"
            )
            debian.run(block)
        else:
            filled = block.replace("REPOSITORY", "/srv/qwenvl.git").replace("VERSION", before)
            debian.run(f"{{ {filled}}} | tee /root/answer" if "curl -" in filled else filled)
    debian.run("systemctl is-active qwenvl nginx; curl -sf 127.0.0.1:8000/readyz")
    return len(blocks)


def main() -> None:
    directory = Path(sys.argv[1]).resolve()
    directory.mkdir(parents=True)
    debian = Debian(directory)
    try:
        count = walk(debian)
    finally:
        debian.end()
    sys.stdout.write(f"\nall {count} blocks were run: {directory}/walk.log\n")


if __name__ == "__main__":
    main()
