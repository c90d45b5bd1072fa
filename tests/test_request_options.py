"""What one request may choose: the two spellings, and every refusal."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_spec_plugins.errors import RequestError
from vllm_spec_plugins.request_options import DEFAULT, RequestOptions, read


def options(extra_args: dict[str, Any] | None) -> RequestOptions:
    return read(extra_args, verifiers_allowed=["lossless", "judge"], num_speculative_tokens=4)


@pytest.mark.parametrize(
    "extra_args", [None, {}, {"kv_transfer": 1, "spec_decoding": 2}, {"spec_decode": {}}]
)
def test_nothing_chosen(extra_args: dict[str, Any] | None) -> None:
    assert options(extra_args) is DEFAULT
    assert (DEFAULT.enabled, DEFAULT.verifier, DEFAULT.num_speculative_tokens) == (True, None, None)


@pytest.mark.parametrize(
    "extra_args",
    [
        {"spec_decode": {"enabled": False, "verifier": "judge", "num_speculative_tokens": 2}},
        {
            "spec_decode.enabled": False,
            "spec_decode.verifier": "judge",
            "spec_decode.num_speculative_tokens": 2,
        },
        # HTTP carries no booleans.
        {
            "spec_decode.enabled": 0,
            "spec_decode.verifier": "judge",
            "spec_decode.num_speculative_tokens": 2,
        },
        {
            "spec_decode": {"verifier": "judge"},
            "spec_decode.enabled": False,
            "spec_decode.num_speculative_tokens": 2,
            "other": {"enabled": True},
        },
    ],
)
def test_nested_dotted_and_both(extra_args: dict[str, Any]) -> None:
    chosen = options(extra_args)
    assert chosen.enabled is False
    assert chosen.verifier == "judge"
    assert chosen.num_speculative_tokens == 2


def test_enabled_as_one_over_http() -> None:
    assert options({"spec_decode.enabled": 1}).enabled is True


@pytest.mark.parametrize("number", [0, 4])
def test_the_whole_range_of_numbers(number: int) -> None:
    chosen = options({"spec_decode": {"num_speculative_tokens": number}})
    assert chosen.num_speculative_tokens == number


@pytest.mark.parametrize(
    ("extra_args", "phrases"),
    [
        (
            {"spec_decode": {"enable": False}},
            [
                '"spec_decode": unknown option "enable". Did you mean "enabled"?',
                "Allowed: enabled, num_speculative_tokens, verifier.",
            ],
        ),
        (
            {"spec_decode.verifyer": "lossless"},
            ['unknown option "verifyer". Did you mean "verifier"?'],
        ),
        (
            {"spec_decode": {"enabled": "no"}},
            ["\"enabled\": input should be a valid boolean, got 'no'."],
        ),
        # Only the dotted spelling comes from a schema without booleans.
        ({"spec_decode": {"enabled": 0}}, ['"enabled": input should be a valid boolean, got 0.']),
        ({"spec_decode.enabled": 2}, ['"enabled": input should be a valid boolean, got 2.']),
        (
            {"spec_decode": {"num_speculative_tokens": "2"}},
            ["\"num_speculative_tokens\": input should be a valid integer, got '2'."],
        ),
        (
            {"spec_decode": {"num_speculative_tokens": -1}},
            ['"num_speculative_tokens": input should be greater than or equal to 0, got -1.'],
        ),
        (
            {"spec_decode": {"num_speculative_tokens": 5}},
            ["num_speculative_tokens is 5, and this server drafts at most 4."],
        ),
        ({"spec_decode": {"verifier": 3}}, ['"verifier": input should be a valid string, got 3.']),
        (
            {"spec_decode": {"verifier": "losless"}},
            [
                'this server does not allow the verifier "losless". Did you mean "lossless"?',
                "Allowed: judge, lossless.",
            ],
        ),
        ({"spec_decode": False}, ['"spec_decode" must be an object like {"enabled": false}']),
        ({"spec_decode": None}, ['"spec_decode" must be an object', "got None"]),
        (
            {"spec_decode": {"enabled": True}, "spec_decode.enabled": False},
            ['"enabled" is given twice, in "spec_decode" and as "spec_decode.enabled".'],
        ),
        (
            {"spec_decode": {"enable": 1, "num_speculative_tokens": "x"}},
            ['unknown option "enable"', '"num_speculative_tokens": input should be'],
        ),
    ],
)
def test_refusals(extra_args: dict[str, Any], phrases: list[str]) -> None:
    with pytest.raises(RequestError) as caught:
        options(extra_args)
    for phrase in phrases:
        assert phrase in str(caught.value)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("spec_decod.enabled", "spec_decode.enabled"),
        ("specdecode.verifier", "spec_decode.verifier"),
        ("spec-decode", "spec_decode"),
    ],
)
def test_a_misspelt_key_is_not_taken_for_anothers(key: str, meant: str) -> None:
    with pytest.raises(RequestError, match=f'Unknown key "{key}". Did you mean "{meant}"'):
        options({key: 0})


def test_vllms_own_verification_leaves_no_choice_of_verifier() -> None:
    with pytest.raises(RequestError, match=r"does not allow .*\"lossless\"\. Allowed: \(none\)\."):
        read(
            {"spec_decode": {"verifier": "lossless"}},
            verifiers_allowed=(),
            num_speculative_tokens=4,
        )
