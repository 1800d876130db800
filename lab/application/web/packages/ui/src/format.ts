/** Seconds as people read them on a clock: 75 is "1:15". */
export function clock(seconds: number): string {
  const whole = Math.max(0, Math.floor(seconds));
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
}

/** The mean of scores, to one decimal; undefined where nothing was scored. */
export function mean(scores: readonly number[]): number | undefined {
  if (scores.length === 0) {
    return undefined;
  }
  const sum = scores.reduce((total, score) => total + score, 0);
  return Math.round((sum / scores.length) * 10) / 10;
}
