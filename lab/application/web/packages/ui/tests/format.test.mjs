import assert from "node:assert/strict";
import { test } from "node:test";
import { clock, mean } from "@grc/ui";

test("seconds are shown as on a clock", () => {
  assert.deepEqual([0, 75, 600].map(clock), ["0:00", "1:15", "10:00"]);
});

test("what was not scored has no mean", () => {
  assert.equal(mean([]), undefined);
  assert.equal(mean([3, 4, 4]), 3.7);
});
