#!/usr/bin/env bash
# Install or upgrade the service from this checkout: `sudo deploy/install.sh`. Any number of times.
#
# Each version has a directory of its own below /opt/qwenvl/releases, and `current` points at
# the one that runs, so that rolling back is pointing it at another: see docs/operating.md. It starts
# nothing: the model is yours to choose first.
set -euo pipefail
umask 022
cd "$(dirname "$0")/.."

NAME=qwenvl
COMMIT=$(git describe --always --dirty --exclude '*' 2>/dev/null || date +%Y%m%d%H%M%S)
# What is not committed has no name of its own: the time is added, so that no release is taken for it.
case $COMMIT in *-dirty) COMMIT=$COMMIT-$(date +%Y%m%d%H%M%S) ;; esac
VERSION=${1:-$(sed -n 's/^VERSION = "\(.*\)"/\1/p' qwenvl_app/version.py)-$COMMIT}
BASE=/opt/$NAME
RELEASE=$BASE/releases/$VERSION

[ "$(id -u)" = 0 ] || { echo "run it as root: sudo $0" >&2; exit 1; }

id -u qwenvl >/dev/null 2>&1 ||
    useradd --system --user-group --home-dir /var/lib/$NAME --shell /usr/sbin/nologin qwenvl

if [ ! -e "$RELEASE/complete" ]; then
    rm -rf "$RELEASE"
    mkdir -p "$RELEASE"
    cp -r Makefile pyproject.toml requirements.txt wsgi.py LICENSE README.md \
        config deploy docs qwenvl_app "$RELEASE"
    make -C "$RELEASE" .venv/runtime
    # Compiled once, here: the service may not write there.
    "$RELEASE/.venv/bin/python" -m compileall -q "$RELEASE/qwenvl_app" "$RELEASE/config"
    touch "$RELEASE/complete"
fi

install -d -m 0755 /etc/$NAME
[ -e /etc/$NAME/settings.toml ] || cat >/etc/$NAME/settings.toml <<'TOML'
# Only what differs from config/default.toml, which explains every key.
model = "demo"
TOML
[ -e /etc/$NAME/environment ] || install -m 0640 -g qwenvl /dev/null /etc/$NAME/environment

ln -sfn "$RELEASE" $BASE/current
install -m 0644 deploy/$NAME.service /etc/systemd/system/$NAME.service
# The unit may use the GPU's devices, but not make them.
if [ -e /dev/nvidiactl ]; then echo nvidia-uvm >/etc/modules-load.d/$NAME.conf; fi

# The unit's StateDirectory, for as-service before the first start.
install -d -m 0750 -o qwenvl -g qwenvl /var/lib/$NAME

if [ -d /run/systemd/system ]; then
    systemctl daemon-reload
    systemctl enable $NAME
fi
cat <<TEXT
Installed $RELEASE.
Next: say in /etc/$NAME/settings.toml which model to serve, then
    $BASE/current/deploy/as-service .venv/bin/flask --app wsgi doctor
    systemctl restart $NAME
TEXT
