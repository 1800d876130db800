"""The users of a load test, for `python -m locust -f`. A flow never imports this module: Locust replaces the sockets
and threads of the process.

`OPS_LOAD_STEPS`: their requests (`[application.load_test]`, JSON). `OPS_LOAD_VALUES`: the values of its names.
`OPS_LOAD_AI_ANSWERS`: the most AI requests of all users together, as each answer costs money.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import uuid

from locust import HttpUser, between, task

from blocks.http_step import TEXT, LoadStep, StepFailed
from tasks.load.names import limited

TOO_MANY = 429

_questions = itertools.count(1)
_most = int(os.environ.get("OPS_LOAD_AI_ANSWERS", "0"))
_steps = [LoadStep(**step) for step in json.loads(os.environ.get("OPS_LOAD_STEPS", "[]"))]
_values = json.loads(os.environ.get("OPS_LOAD_VALUES", "{}"))


class LoadUser(HttpUser):
    """Sends every step once in order, so that each is measured; then random steps by their weights."""

    wait_time = between(0.2, 1.0)

    def on_start(self) -> None:
        self.values = {**_values, "random": uuid.uuid4().hex}
        for step in _steps:
            self.send(step)

    @task
    def one(self) -> None:
        self.send(random.choices(_steps, [step.weight for step in _steps])[0])  # noqa: S311 - no secret

    def send(self, step: LoadStep) -> None:
        """Send a step, unless it needs a value that no answer had. Its text is new each time: a cached answer measures
        no AI."""
        if not step.used <= {*self.values, TEXT} or (step.ai and next(_questions) > _most):
            return
        values = {**self.values, TEXT: f"負荷試験 (interview-ops) {uuid.uuid4()}"}
        request = step.request(values)
        with self.client.request(
            request.method,
            request.path,
            name=step.title,
            timeout=step.seconds,
            catch_response=True,
            **request.arguments,
        ) as answer:
            if answer.status_code == TOO_MANY and step.ai:
                answer.request_meta["name"] = limited(step.title)  # the limit works, but there is no answer to measure
                answer.success()
                return
            if answer.status_code not in step.status:
                wanted = " or ".join(map(str, step.status))
                answer.failure(f"{answer.status_code or 'no answer'} instead of {wanted}")
                return
            try:
                self.values |= step.judge(answer.status_code, answer.content, values)
            except StepFailed as error:
                answer.failure(str(error))
