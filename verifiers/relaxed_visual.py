"""`relaxed_visual`: accept image tokens that look like, or are as likely as, what the target wants.

The law of an image token is flat: many codes would do, and exact verification rejects most
drafts over differences nobody sees. Four published rules and one of ours let more of them stand,
only for ids inside `image_token_range`; every other id is verified exactly:

    lantern    LANTERN, Jang et al. 2410.03355: a code borrows the probability of its nearest
               codes, up to `budget` (`neighbour_mass`)
    lantern++  2502.06352: up to (`factor` - 1) times its own probability
    gsd        grouped speculative decoding, So et al. 2508.07747: tokens about equally likely
               are verified as a group (`probability_groups`)
    annealed   Cool-SD: accept with w p/q, w = `factor` exp(-`decay` i) at draft position i,
               never below 1
    clusters   ours: which cluster of near-identical codes is written keeps the target's law,
               which code of the cluster does not (`code_clusters`)

All five accept at least min(1, p/q), so the residual norm([p - q]+) is the best there is (that of
`clusters` is as good), and the extra acceptance this verifier counts is the distance to the
target's law at that position. None of them bounds it: `budget` limits what one draft token
borrows, and the output's law moves by the sum over the tokens that could have been drafted.

`residual: published` draws what the authors' code draws, for comparison: it is further from
the target at the same acceptance, and the price counted is then a lower limit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor

from vllm_spec_plugins.acceptance_rule import token_acceptance
from vllm_spec_plugins.codebook_neighbours import NeighbourCard, read_neighbours
from vllm_spec_plugins.errors import ConfigError, listed
from vllm_spec_plugins.greedy_on_host import decide
from vllm_spec_plugins.image_token_range import chosen_image_tokens
from vllm_spec_plugins.relaxed_rule import RelaxedOptions, RelaxedRule
from vllm_spec_plugins.residual import residual_weights
from vllm_spec_plugins.row_choice import replace_rows
from vllm_spec_plugins.verifier import VerifierOptions, VerifyInput

from ..triton_kernels.relaxations import Judge, NeighbourSum, Relaxation  # noqa: TID252
from .code_clusters import CodeClusters
from .law_entries import target_entries
from .neighbour_mass import borrowed_mass, published_residual
from .probability_groups import group_acceptance, group_of

if TYPE_CHECKING:
    from vllm_spec_plugins.context import EngineContext, ModelFacts


class RelaxedVisualOptions(RelaxedOptions):
    rule: Literal["lantern", "lantern++", "gsd", "annealed", "clusters"] = Field(
        description="Which tokens stand beyond the exact ones."
    )
    image_token_range: tuple[int, int] | None = Field(
        None,
        description="[first, last + 1] ids that are image codes, id first + c being code c. "
        "Absent: what the model's config.json says.",
    )
    residual: Literal["ours", "published"] = Field(
        "ours",
        description="Law of the token after a rejection. ours: the nearest to the target that the "
        "acceptance allows. published: as the authors' code has it (lantern, lantern++: the "
        "draft's neighbours left out; gsd: without ever falling back on the exact rule).",
    )
    neighbours: str | None = Field(
        None,
        description="lantern, lantern++, clusters: table of `vllm-spec calibrate codebook`.",
    )
    num_neighbours: int | None = Field(
        None,
        ge=0,
        description="lantern, lantern++: how many of the table's neighbours a token may borrow "
        "from; clusters: may share a cluster with. Absent: all.",
    )
    budget: float | None = Field(
        None, ge=0, le=1, description="lantern: most probability a token borrows. Absent: 0.1."
    )
    factor: float | None = Field(
        None,
        ge=1,
        allow_inf_nan=False,
        description="lantern++: a token may rise to so many times its probability; absent: 5. "
        "annealed: how many times p/q the first draft token is accepted with; absent: 1.5.",
    )
    decay: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="annealed: how fast later draft tokens are verified more strictly. "
        "Absent: 0.7.",
    )
    group_size: int | None = Field(
        None, ge=2, description="gsd: most tokens verified as one. Absent: 14."
    )
    max_probability_difference: float | None = Field(
        None,
        gt=0,
        le=1,
        description="gsd: largest difference in the target's probability to the draft token "
        "within its group. Absent: 0.15.",
    )
    cluster_size: int | None = Field(
        None, ge=2, description="clusters: most codes of a cluster. Absent: 16."
    )


#: Options of each rule, with their defaults; of published rules from the papers.
_OF_RULE: dict[str, dict[str, float | None]] = {
    "lantern": {"neighbours": None, "num_neighbours": None, "budget": 0.1},
    "lantern++": {"neighbours": None, "num_neighbours": None, "factor": 5.0},
    "gsd": {"group_size": 14, "max_probability_difference": 0.15},
    "annealed": {"factor": 1.5, "decay": 0.7},
    "clusters": {"neighbours": None, "num_neighbours": None, "cluster_size": 16},
}


class RelaxedVisual(RelaxedRule):
    """Relaxed verification of image tokens; text is exact."""

    Options = RelaxedVisualOptions
    options: RelaxedVisualOptions

    def __init__(self, options: RelaxedVisualOptions, context: EngineContext) -> None:
        super().__init__(options, context)
        self._first, self._end = chosen_image_tokens(
            "relaxed_visual", options.image_token_range, context.facts
        )
        self._neighbours: Tensor | None = None
        self._clusters: CodeClusters | None = None
        if options.neighbours is None:
            return
        _, table = read_neighbours(options.neighbours)
        table = table[:, : options.num_neighbours]
        if options.rule == "clusters":
            size = int(self._setting("cluster_size"))
            self._clusters = CodeClusters.gather(table, size, self._first).to(context.device)
        else:
            #: `[C, k]` int32 token ids, -1: none.
            self._neighbours = torch.where(
                table < len(table), table + self._first, table.new_full((), -1)
            ).to(context.device)

    @property
    def warm_up_tokens(self) -> tuple[int, int]:
        return self._first, self._end

    @classmethod
    def verifies_on_device(cls, options: VerifierOptions) -> bool:
        del options
        return True

    @classmethod
    def check(cls, options: VerifierOptions, facts: ModelFacts) -> None:
        assert isinstance(options, RelaxedVisualOptions)
        _refuse_options_of_others(options)
        image_tokens = chosen_image_tokens("relaxed_visual", options.image_token_range, facts)
        if "neighbours" not in _OF_RULE[options.rule]:
            return
        if options.neighbours is None:
            raise ConfigError(
                f'relaxed_visual: the rule "{options.rule}" needs "neighbours", a file that '
                "`vllm-spec calibrate codebook` makes from the model's VQ codebook."
            )
        NeighbourCard.read(options.neighbours).check(options.neighbours, facts, image_tokens)
        card, _ = read_neighbours(options.neighbours)
        if options.num_neighbours is not None and options.num_neighbours > card.num_neighbours:
            raise ConfigError(
                f'relaxed_visual: "num_neighbours" is {options.num_neighbours}, but '
                f"{options.neighbours} has {card.num_neighbours} of each code. Ask for at most "
                "that, or make a wider table."
            )
        if options.cluster_size is not None and options.cluster_size > card.num_neighbours + 1:
            raise ConfigError(
                f'relaxed_visual: "cluster_size" is {options.cluster_size}, but '
                f"{options.neighbours} has {card.num_neighbours} neighbours of each code, "
                f"enough for clusters of {card.num_neighbours + 1}. Ask for at most that, or make "
                "a wider table."
            )

    def relaxed_acceptance(self, batch: VerifyInput) -> Tensor:
        accept = token_acceptance(batch)
        # What is certain to stand needs no relaxing.
        return replace_rows(
            accept,
            self._is_image(batch.draft_token_ids) & (accept < 1),
            lambda rows: self._of_image_rows(batch, rows, accept[rows]),
        )

    def relaxed_greedy_acceptance(self, batch: VerifyInput, rows: Tensor) -> Tensor:
        """Under lantern and lantern++: accepted if what it and its neighbours have is the most.

        Under clusters: if the most likely token is in its cluster. The other rules are defined
        for sampling alone: greedy requests match exactly.
        """
        if batch.span_maxima is not None:
            return self._decided_on_host(batch, rows)
        stands = torch.zeros_like(rows, dtype=torch.bool)
        if self._matches_exactly:
            return stands
        inside = self._is_image(batch.draft_token_ids[rows])
        return replace_rows(stands, inside, lambda which: self._wins(batch, rows[which]))

    def _wins(self, batch: VerifyInput, rows: Tensor) -> Tensor:
        """`[M]` bool, the same for draft tokens in the image range."""
        if self._clusters is not None:
            return self._clusters.greedy_acceptance(batch, rows)
        both = torch.stack([batch.draft_token_ids, batch.greedy_token_ids], dim=1)[rows]
        own, best = target_entries(batch, rows, both.clamp(min=0)).T
        return own + self._borrowed(batch, rows, own) >= best

    def _decided_on_host(self, batch: VerifyInput, rows: Tensor) -> Tensor:
        """`[M]` bool, the same for single greedy steps on the CPU."""
        if self._clusters is not None:
            of_code = self._clusters.of_code.numpy()
            return decide(batch, rows, "of_one_cluster", of_code, self._first)
        if self._neighbours is None:
            return torch.zeros_like(rows, dtype=torch.bool)
        of_its_own = self.options.rule == "lantern++"
        budget = -1.0 if of_its_own else self._setting("budget")
        factor = self._setting("factor") if of_its_own else 1.0
        table = self._neighbours.numpy()
        return decide(batch, rows, "wins_with_neighbours", table, self._first, budget, factor)

    def residual(self, batch: VerifyInput, rows: Tensor) -> Tensor:
        published = self._neighbours is not None and self.options.residual == "published"
        if not published and self._clusters is None:
            return super().residual(batch, rows)
        exact = self.exact_requests(batch)
        if exact is None and not published:
            return self._own_residual(batch, rows)
        relaxed = torch.ones_like(rows, dtype=torch.bool)
        if published:
            relaxed &= self._is_image(batch.draft_token_ids[rows])
        if exact is not None:
            relaxed &= ~exact[batch.request_of[rows]]
        return replace_rows(
            residual_weights(batch, rows),
            relaxed,
            lambda which: self._own_residual(batch, rows[which]),
        )

    def _own_residual(self, batch: VerifyInput, rows: Tensor) -> Tensor:
        """`[M, V]` weights after a rejection where the rule does not draw from [p - q]+."""
        if self._clusters is not None:
            return self._clusters.residual(batch, rows)
        own = batch.draft_token_probability[rows]
        borrowed = self._borrowed(batch, rows, own)
        return published_residual(batch, rows, self._neighbours_of(batch, rows), borrowed)

    @property
    def _matches_exactly(self) -> bool:
        """gsd, annealed: there is nothing to ask about greedy requests."""
        return self._neighbours is None and self._clusters is None

    @property
    def draws_exact_residual(self) -> bool:
        published = self._neighbours is not None and self.options.residual == "published"
        return not published and self.options.rule in ("lantern", "lantern++", "gsd", "annealed")

    def relaxation(self, batch: VerifyInput) -> tuple[Relaxation | None, Judge | None]:
        """lantern, lantern++: the kernel sums neighbours, where all draw and none is exact."""
        table = self._neighbours
        if table is None or not table.numel() or batch.any_greedy:
            return super().relaxation(batch)
        if self.exact_requests(batch) is not None:
            return super().relaxation(batch)
        if self.options.rule == "lantern":
            return NeighbourSum(table, self._first, self._setting("budget")), None
        budget = self._setting("factor") - 1
        return NeighbourSum(table, self._first, budget, multiplicative=True), None

    def _of_image_rows(self, batch: VerifyInput, rows: Tensor, exact: Tensor) -> Tensor:
        """`[M]` acceptance of draft tokens in the image range. `exact`: min(1, p/q) of them."""
        rule = self.options.rule
        if rule == "gsd":
            groups = group_of(
                batch,
                rows,
                (self._first, self._end),
                int(self._setting("group_size")),
                self._setting("max_probability_difference"),
            )
            accept = group_acceptance(batch, rows, groups)
            return accept if self.options.residual == "published" else torch.maximum(accept, exact)
        if self._clusters is not None:
            return self._clusters.acceptance(batch, rows, exact)
        q = batch.draft_law_of_token[rows].to(exact.dtype)
        if rule == "annealed":
            place = batch.index_in_draft[rows].to(exact.dtype)
            lift = self._setting("factor") * torch.exp(-self._setting("decay") * place)
            raised = batch.draft_token_probability[rows] * lift.clamp(min=1)
        else:
            own = batch.draft_token_probability[rows]
            raised = own + self._borrowed(batch, rows, own)
        return torch.where(raised < q, raised / q, torch.ones_like(raised))

    def _borrowed(self, batch: VerifyInput, rows: Tensor, own: Tensor) -> Tensor:
        """`[M]` what draft tokens in the image range, of probabilities `own`, borrow."""
        if self.options.rule == "lantern":
            budget = torch.full_like(own, self._setting("budget"))
        else:
            budget = (self._setting("factor") - 1) * own
        return borrowed_mass(batch, rows, self._neighbours_of(batch, rows), budget)

    def _neighbours_of(self, batch: VerifyInput, rows: Tensor) -> Tensor:
        """`[M, k]` int64 token ids."""
        assert self._neighbours is not None
        codes = batch.draft_token_ids[rows] - self._first
        # On a device rows of other tokens may be among them.
        return self._neighbours[codes.clamp(0, len(self._neighbours) - 1)].long()

    def _is_image(self, token_ids: Tensor) -> Tensor:
        return (token_ids >= self._first) & (token_ids < self._end)

    def _setting(self, name: str) -> float:
        """An option of the rule, or its default."""
        given = getattr(self.options, name)
        value = _OF_RULE[self.options.rule][name] if given is None else given
        assert value is not None
        return value


def _refuse_options_of_others(options: RelaxedVisualOptions) -> None:
    """An option the rule would ignore is an error."""
    own = _OF_RULE[options.rule].keys()
    others = {name for names in _OF_RULE.values() for name in names} - own
    given = sorted(name for name in others if getattr(options, name) is not None)
    if given:
        raise ConfigError(
            f'relaxed_visual: "{given[0]}" is no option of the rule "{options.rule}". '
            f"It takes {listed(own)}."
        )
    if options.rule in ("annealed", "clusters") and options.residual == "published":
        why = (
            'is published with the residual that is "ours" here'
            if options.rule == "annealed"
            else "has one residual, ours"
        )
        raise ConfigError(f'relaxed_visual: "{options.rule}" {why}. Remove "residual".')
