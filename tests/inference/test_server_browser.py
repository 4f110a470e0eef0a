"""A page of another origin cannot use the server, tested in a real browser."""

import pytest
from serving import CHAT, TEXT, running

pytestmark = pytest.mark.slow

PAGE = "http://page.example/"
TRY = """async ([url, method, type, mode]) => {
    const headers = type ? {"Content-Type": type} : {};
    const asked = url.includes("chat") ? {messages: [{role: "user", content: "Hi"}]}
        : {prompt: "Once"};
    const body = method === "POST" ? JSON.stringify({...asked, max_tokens: 2}) : undefined;
    try {
        const answer = await fetch(url, {method, headers, mode, body});
        return [answer.type, answer.status, await answer.text()];
    } catch (error) {
        return [error.name, 0, ""];
    }
}"""
TRIES = [
    ("GET", "/v1/models", "", "cors"),
    ("POST", CHAT, "application/json", "cors"),
    ("POST", TEXT, "application/json", "cors"),
    ("POST", CHAT, "text/plain", "cors"),  # without a preflight request
    ("POST", CHAT, "text/plain", "no-cors"),
    ("POST", TEXT, "application/x-www-form-urlencoded", "no-cors"),
]


@pytest.fixture
def page(browser):
    page = browser.new_page()
    page.route(PAGE, lambda route: route.fulfill(body="<p>", content_type="text/html"))
    page.goto(PAGE)
    yield page
    page.close()


def attempt(page, url, *how):
    """Return what the page received, and the statuses of the server's responses."""
    given = []
    page.on("response", lambda response: given.append(response.status))
    method, type, mode = how
    return page.evaluate(TRY, [url, method, type, mode]), given


@pytest.mark.parametrize(("method", "path", "type", "mode"), TRIES)
def test_a_page_of_another_origin(page, mixture, method, path, type, mode):
    with running(mixture) as server:
        (kind, status, text), given = attempt(page, server.url + path, method, type, mode)
        assert (status, text) == (0, "") and kind in ("TypeError", "opaque")
        assert all(status in (403, 415) for status in given)
        # DNS rebinding
        rebound = server.url.replace("127.0.0.1", "page.example")
        (_, _, text), given = attempt(page, rebound + path, method, type, mode)
        assert text == "" and all(status in (403, 415) for status in given)


@pytest.mark.parametrize(("method", "path", "type", "mode"), TRIES[:3])
def test_a_page_of_an_allowed_origin(page, mixture, method, path, type, mode):
    with running(mixture, allowed_origins=(PAGE.rstrip("/"),)) as server:
        (kind, status, text), _ = attempt(page, server.url + path, method, type, mode)
        assert (kind, status) == ("cors", 200) and text.startswith("{")
