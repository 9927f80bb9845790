"A server: spoken to by OpenAI's own client; limits; malformed requests; clients that leave."
import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from copy import deepcopy
from pathlib import Path

import httpx
import numpy as np
import openai
import psutil
import pytest
import uvicorn
from fastapi.testclient import TestClient
from hypothesis import given, settings, strategies as st
from PIL import Image

from paligemma_nb import load_model, serving
from paligemma_nb.datasets import coco_mask
from paligemma_nb.inference import main
from paligemma_nb.opening import answer
from paligemma_nb.processing import image_to_tensor
from paligemma_nb.scenes import HELD_OUT, make_scene
from paligemma_nb.serving import (
    Ask, Engine, Limits, Refused, answer_together, make_app, read_data_url, read_request)

SCENES = [make_scene(HELD_OUT + k) for k in (0, 3, 4, 5, 6, 8)] # captioned rightly
PROMPTS = ["caption en", "segment blue ring", "detect blue ring"]


@pytest.fixture(scope="module")
def shipped(): return load_model(device="cpu", dtype="float32")


def data_url(image, kind="PNG"):
    image.save(file := io.BytesIO(), kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def messages(image, prompt):
    url = image if isinstance(image, str) else data_url(image)
    return [dict(role="user", content=[dict(type="text", text=prompt),
                                       dict(type="image_url", image_url=dict(url=url))])]


@pytest.fixture(scope="module")
def address(shipped):
    app = make_app(Engine(*shipped, limits=Limits(tokens=100)), "tiny")
    with socket.create_server(("127.0.0.1", 0)) as place:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs=dict(sockets=[place]))
        thread.start()
        yield f"http://127.0.0.1:{place.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


# --- OpenAI's own client

@pytest.mark.parametrize("prompt", PROMPTS)
def test_answers_are_those_of_the_model(prompt, client, shipped):
    for scene, expected in zip(SCENES[:3], answer(*shipped, [s.image for s in SCENES[:3]],
                                                  [prompt])):
        said = client.chat.completions.create(model="tiny", temperature=0,
                                              messages=messages(scene.image, prompt))
        choice, = said.choices
        assert choice.message.content == expected.text and choice.finish_reason == "stop"
        assert choice.message.role == "assistant" and said.object == "chat.completion"
        found = choice.message.detections
        assert [d["label"] for d in found] == [d.label for d in expected.detections]
        for got, d in zip(found, expected.detections):
            assert np.allclose(got["box"], d.box, atol=.01)
            if d.mask is None: assert got["mask"] is None
            else: assert np.array_equal(coco_mask(got["mask"], scene.image.size), d.mask)
        assert said.usage.prompt_tokens == 64 + len(shipped[1].encode(prompt))
        usage = said.usage
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_stream_says_the_same(prompt, client):
    asked = dict(model="tiny", messages=messages(SCENES[0].image, prompt))
    whole = client.chat.completions.create(**asked)
    *chunks, last = client.chat.completions.create(
        **asked, stream=True, stream_options=dict(include_usage=True))
    assert last.usage == whole.usage and not last.choices
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == whole.choices[0].message.content
    assert len([*filter(None, pieces)]) > 1 or whole.usage.completion_tokens < 3
    ends = [chunk.choices[0].finish_reason for chunk in chunks]
    assert ends == [None] * (len(chunks) - 1) + ["stop"]
    assert chunks[-1].choices[0].delta.detections == whole.choices[0].message.detections
    assert len({chunk.id for chunk in chunks}) == 1


def test_an_answer_that_is_cut_off(client):
    for name in ("max_tokens", "max_completion_tokens"):
        said = client.chat.completions.create(model="tiny", **{name: 3}, messages=messages(
            SCENES[0].image, "segment blue ring"))
        assert said.choices[0].finish_reason == "length"
        assert said.usage.completion_tokens == 3 and said.choices[0].message.detections == []


def test_models_and_health(client, address):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert httpx.get(f"{address}/health").json() == dict(status="ok", waiting=0)


def test_what_the_client_hears(client):
    asked = dict(model="tiny", messages=messages(SCENES[0].image, "caption en"))
    for kind, change, reason in (
            (openai.NotFoundError, dict(model="gpt"), "no model 'gpt'"),
            (openai.BadRequestError, dict(temperature=.5), "temperature: expected 0"),
            (openai.BadRequestError, dict(n=2), "n: expected 1"),
            (openai.BadRequestError, dict(max_tokens=101), "at most 100 new tokens"),
            (openai.BadRequestError, dict(stop="x"), "does not know 'stop'"),
            (openai.BadRequestError, dict(messages=[dict(role="user", content="hello")]),
             "one message with the role user"),
            (openai.BadRequestError, dict(messages=messages("https://a.b/c.png", "x")),
             "fetches no addresses"),
            (openai.BadRequestError, dict(messages=messages("data:image/png;base64,AA", "x")),
             "not a whole picture")):
        with pytest.raises(kind, match=reason) as caught:
            client.chat.completions.create(**asked | change)
        assert "\n" not in caught.value.body["message"]


# --- batches

def asks_of(processor, prompts, most):
    heard = [[] for _ in prompts]
    return heard, [
        Ask(image_to_tensor(scene.image, 112), scene.image.size, prompt, n, told.append)
        for scene, prompt, n, told in zip(SCENES, prompts, most, heard)]


def test_neighbours_change_nothing(shipped):
    "In float32, with prompts and answers of very different lengths"
    model, processor = shipped
    prompts = [PROMPTS[1], PROMPTS[0], PROMPTS[2], PROMPTS[0], PROMPTS[0], PROMPTS[0]]
    most = [100, 100, 100, 3, 5, 1]
    _, alone = asks_of(processor, prompts, most)
    for ask in alone: answer_together(model, processor, None, [ask])
    heard, asks = asks_of(processor, prompts, most)
    answer_together(model, processor, None, asks)
    for one, other, told in zip(alone, asks, heard):
        assert (one.ids, one.finish, one.detections) == (other.ids, other.finish,
                                                         other.detections)
        assert "".join(told) == processor.decode(other.ids) == other.text
    assert [ask.finish for ask in asks] == ["stop"] * 3 + ["length"] * 3
    assert [len(ask.ids) for ask in asks[3:]] == most[3:]
    assert len({len(ask.ids) for ask in asks}) >= 5 and asks[0].detections


def test_who_waits_is_answered_together(shipped):
    engine = Engine(*shipped, limits=Limits(batch=4))
    heard, asks = asks_of(shipped[1], PROMPTS * 2, [9] * 6)
    asks[1].gone = True
    for ask in asks: engine.submit(ask)
    engine.start()
    engine.stop()
    assert engine.batches == [3, 2] and asks[1].ids == []
    assert [told[-1:] == [ask] for told, ask in zip(heard, asks)] == [True, False] + [True] * 4


def test_a_row_that_is_forgotten_ends(shipped):
    heard, asks = asks_of(shipped[1], ["caption en"] * 2, [100] * 2)
    def leave(piece): asks[0].gone = len(asks[0].ids) == 4
    asks[0].tell = leave
    answer_together(*shipped, None, asks)
    assert len(asks[0].ids) <= 5 and asks[1].text == SCENES[1].caption


class Gate:
    "Holds the engine until it is opened"
    def __init__(self, monkeypatch, error=None):
        self.reached, self.open, real = threading.Event(), threading.Event(), answer_together
        def answer(model, processor, vae, asks):
            self.asks = asks
            self.reached.set()
            self.open.wait()
            if error: raise error
            real(model, processor, vae, asks)
        monkeypatch.setattr(serving, "answer_together", answer)


def test_a_full_queue(shipped, monkeypatch):
    gate, replies = Gate(monkeypatch), []
    engine = Engine(*shipped, limits=Limits(tokens=100, queue=1, batch=1))
    body = dict(messages=messages(SCENES[0].image, "caption en"))
    with TestClient(make_app(engine, "tiny")) as client:
        def post(): replies.append(client.post("/v1/chat/completions", json=body).status_code)
        first = threading.Thread(target=post)
        first.start()
        gate.reached.wait()
        second = threading.Thread(target=post)
        second.start()
        while not engine.waiting.full(): time.sleep(.01)
        for more in ({}, dict(stream=True)):
            said = client.post("/v1/chat/completions", json=body | more)
            assert said.status_code == 429
            assert "1 requests wait" in said.json()["error"]["message"]
        gate.open.set()
        first.join()
        second.join()
    assert replies == [200, 200]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves(stream, address, monkeypatch):
    gate = Gate(monkeypatch)
    body = dict(messages=messages(SCENES[0].image, "caption en"), stream=stream)
    try:
        with httpx.Client(timeout=httpx.Timeout(None, read=1)) as client:
            with pytest.raises(httpx.ReadTimeout):
                place = f"{address}/v1/chat/completions"
                with client.stream("POST", place, json=body) as reply: reply.read()
        gate.reached.wait()
        while not gate.asks[0].gone: time.sleep(.01)  # a hang, if it is not noticed
    finally: gate.open.set()
    assert httpx.get(f"{address}/health").status_code == 200


def test_a_model_that_fails(shipped, monkeypatch):
    gate = Gate(monkeypatch, ValueError("new token 1 of row 0:\nnot finite"))
    gate.open.set()
    body = dict(messages=messages(SCENES[0].image, "caption en"))
    with TestClient(make_app(Engine(*shipped, limits=Limits(tokens=100)), "tiny")) as client:
        said = client.post("/v1/chat/completions", json=body)
        assert said.status_code == 500
        assert said.json()["error"]["message"] == "new token 1 of row 0:"
        said = client.post("/v1/chat/completions", json=body | dict(stream=True))
        assert "new token 1 of row 0:" in said.text and said.text.endswith("[DONE]\n\n")
        monkeypatch.undo()
        assert client.post("/v1/chat/completions", json=body).status_code == 200


# --- limits and malformed requests

def test_limits(shipped):
    engine = Engine(*shipped, limits=Limits(body=100_000, pixels=20_000, tokens=100))
    with TestClient(make_app(engine, "tiny")) as client:
        def post(body): return client.post("/v1/chat/completions", **body)
        large = dict(json=dict(messages=messages("data:," + "A" * 100_000, "caption en")))
        assert post(large).status_code == 413
        assert post(dict(content=iter([b"[" * 60_000] * 2))).status_code == 413  # no length
        wide = post(dict(json=dict(messages=messages(Image.new("L", (200, 101)), "x"))))
        assert wide.status_code == 400 and "20,200 pixels" in wide.text
        long = post(dict(json=dict(messages=messages(SCENES[0].image, "red " * 500))))
        assert long.status_code == 400 and "tokens; at most" in long.text


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_kinds_of_pictures(kind):
    image = Image.new("RGB", (9, 7), "red")
    assert read_data_url(data_url(image, kind)).size == (9, 7)
    broken = data_url(image, kind)[:60]
    with pytest.raises(Refused, match="not a whole picture"): read_data_url(broken)


def test_other_kinds_are_not_opened():
    with pytest.raises(Refused, match="not a whole picture"):
        read_data_url(data_url(Image.new("RGB", (9, 7)), "TIFF"))


GOOD = dict(model="tiny", max_tokens=1,
            messages=messages(Image.new("L", (2, 2)), "caption en"))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner,
                                                                max_size=3), max_leaves=6)


def places(value, path=()): # of every value inside a JSON value
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) \
        if isinstance(value, list) else ()
    for key, child in inner: yield from places(child, (*path, key))


PLACES = [path for path in places(GOOD) if path]


@st.composite
def malformed(draw):
    "A good request with one value changed or left out, or one field more, or bytes changed"
    fields = deepcopy(GOOD)
    how = draw(st.sampled_from(["change", "drop", "add", "bytes", "text"]))
    if how == "add": fields[draw(st.sampled_from([*serving._FIELDS, "x"]))] = draw(JSON)
    if how in ("change", "drop"):
        *above, key = draw(st.sampled_from(PLACES))
        inner = fields
        for step in above: inner = inner[step]
        if how == "drop": del inner[key]
        else: inner[key] = draw(JSON)
    body = json.dumps(fields).encode()
    if how == "bytes":
        at = draw(st.integers(0, len(body)))
        body = body[:at] + draw(st.binary(max_size=9)) + body[at + draw(st.integers(0, 50)):]
    return draw(st.binary(max_size=50) | st.just(b"[" * 10**5)) if how == "text" else body


@pytest.fixture(scope="module")
def plain(shipped):
    app = make_app(Engine(*shipped, limits=Limits(tokens=100)), "tiny")
    with TestClient(app, raise_server_exceptions=False) as client: yield client


def check_malformed(client, count):
    seen = []

    @settings(max_examples=count)
    @given(malformed())
    def check(body):
        reply = client.post("/v1/chat/completions", content=body)
        seen.append(reply.status_code)
        assert reply.status_code in (200, 400, 404)
        if reply.status_code == 200: return  # still a good one
        reason = reply.json()["error"]["message"]
        assert reason and len(reason.splitlines()) == 1
    check()
    return seen


def test_malformed_requests(plain):
    seen = check_malformed(plain, 150)
    assert sum(status == 400 for status in seen) > .6 * len(seen)
    assert plain.post("/v1/chat/completions", json=GOOD).status_code == 200


@pytest.mark.long
def test_a_thousand_malformed_requests(plain):
    seen = check_malformed(plain, 2_000)
    assert sum(status != 200 for status in seen) >= 1_000


@pytest.mark.parametrize("text", [
    "\ud800", "\0", " ", "", "<image>", "<bos><eos>", "x" * 5000])
def test_odd_texts(text, plain):
    body = json.dumps(GOOD | dict(messages=messages(SCENES[0].image, text)))
    assert plain.post("/v1/chat/completions", content=body).status_code in (200, 400)


def test_odd_places(plain):
    assert plain.get("/v1/chat/completions").status_code == 405
    assert plain.get("/nowhere").status_code == 404
    assert plain.get("/docs").status_code == 404  # it would fetch scripts from the network


# --- the command

def started(*flags):
    words = [sys.executable, "-m", "paligemma_nb", "serve", "--port", "0", *flags]
    env = os.environ | dict(PYTHONPATH=str(Path(__file__).parents[1]))
    server = subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              text=True)
    return server, server.stdout.readline().split()[-1]


def test_the_command():
    server, address = started()
    try:
        assert address.startswith("http://127.0.0.1:")
        with openai.OpenAI(base_url=address, api_key="none") as client:
            model, = client.models.list()
            said = client.chat.completions.create(model=model.id, messages=messages(
                SCENES[1].image, "caption en"))
            assert said.choices[0].message.content == SCENES[1].caption
    finally: server.send_signal(signal.SIGINT)
    said, errors = server.communicate()
    assert server.returncode in (0, 130) and "Traceback" not in errors


@pytest.mark.parametrize("flags, message", [
    (["--port", "99999"], "99999"), (["--host", "nowhere.invalid"], "nowhere.invalid"),
    (["--max_tokens", "400"], "--max_tokens: 400 of 448"),
    (["--max_queue", "0"], "at least 1"),
    (["--model_path", "absent"], "absent"), (["--batch_size", "0"], "at least 1")])
def test_one_line_each(flags, message, capsys):
    assert main(["serve", *([] if "--port" in flags else ["--port", "0"]), *flags]) == 2
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 1 and message in said.err and not said.out


def test_a_port_that_is_taken(capsys):
    with socket.create_server(("127.0.0.1", 0)) as place:
        assert main(["serve", "--port", str(place.getsockname()[1])]) == 2
    assert "cannot be listened on" in capsys.readouterr().err


def test_without_fastapi(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert main(["serve", "--port", "0"]) == 2
    assert "pip install 'paligemma-nb[serve]'" in capsys.readouterr().err


@pytest.mark.long
def test_memory_stays_flat():
    server, address = started()
    try:
        process, sizes = psutil.Process(server.pid), []
        with openai.OpenAI(base_url=address, api_key="none") as client:
            for k in range(2_000):
                client.chat.completions.create(
                    model="paligemma-tiny", max_tokens=8,
                    messages=messages(SCENES[k % 6].image, PROMPTS[k % 3]))
                if k % 100 == 99: sizes.append(process.memory_info().rss)
        assert max(sizes[10:]) < 1.02 * max(sizes[2:10]), sizes
    finally: server.kill()
    server.communicate()
