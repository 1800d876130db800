"""The checklists' words are the manual's, and the drill has no others."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from datetime import UTC, date, datetime
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]

from flows.recovery.drills import checklist as drill
from flows.recovery.drills.phases import MINUTES
from flows.routine.checklist import forms
from flows.routine.checklist.history import Past
from flows.routine.checklist.questions import LAUNCH
from flows.routine.checklist.run import run_checklist
from flows.routine.checklist.texts import DRILL, NAMES, checklist
from runbook.errors import OpsError, RunbookFailed
from runbook.language.say import catalogue, use_language
from tasks.reports.past import FiledReport
from tests.test_deployments import JAPANESE

ROOT = Path(__file__).parents[3]
# §8.4, word for word.
MANUAL = """
## 事前準備（1週間前）
- [ ] 訓練日時の調整・通知
- [ ] 訓練環境の準備
- [ ] バックアップの最新化確認
- [ ] 参加者への手順書配布

## 訓練当日（4時間）

### フェーズ1: 障害検知（15分）
- [ ] 監視アラートの発火確認
- [ ] オンコール対応の確認
- [ ] エスカレーション手順の確認

### フェーズ2: 初動対応（30分）
- [ ] インシデント宣言
- [ ] ステークホルダー通知
- [ ] 影響範囲の特定
- [ ] 復旧戦略の決定

### フェーズ3: データリストア（1時間）
- [ ] データベースバックアップからのリストア
- [ ] Redisデータのリストア
- [ ] ファイルシステムのリストア
- [ ] データ整合性確認

### フェーズ4: サービス復旧（1時間）
- [ ] アプリケーションデプロイ
- [ ] マイグレーション実行
- [ ] サービス起動
- [ ] ヘルスチェック

### フェーズ5: 動作確認（45分）
- [ ] ログイン機能確認
- [ ] 面接セッション作成確認
- [ ] AI応答確認
- [ ] データ読み書き確認

### フェーズ6: 振り返り（30分）
- [ ] タイムライン作成
- [ ] 問題点の洗い出し
- [ ] 改善アクションの決定
- [ ] ドキュメント更新

## 訓練後（1週間以内）
- [ ] 訓練レポート作成
- [ ] 改善アクションの実施
- [ ] 手順書の更新
- [ ] 次回訓練日の設定
"""
# §7.4, group 5.
COSTS = ("クラウドリソース使用量確認", "AIトークン使用量分析", "未使用リソース削減", "コスト最適化施策実施")
# Of §7.4, group 2, what the yearly audit looks at again.
SECURITY = ("アクセスログレビュー", "異常なログインパターン確認", "API使用量の異常検知")


def test_the_drill_s_checklists_are_the_manual_s_word_for_word() -> None:
    lines = [line for line in MANUAL.splitlines() if line and "訓練当日" not in line]
    ours = []
    for name in DRILL:
        for phase in checklist(name).phases:
            ours += [f"{'###' if phase.minutes else '##'} {phase.heading_ja}", *(f"- [ ] {b.ja}" for b in phase.boxes)]
    assert ours == lines
    assert [len(checklist(name).boxes) for name in DRILL] == [4, 23, 4]


def test_the_day_is_the_manual_s_four_hours() -> None:
    assert sum(phase.minutes for phase in checklist("drill_day").phases) == 4 * 60
    assert MINUTES == (15, 30, 60, 60, 45, 30)


def test_the_drill_ticks_the_same_boxes() -> None:
    assert [box.text for box in drill.BOXES] == [box.en for name in DRILL for _, box in checklist(name).boxes]


def test_the_reviews_hold_the_manual_s_boxes() -> None:
    assert [box.ja for box in checklist("cost_review").phases[0].boxes] == list(COSTS)
    assert set(SECURITY) <= {box.ja for _, box in checklist("security_audit").boxes}


@pytest.mark.parametrize("name", NAMES)
def test_every_box_can_be_asked(name: str) -> None:
    found, said = checklist(name), catalogue("ja").translate  # type: ignore[arg-type]
    assert len({phase.id for phase in found.phases}) == len(found.phases)
    for phase in found.phases:
        assert len({box.id for box in phase.boxes}) == len(phase.boxes)
        for box in phase.boxes:
            assert box.how, "how it is done, or proven"
            assert not JAPANESE.search(box.en + box.how)
            assert said(box.en) == box.ja, "make messages"
            assert said(box.how) == box.how_ja
        assert said(phase.heading) == phase.heading_ja
    assert any(box.must for _, box in found.boxes)


def test_a_form_is_in_the_environment_s_language_and_its_report_in_english() -> None:
    """Answers given in one language are filled in in the other; so are those of older reports."""
    phase = checklist("drill_preparation").phases[0]
    box = {"result": "未実施", "who": "", "note": "まだ決まらない", "link": ""}
    given = {"who": "山田", **{one.id: box for one in phase.boxes}}
    with use_language("ja"):
        model = forms.form(phase, "", {}, {})
        schema = model.model_json_schema()
        sent = forms.answers(phase, model.model_validate(given), datetime.now(UTC))
        assert forms.problems(sent) == []
        (wrong, *_) = forms.problems([replace(one, note="") for one in sent])
    assert schema["properties"]["date"]["title"] == "☐ 訓練日時の調整・通知 *"
    assert "カレンダーの招待" in schema["properties"]["date"]["description"]
    fields = schema["$defs"]["Box_date"]["properties"]
    assert fields["result"]["enum"] == ["実施", "未実施", "対象外"]
    assert all(JAPANESE.search(one["title"] + one["description"]) for one in fields.values())
    assert wrong == "「訓練日時の調整・通知」: 未実施の理由をメモに書いてください"
    assert {one.result for one in sent} == {forms.NOT_DONE}
    english = forms.form(phase, "", {}, forms.fitting(phase, given)).model_json_schema()
    assert english["$defs"]["Box_date"]["properties"]["result"]["default"] == "not carried out"
    assert not JAPANESE.search(json.dumps(english["properties"]["date"], ensure_ascii=False))

    rows = {
        ("事前準備", "訓練環境の準備"): ["事前準備", "訓練環境の準備", "未実施", "佐藤", "2026-01-01 10:00", "", ""]
    }
    filed = FiledReport(Path("x.json"), {"finished": "2026-01-01T10:00:00+09:00"})
    past = Past(filed, rows)
    answer = past.answer(phase, phase.boxes[1])
    assert answer
    assert answer[2] == forms.NOT_DONE


def test_until_when() -> None:
    launched, drill_day = date(2026, 3, 1), "2026-03-31"
    assert checklist("drill_preparation").due(launched, "", drill_day) == date(2026, 3, 24)
    assert checklist("drill_day").due(launched, "", drill_day) == date(2026, 3, 31)
    assert checklist("drill_follow_up").due(launched, "", drill_day) == date(2026, 4, 7)
    assert checklist("drill_follow_up").due(launched, "2026-04-02", drill_day) == date(2026, 4, 2)
    assert checklist("security_audit").due(launched, "", drill_day) == date(2026, 3, 31)
    with pytest.raises(OpsError, match="drill_date “someday” is not a date"):
        checklist("drill_day").due(launched, "", "someday")


def test_a_run_that_could_not_wait_says_so(small: str) -> None:
    """Called as a function, or by another flow, it would never be answered."""
    with pytest.raises(RunbookFailed) as failed:
        run_checklist.fn(small, "drill_day")
    (finding,) = failed.value.report.findings
    assert "has no deployment" in finding.name
    assert finding.hint == LAUNCH


def test_what_a_box_refers_to_is_there() -> None:
    """`how` names runbooks: a person must find them in the UI."""
    runbook, named = re.compile(r"(?<![\w/.-])[a-z]+(?:-[a-z]+)+(?![\w/]|\.\w)"), set[str]()
    for box in (box for name in NAMES for _, box in checklist(name).boxes):
        named |= (own := set(runbook.findall(box.how_ja)))
        assert own <= set(runbook.findall(box.how)), "the same in English"
    entries = yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))["deployments"]
    deployed = {entry["entrypoint"].rpartition(".")[2].replace("_", "-") for entry in entries}
    assert named <= deployed, "no such runbook"
