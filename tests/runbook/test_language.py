"""A page in the reader's language: a finished text finds its message, its values stay, what is unknown stays English."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from runbook.guard.permit import Act
from runbook.language import catalogue, say
from runbook.language.catalogue import Catalogue, Template
from runbook.run import runbook
from tests.runbook.system import EFFECT, System

VALUE = re.compile(r"\{(\w+)\}")
MESSAGES = {
    "nothing is lost": "失われるデータはありません",
    "no downtime": "停止時間なし",
    "{what} goes back to {at}": "{what} は {at} の状態に戻ります",
    "undo: {undo}": "元に戻す方法: {undo}",
    "{count} file{s} could not be read": "{count} 個のファイルを読み取れません",
    "the {part} did not answer": "{part}が応答しません",
    "database's pooler": "データベースのプーラ",
    "wait for {name}": "{name} を待ってください",
    "lock": "ロック",
    "{errors} of {requests} requests failed{cut}": "リクエスト {requests} 件中 {errors} 件が失敗{cut}",
    "{error_ratio} of {count} requests failed": "リクエスト {count} 件のうち {error_ratio} が失敗",
}
SAMPLES = {**dict.fromkeys(("len", "number", "count", "sum"), "7"), "size": "7.0 MB", "counted": "7 backups"}
SAMPLES |= dict.fromkeys(("duration", "rounded", "about"), "7.0 s")
SHOWN = {"Nothing has changed.": "何も変更していません", "Findings": "検出事項", "lock": "ロック"}
TEXTS = {
    "no downtime": "停止時間なし",
    "app_db goes back to 01:59 (+09:00)": "app_db は 01:59 (+09:00) の状態に戻ります",
    "app_db goes back to 01:59 (+09:00); nothing is lost; no downtime; undo: undo-restore": (
        "app_db は 01:59 (+09:00) の状態に戻ります; 失われるデータはありません; 停止時間なし; 元に戻す方法: undo-restore"
    ),
    "7 of 20 requests failed": "リクエスト 20 件中 7 件が失敗",
    "0.5 % of 20 requests failed": "リクエスト 20 件のうち 0.5 % が失敗",
    "3 files could not be read": "3 個のファイルを読み取れません",
    "1 file could not be read": "1 個のファイルを読み取れません",
    "the database's pooler did not answer": "データベースのプーラが応答しません",
    "the lock did not answer": "lockが応答しません",  # one word within a text may be a name
    "nothing is lost. wait for web": "失われるデータはありません。web を待ってください",
    "ls: cannot access {name}": "ls: cannot access {name}",
    "no  downtime": "停止時間なし",
    "人が読む": "人が読む",
    "": "",
}


@pytest.mark.parametrize(("text", "expected"), TEXTS.items(), ids=range(len(TEXTS)))
def test_a_finished_text_finds_its_message(text: str, expected: str) -> None:
    assert Catalogue(MESSAGES).translate(text) == expected


def test_one_word_is_translated_as_a_name_of_the_page_only() -> None:
    known = Catalogue(MESSAGES)
    assert known.translate("lock") == "lock"
    assert known.translate("lock", words=True) == "ロック"


def test_every_message_is_read_and_its_translation_has_no_value_of_its_own() -> None:
    messages = catalogue.read("ja")
    assert len(messages) > 1000
    for message, translation in messages.items():
        assert set(VALUE.findall(translation)) <= set(VALUE.findall(message)), message
        assert message == " ".join(message.split())


def test_a_text_made_of_a_message_is_translated_by_it_or_by_one_that_explains_more() -> None:
    """Each message with values, filled in: none is taken for one that explains less of it."""
    messages = {message: text for message, text in catalogue.read("ja").items() if message != text}
    known = Catalogue(messages)
    for message, translation in messages.items():
        own = Template.of(message, translation)
        if own.names and own.words > 1:
            made = VALUE.sub(_sample, message)
            assert known.translate(made) != made, message


def _sample(value: re.Match[str]) -> str:
    name = value[1].rstrip("0123456789")
    return SAMPLES.get(name, "7 %" if name.endswith("ratio") else "X7")


def test_catalogues_are_read_as_gettext_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long messages over several lines, quotes, fuzzy and empty ones: the same as Babel's reader."""
    from babel.messages.pofile import read_po

    for path in sorted((catalogue.DIRECTORY / "ja").glob("*.po")):
        (tmp_path / "ja").mkdir(exist_ok=True)
        target = tmp_path / "ja" / "one.po"
        target.write_bytes(path.read_bytes())
        monkeypatch.setattr(catalogue, "DIRECTORY", tmp_path)
        with path.open("rb") as file:
            theirs = {str(one.id): str(one.string) for one in read_po(file) if one.id and one.string and not one.fuzzy}
        assert catalogue.read("ja") == theirs, path.name


@pytest.mark.parametrize("template", ["{a} {b}{c} (owner {d})", "run {a} with {b}, or {c} with {d}{e} again"])
@pytest.mark.timeout(60)
def test_a_long_text_that_fits_nowhere_is_left_in_a_moment(template: str) -> None:
    """What a program printed stands in findings. A pattern that tries every end of each value takes minutes."""
    text = "run it with a (owner b, or " * 70
    assert Template.of(template, "").values(text) is None
    assert Catalogue({template: "…"}).translate(text) == text


def test_outside_an_environment_texts_are_english() -> None:
    assert say.say("no downtime") == "no downtime"


def test_a_report_s_page_headline_and_state_are_japanese_its_json_and_log_english(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    target = System(tmp_path, language="ja")
    with runbook("Full restore", target, "") as report:
        report.plan("rename", "grc_db__new becomes grc_db", seconds=1)
        report.warn("lock", "run it again", value="the database is being restored")
        report.permit(Act("swap database", "grc_db"), effect=EFFECT)
    assert report.path
    page, filed = report.path.with_suffix(".md").read_text(), report.path.read_text()
    for english, japanese in SHOWN.items():
        assert japanese in page, english
        assert english not in page
        assert japanese not in filed
    assert report.headline.startswith("PLANNED: ")
    assert "何も変更していません" in report.headline
    assert '"hint": "run it again"' in filed
    assert report.titled_sentence.endswith(report.headline)
    assert report.sentence() in caplog.text
    assert report.headline not in caplog.text
    assert "Nothing has changed." in report.sentence(), "outside its block it is English"
