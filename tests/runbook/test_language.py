"""A page in the reader's language: a finished text finds its message, its values stay, what is unknown stays English."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from runbook.errors import RunbookFailed
from runbook.guard.permit import Act
from runbook.language import catalogue, say
from runbook.language.catalogue import Catalogue, Template
from runbook.page.markdown import fenced
from runbook.report import Evidence
from runbook.run import runbook
from tests.runbook.system import EFFECT, System

VALUE = re.compile(r"\{(\w+)\}")
JAPANESE = "[ぁ-んァ-ヶ一-龥]"
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
    "takes no writes": "が書き込みを受け付けません",
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
    "Redis at 10.0.0.1:6379 takes no writes": "Redis at 10.0.0.1:6379 が書き込みを受け付けません",
    "3 files could not be read": "3 個のファイルを読み取れません",
    "1 file could not be read": "1 個のファイルを読み取れません",
    "the database's pooler did not answer": "データベースのプーラが応答しません",
    "the lock did not answer": "lockが応答しません",  # one word within a text may be a name
    "nothing is lost. wait for web": "失われるデータはありません。web を待ってください",
    "no replica goes back to 01:59": "no replica goes back to 01:59",
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


def test_each_message_has_the_values_of_its_text_once() -> None:
    """A value that a translation leaves out or repeats is a fact less, or a wrong one."""
    for message, translation in catalogue.read("ja").items():
        values = VALUE.findall(message)
        if message != translation:  # a command may repeat one
            assert len(values) == len(set(values)), message
            assert set(values) <= {"s", *VALUE.findall(translation)}, (message, translation)


@pytest.mark.parametrize("sample", ["X7", "7", "X7 Y8"])
def test_a_text_made_of_a_message_has_the_translation_of_that_message(sample: str) -> None:
    """Every message with values, filled in, is taken for no other one whose translation differs, and each value is
    where it belongs."""
    messages = catalogue.read("ja")
    known, wrong = Catalogue(messages), list[str]()
    for message, translation in messages.items():
        own = Template.of(message, translation)
        if not own.names or message == translation or (" " in sample and " " in own.parts[1:-1]):
            continue
        values = {name: _sample(name, sample, own) for name in own.names}
        made, expected = _filled(message, values), _filled(translation, values)
        expected = expected.replace("7 backups", known.translate("7 backups"))
        if (found := known.translate(made)) not in (expected, " ".join(expected.split())):
            wrong.append(f"{message}: {made!r} is {found!r}, not {expected!r}")
    assert not wrong, "\n".join(wrong)


def _filled(message: str, values: Mapping[str, str]) -> str:
    return VALUE.sub(lambda found: values.get(found[1], found[0]), message)


def _sample(name: str, sample: str, of: Template) -> str:
    kind = name.rstrip("0123456789")
    number = of.names.index(name)
    if kind in SAMPLES or kind.endswith("ratio"):
        return SAMPLES.get(kind, "7 %")
    if number and not of.parts[number]:  # it follows another value directly: a clause
        return f" ({sample})"
    return "X7" if kind == "kind" else sample


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


def test_two_values_with_nothing_between_them_are_a_value_and_a_clause() -> None:
    messages = {
        "{what} expired at {until}{why}": "{what} は {until} に期限切れ{why}",
        "others ({at_least}{number} prefixes)": "その他 ({at_least}{number} プレフィックス)",
        "at least": "少なくとも",
    }
    known = Catalogue(messages)
    assert known.translate("x expired at 20:00 today") == "x は 20:00 today に期限切れ"
    assert known.translate("x expired at 20:00 today (peak)") == "x は 20:00 today に期限切れ (peak)"
    assert known.translate("others (at least 7 prefixes)") == "その他 (少なくとも7 プレフィックス)"


def test_a_number_is_one_of_the_message_that_expects_a_number() -> None:
    known = Catalogue(
        {"{rows} in {len} tables": "{rows} 行", "{size} in {len} tables": "{size}", "{number} row": "{number} 行"}
    )
    assert known.translate("7.0 MB in 3 tables") == "7.0 MB"
    assert known.translate("7 in 3 tables") == "7 行"
    assert known.translate("1 row") == "1 行", "a short noun after a number"


class _ClearedByAnotherThread(dict[tuple[str, bool], str]):
    """What was translated is forgotten at the worst moment."""

    def __contains__(self, key: object) -> bool:
        found = super().__contains__(key)
        self.clear()
        return found

    def __setitem__(self, key: tuple[str, bool], value: str) -> None:
        super().__setitem__(key, value)
        self.clear()


def test_a_thread_that_clears_what_was_translated_disturbs_no_other_one() -> None:
    known = Catalogue(MESSAGES)
    known._known = _ClearedByAnotherThread()
    for _ in range(2):
        assert known.translate("3 files could not be read") == "3 個のファイルを読み取れません"


@pytest.mark.parametrize("damage", ["catalogue", "text"])
def test_a_translation_that_fails_takes_no_report_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    if damage == "catalogue":
        (tmp_path / "ja").mkdir()
        (tmp_path / "ja" / "flows.po").write_text('msgid "no downtime"\nmsgstr "\\x"\n')
        monkeypatch.setattr(catalogue, "DIRECTORY", tmp_path)
        monkeypatch.setattr(say, "catalogue", functools.cache(say.catalogue.__wrapped__))
    else:
        monkeypatch.setattr(Catalogue, "translate", lambda *_, **__: 1 / 0)
    with runbook("Full restore", System(tmp_path / "reports", language="ja"), "") as report:
        report.warn("lock", "run it again", value="the database is being restored")
    assert report.path
    assert report.headline == report.sentence()
    assert "run it again" in report.path.with_suffix(".md").read_text()
    assert [one for one in caplog.messages if "is not shown in the language ja" in one]


def test_a_report_quotes_a_failed_runbook_in_english_and_prefect_in_the_environment_s_language(tmp_path: Path) -> None:
    target = System(tmp_path, language="ja")
    with runbook("DR drill", target) as report:
        with pytest.raises(RunbookFailed) as caught, runbook("Full restore", target) as inner:
            inner.fail("lock", "run it again")
        report.warn("restore", caught.value.hint, value=caught.value.message)
    assert "ロック" in str(caught.value)
    assert report.path
    assert not re.search(JAPANESE, report.path.read_text())


def test_text_of_a_report_is_translated_line_by_line_and_what_a_program_printed_is_not(tmp_path: Path) -> None:
    with runbook("Start here", System(tmp_path, language="ja")) as report:
        lines = "1. no downtime: `x`\n2. Nothing has changed.\n- Nothing has changed.\n| Nothing has changed. |"
        report.attach(Evidence("List", text=lines))
        report.attach(Evidence("Output", text=f"Nothing has changed.\n{fenced('Nothing has changed.')}"))
        report.attach(Evidence("Log", text=fenced("Nothing has changed.\n- Nothing has changed.")))
    assert report.path
    page, said = report.path.with_suffix(".md").read_text(), "何も変更していません。"
    assert f"\n2. {said}\n- {said}\n| Nothing has changed. |" in page
    assert f"{said}\n```\nNothing has changed.\n```" in page
    assert "```\nNothing has changed.\n- Nothing has changed.\n```" in page


def test_environments_beside_each_other_keep_their_languages(tmp_path: Path) -> None:
    """One process, one report in each language, one inside the other and each in a thread."""

    def reported(language: say.Language, inside: say.Language | None = None) -> bool:
        with runbook("Full restore", System(tmp_path / str(language) / str(inside), language=language)) as report:
            if inside:
                assert reported(inside) == (inside == "ja")
                assert bool(re.search(JAPANESE, say.say("Nothing has changed."))) == (language == "ja"), "afterwards"
            report.warn("lock", "run it again")
        return bool(re.search(JAPANESE, report.headline))

    pairs: list[tuple[say.Language, say.Language | None]] = [("ja", "en"), ("en", "ja"), ("ja", None), ("en", None)]
    with ThreadPoolExecutor(len(pairs)) as pool:
        assert list(pool.map(lambda pair: reported(*pair), pairs)) == [True, False, True, False]


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
