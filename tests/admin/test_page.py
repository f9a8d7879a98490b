"""The status page in a real Chromium, in a network namespace from which nobody else can be reached."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from playwright.sync_api import Browser, Locator, Page, Route, expect, sync_playwright

from backend.clients.fleet import open_session
from backend.demo.stage import Play, Stage, stage
from lb.address import Address
from lb.cid import Codec
from lb.keys import AdminConfig
from lb.router import Verdict
from tests.admin.fake import Running, running
from tests.builders import long
from tests.namespaces import inside, missing, namespaces

T = TypeVar("T")

CHROMIUM = shutil.which("chromium")
# It is root, has no GPU, and has nobody to ask for updates.
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
HERE = Address("127.0.0.1", 9101)
PATIENCE = 30.0  # seconds, on a machine that is busy
TICKS = 130  # more than a sparkline shows
WIDE = {"width": 1280, "height": 900}
NARROW = {"width": 360, "height": 780}
READ, WRITE = "a-token-to-read-with", "a-token-to-write-with"


@pytest.fixture(scope="module")
def island() -> Iterator[str]:
    """A namespace that has nothing but `lo`."""
    if CHROMIUM is None:
        pytest.skip("chromium is not installed (Debian: apt-get install chromium fonts-dejavu-core)")
    reason = missing()
    if reason is not None:
        pytest.skip(f"{reason}; elsewhere Chromium would ask its vendor's hosts")
    with namespaces("page") as (name,):
        yield name


@pytest.fixture(scope="module")
def browser(island: str) -> Iterator[Browser]:
    with inside(island), sync_playwright() as playwright:  # processes stay where they were started
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield made
        made.close()


@pytest.fixture
def quiclb(island: str) -> Iterator[Running]:
    """A balancer that has run for a while."""
    with inside(island), running(addresses=(HERE,)) as made:
        age(made, TICKS)
        yield made


Open = Callable[..., Page]


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    """Opens the page. Whatever it complains about, or asks of others, is a failure."""
    expect.set_options(timeout=PATIENCE * 1000)
    complaints: list[str] = []
    asked: set[str] = set()
    with contextlib.ExitStack() as contexts:

        def opened(
            path: str = "/",
            *,
            prepare: Callable[[Page], None] | None = None,
            viewport: Any = WIDE,
            scheme: Any = "light",
            token: str | None = None,
        ) -> Page:
            credentials: Any = None if token is None else {"username": "anybody", "password": token}
            context = browser.new_context(viewport=viewport, color_scheme=scheme, http_credentials=credentials)
            contexts.callback(context.close)
            context.set_default_timeout(PATIENCE * 1000)
            context.on("request", lambda request: asked.add(request.url.partition("://")[2].partition("/")[0]))
            page = context.new_page()
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.on("console", lambda said: complaints.extend(complaint(said.text)))
            if prepare is not None:
                prepare(page)
            page.goto(f"http://{HERE}{path}")
            expect(page.locator("#live")).to_contain_text("live")
            return page

        yield opened
    assert complaints == []
    assert asked <= {str(HERE)}


def complaint(said: str) -> list[str]:
    """What was said on the console. That a request failed is no news to a test that made it fail."""
    return [] if "Failed to load resource" in said else [said]


def age(quiclb: Running, ticks: int = 1) -> None:
    """Time passes at a fake balancer."""

    async def tick() -> None:
        for _ in range(ticks):
            quiclb.balancer.tick()

    asyncio.run_coroutine_threadsafe(tick(), quiclb.loop).result(PATIENCE)


def on_loop(quiclb: Running, act: Callable[[], object]) -> None:
    """Have something done where the fake balancer lives."""

    async def done() -> None:
        act()

    asyncio.run_coroutine_threadsafe(done(), quiclb.loop).result(PATIENCE)


def stopped(quiclb: Running) -> None:
    asyncio.run_coroutine_threadsafe(quiclb.server.stop(), quiclb.loop).result(PATIENCE)


def service(page: Page, name: str) -> Locator:
    return page.locator("details.service").filter(has=page.get_by_role("heading", name=name, exact=True))


def row(page: Page, name: str, of: str = "web") -> Locator:
    return service(page, of).locator(f'tr[data-backend="{name}"]')


def answering(change: Callable[[dict[str, Any]], None]) -> Callable[[Page], None]:
    """Prepares a page whose /v1/state is the balancer's, but for a change."""

    def answer(route: Route) -> None:
        response = route.fetch()
        state = response.json()
        change(state)
        route.fulfill(response=response, json=state)

    def prepare(page: Page) -> None:
        page.route("**/v1/state", answer)

    return prepare


def width(page: Page) -> int:
    found: int = page.evaluate("document.documentElement.scrollWidth")
    return found


def test_the_fleet_is_drawn(quiclb: Running, open_page: Open) -> None:
    page = open_page()

    expect(page.locator("#about")).to_contain_text("udp, 2 workers")
    expect(page.locator("#about")).to_contain_text("generation 1")
    expect(page.locator("#verdict")).to_have_attribute("data-level", "bad")
    expect(page.locator("#verdict")).to_contain_text("web: b4 is down.")
    expect(page.locator("#verdict")).to_contain_text("web: b3 is draining.")
    states = {"b0": "active", "b1": "active", "b2": "active", "b3": "draining", "b4": "down"}
    for name, state in states.items():
        expect(row(page, name).locator(".state")).to_have_text(state)
    expect(row(page, "b4")).to_contain_text("timeout")
    expect(row(page, "b0").locator(".share")).to_contain_text("25 %")
    expect(service(page, "web").locator(".ring .arc")).to_have_count(3)
    expect(service(page, "web").locator(".ring .number")).to_have_text("3/5")
    for line in (
        row(page, "b0").locator(".spark .line").all() + service(page, "web").locator('.band[data-band="cid"]').all()
    ):
        assert len(line.get_attribute("d") or "") > 100
    phases = service(page, "web").locator(".slot")
    assert ["retiring", "active", "prepared", *["free"] * 4] == [
        slot.get_attribute("data-phase") for slot in phases.all()
    ]
    expect(phases.first).to_contain_text("single-pass")
    expect(phases.first).to_contain_text("free in 5 min")
    counted = quiclb.balancer.counters.services
    rescued = page.locator('[data-is="rescued"]')
    expect(rescued).to_contain_text("connections that a 4-tuple balancer would have broken")
    expect(rescued.locator("strong")).to_have_text(f"{sum(each.rescued for each in counted.values()):,}")
    expect(service(page, "web").locator(".numbers")).to_contain_text(f"{counted['web'].moves:,}")
    assert width(page) <= WIDE["width"]


def test_it_is_live_without_being_loaded_again(quiclb: Running, open_page: Open) -> None:
    page = open_page()
    page.evaluate("window.before = true")
    line = row(page, "b1").locator(".spark .line").get_attribute("d") or ""
    flows = row(page, "b1").locator(".flows").inner_text()

    age(quiclb, 3)

    expect(row(page, "b1").locator(".flows")).not_to_have_text(flows)
    expect(row(page, "b1").locator(".spark .line")).not_to_have_attribute("d", line)
    expect(page.locator('[data-is="rescued"] strong')).to_have_text(
        f"{sum(each.rescued for each in quiclb.balancer.counters.services.values()):,}"
    )
    assert page.evaluate("window.before")


def test_a_backend_is_drained_once_that_is_confirmed(quiclb: Running, open_page: Open) -> None:
    page = open_page()
    dialog = page.get_by_role("dialog")

    row(page, "b0").get_by_role("button", name="Drain b0").click()
    expect(dialog).to_contain_text("Drain b0?")
    expect(dialog).to_contain_text("It gets no new connections any more. Its 25 % of them go to the others.")
    dialog.get_by_role("button", name="Cancel").click()
    expect(dialog).to_be_hidden()
    assert quiclb.balancer.changes == []
    expect(row(page, "b0").locator(".state")).to_have_text("active")

    row(page, "b0").get_by_role("button", name="Drain b0").click()
    dialog.get_by_role("button", name="Drain").click()
    expect(row(page, "b0").locator(".state")).to_have_text("draining")
    expect(dialog).to_be_hidden()
    expect(page.locator("#done")).to_have_text("b0 is draining.")
    expect(row(page, "b0")).to_contain_text("by the operator: drain")
    assert [change for _, change in quiclb.balancer.changes] == ["web.b0 {'drain': True}"]

    row(page, "b0").get_by_role("button", name="Undrain b0").click()
    dialog.get_by_role("button", name="Undrain").click()
    expect(row(page, "b0").locator(".state")).to_have_text("active")


def test_weights_and_fences_are_changed_and_taken_back(quiclb: Running, open_page: Open) -> None:
    page = open_page()
    dialog = page.get_by_role("dialog")

    row(page, "b2").get_by_role("button", name="Weight b2").click()
    dialog.get_by_label("Weight, 0 to 1000").fill("1001")
    dialog.get_by_role("button", name="Change").click()
    expect(dialog).to_be_visible()  # the browser does not let it pass
    dialog.get_by_label("Weight, 0 to 1000").fill("5")
    dialog.get_by_role("button", name="Change").click()
    expect(row(page, "b2").locator(".weight")).to_contain_text("5")

    row(page, "b2").get_by_role("button", name="Fence b2").click()
    expect(dialog).to_contain_text("Its connections are lost")
    dialog.get_by_role("button", name="Fence").click()
    expect(row(page, "b2").locator(".state")).to_have_text("fenced")

    row(page, "b2").get_by_role("button", name="As in file b2").click()
    expect(dialog).to_contain_text("weight, fence")
    dialog.get_by_role("button", name="As in the file").click()
    expect(row(page, "b2").locator(".state")).to_have_text("active")
    expect(row(page, "b2").locator(".weight")).to_contain_text("1")


def test_the_keyboard_is_enough(quiclb: Running, open_page: Open) -> None:
    page = open_page()
    dialog = page.get_by_role("dialog")
    row(page, "b0").get_by_role("button", name="Drain b0").focus()

    page.keyboard.press("Enter")
    expect(dialog.get_by_role("button", name="Cancel")).to_be_focused()  # nothing happens by a second Enter
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    expect(row(page, "b0").get_by_role("button", name="Drain b0")).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")

    expect(row(page, "b0").locator(".state")).to_have_text("draining")


def test_who_comes_second_is_told_and_nothing_is_changed(quiclb: Running, open_page: Open) -> None:
    page = open_page()
    dialog = page.get_by_role("dialog")
    row(page, "b0").get_by_role("button", name="Drain b0").click()
    change = quiclb.balancer.change("web", "b1", {"weight": 7}, who="somebody else")
    asyncio.run_coroutine_threadsafe(change, quiclb.loop).result(PATIENCE)

    dialog.get_by_role("button", name="Drain").click()

    expect(dialog.get_by_role("alert")).to_contain_text("Somebody else changed something in the meantime.")
    expect(dialog.get_by_role("alert")).to_contain_text("the generation is 2, and not 1")
    expect(dialog).to_be_visible()
    assert quiclb.balancer.changes == [("somebody else", "web.b1 {'weight': 7}")]


def test_it_says_so_when_the_api_is_gone_and_recovers_by_itself(quiclb: Running, open_page: Open) -> None:
    page = open_page()
    banner = page.locator("#banner")
    expect(banner).to_be_hidden()

    stopped(quiclb)
    expect(banner).to_be_visible()
    expect(banner).to_contain_text("quiclb does not answer, since ")
    expect(banner).to_have_attribute("role", "alert")
    expect(page.locator("#live")).to_have_text("not live")
    expect(page.locator("main")).to_have_attribute("data-stale", "")
    expect(row(page, "b0")).to_be_visible()  # what was known stays
    expect(banner).to_contain_text("asked again in 4 s")  # less and less often

    age(quiclb, 2)
    quiclb.start()
    expect(banner).to_be_hidden()
    expect(page.locator("#live")).to_have_text("live")
    expect(page.locator("main")).not_to_have_attribute("data-stale", "")
    expect(page.locator("#done")).to_contain_text("quiclb answers again")


def test_it_says_so_when_the_balancer_hangs(quiclb: Running, open_page: Open) -> None:
    page = open_page()

    on_loop(quiclb, quiclb.balancer.hold.clear)
    expect(page.locator("#banner")).to_contain_text("the balancer did not answer in time")
    on_loop(quiclb, quiclb.balancer.hold.set)

    expect(page.locator("#banner")).to_be_hidden()


def test_a_refused_reload_is_shown_with_its_mistakes(quiclb: Running, open_page: Open) -> None:
    page = open_page()
    mistakes = ("services[0].backends[2].weight: 1001: expected 0 to 1000", "services[1].listen: missing")

    on_loop(quiclb, lambda: setattr(quiclb.balancer, "reload_errors", mistakes))

    expect(page.locator("#about")).to_contain_text("latest reload refused")
    for mistake in mistakes:
        expect(page.locator("#verdict")).to_contain_text(mistake)


def test_a_connection_id_is_explained(quiclb: Running, open_page: Open) -> None:
    page = open_page()
    section = quiclb.balancer.config.services[0].service
    slot, owner = section.cid_slots[0], section.backends[1]
    (server_id,) = owner.server_ids[slot.config.config_id]
    cid = Codec(slot.config).encode(server_id, bytes(range(12)))

    page.locator("#hex").fill(cid.hex(":"))
    page.get_by_role("button", name="Explain").click()

    web = page.locator(".answer").filter(has_text="web")
    expect(web.locator(".goes")).to_contain_text("b1")
    expect(web.locator(".goes .state")).to_have_text("active")
    expect(web).to_contain_text("Its CID carries the server ID of a backend that is ACTIVE.")
    expect(web.locator('[data-of="server"] code')).to_have_text(server_id.hex(" "))
    expect(web.locator('[data-of="nonce"] code')).to_have_text(bytes(range(12)).hex(" "))
    expect(page.locator(".answer").filter(has_text="video")).to_contain_text("its config ID names no configuration")


def test_a_packet_is_explained(quiclb: Running, open_page: Open) -> None:
    page = open_page()

    page.locator("#hex").fill(long(bytes(8), b"client").hex())
    page.locator("#asked").select_option("video")
    page.locator("#client").fill("198.51.100.7:4433")
    page.get_by_role("button", name="Explain").click()

    expect(page.locator(".answer")).to_have_count(1)
    expect(page.locator("#explained .facts")).to_contain_text("long")
    expect(page.locator("#explained .facts")).to_contain_text("0x00000001")
    expect(page.locator(".answer")).to_contain_text("fallback")
    expect(page.locator(".answer .goes .state")).to_have_text("active")


def test_what_cannot_be_explained_is_answered_with_what_was_wrong(quiclb: Running, open_page: Open) -> None:
    page = open_page()
    page.locator("#hex").fill("not hex")

    page.get_by_role("button", name="Explain").click()

    expect(page.locator("#explained").get_by_role("alert")).to_contain_text("expected hex digits, two for each octet")


def test_who_may_only_look_gets_no_buttons(tmp_path: Path, island: str, open_page: Open) -> None:
    config = tokens(tmp_path)
    with inside(island), running(config, addresses=(HERE,)) as quiclb:
        age(quiclb, TICKS)
        page = open_page(token=READ)
        expect(page.locator("#live")).to_have_text("live, read only")
        expect(row(page, "b0")).to_be_visible()
        expect(page.locator(".change button")).to_have_count(0)

        page = open_page(token=WRITE)
        expect(page.locator("#live")).to_have_text("live")
        expect(row(page, "b0").locator(".change button")).to_have_count(3)


def test_a_token_that_is_not_valid_any_more_is_asked_for(tmp_path: Path, island: str, open_page: Open) -> None:
    config = tokens(tmp_path)
    with inside(island), running(config, addresses=(HERE,)) as quiclb:
        age(quiclb, TICKS)
        page = open_page(token=WRITE)
        secret(tmp_path / "write", "another-token-to-write")
        expect(page.locator("#live")).to_have_text("locked")
        token = page.get_by_label("quiclb wants a token.")

        token.fill("a-token-that-is-wrong")
        page.get_by_role("button", name="Go on").click()
        expect(page.locator("#live")).to_have_text("locked")
        expect(token).to_have_value("")
        token.fill("another-token-to-write")
        page.get_by_role("button", name="Go on").click()

        expect(page.locator("#live")).to_have_text("live")
        expect(page.locator("#banner")).to_be_hidden()
        row(page, "b0").get_by_role("button", name="Drain b0").click()
        page.get_by_role("dialog").get_by_role("button", name="Drain").click()
        expect(row(page, "b0").locator(".state")).to_have_text("draining")
        assert "token" not in page.url


def tokens(directory: Path) -> AdminConfig:
    return AdminConfig(
        read_token_file=secret(directory / "read", READ), write_token_file=secret(directory / "write", WRITE)
    )


def secret(path: Path, token: str) -> Path:
    """A file that changes at once."""
    path.with_suffix(".new").write_text(token)
    path.with_suffix(".new").chmod(0o600)
    return path.with_suffix(".new").rename(path)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_window_needs_no_scrolling_sideways(quiclb: Running, open_page: Open, scheme: str) -> None:
    def long_names(state: dict[str, Any]) -> None:
        for each in state["services"]:
            each["backends"][0]["name"] = "a-backend-with-a-name-that-is-far-too-long-for-a-telephone" * 2
            each["backends"][0]["overridden"] = ["drain", "weight", "fence"]
            each["backends"][1]["address"] = "[2001:db8:1111:2222:3333:4444:5555:6666]:65535"
        state["reload"]["errors"] = ["services[0].backends[12].server-ids." + "0123456789abcdef" * 12 + ": unknown"]

    page = open_page(viewport=NARROW, scheme=scheme, prepare=answering(long_names))
    page.locator("#hex").fill("40" * 1200)
    page.get_by_role("button", name="Explain").click()
    expect(page.locator(".answer")).not_to_have_count(0)
    assert width(page) <= NARROW["width"]
    expect(row(page, "b2").get_by_role("cell")).to_have_count(9)  # still a table to those who hear it

    row(page, "b2").get_by_role("button", name="Drain b2").click()
    box = page.get_by_role("dialog").bounding_box()
    assert box is not None
    assert box["width"] <= NARROW["width"]


def test_both_themes_are_there_and_can_be_read(quiclb: Running, open_page: Open) -> None:
    on_loop(quiclb, lambda: setattr(quiclb.balancer, "reload_errors", ("listen: missing",)))

    def all_states(state: dict[str, Any]) -> None:
        for backend, name in zip(
            state["services"][0]["backends"], ("active", "draining", "down", "dead", "fenced"), strict=True
        ):
            backend.update(state=name, overridden=["weight"])
        state["services"][0]["fail-open"] = True

    grounds = set()
    for scheme in ("light", "dark"):
        page = open_page(scheme=scheme, prepare=answering(all_states))
        expect(row(page, "b3").locator(".state")).to_have_text("dead")
        grounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        page.locator("#hex").fill("00" * 17)
        page.get_by_role("button", name="Explain").click()
        expect(page.locator(".answer")).to_have_count(2)
        assert_readable(page)
        page.locator("#hex").fill("no")
        page.get_by_role("button", name="Explain").click()
        expect(page.locator("#explained").get_by_role("alert")).to_be_visible()
        row(page, "b1").get_by_role("button", name="Fence b1").click()
        assert_readable(page)
        page.keyboard.press("Escape")
        page.evaluate("document.getElementById('banner').hidden = false")
        page.evaluate("document.getElementById('banner').textContent = 'quiclb does not answer'")
        assert_readable(page)
    assert len(grounds) == 2


def assert_readable(page: Page) -> None:
    """All text that can be seen has a contrast of at least 4.5:1 (WCAG 2.2, 1.4.3)."""
    measured = page.evaluate(CONTRASTS)
    assert len(measured) > 100
    assert [each for each in measured if each["contrast"] < 4.5] == []


CONTRASTS = """() => {
  const colour = (text) => {
    const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number);
    return { rgb: [r, g, b], a };
  };
  const over = (top, below) => top.rgb.map((value, i) => value * top.a + below[i] * (1 - top.a));
  const ground = (element) => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) layers.push(colour(getComputedStyle(at).backgroundColor));
    return layers.reverse().reduce((below, layer) => over(layer, below), [255, 255, 255]);
  };
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const text = walker.currentNode.textContent.trim();
    if (!text || element.closest("title, noscript") || !element.checkVisibility({ visibilityProperty: true })) continue;
    const style = getComputedStyle(element);
    const below = ground(element);
    const ink = over(colour(element instanceof SVGElement ? style.fill : style.color), below);
    const [dark, light] = [luminance(ink), luminance(below)].sort((a, b) => a - b);
    found.push({ text, contrast: (light + 0.05) / (dark + 0.05) });
  }
  return found;
}"""


def test_names_are_text_whatever_they_look_like(quiclb: Running, open_page: Open) -> None:
    name = "<img src=x onerror=window.broken=1><script>window.broken=1</script>"

    def hostile(state: dict[str, Any]) -> None:
        state["version"] = name
        state["reload"]["errors"] = [name]
        state["services"][0]["name"] = name
        state["services"][0]["listen"] = [name]
        state["services"][0]["backends"][0].update(name=name, address=name, state="down", reason=name)
        state["services"][0]["cid-configs"][0]["algorithm"] = name

    page = open_page(prepare=answering(hostile))

    expect(page.locator("details.service h2").first).to_have_text(name)
    expect(page.locator("tr[data-backend] .name").first).to_have_text(name)
    page.locator("tr[data-backend]").first.get_by_role("button", name="Drain").click()
    expect(page.get_by_role("dialog").get_by_role("heading")).to_have_text(f"Drain {name}?")
    assert page.locator("main img, main script, dialog img").count() == 0
    assert page.evaluate("window.broken") is None


def test_scripts_and_styles_of_others_do_not_run(quiclb: Running, browser: Browser) -> None:
    with contextlib.closing(browser.new_context()) as context:
        page = context.new_page()
        page.goto(f"http://{HERE}/")
        expect(page.locator("#live")).to_have_text("live")
        page.evaluate(
            """() => {
              window.refused = [];
              const note = (event) => window.refused.push(event.effectiveDirective);
              document.addEventListener("securitypolicyviolation", note);
              const script = document.createElement("script");
              script.textContent = "window.broken = true";
              document.body.append(script);
              const far = document.createElement("img");
              far.src = "http://192.0.2.1/picture.png";
              document.body.append(far);
              document.body.setAttribute("style", "display: none");
            }"""
        )
        page.wait_for_function("window.refused.length === 3")

        assert {"script-src-elem", "img-src", "style-src-attr"} == set(page.evaluate("window.refused"))
        assert page.evaluate("window.broken") is None


def test_of_many_backends_the_worst_are_drawn_and_the_others_can_be_found(quiclb: Running, open_page: Open) -> None:
    def many(state: dict[str, Any]) -> None:
        one = state["services"][0]["backends"][0]
        state["services"][0]["backends"] = [
            one | {"name": f"n{i}", "ring-share": 1 / 1000, "state": "down" if i == 777 else "active"}
            for i in range(1000)
        ]

    page = open_page(prepare=answering(many))
    rows = service(page, "web").locator("tr[data-backend]")

    expect(rows).to_have_count(200)
    expect(rows.first).to_have_attribute("data-backend", "n777")
    expect(service(page, "web").locator(".backends .hint")).to_contain_text("200 of 1,000 are shown, the worst first.")
    assert service(page, "web").locator(".ring .arc").count() == 2  # one for each state
    page.get_by_label("Show backends").fill("web n998")
    expect(rows).to_have_count(1)
    expect(rows.first).to_have_attribute("data-backend", "n998")
    expect(service(page, "video")).to_have_count(0)
    page.get_by_label("Show backends").press("Escape")
    expect(service(page, "video")).to_have_count(1)


def test_of_many_services_those_in_trouble_are_open(quiclb: Running, open_page: Open) -> None:
    def many(state: dict[str, Any]) -> None:
        well, ill = state["services"][1], state["services"][0]
        state["services"] = [ill, *(well | {"name": f"s{i}"} for i in range(255))]

    page = open_page(prepare=answering(many))

    expect(page.locator("details.service")).to_have_count(256)
    expect(page.locator("details.service[open]")).to_have_count(1)
    expect(page.locator("tr[data-backend]")).to_have_count(5)  # what is closed is not drawn
    service(page, "s254").locator("summary").click()
    expect(service(page, "s254").locator("tr[data-backend]")).to_have_count(3)


def test_every_verdict_has_its_band(quiclb: Running, open_page: Open) -> None:
    bands = open_page().evaluate(
        "import('/page/states.js').then(({ BANDS }) => BANDS.flatMap((band) => band.verdicts))"
    )

    assert sorted(verdict.name.lower() for verdict in Verdict) == sorted(bands)


def test_numbers_and_times_are_said_in_words(quiclb: Running, open_page: Open) -> None:
    said = open_page().evaluate(
        """import('/page/words.js').then((words) => [
          words.time(0), words.time(59.6), words.time(3600), words.time(7505), words.time(90061), words.time(90061, 1),
          words.rate(0), words.rate(0.01), words.rate(2.34), words.rate(1234.5), words.count(12345678),
          words.percent(0), words.percent(0.0001), words.percent(0.25), words.percent(0.042),
          words.milliseconds(0.0123),
        ])"""
    )

    assert said == [
        *("0 s", "1 min", "1 h", "2 h 5 min", "1 d 1 h", "1 d"),
        *("0", "<0.1", "2.3", "1,235", "12.3M"),
        *("0 %", "<0.1 %", "25 %", "4.2 %", "12 ms"),
    ]


class Background:
    """An event loop on a thread, where a real balancer, real backends and a real client live."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="stage")
        self._thread.start()

    def do(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(PATIENCE)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE)
        self._loop.close()


@pytest.fixture
def real(island: str) -> Iterator[tuple[Background, Stage]]:
    """`quiclb run` with its API at `HERE`, and three backends."""
    with inside(island):
        background = Background()
    context = stage(Play())
    try:
        made = background.do(context.__aenter__())
        try:
            balancer = made.balancers["one"]
            path = made.directory / "balancer-one.yaml"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"admin": {"listen": [str(HERE)]}}))
            background.do(balancer.child.stop())
            background.do(made.run(balancer))
            yield background, made
        finally:
            background.do(context.__aexit__(None, None, None))
    finally:
        background.stop()


def test_a_real_balancer_is_shown_and_drained(real: tuple[Background, Stage], open_page: Open) -> None:
    """A download goes on through the drain of its backend; whoever comes then goes elsewhere."""
    background, made = real
    page = open_page()
    for name in ("a", "b", "c"):
        expect(row(page, name).locator(".state")).to_have_text("active")
    address = made.balancers["one"].address
    client = background.do(open_session("aioquic", address, "/whoami", "/slow/600"))
    try:
        name = json.loads(background.do(client.transfers[0].complete()))["name"]
        expect(row(page, name).locator(".flows")).to_have_text("1")
        expect(row(page, name).locator(".rate")).not_to_have_text("0")

        row(page, name).get_by_role("button", name=f"Drain {name}").click()
        page.get_by_role("dialog").get_by_role("button", name="Drain").click()
        expect(row(page, name).locator(".state")).to_have_text("draining")
        expect(row(page, name).locator(".share")).to_contain_text("0 %")
        for _ in range(5):
            other = background.do(open_session("aioquic", address, "/whoami"))
            assert name != json.loads(background.do(other.transfers[0].complete()))["name"]
            background.do(other.close())
        seen = len(client.transfers[1].body)
        background.do(client.transfers[1].reached(seen + 1))  # it is still served
        expect(row(page, name).locator(".flows")).to_have_text("1")
    finally:
        background.do(client.close())
