import { Button, ScoreBadge } from "@grc/ui";
import { useState } from "react";
import type { Interview } from "./interview.js";
import { InterviewChat } from "./InterviewChat.js";

export function InterviewPage({ interview }: { interview: Interview }) {
  const [shown, setShown] = useState(true);
  return (
    <main>
      <h1>{interview.candidate}さんの面接</h1>
      {Object.entries(interview.scores).map(([label, scores]) => (
        <ScoreBadge key={label} label={label} scores={scores} />
      ))}
      <Button onPress={() => setShown(!shown)}>{shown ? "会話を隠す" : "会話を表示"}</Button>
      {shown && <InterviewChat messages={interview.messages} />}
    </main>
  );
}
