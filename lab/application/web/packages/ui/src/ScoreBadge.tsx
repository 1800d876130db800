import { mean } from "./format.js";

interface ScoreBadgeProps {
  label: string;
  scores: readonly number[];
}

export function ScoreBadge({ label, scores }: ScoreBadgeProps) {
  const value = mean(scores);
  return (
    <span className="score">
      {label}: {value === undefined ? "未評価" : value.toFixed(1)}
    </span>
  );
}
