"""The OpenAPI description is complete and true: schemathesis holds the application to it."""

from collections import Counter
from itertools import chain
from pathlib import Path

import schemathesis
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import events, from_schema

from spafl.bundle import Bundle
from tests.server_api.local_server import local_server

# what a request that fits the description may be answered beside 2xx: the description cannot tell which
# runs, rounds and bytes there are at that moment
EXPECTED = ["2xx", "304", "403", "404", "409", "410", "415", "416", "422", "503"]


for media_type in ("application/zip", "application/vnd.safetensors"):

    @schemathesis.serializer(media_type)
    def raw(context, value):
        return value if isinstance(value, bytes) else str(value).encode()


def configuration() -> SchemathesisConfig:
    return SchemathesisConfig.from_dict(
        {
            "generation": {"max-examples": 15, "deterministic": True, "no-shrink": True},
            "continue-on-failure": True,
            "checks": {
                "positive_data_acceptance": {"expected-statuses": EXPECTED},
                "not_a_server_error": {"expected-statuses": ["2xx", "3xx", "4xx", "503"]},
            },
        }
    )


def test_the_application_does_what_it_says(tmp_path: Path, bundle: Bundle) -> None:
    with local_server(tmp_path, bundle) as server:
        # event streams end after the events so far
        server.app.state.stopping.set()
        server.start(rounds=1000, target=1000)
        tokens = {"admin": server.admin, "enrolment": server.key, "device": server.enrol().headers}
        schema = schemathesis.openapi.from_asgi("/v1/openapi.json", server.app, config=configuration())

        operations = [result.ok() for result in schema.get_all_operations()]

        @schema.auth(refresh_interval=None)
        class Tokens:
            def get(self, case, context):
                security = context.operation.definition.raw.get("security", [])
                return tokens[next(iter(security[0]))] if security else {}

            def set(self, case, data, context):
                case.headers.update(data)

        checked, failures = Counter[str](), set[str]()
        for event in from_schema(schema).execute():
            if isinstance(event, events.NonFatalError | events.FatalError):
                failures.add(str(event.info if isinstance(event, events.NonFatalError) else event.exception))
            if isinstance(event, events.ScenarioFinished):
                for node in chain.from_iterable(event.recorder.checks.values()):
                    checked[event.label or ""] += 1
                    if node.failure_info is not None:
                        failures.add(
                            f"{event.label}: {node.failure_info.failure}\n{node.failure_info.code_sample}"
                        )
    assert not failures, "\n\n".join(sorted(failures))
    assert set(checked) >= {operation.label for operation in operations}, "an operation was not tried"
