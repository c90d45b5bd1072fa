"""pytest plugin: names the verifier that the losslessness kit is to examine.

Loaded in every test run of an environment that has this package, so it imports nothing
until the fixture is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from vllm_spec_plugins.verifier import Verifier


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vllm-spec-plugins")
    group.addoption(
        "--spec-verifier",
        metavar="NAME",
        help="verifier to examine: a registered name, or module:Class",
    )
    group.addoption(
        "--spec-verifier-options",
        metavar="JSON",
        default="{}",
        help="its options, as they would stand in --speculative-config",
    )


@pytest.fixture(scope="session")
def verifier_under_test(request: pytest.FixtureRequest) -> Verifier:
    """The verifier named by `--spec-verifier`, built on toy facts. Skips when none is named.

    A name or an option that is wrong ends the run: one message, not one for every test.
    """
    name: Any = request.config.getoption("--spec-verifier")
    options: Any = request.config.getoption("--spec-verifier-options")
    if name is None:
        pytest.skip("name a verifier with --spec-verifier")
    from vllm_spec_plugins.errors import SpecPluginsError
    from vllm_spec_plugins.testing.guarantees import build_verifier

    try:
        return build_verifier(name, options)
    except SpecPluginsError as error:
        pytest.exit(f"--spec-verifier {name}: {error}", returncode=pytest.ExitCode.USAGE_ERROR)
