import { clock } from "@grc/ui";
import type { Message, Speaker } from "./interview.js";

const NAMES: Record<Speaker, string> = { interviewer: "面接官", candidate: "応募者" };

export function InterviewChat({ messages }: { messages: readonly Message[] }) {
  return (
    <ol>
      {messages.map((message) => (
        <li key={message.id}>
          <time>{clock(message.at)}</time> {NAMES[message.speaker]}: {message.text}
        </li>
      ))}
    </ol>
  );
}
