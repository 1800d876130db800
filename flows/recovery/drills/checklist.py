"""The training checklist of §8.4: what a machine has checked in a drill, and what a person must."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from runbook.report import Report


class Box(NamedTuple):
    """One box: its part of the checklist, its text, and the key by which a drill says that a machine has checked it
    (empty: only a person can)."""

    part: str
    text: str
    key: str = ""


_PARTS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "事前準備（1週間前）": (
        ("訓練日時の調整・通知", ""),
        ("訓練環境の準備", "environment"),
        ("バックアップの最新化確認", "backups"),
        ("参加者への手順書配布", ""),
    ),
    "フェーズ1: 障害検知": (
        ("監視アラートの発火確認", "alarm"),
        ("オンコール対応の確認", "on-call"),
        ("エスカレーション手順の確認", "escalation"),
    ),
    "フェーズ2: 初動対応": (
        ("インシデント宣言", "declared"),
        ("ステークホルダー通知", "stakeholders"),
        ("影響範囲の特定", "scope"),
        ("復旧戦略の決定", "strategy"),
    ),
    "フェーズ3: データリストア": (
        ("データベースバックアップからのリストア", "database"),
        ("Redisデータのリストア", "redis"),
        ("ファイルシステムのリストア", "files"),
        ("データ整合性確認", "integrity"),
    ),
    "フェーズ4: サービス復旧": (
        ("アプリケーションデプロイ", "deployed"),
        ("マイグレーション実行", "migrations"),
        ("サービス起動", "services"),
        ("ヘルスチェック", "health"),
    ),
    "フェーズ5: 動作確認": (
        ("ログイン機能確認", "ログイン"),
        ("面接セッション作成確認", "面接セッション作成"),
        ("AI応答確認", "AI応答"),
        ("データ読み書き確認", "データ読み書き"),
    ),
    "フェーズ6: 振り返り": (
        ("タイムライン作成", "timeline"),
        ("問題点の洗い出し", "problems"),
        ("改善アクションの決定", ""),
        ("ドキュメント更新", ""),
    ),
    "訓練後（1週間以内）": (
        ("訓練レポート作成", "report"),
        ("改善アクションの実施", ""),
        ("手順書の更新", ""),
        ("次回訓練日の設定", ""),
    ),
}
BOXES = tuple(Box(part, text, key) for part, boxes in _PARTS.items() for text, key in boxes)


def tell(report: Report, done: Mapping[str, str]) -> None:
    """Every box; and once more, by themselves, those that nobody has checked yet."""
    rows = [(box.part, _mark(box, done), box.text, _who(box, done)) for box in BOXES]
    report.table("Training checklist (§8.4)", ("part", "", "box", "checked by"), rows)
    open_boxes = [(box.part, box.text, "a person must" if not box.key else "this scenario does not touch it")
                  for box in BOXES if box.key not in done]  # fmt: skip
    report.table("Not checked in this drill", ("part", "what", "why"), open_boxes)


def _mark(box: Box, done: Mapping[str, str]) -> str:
    return "☑" if box.key in done else "☐"


def _who(box: Box, done: Mapping[str, str]) -> str:
    if box.key in done:
        return f"machine: {done[box.key]}"
    return "not checked: this scenario does not touch it" if box.key else "not checked: a person must"
