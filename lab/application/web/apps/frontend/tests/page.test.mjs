import assert from "node:assert/strict";
import { test } from "node:test";
import { createElement } from "react";
import { renderToStaticMarkup } from "react-dom/server";
import { InterviewPage } from "../dist/InterviewPage.js";

test("the page shows who said what, and the scores", () => {
  const interview = {
    candidate: "山田",
    messages: [{ id: "1", speaker: "candidate", text: "よろしくお願いします", at: 75 }],
    scores: { 論理性: [4, 5] },
  };
  const page = renderToStaticMarkup(createElement(InterviewPage, { interview }));
  assert.match(page, /1:15<\/time> 応募者: よろしくお願いします/);
  assert.match(page, /論理性: 4\.5/);
});
