"""The page of the doctor: well-formed, alone in its file, accessible, and deaf to what its texts would like to be."""

import base64
import io
import json
import re

import numpy as np
import pytest
from html_page import Page, in_browser, luminance
from phantom_split import ORGANS, build_split, render_scans
from PIL import Image

from data_builders import doctor_page
from data_builders.__main__ import main
from data_builders.doctor import Damage, RowPlace, examine
from data_builders.doctor_findings import FEWEST_FOR_STATISTICS, find
from data_builders.doctor_page import kind_of_cell, organ_table, page_html, shrunken_png
from data_builders.previews import organ_colors

EVIL = "<script>alert('x')</script><b>&\"'"


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    scans = render_scans(tmp_path_factory.mktemp("scans"), 8, 1)
    return build_split(scans, tmp_path_factory.mktemp("split") / "out", previews=2)


@pytest.fixture(scope="module")
def page(split):
    assert main(["inspect", str(split), "--cases", "2", "--workers", "1"]) == 0
    return (split / "doctor.html").read_text(encoding="utf-8")


def test_the_page_is_well_formed_and_stands_alone(page):
    parsed = Page(page)
    assert page.startswith("<!DOCTYPE html>") and parsed.of("html") == [{"lang": "en"}]
    assert not parsed.of("script") and not parsed.of("link") and not parsed.of("iframe")
    addresses = [a[name] for _, a in parsed.tags for name in ("src", "href", "action", "data", "srcset") if name in a]
    assert addresses and all(address.startswith(("#", "data:image/png;base64,")) for address in addresses)
    assert "url(" not in page and "@import" not in page
    anchors = {a["id"] for _, a in parsed.tags if "id" in a}
    assert {address[1:] for address in addresses if address.startswith("#")} <= anchors
    assert len(anchors) == sum("id" in a for _, a in parsed.tags), "an id twice"
    assert not any(name.startswith("on") for _, a in parsed.tags for name in a)


def test_the_page_can_be_read_without_seeing_it(page):
    parsed = Page(page)
    levels = [int(tag[1]) for tag, _ in parsed.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(later - earlier <= 1 for earlier, later in zip(levels, levels[1:])), "no level of headings is left out"
    images = parsed.of("img")
    assert len(images) == 3 and all(len(image["alt"]) > 40 and int(image["width"]) > 0 for image in images)
    drawings = parsed.of("svg")
    assert len(drawings) > len(ORGANS) and all(d["role"] == "img" and d["aria-label"] for d in drawings)
    assert len(parsed.text["caption"]) == len(parsed.of("table")) >= 8
    assert len(parsed.of("tbody")) == len(parsed.of("thead")) == len(parsed.of("table"))
    assert all(cell["scope"] in ("col", "row") for cell in parsed.of("th"))


@pytest.mark.parametrize(
    ("front", "back"),
    [("#1b1b1b", "#fff"), ("#404040", "#fff"), ("#0b4f8a", "#fff"), ("#fff", "#595959"), ("#fff", "#9b1c1c")]
    + [("#fff", "#7a4f00"), ("#1b1b1b", "#eef1f4"), ("#1b1b1b", "#d5dde6")],
)
def test_contrast_of_text(page, front, back):
    """At least 4.5 : 1, as WCAG 2.1 asks (https://www.w3.org/TR/WCAG21/#contrast-minimum)."""
    assert front in page and back in page, "a pair that the page no longer uses"
    high, low = sorted((luminance(front), luminance(back)), reverse=True)
    assert (high + 0.05) / (low + 0.05) >= 4.5


def test_figures_stand_on_the_page(page, split):
    parsed = Page(page)
    headings = " ".join(parsed.text["th"])
    assert all(organ in headings for organ in ORGANS)
    assert "Looked at 9 of 9 rows (train 8, validation 1)." in page and "Only some rows" not in page
    assert "the axes are as they should be" in page and "not kept in the split" in page
    assert "8 / 1" in page, "counts of each split"


def outlier_cells(exam) -> dict[str, str]:
    table = organ_table(exam)
    assert table.columns[-1] == "volume outliers (ml)"
    return {row[0]: row[-1] for row in table.rows}


def test_the_column_of_outliers_is_never_empty(split):
    manifest = json.loads((split / "manifest.json").read_text(encoding="utf-8"))
    exam = examine(split, manifest)
    heart = ORGANS.index("heart")
    assert outlier_cells(exam)["heart"] == "none" and exam.is_whole[:, heart].sum() >= 8
    exam = examine(split, manifest)
    exam.rows[4].voxels[heart] *= 20
    assert re.fullmatch(r"p_4 \(\d,\d{3}\)|p_4 \(\d\d,\d{3}\)", outlier_cells(exam)["heart"])
    assert f"fewer than {FEWEST_FOR_STATISTICS} scans" in organ_table(exam).note
    few = examine(split, manifest, limit=3)
    assert set(outlier_cells(few).values()) == {"too few to tell"}


@pytest.mark.parametrize(
    ("cell", "kind"),
    [(3, "number"), ("14 / 10", "number"), ("-1024 to -992", "number"), ("854 (709 to 985)", "number")]
    + [("1,530 (1,235 to 1,715)", "number"), ("48.0% (the normal sentence)", "number"), ("", "number")]
    + [("6 x 4 x 4 mm", "text"), ("3 of 9 voxels are NaN or infinite. Set them to -1024 (air).", "long"), ("x", "text")]
    + [("-", "text"), ("p_4 (3,944)", "text")],
)
def test_numbers_stand_to_the_right_and_words_to_the_left(cell, kind):
    assert kind_of_cell(cell) == kind


def test_organs_keep_their_colours_in_the_page(split):
    """256 colours must do; the usual choice of them leaves hardly any to the organs."""
    path = next((split / "previews").glob("*.png"))
    before = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3).astype(int)
    after = np.asarray(Image.open(io.BytesIO(shrunken_png(path)[0])).convert("RGB")).reshape(-1, 3).astype(int)
    checked = 0
    for color in np.rint(organ_colors(ORGANS)[:, :3] * 255).astype(int):
        if (before == color).all(axis=1).sum() >= 20:  # a patch of the legend
            checked += 1
            assert np.abs(after - color).max(axis=1).min() <= 24, color
    assert checked > len(ORGANS) // 2


def test_every_text_is_escaped(split):
    manifest = json.loads((split / "manifest.json").read_text(encoding="utf-8"))
    manifest["skipped"] = [{"split": "train", "case": EVIL, "reason": f"ct: {EVIL}"}]
    manifest["warnings"] = [{"split": "train", "case": EVIL, "warning": EVIL}]
    manifest["settings"]["builder"] = EVIL
    manifest["privacy_concerns"] = {EVIL: 2}
    exam = examine(split, manifest)
    exam.organs = (EVIL, *exam.organs[1:])
    exam.damaged.append(Damage(RowPlace("train", 3, EVIL, 0, 0), EVIL, EVIL))
    for row in exam.rows:
        row.recon_id = row.patient_id = row.scan_id = EVIL
        row.labels = {EVIL: 1}
    picture = doctor_page.Picture(EVIL, "train", f"Planes of {EVIL}", "data:image/png;base64,AA==", (2, 2), EVIL)
    html = page_html(EVIL, exam, find(exam), [picture])
    parsed = Page(html)
    assert not parsed.of("script") and not parsed.of("b") and "alert(" in html
    assert any(EVIL in text for text in parsed.text["td"]) and any(EVIL in text for text in parsed.text["text"])
    assert parsed.of("img")[0]["alt"] == f"Planes of {EVIL}"


def test_a_split_without_a_readable_row_still_has_a_page(split):
    manifest = json.loads((split / "manifest.json").read_text(encoding="utf-8"))
    exam = examine(split.parent / "nowhere", manifest)
    html = page_html("empty", exam, find(exam), [])
    assert "the split holds no row" in html and Page(html).of("table")


def test_pictures_have_a_bounded_size(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (640, 1000, 3)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")  # no picture packs worse
    data, size = shrunken_png(tmp_path / "noise.png")
    assert len(data) <= doctor_page.PICTURE_BYTES and size[0] < 1000
    assert Image.open(io.BytesIO(data)).size == size and size[0] / size[1] == pytest.approx(1000 / 640, rel=0.01)


def test_pictures_beyond_the_size_of_the_page_are_named(split, monkeypatch):
    monkeypatch.setattr(doctor_page, "ALL_PICTURES_BYTES", 10)
    manifest = json.loads((split / "manifest.json").read_text(encoding="utf-8"))
    exam = examine(split, manifest, limit=1)
    path = next((split / "previews").glob("*.png"))
    html = page_html("x", exam, [], doctor_page.inline_pictures(exam, [], [(exam.rows[0], path)]))
    assert not Page(html).of("img") and "Left out to keep this file small" in html and "p_0" in html


def test_the_pictures_are_those_of_the_cases(page):
    sources = [image["src"].split(",")[1] for image in Page(page).of("img")]
    pictures = [Image.open(io.BytesIO(base64.b64decode(source))) for source in sources]
    assert all(picture.format == "PNG" and picture.width <= doctor_page.PICTURE_WIDTH for picture in pictures)
    assert len({picture.tobytes() for picture in pictures}) == 3


@pytest.mark.slow
@pytest.mark.parametrize("width", [500, 1400])
def test_a_browser_lays_the_page_out(page, tmp_path, width):
    """Nothing but tables and charts may stick out, and those scroll in their own boxes; every picture is drawn."""
    probe = (
        "[document.documentElement.scrollWidth, innerWidth, "
        "[...document.images].filter(image => image.naturalWidth > 0 && image.clientWidth > 0).length, "
        "[...document.querySelectorAll('svg')].filter(svg => svg.clientHeight > 20).length].join(' ')"
    )
    wide, inner, pictures, charts = map(int, in_browser(page, tmp_path, width, probe).split())
    assert inner == pytest.approx(width, abs=20) and wide <= inner
    assert pictures == len(Page(page).of("img")) > 0 and charts == len(Page(page).of("svg")) > 0
