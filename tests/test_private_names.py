"""Names of libraries that are private to them, or that fail in silence when they are renamed.

``PRIVATE``: each name with an underscore that our code uses, with what proves that it still does
what it is used for. ``OVERRIDDEN``: what our classes replace of a library's, which nobody would
call any more under another name. ``SET`` and ``READ``: what a library is told, and what we take
from it, that would not fail either. A name that our code stops using loses its row.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import mmap
import pkgutil
import re
import socket
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import flask
import gunicorn
import modelscope_hub
import prometheus_client
import pytest
import torch
import transformers
import werkzeug
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from gunicorn.config import Config
from gunicorn.http import Request, RequestParser, wsgi
from gunicorn.http.unreader import IterUnreader
from modelscope_hub import _download
from PIL import Image
from transformers import AttentionInterface

import qwenvl_app
from qwenvl_app.engine.fused import PackedLinear
from qwenvl_app.engine.memory import place
from qwenvl_app.engine.processors import processors
from qwenvl_app.errors import is_out_of_memory
from qwenvl_app.loading.load import load
from qwenvl_app.server.connection import Connection
from qwenvl_app.web.responses import ContractJSON

ROOT = Path(qwenvl_app.__file__).resolve().parent.parent
FILES = [*(ROOT / "qwenvl_app").rglob("*.py"), ROOT / "config" / "gunicorn.conf.py"]
LIBRARIES = (flask, gunicorn, modelscope_hub, prometheus_client, transformers, werkzeug)
EXPECTING = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 99999\r\nExpect: 100-continue\r\n\r\n"


@cache
def demo(attention: str) -> Any:
    return load("demo", device="cpu", attention=attention).model


def continue_is_not_sent_again() -> None:
    def sent(expected: bool) -> bytes:
        request = Request(Config(), IterUnreader([EXPECTING]), ("", 0))
        if not expected:
            request._expected_100_continue = False
        ours, theirs = socket.socketpair()
        with ours, theirs:
            wsgi.create(request, ours, ("", 0), ("", 0), Config())
            ours.shutdown(socket.SHUT_WR)
            return theirs.recv(100)

    assert b"100 Continue" in sent(expected=True)
    assert sent(expected=False) == b""


def pixels_without_their_file() -> None:
    image = Image.new("RGB", (2, 2), "red")
    copy = image._new(image.im)
    assert copy.getpixel((1, 1)) == (255, 0, 0)


def downloads_read_their_module() -> None:
    source = inspect.getsource(_download)
    for name in ("tqdm(", "DOWNLOAD_TOTAL_TIMEOUT"):
        assert source.count(name) > 1, name


def json_of_views() -> None:
    app = flask.Flask("x")
    assert ContractJSON(app).response(a=["图"]).data == '{"a":["图"]}'.encode()


def attention_is_told() -> None:
    for attention in ("eager", "sdpa"):
        assert demo(attention).model.language_model.config._attn_implementation == attention


def weights_that_are_elsewhere_are_placed() -> None:
    linear = torch.nn.Linear(2, 2)
    weights = dict(linear.state_dict())
    hook = AlignDevicesHook(execution_device="cpu", offload=True, weights_map=weights)
    add_hook_to_module(linear, hook)
    assert linear.weight.device.type == "meta"
    assert place(linear) == torch.device("cpu")


def weights_are_packed() -> None:
    assert isinstance(torch._C._has_mkldnn, bool)
    linear, x = torch.nn.Linear(8, 8), torch.ones(3, 8)
    with torch.inference_mode():
        assert torch.allclose(PackedLinear(linear)(x), linear(x), atol=1e-5)


def generate_makes_the_steps() -> None:
    asked = {"repetition_penalty": 2.0, "min_new_tokens": 1, "do_sample": True, "top_k": 1}
    made = processors(asked, [3], [0], torch.zeros(1, 5), own=[lambda _ids, scores: scores + 1])
    names = [type(each).__name__ for each in made]
    assert names == [
        "RepetitionPenaltyLogitsProcessor",
        "MinNewTokensLengthLogitsProcessor",
        "function",
        "TopKLogitsWarper",
    ]
    scores = made(torch.tensor([[0]]), torch.tensor([[8.0, 5.0, 2.0, 9.0, 1.0]]))
    assert scores[0].isfinite().tolist() == [False, True, False, False, False]


def torch_compile_is_told() -> None:
    assert isinstance(torch._inductor.config.freezing, bool)
    x = torch.ones(2, 2)
    torch._dynamo.mark_dynamic(x, 1)
    assert 1 in x._dynamo_dynamic_indices


PRIVATE: dict[str, Callable[[], None]] = {
    "_expected_100_continue": continue_is_not_sent_again,
    "_new": pixels_without_their_file,
    "_download": downloads_read_their_module,
    "_prepare_response_obj": json_of_views,
    "_attn_implementation": attention_is_told,
    "_hf_hook": weights_that_are_elsewhere_are_placed,
    "_C": weights_are_packed,
    "_has_mkldnn": weights_are_packed,
    "_reorder_linear_weight": weights_are_packed,
    "_linear_pointwise": weights_are_packed,
    "_get_logits_processor": generate_makes_the_steps,
    "_eos_token_tensor": generate_makes_the_steps,
    "_inductor": torch_compile_is_told,
    "_dynamo": torch_compile_is_told,
}

WORKER = "accept check_config finish_request get_thread_pool handle handle_error handle_quit"
STATES = "get_conv_state get_recurrent_state is_recording_past reset"
OVERRIDDEN = {
    "server.worker.Worker": f"{WORKER} handle_request load_wsgi run",
    "server.log.Log": "access",
    "web.responses.ContractJSON": "ensure_ascii response sort_keys",
    "service.metrics._Gauges": "collect",
    "service.all_workers._Fresh": "collect",
    "service.all_workers._Others": "collect",
    "service.all_workers._Processes": "collect",
    "hub.modelscope._Anonymous": "get_session_id",
    "engine.kv_cache.SlotCache": "reset update",
    "engine.compiled._Cells": "update",
    "engine.recurrent.RecurrentCache": f"{STATES} update_conv_state update_recurrent_state",
}


def no_body_is_drained() -> None:
    """``Worker.handle_request``: or a long one that nobody read would close its connection."""
    parser = RequestParser(Config(), iter([EXPECTING, *[bytes(1000)] * 100]), ("", 0))
    next(parser)
    deadline = time.monotonic() + 5
    parser.mesg, message = None, parser.mesg
    assert parser.finish_body(deadline=deadline)
    parser.mesg = message
    assert not parser.finish_body(deadline=deadline)


def connections_are_initialised() -> None:
    """``Connection``: or its parser would be one that reads the socket."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        connection = Connection(Config(), ours, ("", 0), ("", 0))
        connection.init()
        assert connection.parser is None


def idle_connections_are_not_counted() -> None:
    """``Worker.max_keepalived``: or the keeping of connections would end with the threads."""
    assert mentions(gunicorn, "max_keepalived") > 1


def values_are_made_by_the_class_of_the_moment() -> None:
    """``process.share_metrics``: or each worker would count for itself."""
    assert mentions(prometheus_client, "ValueClass") > 1


SET = (
    no_body_is_drained,
    connections_are_initialised,
    idle_connections_are_not_counted,
    values_are_made_by_the_class_of_the_moment,
)


def a_mask_of_four_dimensions_is_taken_as_it_is() -> None:
    """``SlotCache.begin``: transformers would make another of it, and rows see one another."""
    seen: list[torch.Tensor] = []

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **_: Any) -> Any:
        seen.append(mask)
        return query.transpose(1, 2), None

    AttentionInterface.register("spy", attend)
    text = demo("sdpa").model.language_model
    text.set_attn_implementation("spy")
    mask = torch.tensor([[True, False, True], [False, True, True]])[:, None, None].expand(
        2, 1, 3, 3
    )
    try:
        with torch.inference_mode():
            text(
                input_ids=torch.ones(2, 3, dtype=torch.long),
                attention_mask=mask,
                position_ids=torch.arange(3).expand(3, 2, 3),
                use_cache=False,
            )
    finally:
        text.set_attn_implementation("sdpa")
    assert len(seen) == len(text.layers)
    assert all(torch.equal(each, mask) for each in seen)


def want_of_memory_is_seen() -> None:
    """``errors.is_out_of_memory`` goes by torch's words, since it must not import it."""
    assert torch.OutOfMemoryError.__name__ == "OutOfMemoryError"
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(error.value)


def want_of_a_gpus_memory_is_seen() -> None:
    """Its words lie in torch's libraries for CUDA; a build without them can't say any."""
    libraries = sorted((Path(torch.__file__).parent / "lib").glob("lib*_cuda*.so"))
    if torch.version.cuda is None:
        assert not libraries
        return
    for text in (b"CUDA error: ", b"CUBLAS_STATUS_ALLOC_FAILED"):
        assert any(holds(library, text) for library in libraries), text


def holds(library: Path, text: bytes) -> bool:
    """A file of a gigabyte, which need not be in memory for that."""
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return data.find(text) >= 0


READ = (
    a_mask_of_four_dimensions_is_taken_as_it_is,
    want_of_memory_is_seen,
    want_of_a_gpus_memory_is_seen,
)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def mentions(library: ModuleType, name: str) -> int:
    """How often a library reads an attribute of that name."""
    pattern, folder = re.compile(rf"\.{name}\b"), Path(str(library.__file__)).parent
    return sum(
        len(pattern.findall(path.read_text(encoding="utf-8"))) for path in folder.rglob("*.py")
    )


def foreign_names() -> dict[str, str]:
    """Private names in our code that it does not define itself, and a file that has each."""
    ours: set[str] = set()
    used: dict[str, str] = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.arg(arg=name):
                    ours.add(name)
                case ast.Name(id=name, ctx=ast.Store()):
                    ours.add(name)
                case ast.Attribute(attr=name, ctx=ast.Store(), value=ast.Name(id="self")):
                    ours.add(name)
                case ast.Attribute(attr=name):
                    used[name] = path.name
                case ast.ImportFrom(names=names):
                    used |= {alias.name: path.name for alias in names}
                case ast.Call(func=ast.Name(id="getattr"), args=[_, ast.Constant(value=name), *_]):
                    used[str(name)] = path.name
    documented = {"_exit", "_asdict", "_replace"}  # of os; of named tuples
    return {n: p for n, p in used.items() if is_private(n) and n not in ours | documented}


def overridden() -> dict[str, str]:
    """What classes of ours replace of the libraries', by class, in order."""
    found = {}
    roots = {library.__name__ for library in LIBRARIES}
    for module in pkgutil.walk_packages(qwenvl_app.__path__, "qwenvl_app."):
        for name, kind in vars(importlib.import_module(module.name)).items():
            if not inspect.isclass(kind) or kind.__module__ != module.name:
                continue
            bases = [b for b in kind.__mro__ if b.__module__.partition(".")[0] in roots]
            theirs = {each for base in bases for each in vars(base)}
            names = sorted(
                n for n in theirs & set(vars(kind)) if not n.startswith(("__", "_abc", "_is"))
            )
            if names:
                found[f"{module.name}.{name}".removeprefix("qwenvl_app.")] = " ".join(names)
    return found


def test_every_private_name_has_a_row():
    used = foreign_names()
    assert not used.keys() - PRIVATE.keys(), f"prove that it works, in PRIVATE: {used}"
    assert not PRIVATE.keys() - used.keys(), "no longer used: drop the row"


def test_what_we_override_is_still_theirs():
    """A method that they have renamed is ours alone, and not called."""
    assert overridden() == OVERRIDDEN


@pytest.mark.parametrize(
    ("library", "kind"),
    [
        (gunicorn, "server.worker.Worker"),
        (gunicorn, "server.log.Log"),
        (flask, "web.responses.ContractJSON"),
        (prometheus_client, "service.metrics._Gauges"),
        (modelscope_hub, "hub.modelscope._Anonymous"),
    ],
)
def test_what_we_override_is_called(library: ModuleType, kind: str):
    """The caches' is proven where answers are compared with those of ``generate``."""
    for name in OVERRIDDEN[kind].split():
        assert mentions(library, name), name


@pytest.mark.parametrize("proof", [*dict.fromkeys(PRIVATE.values()), *SET, *READ])
def test_it_still_does_what_it_is_used_for(proof: Callable[[], None]):
    proof()
