"""The examples of the documentation run, and do what the pages say."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vllm_spec_plugins.triton_kernels.verify_fused import verify_fused

from vllm_spec_plugins.length_control import Fixed, LengthControlOptions
from vllm_spec_plugins.proposer import DraftInput
from vllm_spec_plugins.registry import Kind, contract_problem, installed
from vllm_spec_plugins.testing import toy_context
from vllm_spec_plugins.testing.enumeration import enumerated_input
from vllm_spec_plugins.testing.toy_problems import random_problem

ROOT = Path(__file__).resolve().parent.parent
DOCS, BENCHMARKS = ROOT / "docs", ROOT / "benchmarks"


def run_examples(page: str) -> dict[str, Any]:
    """Every Python block of a page, one after the other, in one namespace."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)
    assert blocks
    names: dict[str, Any] = {"__name__": page}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    return names


def test_proposer_page() -> None:
    names = run_examples("writing_a_proposer.md")
    last_time = names["LastTime"]
    assert contract_problem(Kind.PROPOSER, last_time) is None
    proposer = last_time(last_time.Options(), toy_context())
    history = np.array([[1, 2, 3, 4, 1, 99], [5, 6, 7, 8, 9, 99]], dtype=np.int32)
    batch = DraftInput(
        request_ids=["a", "b"],
        token_history=history,
        rows=np.array([0, 1]),
        num_tokens=np.array([5, 5]),
        num_prompt_tokens=np.array([1, 1]),
        max_draft=np.array([2, 4]),
        temperatures=np.zeros(2, dtype=np.float32),
        streams=np.zeros(2, dtype=np.int64),
        hidden_states=None,
        cache_salts=None,
        length_control=None,  # pyright: ignore[reportArgumentType]  # never asked
    )
    draft = proposer.propose(batch)
    assert np.asarray(draft.token_ids).tolist() == [[2, 3, -1, -1], [-1, -1, -1, -1]]

    own_words = names["OwnWords"]
    assert contract_problem(Kind.PROPOSER, own_words) is None
    context = toy_context(num_speculative_tokens=4)
    batch = replace(batch, length_control=Fixed(LengthControlOptions(), context))
    drafts = own_words(own_words.Options(), context).propose(batch)
    assert np.asarray(drafts.token_ids).tolist() == [[1, 1, -1, -1], [5, 5, 5, 5]]


def test_verifier_page() -> None:
    names = run_examples("writing_a_verifier.md")  # holds itself to its guarantee
    assert contract_problem(Kind.VERIFIER, names["NearTheTop"]) is None
    # What the kernel is told is what the rule says.
    rule = names["rule"]
    plain = random_problem(5, num_draft=3, order=3)
    batch, _, _ = enumerated_input([plain, plain.with_temperature(0)])
    relaxation, judge = rule.relaxation(batch)
    told, own = verify_fused(batch, relaxation=relaxation, judge=judge), rule.verify(batch)
    assert torch.equal(told.token_ids, own.token_ids)
    assert told.extra_acceptance is not None
    torch.testing.assert_close(told.extra_acceptance, own.extra_acceptance)
    assert float(told.extra_acceptance.sum()) > 1


def test_options_page_names_every_option_of_ours() -> None:
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    page = hooks.on_page_markdown((DOCS / "options.md").read_text())
    assert "<!--" not in page
    for kind in Kind:
        for entry in installed().entries(kind):
            if entry.distribution == "vllm-spec-plugins":
                assert f"### `{entry.name}`" in page
                for option in installed().load(kind, entry.name).Options.model_fields:
                    assert f"| `{option}` |" in page


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")))
def test_links_between_pages_exist(page: str) -> None:
    for target in re.findall(r"\]\(([^)#:]+\.md)", (DOCS / page).read_text()):
        assert (DOCS / target).is_file()


def test_benchmarks_page_names_every_script_and_its_rows() -> None:
    page = (BENCHMARKS / "README.md").read_text()
    named = re.findall(r"^\| `(\w+\.py)` \|", page, flags=re.MULTILINE)
    scripts = {
        path.name
        for path in BENCHMARKS.glob("*.py")
        if '__name__ == "__main__"' in path.read_text()
    }
    assert sorted(named) == sorted(scripts)
    for rows in (BENCHMARKS / "results").glob("*.jsonl"):
        assert f"| `{rows.name}` |" in page
    for target in re.findall(r"\]\(([^)#:]+\.md)", page):
        assert (BENCHMARKS / target).is_file()
