"""Chromium through playwright, for tests of pages; both are optional."""

from __future__ import annotations

import contextlib
import shutil

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SIZES = {"phone": (390, 844), "desktop": (1280, 800)}


@contextlib.contextmanager
def open_browser():
    """Yield a browser; skip the test if playwright is not installed."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


# The smallest contrast ratio of WCAG 2 between the text and the background of visible elements.
CONTRAST = """() => {
    const luminance = (text) => {
        const channels = text.match(/[\\d.]+/g).slice(0, 3).map((value) => {
            const share = value / 255;
            return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
        });
        return 0.2126 * channels[0] + 0.7152 * channels[1] + 0.0722 * channels[2];
    };
    const background = (element) => {
        for (let one = element; one; one = one.parentElement) {
            const colour = getComputedStyle(one).backgroundColor;
            if (!/rgba\\(.*, 0\\)/.test(colour)) return colour;
        }
        return "rgb(255, 255, 255)";
    };
    let smallest = 21;
    for (const element of document.querySelectorAll("body *")) {
        const hasText = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
        if (!hasText || !element.checkVisibility() || element.tagName === "SCRIPT") continue;
        const [a, b] = [getComputedStyle(element).color, background(element)].map(luminance).sort((x, y) => y - x);
        smallest = Math.min(smallest, (a + 0.05) / (b + 0.05));
    }
    return smallest;
}"""
