"""Other people's services: where the image goes, where the answer stands, and what makes no sense."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from typing import Any

import httpx2
import numpy as np
import pytest
import torch
from PIL import Image
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

import robustbox as rb
from robustbox.boxes import as_black_box
from robustbox.errors import InputError, ModelError
from robustbox.models.failures import Garbled
from robustbox.models.paths import follow, read_path
from robustbox.models.remote import RemoteBox
from robustbox.models.service_file import Request, Response, Retry, ServiceFile
from robustbox.models.templates import Template, filled
from robustbox.protocol import BANNED, REJECTED
from robustbox.wire import pack, unpack
from tests.services import running, served
from tests.toys import HalfSpace, images

ROWS = (images(3) * 255).round().div(255).numpy()
BYTES = np.rint(ROWS * 255).astype(np.uint8)
CLASSES = ["cat", "dog", "cow"]


def hear(
    response: dict[str, Any], document: Any, n: int, batch: int = 8, classes: int | None = None, status: int = 200
) -> Any:
    """What a template makes of an answer to n rows."""
    template = Template(Request(template="$images", batch=batch), Response(**response), classes)
    return template.hear(httpx2.Response(status, json=document), n)


# Where something stands


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("$", {"a": [{"b": 1}, {"b": 2}], "c d": {"e-f": [[1, 2], [3, 4]]}}),
        ("a[0].b", 1),
        ("a[-1].b", 2),
        ("$.a[*].b", [1, 2]),
        ("c d.e-f[*][1]", [2, 4]),
        ("c d.e-f[*][*]", [[1, 2], [3, 4]]),
    ],
)
def test_paths_lead_to_what_stands_there(path: str, found: Any) -> None:
    document = {"a": [{"b": 1}, {"b": 2}], "c d": {"e-f": [[1, 2], [3, 4]]}}
    assert follow(document, read_path(path)) == found


@pytest.mark.parametrize("path", ["a[2]", "b", "a.b", "a[0].b[0]", "c[*]", "c.d"])
def test_paths_that_lead_nowhere_say_where_they_end(path: str) -> None:
    with pytest.raises(ValueError, match=r"(nothing|no list) at \$"):
        follow({"a": [{"b": 1}], "c": 3}, read_path(path))


@pytest.mark.parametrize("path", ["a[", "a[x]", "a..b", "[1"])
def test_what_is_no_path_is_refused(path: str) -> None:
    with pytest.raises(InputError, match="is no path"):
        read_path(path)


# Where the image goes


@pytest.mark.parametrize(
    ("template", "filled_in"),
    [
        ({"instances": "$images", "n": 3}, {"instances": ["A", "B"], "n": 3}),
        ({"x": [{"b64": "$image", "k": [1]}]}, {"x": [{"b64": "A", "k": [1]}, {"b64": "B", "k": [1]}]}),
        ({"x": ["data:image/png;base64,$image"]}, {"x": ["data:image/png;base64,A", "data:image/png;base64,B"]}),
        ("$images", ["A", "B"]),
    ],
)
def test_a_template_is_filled_in(template: Any, filled_in: Any) -> None:
    assert filled(template, ["A", "B"]) == filled_in


@pytest.mark.parametrize(
    ("request_", "decode"),
    [
        (Request(template="$images", encoding="float"), lambda x: np.float32(x)),
        (Request(template="$images", encoding="uint8"), lambda x: np.float32(x) / 255),
        (
            Request(template="$images", encoding="uint8", layout="hwc"),
            lambda x: np.float32(x).transpose(0, 3, 1, 2) / 255,
        ),
        (
            Request(template="$images", encoding="npy"),
            lambda x: np.stack([unpack(base64.b64decode(item), 1)[0] for item in x]),
        ),
        (
            Request(template="$images", encoding="png"),
            lambda x: (
                np.stack([np.asarray(Image.open(io.BytesIO(base64.b64decode(item)))) for item in x])
                .transpose(0, 3, 1, 2)
                .astype(np.float32)
                / 255
            ),
        ),
    ],
)
def test_images_in_json_are_the_rows(request_: Request, decode: Any) -> None:
    body = Template(request_, Response(labels="$"), None).say(ROWS, None).body["content"]
    assert np.array_equal(decode(json.loads(body)), ROWS)


def test_raw_bodies_and_forms_hold_the_rows() -> None:
    answer = Response(labels="$")
    raw = Template(Request(body="raw", encoding="npy", batch=3, layout="hwc"), answer, None).say(ROWS, None)
    assert np.array_equal(unpack(raw.body["content"], 1)[0], ROWS.transpose(0, 2, 3, 1))
    png = Template(Request(body="raw", encoding="png"), answer, None).say(ROWS[:1], None)
    assert png.headers == {"content-type": "image/png"}
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png.body["content"]))).transpose(2, 0, 1), BYTES[0])
    form = Request(body="multipart", encoding="jpeg", form_field="photo", form={"model": "big"}, batch=3)
    sent = Template(form, answer, None).say(ROWS, None)
    encoded = httpx2.Request("POST", "http://x", **sent.body)
    text = encoded.read()
    assert text.count(b'name="photo"; filename=') == 3
    assert b'name="model"\r\n\r\nbig' in text


# Where the answer stands


@pytest.mark.parametrize(
    ("response", "document", "n", "labels", "scores"),
    [
        ({"labels": "result.class"}, {"result": {"class": 2}}, 1, [2], None),
        ({"rows": "predictions", "labels": "class"}, {"predictions": [{"class": 2}, {"class": 0}]}, 2, [2, 0], None),
        (
            {"rows": "predictions", "scores": "$"},
            {"predictions": [[0.1, 0.9], [0.7, 0.3]]},
            2,
            [1, 0],
            [[0.1, 0.9], [0.7, 0.3]],
        ),
        (
            {"labels": "labels", "scores": "scores"},
            {"labels": [0, 0], "scores": [[1, 2], [3, 4]]},
            2,
            [0, 0],
            [[1, 2], [3, 4]],
        ),
        ({"scores": "outputs[0].data"}, {"outputs": [{"data": [1, 2, 6, 4, 5, 3]}]}, 2, [2, 1], [[1, 2, 6], [4, 5, 3]]),
        (
            {"rows": "$", "labels": "[0].label", "classes": CLASSES},
            [[{"label": "dog"}], [{"label": "cow"}]],
            2,
            [1, 2],
            None,
        ),
        (
            {"rows": "$", "scores": "[*].score", "names": "[*].label", "classes": CLASSES},
            [[{"label": "cow", "score": 0.6}, {"label": "cat", "score": 0.3}]],
            1,
            [2],
            [[0.3, 0.0, 0.6]],
        ),
        (
            {"rows": "$", "scores": "p", "classes": CLASSES},
            [{"p": {"dog": 0.7, "cat": 0.3}}],
            1,
            [1],
            [[0.3, 0.7, 0.0]],
        ),
    ],
)
def test_answers_are_found(response: Any, document: Any, n: int, labels: Any, scores: Any) -> None:
    answer = hear(response, document, n, batch=1 if response == {"labels": "result.class"} else 8)
    assert answer.labels.tolist() == labels
    assert (
        answer.scores is None
        if scores is None
        else torch.equal(answer.scores, torch.tensor(scores, dtype=torch.float32))
    )


@pytest.mark.parametrize(
    ("response", "document", "line"),
    [
        ({"rows": "predictions", "labels": "class"}, {"predictions": [{"class": 2}]}, "1 answers for 2 rows"),
        ({"rows": "predictions", "labels": "class"}, {"error": "busy"}, r"nothing at \$.predictions"),
        ({"rows": "$", "labels": "$"}, ["cat", "dog"], "the label 'cat' is no class; list response.classes"),
        ({"rows": "$", "labels": "$", "classes": CLASSES}, ["cat", "cod"], "the label 'cod' is no class"),
        ({"rows": "$", "labels": "$"}, [1.5, 0], "no class"),
        ({"rows": "$", "labels": "$"}, [True, 0], "no class"),
        ({"rows": "$", "labels": "$"}, [-1, 0], "no class"),
        ({"rows": "$", "scores": "$"}, [[0.1, 0.9], [0.2]], r"\[1, 2\] scores a row"),
        ({"rows": "$", "scores": "$", "classes": CLASSES}, [[0.1, 0.9], [0.2, 0.8]], r"\[2\] scores a row"),
        ({"rows": "$", "scores": "$", "classes": CLASSES}, [0.1, 0.2], r"\[1\] scores a row"),
        ({"rows": "$", "scores": "$"}, [[], []], r"\[0\] scores a row"),
        ({"rows": "$", "scores": "$"}, [True, False], "scores are no list and no number"),
        ({"rows": "$", "scores": "$"}, [["much", "little"], [0.1, 0.9]], "could not convert"),
        ({"rows": "$", "scores": "$"}, [{"cat": 1}, {"cat": 1}], "need classes"),
        ({"rows": "$", "scores": "s", "names": "n", "classes": CLASSES}, [{"s": [1], "n": []}] * 2, "of one length"),
        ({"scores": "s"}, {"s": [1, 2, 3]}, "3 answers for 2 rows"),
    ],
)
def test_answers_that_make_no_sense_are_not_believed(response: Any, document: Any, line: str) -> None:
    with pytest.raises(Garbled, match=line):
        hear(response, document, 2, classes=len(response["classes"]) if "classes" in response else None)


def test_statuses_that_refuse_a_row_come_through() -> None:
    response = {"labels": "label", "rejected": [422], "banned": [403]}
    assert hear(response, {}, 1, batch=1, status=422).status.tolist() == [REJECTED]
    assert hear(response, {}, 1, batch=1, status=403).status.tolist() == [BANNED]


@pytest.mark.parametrize(
    ("request_", "response", "line"),
    [
        ({"template": "$images"}, {}, "response needs labels, scores, or both"),
        ({}, {"labels": "$"}, "request.template is missing"),
        ({"template": {"x": 1}}, {"labels": "$"}, "must hold \\$images or \\$image, once"),
        ({"template": ["$image", "$images"]}, {"labels": "$"}, "once"),
        ({"template": {"x": "$image"}, "batch": 2}, {"labels": "$"}, "a list of one element"),
        ({"body": "raw", "encoding": "png", "batch": 2}, {"labels": "$"}, "batch: 1"),
        ({"body": "raw", "encoding": "float"}, {"labels": "$"}, "float goes with body: json"),
        ({"body": "raw", "template": "$images"}, {"labels": "$"}, "template goes with body: json"),
        ({"template": "$images"}, {"labels": "$", "names": "n"}, "names go with response.scores"),
        (
            {"template": "$images", "batch": 2},
            {"labels": "$", "rejected": [403]},
            "rejected and banned go with batch: 1",
        ),
        ({"template": "$images"}, {"labels": "a["}, "is no path"),
        ({"template": "$images"}, {"scores": "p", "classes": ["cat"]}, "one class is no choice"),
    ],
)
def test_descriptions_that_make_no_sense_are_refused(request_: Any, response: Any, line: str) -> None:
    with pytest.raises(InputError, match=line):
        Template(Request(**request_), Response(**response), None)


# All of it


class Shop:
    """A foreign service with a form, names for classes, a list of the best two, one image a request and a ban."""

    def __init__(self, banned_after: int) -> None:
        self.asked, self.banned_after = 0, banned_after
        self.keys: list[bytes] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body = b""
        more = True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        self.keys.append(dict(scope["headers"]).get(b"x-key", b""))
        self.asked += 1
        start = body.index(b"\x89PNG")
        row = np.asarray(Image.open(io.BytesIO(body[start:]))).transpose(2, 0, 1) / np.float32(255)
        answer = HalfSpace().of(torch.from_numpy(row)[None])
        assert answer.scores is not None
        best = answer.scores.softmax(dim=1)[0].sort(descending=True)
        found = [{"name": ["dark", "bright"][k], "p": float(p)} for p, k in zip(*best, strict=True)]
        status = 403 if self.asked > self.banned_after else 200
        content = json.dumps({"data": {"top": found}}).encode()
        await send(
            {"type": "http.response.start", "status": status, "headers": [(b"content-type", b"application/json")]}
        )
        await send({"type": "http.response.body", "body": content})


def test_a_foreign_service_is_attacked_as_if_it_were_here(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shop = Shop(banned_after=50)
    monkeypatch.setenv("SHOP_KEY", "k-1")
    with running(shop) as address:
        (tmp_path / "shop.yaml").write_text(
            f"""
url: {address}/classify?size=small
token_env: SHOP_KEY
token_header: X-Key
token_prefix: ""
concurrency: 4
request: {{body: multipart, encoding: png, form_field: upload}}
response: {{scores: "data.top[*].p", names: "data.top[*].name", classes: [dark, bright], banned: [403]}}
"""
        )
        box = as_black_box(f"remote:{tmp_path}/shop.yaml")
        assert (box.classes, box.scores, box.levels) == (2, "probability", 256)
        there = rb.run_attack(box, images(2), [0, 0], "cgba", budget=40, levels=256, max_rows=8)
    here = rb.run_attack(HalfSpace(), images(2), [0, 0], "cgba", budget=24, levels=256, max_rows=8)
    assert there.stop_reasons == ["banned", "banned"]
    assert there.queries.sum() == shop.asked - 2 - int((there.success_any).sum())  # all but the evaluator's
    assert [trace[:3] for trace in there.traces] == [trace[:3] for trace in here.traces]
    assert set(shop.keys) == {b"k-1"}
    assert there.meta["model"]["url"] == f"{address}/classify"
    assert there.meta["model"]["traffic"]["rows_answered"] == shop.asked


def brightness(rows: torch.Tensor) -> torch.Tensor:
    """A probability a row [n]."""
    return torch.stack([20 * (row.double().mean() - 0.6) for row in rows]).sigmoid().float()


class Judge:
    """A foreign service that answers one number a row, in whatever document."""

    def __init__(self, document: Callable[[list[float]], Any]) -> None:
        self.document, self.rows = document, 0

    async def answer(self, request: Any) -> Any:
        rows = torch.tensor((await request.json())["rows"])
        self.rows += len(rows)
        return JSONResponse(self.document(brightness(rows).tolist()))


@pytest.mark.parametrize(
    ("response", "batch", "document"),
    [
        ({"scores": "p"}, 1, lambda p: {"p": p[0]}),
        ({"scores": "p"}, 1, lambda p: {"p": p}),
        ({"scores": "p"}, 5, lambda p: {"p": p}),
        ({"rows": "predictions", "scores": "$", "classes": ["dark", "bright"]}, 5, lambda p: {"predictions": p}),
        ({"rows": "predictions", "scores": "$", "kind": "probability"}, 5, lambda p: {"predictions": [[x] for x in p]}),
    ],
)
def test_one_number_a_row_is_the_score_of_class_1_of_two(response: Any, batch: int, document: Any) -> None:
    judge = Judge(document)
    with running(Starlette(routes=[Route("/", judge.answer, methods=["POST"])])) as address:
        request = Request(template={"rows": "$images"}, batch=batch)
        box = RemoteBox(ServiceFile(url=address, request=request, response=Response(**response)), "remote")
        there = rb.run_attack(box, images(2), [0, 0], "cgba", budget=30, max_rows=8)
        assert (box.scores, box.classes) == ("probability", 2)
        assert judge.rows == sum(there.ledger.values())
        answer = box.answer(images(3), torch.zeros(3, dtype=torch.int64))
        assert answer.scores is not None
        assert torch.equal(answer.scores[:, 1], brightness(images(3)))
    here = rb.run_attack(brightness, images(2), [0, 0], "cgba", budget=30, max_rows=8)
    assert there.success.all()
    assert there.traces == here.traces


@pytest.mark.parametrize(
    ("response", "document", "line"),
    [
        (
            {"scores": "p", "labels": "l"},
            {"p": 0.9, "l": 1},
            "one score beside a label, and nobody says of which class",
        ),
        ({"scores": "p"}, {"p": 1}, r"whole numbers only: .* declared \(response: {kind: logit} in its file\)"),
        ({"scores": "p", "kind": "probability"}, {"p": 1.5}, r"returned 1.5, .* declare that"),
    ],
)
def test_one_number_that_could_mean_anything_is_asked_once_and_refused(response: Any, document: Any, line: str) -> None:
    asked = []

    async def answer(request: Any) -> Any:
        asked.append(1)
        return JSONResponse(document)

    with running(Starlette(routes=[Route("/", answer, methods=["POST"])])) as address:
        box = RemoteBox(
            ServiceFile(url=address, request=Request(template="$images"), response=Response(**response)), "remote"
        )
        with pytest.raises(ModelError, match=line) as caught:
            box.answer(images(1), torch.zeros(1, dtype=torch.int64))
    assert "\n" not in str(caught.value)
    assert len(asked) == 1


def test_our_own_service_can_be_described_as_a_foreign_one() -> None:
    """With JSON both ways floats arrive to the last bit, too."""
    with served(HalfSpace()) as (address, service):
        request = Request(template={"rows": "$images"}, encoding="float", batch=5)
        response = Response(labels="labels", scores="scores", kind="logit")
        box = RemoteBox(ServiceFile(url=f"{address}/v1/answer", request=request, response=response), "remote")
        there = rb.run_attack(box, images(2), [0, 0], "cgba", budget=30, max_rows=8)
        assert sum(service.rows.values()) == sum(there.ledger.values())
        wrong = Response(labels="label")
        described = ServiceFile(url=f"{address}/v1/answer", request=request, response=wrong, retry=Retry(attempts=1))
        with pytest.raises(ModelError, match=r"nothing at \$.label; 5 rows may have been charged"):
            RemoteBox(described, "remote").answer(images(5), torch.zeros(5, dtype=torch.int64))
    here = rb.run_attack(HalfSpace(), images(2), [0, 0], "cgba", budget=30, max_rows=8)
    assert there.traces == here.traces
    assert pack(there.adversarials.numpy()) == pack(here.adversarials.numpy())
