"""The Segmind-compatible API, by the events of its gateway: what Segmind's own clients send and get."""

from __future__ import annotations

import base64
import io
import json
import threading

import pytest
from PIL import Image

from tests.functions.interruptions import picture
from tests.system import create_team, sample_base64

RUN, SUBMIT = "/v1/sd1.5-img2img", "/v2/sd1.5-img2img"
NOBODYS = "0000000001BA321W0123456789"
WANTED = {"img_width": 512, "img_height": 768}


def asked(**fields):
    return {"image": sample_base64(), "prompt": "a castle on a hill", "seed": 7, **WANTED, **fields}


@pytest.fixture
def busy(system):
    """A system whose worker works while a caller waits; `system.idle` holds it back."""
    system.idle = threading.Event()

    def sleep(seconds):
        system.clock.advance(seconds)
        if not system.idle.is_set():
            system.deliver()

    system.services.sleep = sleep
    return system


def seeds(system):
    return [call["body"]["seed"] for call in system.segmind.calls]


def late(system, **fields):
    """Have a request time out."""
    system.idle.set()
    answer = system.compatible("POST", RUN, asked(**fields))
    assert answer.status == 504, answer.content
    system.idle.clear()
    return answer


# ------------------------------------------------------------------------------------------------------------- v1


@pytest.mark.parametrize("accept", ["*/*", "application/json, text/plain, */*", "image/png"])
def test_v1_answers_with_the_picture_whatever_is_accepted(busy, accept):
    answer = busy.compatible("POST", RUN, asked(), {"Accept": accept})
    assert (answer.status, answer.headers["content-type"]) == (200, "image/jpeg")
    assert Image.open(io.BytesIO(answer.content)).size == (512, 768)
    job = busy.job(answer.headers["x-request-id"])
    assert (job["status"], job["via"]) == ("succeeded", "segmind")
    assert answer.headers["x-seed-value"] == "7"
    assert float(answer.headers["x-generation-time"]) > 0
    assert float(answer.headers["x-cost"]) * 1000 == job["credits"]["charged"]
    assert float(answer.headers["x-remaining-credits"]) * 1000 == busy.books().balance
    assert "access-control-allow-origin" not in answer.headers


def test_v1_base64_is_json(busy):
    answer = busy.compatible("POST", RUN, asked(base64=True))
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    assert Image.open(io.BytesIO(base64.b64decode(answer.json["image"]))).size == (512, 768)
    many = busy.compatible("POST", RUN, asked(base64="true", samples="2"))
    assert len({base64.b64decode(image) for image in many.json["image"]}) == 2


def test_of_several_samples_v1_sends_the_first(busy):
    answer = busy.compatible("POST", RUN, asked(samples=2))
    first = busy.job(answer.headers["x-request-id"])["outputs"][0]
    assert (answer.status, len(answer.content)) == (200, first["bytes"])


def test_what_other_clients_send_is_taken(busy):
    fields = asked(
        negativePrompt="blurry", num_inference_steps="25", strength="0.5", seed="9", style="x", **{"\r\n": 1}
    )
    answer = busy.compatible("POST", RUN, fields)
    assert answer.status == 200
    assert answer.headers["x-ignored-parameters"] == "style, %0D%0A"
    given = busy.job(answer.headers["x-request-id"])["input"]
    assert (given["negative_prompt"], given["num_inference_steps"], given["strength"]) == ("blurry", 25, 0.5)
    null = busy.compatible("POST", RUN, asked(negativePrompt="old", negative_prompt=None))
    assert busy.job(null.headers["x-request-id"])["input"]["negative_prompt"] == "old"
    both = busy.compatible("POST", RUN, asked(negativePrompt="old", negative_prompt="new"))
    assert busy.job(both.headers["x-request-id"])["input"]["negative_prompt"] == "new"


def test_who_waited_in_vain_is_told_where_the_job_is(busy):
    answer = late(busy)
    job_id = answer.headers["x-request-id"]
    assert job_id in answer.json["error"]
    assert busy.job(job_id)["status"] == "queued"


def test_after_504_the_same_request_gets_the_same_job_and_then_a_new_one(busy):
    job_id = late(busy).headers["x-request-id"]
    again = busy.compatible("POST", RUN, asked())
    assert (again.status, again.headers["x-request-id"]) == (200, job_id)
    assert seeds(busy) == [7]
    after = busy.compatible("POST", RUN, asked())
    assert after.status == 200
    assert after.headers["x-request-id"] != job_id
    assert seeds(busy) == [7, 7]


def test_what_ended_without_being_delivered_is_delivered_later(busy):
    job_id = late(busy).headers["x-request-id"]
    busy.deliver()
    busy.clock.advance(12 * 3600)
    again = busy.compatible("POST", RUN, asked())
    assert (again.status, again.headers["x-request-id"]) == (200, job_id)


def test_the_same_request_at_once_is_one_job_if_a_seed_was_given(busy):
    first = busy.services.sleep
    answers = []

    def meanwhile(seconds):
        busy.services.sleep = first
        answers.append(busy.compatible("POST", RUN, asked()))
        first(seconds)

    busy.services.sleep = meanwhile
    answers.append(busy.compatible("POST", RUN, asked()))
    assert [answer.status for answer in answers] == [200, 200]
    assert len({answer.headers["x-request-id"] for answer in answers}) == 1
    assert seeds(busy) == [7]


@pytest.mark.parametrize(("pause", "same"), [(590, True), (610, False)])
def test_without_a_seed_a_repeat_attaches_for_ten_minutes_after_a_504(busy, pause, same):
    job_id = late(busy, seed=-1).headers["x-request-id"]
    busy.clock.advance(pause)
    again = busy.compatible("POST", RUN, asked(seed=-1))
    assert again.status == 200
    assert (again.headers["x-request-id"] == job_id) is same


def test_without_a_seed_and_without_a_504_every_request_is_a_job(busy):
    ids = {busy.compatible("POST", RUN, asked(seed=-1)).headers["x-request-id"] for _ in range(3)}
    assert len(ids) == 3


@pytest.mark.parametrize("change", [{"prompt": "a boat"}, {"strength": 0.4}, {"seed": 8}])
def test_another_request_is_another_job(busy, change):
    job_id = late(busy).headers["x-request-id"]
    assert busy.compatible("POST", RUN, asked(**change)).headers["x-request-id"] != job_id


def test_another_key_of_the_team_has_jobs_of_its_own(busy):
    busy.services.teams.add_key("second", "default", label="second")
    job_id = late(busy).headers["x-request-id"]
    assert busy.compatible("POST", RUN, asked(), key_id="second").headers["x-request-id"] != job_id


@pytest.mark.parametrize("how", ["cancel", "delete"])
def test_a_job_that_its_owner_ended_is_not_attached_to(busy, how):
    job_id = late(busy).headers["x-request-id"]
    if how == "cancel":
        assert busy.api("POST", f"/jobs/{job_id}/cancel").status == 200
    else:
        assert busy.api("DELETE", f"/jobs/{job_id}").status == 204
    again = busy.compatible("POST", RUN, asked())
    assert again.status == 200
    assert again.headers["x-request-id"] != job_id


def test_a_picture_that_does_not_fit_stays_to_be_read(busy, monkeypatch):
    monkeypatch.setattr("img2img.flows.answer.MAX_ANSWER", 1000)
    answer = busy.compatible("POST", RUN, asked())
    job_id = answer.headers["x-request-id"]
    assert answer.status == 413
    assert f"/v2/requests/{job_id}" in answer.json["error"]
    assert busy.compatible("POST", RUN, asked()).headers["x-request-id"] == job_id
    assert seeds(busy) == [7]


@pytest.mark.parametrize("behaviour", ["406-credits", "401", "400", "html"])
def test_a_job_that_fails_is_500_and_not_attached_to(busy, behaviour):
    busy.segmind.behave(behaviour, times=2)
    answer = busy.compatible("POST", RUN, asked())
    job = busy.job(answer.headers["x-request-id"])
    assert (answer.status, answer.json) == (500, {"error": job["error"]["detail"]})
    busy.segmind.reset()
    assert busy.compatible("POST", RUN, asked()).headers["x-request-id"] != job["id"]


# ------------------------------------------------------------------------------------------------------------- v2


def submitted(system, **fields):
    answer = system.compatible("POST", SUBMIT, asked(**fields))
    assert answer.status == 200, answer.content
    return answer.json


def test_v2_submits_polls_and_fetches(system):
    job = submitted(system)
    job_id = job["request_id"]
    base = "https://api.example/segmind"
    assert job == {
        "request_id": job_id,
        "status": "QUEUED",
        "poll_url": f"{base}/v1/requests/{job_id}",
        "status_url": f"{base}/v2/requests/{job_id}/status",
        "response_url": f"{base}/v2/requests/{job_id}",
    }
    status = f"/v2/requests/{job_id}/status"
    assert system.compatible("GET", status).json["status"] == "QUEUED"
    assert system.compatible("GET", f"/v2/requests/{job_id}").json["output"] is None
    system.services.jobs.claim("default", job_id, lease_seconds=130)
    assert system.compatible("GET", status).json["status"] == "PROCESSING"
    system.clock.advance(140)
    assert system.deliver() == 1
    done = system.compatible("GET", status).json
    assert (done["status"], done["request_id"]) == ("COMPLETED", job_id)
    assert done["metrics"]["inference_time"] > 0
    for path in (f"/v2/requests/{job_id}", f"/v1/requests/{job_id}"):
        result = system.compatible("GET", path).json
        assert f"results/default/{job_id}/" in result["output"]
        metrics = result["metrics"]
        assert metrics["cost"] * 1000 == system.job(job_id)["credits"]["charged"]
        assert metrics["remaining_credits"] * 1000 == system.books().balance
        assert metrics["total_time"] >= metrics["queue_time"] >= 0


def test_v2_never_attaches(system):
    assert submitted(system)["request_id"] != submitted(system)["request_id"]


def test_v2_output_of_several_samples_is_a_list(system):
    job_id = submitted(system, samples=3)["request_id"]
    system.deliver()
    assert len(set(system.compatible("GET", f"/v2/requests/{job_id}").json["output"])) == 3


@pytest.mark.parametrize("path", ["/v2/requests/{}", "/v2/requests/{}/status", "/v1/requests/{}"])
def test_v2_says_422_of_what_failed(system, path):
    system.segmind.behave("400")
    job_id = submitted(system)["request_id"]
    system.deliver()
    answer = system.compatible("GET", path.format(job_id))
    assert (answer.status, answer.json["status"]) == (422, "FAILED")
    assert answer.json["error"] == system.job(job_id)["error"]["detail"]
    canceled = submitted(system)["request_id"]
    system.api("POST", f"/jobs/{canceled}/cancel")
    assert system.compatible("GET", path.format(canceled)).json["error"] == "The request was canceled"


def test_both_apis_show_the_same_job(system):
    job_id = submitted(system)["request_id"]
    assert system.job(job_id)["via"] == "segmind"
    made = system.create().json
    assert made["via"] == "api"
    assert system.compatible("GET", f"/v2/requests/{made['id']}/status").json["status"] == "QUEUED"


def test_credits(system):
    assert system.compatible("GET", "/v1/get-user-credits").json == {"credits": system.books().balance / 1000}


# ---------------------------------------------------------------------------------------------------------- bad input

LONG_NAME = "x" * 100
REFUSED = {
    "no body": (b"", {}, 400, "body"),
    "no JSON": (b"{", {}, 400, "body"),
    "a list": ([1], {}, 400, "body"),
    "a text": ("x", {}, 400, "body"),
    "null": (None, {}, 400, "body"),
    "no Unicode": (b"\xff\xfe", {}, 400, "body"),
    "deep": (b"[" * 100_000, {}, 400, "body"),
    "a form": (b"prompt=x", {"Content-Type": "application/x-www-form-urlencoded"}, 406, "Invalid content type"),
    "multipart": (b"--x--", {"Content-Type": "multipart/form-data; boundary=x"}, 406, "Invalid content type"),
    "a picture": (picture(), {"Content-Type": "image/png"}, 406, "Invalid content type"),
    "text/plain": (b"{}", {"Content-Type": "text/plain"}, 406, "Invalid content type"),
    "nothing in it": ({}, {}, 400, "prompt"),
    "no image": ({"prompt": "x"}, {}, 400, "image"),
    "no prompt": ({"image": base64.b64encode(picture()).decode()}, {}, 400, "prompt"),
    **{
        f"{name} {str(value)[:20]}": (asked(**{name: value}), {}, 400, name)
        for name, value in [
            ("image", ""),
            ("image", 7),
            ("image", "x"),
            ("image", "https://127.0.0.1/x.png"),
            ("image", "http://169.254.169.254/latest"),
            ("image", "file:///etc/passwd"),
            ("image", "data:image/png;base64,!!"),
            ("image", "upl_" + NOBODYS[:-1]),
            ("prompt", ""),
            ("prompt", 7),
            ("prompt", ["x"]),
            ("prompt", "\ud800"),
            ("num_inference_steps", 7),
            ("num_inference_steps", "many"),
            ("num_inference_steps", 20.5),
            ("samples", 0),
            ("samples", 5),
            ("samples", "1e400"),
            ("seed", -2),
            ("seed", True),
            ("strength", 1.1),
            ("strength", "NaN"),
            ("guidance_scale", 0),
            ("img_width", 500),
            ("img_height", "tall"),
            ("scheduler", "ddim"),
            ("base64", "perhaps"),
            ("metadata", "x"),
            ("preset", "none-such"),
            ("negativePrompt", 7),
        ]
    },
    "no picture": (asked(image=base64.b64encode(b"x" * 500).decode()), {}, 400, ""),
    "a cut picture": (asked(image=base64.b64encode(picture()[:60]).decode()), {}, 400, ""),
}


@pytest.mark.parametrize("path", [RUN, SUBMIT])
@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_says_what_is_wrong_and_costs_nothing(system, path, case):
    body, headers, status, named = REFUSED[case]
    before = system.books()
    answer = system.compatible("POST", path, body, headers)
    assert answer.status == status, answer.content
    assert set(answer.json) == {"error"}
    named = "negative_prompt" if named == "negativePrompt" else named
    assert named in answer.json["error"]
    assert system.books() == before
    assert system.messages() == 0
    assert system.objects("uploads") == []


def test_at_least_forty_kinds_of_bad_input():
    assert len(REFUSED) >= 40


@pytest.mark.parametrize("path", ["/v1/sdxl-img2img", "/v2/sdxl-img2img", f"/v1/{LONG_NAME}", "/v2/.."])
def test_another_model_is_not_found_and_ours_is_named(system, path):
    answer = system.compatible("POST", path, asked())
    assert answer.status == 404
    assert "sd1.5-img2img" in answer.json["error"]


@pytest.mark.parametrize("form", ["/v2/requests/{}", "/v2/requests/{}/status", "/v1/requests/{}"])
@pytest.mark.parametrize("job_id", ["x", NOBODYS, "TEAM", "%00", "a" * 300])
def test_an_unknown_request_is_not_found(system, form, job_id):
    answer = system.compatible("GET", form.format(job_id))
    assert (answer.status, set(answer.json)) == (404, {"error"})


@pytest.mark.parametrize("form", ["/v2/requests/{}", "/v2/requests/{}/status", "/v1/requests/{}"])
def test_another_teams_request_is_not_found(system, form):
    job_id = submitted(system)["request_id"]
    system.deliver()
    create_team(system.services, "other", "key-of-the-other")
    for unknown in (job_id, NOBODYS):
        answer = system.compatible("GET", form.format(unknown), key_id="key-of-the-other")
        assert (answer.status, answer.json) == (404, {"error": f"There is no job {unknown}"})


def test_other_teams_do_not_attach(busy):
    create_team(busy.services, "other", "key-of-the-other")
    job_id = late(busy).headers["x-request-id"]
    assert busy.compatible("POST", RUN, asked(), key_id="key-of-the-other").headers["x-request-id"] != job_id


def test_a_poor_team_is_told_in_segminds_words(system):
    system.services.credits.add("default", -system.books().balance)
    answer = system.compatible("POST", RUN, asked())
    assert answer.status == 406
    assert "Insufficient credits" in answer.json["error"]


@pytest.mark.parametrize("path", [RUN, SUBMIT])
def test_an_unknown_key_or_a_disabled_team_is_401(system, path):
    assert system.compatible("POST", path, asked(), key_id="nobodys").status == 401
    create_team(system.services, "other", "key-of-the-other")
    system.services.teams.enable("other", enabled=False)
    answer = system.compatible("POST", path, asked(), key_id="key-of-the-other")
    assert answer.status == 401
    assert json.loads(answer.content)["error"]
