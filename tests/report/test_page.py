"""The page in a real browser: it renders, sorts, says its names, fits a phone, and fetches nothing."""

import html.parser

import numpy as np
import pytest

from keras_kd.report import Comparison, LayerRow, ModelRow
from tests import chromium

HOSTILE = "<script>alert('x')</script> & \"co\""
NAMES = ("teacher", HOSTILE, "lost", "</svg><img src=x onerror=alert(2)>")


def row(name, accuracy, size, latency):
    layers = (LayerRow(f"conv {name}", "Conv2D", 100, 20, 8.0, 5_000), LayerRow("head", "Dense", 10, 10, 32.0, None))
    return ModelRow(
        *(name, "Keras", accuracy, (accuracy - 0.02, accuracy + 0.02), 0.5, 0.9, 1, 2, 0.5, {"top 2": 0.5}, 110, 30, 10.0, 5_000),
        *(size, size and size // 2, latency, latency and (latency, latency), layers, () if size else ("No LiteRT file: <b>.",)),
    )


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    rows = (
        row("teacher", 0.95, 900_000, 2.0),
        row(HOSTILE, 0.9, 80_000, 0.5),
        row("lost", 0.7, None, None),
        row(NAMES[3], 0.91, 100_000, 0.1),
    )
    curves = {name: {"loss": (2.0, 1.0, None), "val_loss": (2.1, 1.5, 1.4)} for name in NAMES[:2]}
    comparison = Comparison(rows, "teacher", "classes", 500, curves, {"keras": "3"})
    path = tmp_path_factory.mktemp("page") / "page.html"
    comparison.to_html(path)
    return path


@pytest.fixture(scope="module")
def browser():
    if chromium.PROGRAM is None:
        pytest.skip("There is no Chromium on the PATH (Debian: apt-get install chromium).")
    with chromium.opened() as page:
        yield page


@pytest.fixture
def page(browser, path):
    browser.messages.clear()
    browser.requests.clear()
    browser.show(path)
    yield browser
    assert browser.messages == []
    assert [url for url in browser.requests if not url.startswith("data:")] == [path.as_uri()]


class Tags(html.parser.HTMLParser):
    """Tags with their attributes."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_the_page_names_no_other_file_and_no_name_of_a_user_becomes_a_tag(path):
    found = Tags(path.read_text()).found
    assert [tag for tag, _ in found].count("script") == 1
    assert not [tag for tag, _ in found if tag in ("img", "iframe", "object", "b")]
    links = [value for _, attrs in found for name, value in attrs.items() if name in ("src", "href", "srcset", "action")]
    assert links == ["data:,"]
    assert "@import" not in path.read_text()
    assert "url(" not in path.read_text()


def test_every_number_of_the_id_that_it_refers_to_exists(path):
    found = Tags(path.read_text()).found
    ids = [attrs["id"] for _, attrs in found if "id" in attrs]
    used = [attrs[key] for _, attrs in found for key in ("aria-describedby", "aria-labelledby") if key in attrs]
    assert len(ids) == len(set(ids))
    assert set(used) <= set(ids)


def names(page):
    return page.run("[...document.querySelectorAll('#models tbody tr')].map((row) => row.cells[0].textContent)")


def sorting(page, key):
    return page.run(f"document.querySelector('th[data-key={key}]').getAttribute('aria-sort')")


def test_a_click_sorts_by_number_and_another_turns_it_what_is_not_known_stays_last(page):
    assert names(page) == list(NAMES)
    page.click("th[data-key=size] button")
    assert names(page) == [HOSTILE, NAMES[3], "teacher", "lost"]
    assert sorting(page, "size") == "ascending"
    page.click("th[data-key=size] button")
    assert names(page) == ["teacher", NAMES[3], HOSTILE, "lost"]
    page.click("th[data-key=accuracy] button")
    assert (sorting(page, "size"), sorting(page, "accuracy")) == ("none", "ascending")
    assert page.run("document.getElementById('sorted').textContent") == "Sorted by accuracy, %, ascending"


def test_the_keyboard_sorts(page):
    page.run("document.querySelector('th[data-key=latency] button').focus()")
    page.press("Enter", "\r")
    assert names(page)[0] == NAMES[3]
    assert sorting(page, "latency") == "ascending"


def test_tips_show_at_the_mouse_and_at_focus_inside_the_window_and_go_with_escape(page):
    shown = "document.getElementById('tip').hidden ? '' : document.getElementById('tip').textContent"
    assert page.run(shown) == ""
    page.point("th[data-key=size] button")
    assert page.run(shown) == "Bytes of the LiteRT file."
    page.press("Escape")
    assert page.run(shown) == ""
    page.run("document.querySelector('svg circle').focus()")
    assert page.run(shown).startswith("teacher: accuracy, % 95.0")
    left, right = page.run("(({left, right}) => [left, right])(document.getElementById('tip').getBoundingClientRect())")
    assert 0 <= left < right <= 1200


def test_a_screen_reader_finds_the_chart_its_bubbles_and_the_headings_of_the_table(page):
    found = page.accessible()
    for name in (NAMES[0], HOSTILE, NAMES[3]):
        assert [text for role, text in found if role == "image" and text.startswith(f"{name}: accuracy")], name
    assert [text for role, text in found if role == "group" and text.startswith("Accuracy against bytes")]
    assert ("button", "bytes") in found
    assert ("rowheader", HOSTILE) in found
    assert not [role for role, text in found if role in ("button", "image", "link", "region") and not text.strip()]


def contrast(one, other):
    def luminance(text):
        channels = np.array([int(part) for part in text.strip("rgb()").split(",")]) / 255
        return float(
            np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]
        )

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_stands_out_from_the_page_in_both_schemes(page, path, dark):
    page.requests.clear()
    page.show(path, dark=dark)
    color = "getComputedStyle(document.querySelector('{}')).{}"
    below = page.run(color.format("body", "backgroundColor"))
    assert (contrast(below, "rgb(0, 0, 0)") < 2) == dark
    for selector, what in (("body", "color"), (".soft", "color"), ("svg text", "fill")):
        assert contrast(below, page.run(color.format(selector, what))) >= 4.5, selector
    for index in range(4):
        assert contrast(below, page.run(color.format(f".swatch.c{index}", "backgroundColor"))) >= 3, index


def test_a_phone_scrolls_the_table_alone_and_its_first_column_stays(page, path):
    page.requests.clear()
    page.show(path, width=375, height=800, touch=True)
    assert page.run("document.documentElement.scrollWidth") == 375
    assert page.run("document.querySelector('#models').offsetWidth") > 375
    page.run("document.querySelector('.scroll').scrollLeft = 300")
    assert page.run("document.querySelector('#models tbody th').getBoundingClientRect().left") >= 0
    assert page.run("document.querySelector('svg text').getBoundingClientRect().height") > 10


def test_it_is_drawn(page, tmp_path):
    page.picture(tmp_path / "page.png", whole=False)
    from matplotlib import image

    pixels = image.imread(tmp_path / "page.png")
    assert len(np.unique((255 * pixels[..., :3]).astype(int).reshape(-1, 3), axis=0)) > 50
