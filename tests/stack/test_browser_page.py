"""A page of another origin in a real browser, which holds to CORS: presets, and an upload that starts its own job."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from local.http_server import Handler, LoopbackServer
from tests.stack.browser import PROGRAM, headless
from tests.system import ROOT

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="there is no Chromium")
FILES = {
    "/": (ROOT / "tests" / "stack" / "phone.html", "text/html; charset=utf-8"),
    "/photo.heic": (ROOT / "events" / "phone.heic", "image/heic"),
}


class Page(Handler):
    """The page's own server, on an origin that is not the API's."""

    def do_GET(self) -> None:
        path, content_type = FILES.get(self.path, (None, ""))
        if path:
            self.reply(200, [("Content-Type", content_type)], path.read_bytes())
        else:
            self.reply(404)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    server = LoopbackServer(Page)
    server.start()
    try:
        with headless(tmp_path_factory.mktemp("profile")) as browser:
            browser.open(f"http://{server.address}/")
            yield browser
    finally:
        server.stop()


@pytest.fixture
def caller(stack):
    """The address and the key of the API, as arguments of the page's functions."""
    stack.segmind.reset()
    return f"{json.dumps(stack.url)}, {json.dumps(stack.api_key)}"


def test_a_page_saves_reads_and_deletes_a_preset(page, caller):
    saved = page.evaluate(f"savePreset({caller}, 'phone', {{prompt: 'a castle', strength: 0.6}})")
    assert saved == {"statuses": [201, 200], "fields": {"prompt": "a castle", "strength": 0.6}}
    assert page.evaluate(f"removePreset({caller}, 'phone')") == 204
    with pytest.raises(RuntimeError, match="preset_unknown"):
        page.evaluate(f"readPreset({caller}, 'phone')")


def test_a_page_announces_uploads_forgets_and_shows_the_picture(page, caller, stack, tmp_path):
    done = page.evaluate(f"makeNew({caller}, {{preset: 'soft', strength: 0.6}})")
    assert (done["uploaded"], done["size"]) == (204, [512, 512])
    assert (done["statuses"][0], done["statuses"][-1]) == ("awaiting_upload", "succeeded")
    assert done["source"]["key"] == f"awaited/local/{done['id']}"
    assert (done["source"]["preset"], done["input"]["strength"]) == ("soft", 0.6)
    assert len(stack.segmind.calls) == 1
    page.screenshot(tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as shown:
        middle = shown.convert("RGB").crop((200, 200, 400, 400))
    assert len(middle.getcolors(middle.width * middle.height)) > 1000
