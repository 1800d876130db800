export type Speaker = "interviewer" | "candidate";

export interface Message {
  id: string;
  speaker: Speaker;
  text: string;
  /** Seconds since the interview began. */
  at: number;
}

export interface Interview {
  candidate: string;
  messages: readonly Message[];
  scores: Readonly<Record<string, readonly number[]>>;
}
