"""gunicorn: one worker that holds the model, or some that have none, and threads that wait.

``gunicorn -c config/gunicorn.conf.py wsgi:app``; ``--bind`` for another address.
"""

import ctypes
import gc
import importlib.util
import os
import signal
import sys
from pathlib import Path

if not importlib.util.find_spec("qwenvl_app"):  # a checkout, and gunicorn was not started in it
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gunicorn.systemd import sd_notify

from qwenvl_app import logs, sharing
from qwenvl_app.server import notify
from qwenvl_app.server.hooks import hook
from qwenvl_app.settings import SettingsError, load_for_workers, load_settings

try:
    _settings = load_for_workers()  # once: the worker and the application take these
except SettingsError as error:  # one line, and no worker that dies again and again
    sys.stderr.write(f"qwenvl: {error}\n")
    sys.exit(os.EX_CONFIG)  # of its own: gunicorn's 1 is also a port that is in use

bind = "0.0.0.0:8000"
# A model is resident in the one worker; with backend = "remote" there may be several.
workers = _settings.workers
# gthread, but that a request takes a thread only when all of it has arrived.
worker_class = "qwenvl_app.server.worker.Worker"
# Everyone who runs or waits holds a thread, four are there to refuse the next, and four the worker
# keeps for requests without a body: health checks and metrics.
threads = _settings.max_concurrency + _settings.max_waiting + 8
# As many may fetch pictures (web/chat/image_urls.py), so that a slow host stops nobody else.
if _settings.image_hosts:
    threads += _settings.max_concurrency + _settings.max_waiting
worker_connections = _settings.max_connections
# CUDA does not survive a fork, so the application is loaded in the worker.
preload_app = False
# A heartbeat of the worker's main loop, not a limit on a request.
timeout = 60
# Who was accepted before a stop is answered: within request_timeout_s, and some to send it.
graceful_timeout = int(_settings.request_timeout_s) + 10
keepalive = 5
# The heartbeat's file: in memory, so that a slow disk can't look like a dead worker.
worker_tmp_dir = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108
# Its socket would be made in the home directory, which a service account may not have.
control_socket_disable = True

# The application logs each request itself, with what only it knows (web/request_log.py).
accesslog = None
logger_class = "qwenvl_app.server.log.Log"
logconfig_dict = logs.config(_settings.log_format)


# gunicorn tells systemd READY before its worker has loaded anything. So the socket's name is put
# away, under a name that outlives a reload, and the worker tells when it is: server/notify.py.
_NOTIFY, _PUT_AWAY = "NOTIFY_SOCKET", "WORKER_NOTIFY_SOCKET"
if _NOTIFY in os.environ:
    os.environ[_PUT_AWAY] = os.environ.pop(_NOTIFY)


def pre_fork(server, worker):
    """As Python's documentation has it for gc.freeze: what is there now stays, in both processes.

    Else each looks through all of it in every full collection, and once more before it ends, which
    was a third of the processor time of a start and a stop without a model.
    """
    gc.freeze()


def post_worker_init(worker):
    """Begin to tell systemd how it goes, if it listens."""
    if address := os.environ.get(_PUT_AWAY):
        os.environ[_NOTIFY] = address
        if status := hook(worker.app.callable, "status"):
            notify.start(status, lambda message: sd_notify(message, worker.log))
        else:  # another application: loaded is all that it can be
            sd_notify("READY=1", worker.log)


def share():
    """Before workers are forked: what several of them have together."""
    if workers > 1:
        sharing.begin(worker_tmp_dir)


def when_ready(server):
    """Share, and change what signals do to the master."""
    share()
    _end_at_a_second_signal(server)
    _keep_the_number_of_workers(server)
    _keep_on_if_a_setting_is_wrong(server)


def _keep_on_if_a_setting_is_wrong(server):
    """At SIGHUP this file is read again, and would end the master as it does at the start."""
    reload = server.handle_hup

    def handle_hup():
        try:
            load_settings()
        except SettingsError as error:
            server.log.error("no reload, the workers go on with the settings they have: %s", error)
        else:
            reload()

    server.handle_hup = handle_hup


def _end_at_a_second_signal(server):
    """Since gunicorn itself ignores a second SIGTERM."""
    told = False

    def stop(number, frame):
        nonlocal told
        if told:
            server.kill_workers(signal.SIGKILL)
        told = True
        server.signal(number, frame)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)


def _keep_the_number_of_workers(server):
    """Limits are divided among them when they start."""

    def keep(number, frame):
        server.log.warning("the number of workers is a setting: change it, and reload by SIGHUP")

    signal.signal(signal.SIGTTIN, keep)
    signal.signal(signal.SIGTTOU, keep)


def on_reload(server):
    """As ``when_ready``: there may be more workers now."""
    share()


def child_exit(server, worker):
    """In the master: a worker has ended."""
    sharing.forget(worker.pid)


def on_exit(server):
    """In the master: all have."""
    sharing.end()


def post_fork(server, worker):
    """Set up the process.

    The engine's thread gives up the interpreter's lock in every operation of the model; from a
    thread that is busy with a form or a picture it gets it back after this time, by default 5 ms.
    Without a model the default is better: threads that answer gain nothing by taking turns often.

    And glibc gives memory back: with an arena a thread, pictures left it 300 MB larger for good. By
    mallopt, since its environment variables are read before Python starts. Elsewhere: nothing.
    """
    if _settings.backend == "local":
        sys.setswitchinterval(0.0002)
    sharing.stay_on_one_cpu(_settings.workers)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-8, 2)  # M_ARENA_MAX
        mallopt(-3, 4 << 20)  # M_MMAP_THRESHOLD: what is larger goes back as soon as it is freed
        mallopt(-1, 1 << 20)  # M_TRIM_THRESHOLD


def worker_exit(server, worker):
    """End the application's threads before the interpreter goes."""
    if close := hook(worker.app.callable, "close"):
        close()
