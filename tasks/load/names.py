"""What the load's users do, by the names under which it is measured. Locust's program reads them too: it imports
nothing of this project but this."""

LOG_IN, CREATE, ASK, READ = NAMES = ("ログイン", "面接セッション作成", "AI応答", "データ読み取り")
LIMITED = "AI応答 (利用制限 429)"
