"""`verify` itself, in float32 as served: chi-square over 16 tokens and 200,000 texts.

A right verifier fails a test here with probability 1e-6 over fresh seeds; seeds are fixed.
"""

from __future__ import annotations

import pytest
import torch

from vllm_spec_plugins.testing.chi_square import compare
from vllm_spec_plugins.testing.controls import negative_controls, position_keyed
from vllm_spec_plugins.testing.guarantees import (
    Case,
    assert_lossless,
    build_verifier,
    check_texts,
    simulation_cases,
)
from vllm_spec_plugins.verifier import Verification, Verifier, VerifyInput

TOKEN = build_verifier("lossless", '{"rule": "token"}')
BLOCK = build_verifier("lossless", '{"rule": "block"}')
RULES = pytest.mark.parametrize("verifier", [TOKEN, BLOCK], ids=["token", "block"])
CASES = {case.name: case for case in simulation_cases()}


@RULES
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_texts_follow_the_target(verifier: Verifier, case: Case) -> None:
    wrong = check_texts(verifier, case)
    assert not wrong, "\n".join(wrong)


@RULES
@pytest.mark.parametrize("mistake", negative_controls(TOKEN))
def test_each_mistake_is_caught(verifier: Verifier, mistake: str) -> None:
    broken = negative_controls(verifier)[mistake]
    # The bonus token only comes where the whole draft stands, which an adversary prevents.
    name = "K = 1" if mistake.startswith("bonus") else "adversarial draft, K = 3"
    with pytest.raises(AssertionError, match="total variation"):
        # The enumeration would see some of these too; here the texts must show it.
        assert_lossless(_only_verify(broken), cases=[CASES[name]])


def _only_verify(verifier: Verifier) -> Verifier:
    """The verifier without the means to enumerate it."""

    class Opaque(Verifier):
        guarantee = verifier.guarantee

        def verify(self, batch: VerifyInput) -> Verification:
            return verifier.verify(batch)

    return Opaque(verifier.options, verifier.context)


def test_numbers_must_belong_to_steps_for_the_block_rule() -> None:
    """Keyed by sequence position they return in the next step, which only block looks at."""
    case = CASES["compact draft probabilities, K = 2"]
    assert not check_texts(position_keyed(TOKEN), case)
    assert check_texts(position_keyed(BLOCK), case)


def test_message_states_the_noise_floor() -> None:
    law = torch.full((16,), 1 / 16)
    fit = compare("token 1", torch.full((16,), 12_500), law)
    assert fit.p_value == pytest.approx(1)
    assert fit.distance == 0
    # 16 bins, 200,000 samples: half the sum of sqrt(2 p (1 - p) / (pi n)).
    assert fit.noise_floor == pytest.approx(0.003455, abs=1e-5)
    assert "is expected from noise" in str(fit)


def test_false_alarms_are_as_rare_as_stated() -> None:
    """p-values of right counts are uniform: 5 % of them below 0.05."""
    generator = torch.Generator().manual_seed(0)
    law = torch.softmax(torch.randn(16, generator=generator), 0)
    below = 0
    for _ in range(2000):
        drawn = torch.multinomial(law, 5000, replacement=True, generator=generator)
        below += compare("", torch.bincount(drawn, minlength=16), law).p_value < 0.05
    assert 60 < below < 140  # 100 expected, four standard deviations


def test_impossible_token_is_an_alarm_however_rare() -> None:
    law = torch.tensor([0.5, 0.5, 0.0])
    assert compare("", torch.tensor([100_000, 99_999, 1]), law).p_value == 0
