"""Foreign texts are printable and have no credentials."""

import logging
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from yolov7_deploy._text import (
    expand_user,
    get_logger,
    hide_credentials,
    json_escape,
    printable,
    printable_line,
    similar_file,
)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred", r"\x1b[31mred"),
        ("\x1b]8;;http://evil\x07link", r"\x1b]8;;http://evil\x07link"),
        ("\x9b2J", r"\x9b2J"),
        ("photo\u202egpj.exe", r"photo\u202egpj.exe"),
        ("\u2066a\u2069\u200f\u061c", r"\u2066a\u2069\u200f\u061c"),
        ("a\rb\x08", r"a\x0db\x08"),
        ("photo\udcff.jpg", r"photo\udcff.jpg"),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("Größe 猫 кошка 👩‍👧 é", "Größe 猫 кошка 👩‍👧 é"),
    ],
)
def test_only_texts_that_cannot_be_read_become_escapes(text, shown):
    assert printable(text) == shown


def test_a_line_has_no_line_breaks():
    assert printable_line("a\nb\tc\r") == r"a\nb\tc\x0d"


@given(st.text(st.characters(exclude_categories=[])))
def test_every_text_can_be_printed_afterwards(text):
    shown = printable_line(text)
    shown.encode("utf-8")
    assert not any(ord(character) < 32 or 127 <= ord(character) < 160 for character in shown)
    json_escape(text).encode("utf-8")


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("rtsp://user:pass@cam:554/live", "rtsp://***@cam:554/live"),
        ("rtsp://user:p@ss@cam/live", "rtsp://***@cam/live"),
        ("rtsp://user:p/a?s#s@cam/live", "rtsp://***@cam/live"),
        ("rtsp://user:p ass@cam/live", "rtsp://***@cam/live"),
        ("rtsp://user%3Apass%40cam/live", "rtsp://***@cam/live"),
        ("rtsp:/user:pass@cam/live", "rtsp:/***@cam/live"),
        ("https://ghp_token@host/a.jpg", "https://***@host/a.jpg"),
        ("user:pass@cam/live", "***@cam/live"),
        ("http://cam/a.cgi?user=admin&pwd=s3cret&channel=1", "http://cam/a.cgi?user=admin&pwd=***&channel=1"),
        ("http://cam/a?PASSWORD=s3cret", "http://cam/a?PASSWORD=***"),
        ("http://cam/a?access_token=s3cret;x=1", "http://cam/a?access_token=***;x=1"),
        ("http://cam/a?api-key=s3cret#top", "http://cam/a?api-key=***#top"),
        ("https://s3/a.jpg?X-Amz-Signature=s3cret", "https://s3/a.jpg?X-Amz-Signature=***"),
        ("http://cam/a?p%61ssword=s3cret&x=1", "http://cam/a?password=***&x=1"),
        ("http://cam/a?%2574oken%3Ds3cret", "http://cam/a?token=***"),
        ("http://proxy/?url=rtsp%3A%2F%2Fu%3As3cret%40cam", "http://proxy/?url=***"),
        (
            "rtsp://cam:554/user=admin&password=s3cret&stream=0.sdp",
            "rtsp://cam:554/user=admin&password=***&stream=0.sdp",
        ),
        ("rtsp://cam/user=admin_password=s3cret_channel=1", "rtsp://cam/user=admin_password=***"),
        ("<urlopen error http://me:s3cret@proxy:3128 refused>", "<urlopen error http://***@proxy:3128 refused>"),
        ("URL can't contain spaces. '/a b?token=s3cret' (found)", "URL can't contain spaces. '/a b?token=***' (found)"),
    ],
)
def test_credentials_of_addresses_are_hidden(address, shown):
    assert hide_credentials(address) == shown


@pytest.mark.parametrize(
    "text", ["clip.mp4", "http://cam/a@b.jpg", "http://cam:8080/live.mjpg?x=1", "/data/icon@2x.png", r"C:\clips\a.mp4"]
)
def test_addresses_without_credentials_are_unchanged(text):
    assert hide_credentials(text) == text


def test_log_messages_are_printable(caplog):
    logger = get_logger("yolov7_deploy.test_text")
    with caplog.at_level(logging.INFO, logger="yolov7_deploy.test_text"):
        logger.info("read %s in %d ms", "\x1b[2J\udcff", 3)
    assert caplog.messages == [r"read \x1b[2J\udcff in 3 ms"]


@pytest.mark.parametrize("text", ["~absent-user/x.jpg", "~\0/x.jpg", "~root\0", "x.jpg"])
def test_a_home_folder_that_does_not_exist_is_not_expanded(text):
    assert expand_user(text) == Path(text)
    assert expand_user("~") == Path.home()


@pytest.mark.parametrize("path", ["a\0b/c/d.jpg", "a\0b/c.jpg", "a\0b", "n" * 300 + "/x.pt", "n" * 100_000])
def test_a_path_that_no_file_can_have_has_no_similar_file(path):
    assert similar_file(Path(path)) is None


@pytest.mark.parametrize("text", ["a", "a:", "http://", "x://a:b@", "token=", "&", "%40", "\x1b", "\ud800", "a b:c@"])
@pytest.mark.parametrize("clean", [hide_credentials, printable, printable_line, json_escape])
def test_the_time_for_a_text_is_proportional_to_its_length(clean, text):
    started = time.process_time()
    clean(text * (300_000 // len(text)))
    assert time.process_time() - started < 2


def test_the_scheme_of_an_address_may_follow_letters_of_another_word():
    assert hide_credentials("see " + "a" * 100 + "http://me:secret@host/x") == "see " + "a" * 100 + "http://***@host/x"
