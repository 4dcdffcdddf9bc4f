"""The chat page of the real application, in a real browser."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app import traffic
from app.storage import Storage
from tests.answering_model import ANSWERS, SNAPSHOT_ID, UNSURE
from tests.conftest import Service

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("needs chromium: apt-get install chromium", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
expect = playwright.expect
expect.set_options(timeout=60_000)

ARGUMENTS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS), timeout=120_000)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """A new page whose errors, policy violations included, fail the test."""
    context = browser.new_context(viewport={"width": 1000, "height": 800})
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    yield page
    page.screenshot(path=str(tmp_path / "page.png"))
    context.close()
    # A refused key is told to the browser's console by the browser itself.
    assert [problem for problem in problems if "401" not in problem] == []


def ask(page: Any, question: str) -> Any:
    """Send a question; returns the finished answer."""
    page.get_by_label("Your message").fill(question)
    page.keyboard.press("Enter")
    answer = page.locator("article[data-role=assistant]").last
    expect(answer).to_have_attribute("data-state", "done")
    return answer


def test_a_customer_asks_rates_and_learns_why(page: Any, service: Service) -> None:
    page.goto(f"{service.url}/#key={service.api_key}")
    expect(page.locator("#status-text")).to_have_text("Ready")
    expect(page.locator("#model")).to_have_text("support")
    assert service.api_key not in page.url
    page.get_by_role("button", name="Where is my order 4512?").click()
    first = page.locator("article[data-role=assistant]").last
    expect(first).to_have_attribute("data-state", "done")
    for question in ("i want a refund", "how do i reset my password?"):
        page.get_by_role("button", name="New conversation").click()
        answer = ask(page, question)
        expect(answer.locator(".message-text")).to_have_text(ANSWERS[question])
        expect(answer.locator(".handover")).to_be_hidden()
    answer.get_by_role("button", name="Good answer").click()
    expect(answer.locator(".acknowledgement")).to_have_text("Thank you for the feedback.")
    answer.get_by_role("button", name="Why this answer?").click()
    expect(answer.locator(".why")).to_contain_text(str(SNAPSHOT_ID))
    expect(answer.locator(".why")).to_contain_text("sample:shop")
    exchange, feedback = traffic.find(Storage(service.store), answer.get_attribute("data-response-id"))
    assert exchange
    assert exchange.reply == ANSWERS["how do i reset my password?"]
    assert [given.rating for given in feedback] == [1]


def test_a_hand_over_is_shown(page: Any, service: Service) -> None:
    page.goto(f"{service.url}/#key={service.api_key}")
    answer = ask(page, "can i talk to a person?")
    expect(answer.locator(".handover")).to_contain_text("A colleague will take over")
    page.get_by_role("button", name="New conversation").click()
    answer = ask(page, UNSURE)
    expect(answer.locator(".handover-reason")).to_have_text("low reply confidence")
    expect(answer.locator(".message-text")).to_contain_text("handing you over to a colleague")


def test_a_wrong_key_is_asked_for_again(page: Any, service: Service) -> None:
    page.goto(f"{service.url}/#key=sk-wrong")
    dialog = page.locator("#key-dialog")
    expect(dialog).to_be_visible()
    expect(page.locator("#key-problem")).to_contain_text("API key")
    page.get_by_label("API key", exact=True).fill(service.api_key)
    page.get_by_role("button", name="Use this key").click()
    expect(dialog).to_be_hidden()
    assert ask(page, "thank you").locator(".message-text").inner_text() == ANSWERS["thank you"]
    stored = json.loads(page.evaluate("JSON.stringify({...sessionStorage})"))
    assert stored == {"rayloop.key": service.api_key}


def test_what_a_customer_writes_is_text_and_never_a_page(page: Any, service: Service) -> None:
    page.goto(f"{service.url}/#key={service.api_key}")
    ask(page, "<img src=x onerror=document.title='owned'><script>document.title='owned'</script>")
    assert page.title() == "Rayloop"
    assert page.locator("#transcript img, #transcript script").count() == 0
