export { Button } from "./Button.js";
export { clock, mean } from "./format.js";
export { ScoreBadge } from "./ScoreBadge.js";
