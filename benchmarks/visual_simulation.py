"""Draft and verify thousands of images at once, with the verifiers that also serve, without vLLM.

Whole rounds: the draft model of the zoo draws K codes, the target reads them in one pass, the
verifier decides and draws the next code, until every image has its 64. Both models keep keys
and values. What an engine adds is scheduling and speed; laws, acceptance and price are the
same (`relaxed_visual.py --engine` checks that).
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_spec_plugins import zoo
from vllm_spec_plugins.acceptance_rule import AcceptanceRule
from vllm_spec_plugins.context import EngineContext, ModelFacts
from vllm_spec_plugins.draft_probabilities import DraftProbabilities
from vllm_spec_plugins.draw_next import sample_weights
from vllm_spec_plugins.verifier import Verifier, VerifyInput
from vllm_spec_plugins.zoo.hugging_face import load_model
from vllm_spec_plugins.zoo.image_tokens import IMAGE_TOKEN_RANGE, TOKENS_PER_IMAGE, prompts_of
from vllm_spec_plugins.zoo.model import Llama, _rotate, _rotation

#: Images drafted for together.
BATCH = 500
#: Finished images stay until they are so many of a batch: moving keys and values costs more.
_LEAST_FINISHED = 0.15


class CachedLlama:
    """A Llama of the zoo that keeps keys and values of many texts, each of its own length."""

    def __init__(self, model: Llama, texts: int, length: int) -> None:
        self.model = model
        shape = model.shape
        self._rotation = _rotation(length, shape)
        size = (texts, shape.num_key_value_heads, length, shape.head_dim)
        self._keys = [torch.zeros(size) for _ in model.layers]
        self._values = [torch.zeros(size) for _ in model.layers]
        self._columns = torch.arange(length)

    def keep(self, texts: Tensor) -> None:
        """Forget all texts but these, `[B']` int64."""
        self._keys = [keys[texts] for keys in self._keys]
        self._values = [values[texts] for values in self._values]

    @torch.inference_mode()
    def __call__(self, token_ids: Tensor, first: Tensor) -> Tensor:
        """`[B, n, V]` logits after each of `[B, n]` tokens; the first stands at `first` `[B]`.

        What was kept from there on is overwritten, so rejected drafts need no undoing.
        """
        shape = self.model.shape
        batch, count = token_ids.shape
        heads, keys, width = shape.num_heads, shape.num_key_value_heads, shape.head_dim
        positions = first.unsqueeze(1) + torch.arange(count)  # [B, n]
        cosines, sines = (table[positions].unsqueeze(1) for table in self._rotation)
        used = int(positions.max()) + 1  # T
        visible = (self._columns[:used] <= positions.unsqueeze(2)).unsqueeze(1)  # [B, 1, n, T]
        text = torch.arange(batch).unsqueeze(1)
        x = F.embedding(token_ids, self.model.embedding)
        for index, layer in enumerate(self.model.layers):
            h = F.rms_norm(x, (shape.hidden_size,), layer.attention_norm, shape.rms_norm_eps)
            qkv = F.linear(h, layer.qkv).view(batch, count, heads + 2 * keys, width)
            qk = _rotate(qkv[:, :, : heads + keys].transpose(1, 2), cosines, sines)
            q, k = qk.split((heads, keys), dim=1)
            self._keys[index][text, :, positions] = k.transpose(1, 2)
            self._values[index][text, :, positions] = qkv[:, :, heads + keys :]
            k, v = self._keys[index][:, :, :used], self._values[index][:, :, :used]
            h = F.scaled_dot_product_attention(q, k, v, visible, enable_gqa=heads != keys)
            x = x + F.linear(h.transpose(1, 2).reshape(batch, count, -1), layer.attention_out)
            h = F.rms_norm(x, (shape.hidden_size,), layer.mlp_norm, shape.rms_norm_eps)
            gate, up = F.linear(h, layer.gate_up).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, layer.down)
        return F.linear(self.model.normalise(x), self.model.head)


@dataclass(slots=True)
class Simulated:
    """Many images, and what it took.

    Attributes:
        token_ids: `[B, 64]`.
        rounds: Target passes after the first, over all images.
        tokens: Codes those passes gave.
        looked_at: Draft tokens verified before or at the first rejection, inside the image.
        price: Sum of their extra acceptance.
        seconds: Wall time.
    """

    token_ids: Tensor
    rounds: int = 0
    tokens: int = 0
    looked_at: int = 0
    price: float = 0.0
    seconds: float = 0.0

    @property
    def acceptance_length(self) -> float:
        """Codes per target pass, the one after the draft included."""
        return self.tokens / self.rounds

    @property
    def mean_price(self) -> float:
        """Total variation per draft token looked at."""
        return self.price / self.looked_at if self.looked_at else 0.0


def models(draft: str) -> tuple[Llama, Llama]:
    """Target, and the draft model of that name."""
    loaded = []
    for name in ("digits", draft):
        model = load_model(zoo.recipe(name).architecture, zoo.ensure(name))
        loaded.append(model.requires_grad_(False))
    return loaded[0], loaded[1]


def simulate(
    verifier: Verifier | None,
    target: Llama,
    draft: Llama,
    labels: Tensor,
    num_draft: int,
    temperature: float,
    seed: int,
) -> Simulated:
    """Images of `labels` `[B]`; without a verifier, code by code from the target."""
    start = time.perf_counter()
    parts = [
        _simulate(verifier, target, draft, part, num_draft, temperature, seed * 1_000_000 + number)
        for number, part in enumerate(labels.split(BATCH))
    ]
    result = Simulated(torch.cat([part.token_ids for part in parts]))
    for part in parts:
        result.rounds += part.rounds
        result.tokens += part.tokens
        result.looked_at += part.looked_at
        result.price += part.price
    result.seconds = time.perf_counter() - start
    return result


def _simulate(
    verifier: Verifier | None,
    target: Llama,
    draft: Llama,
    labels: Tensor,
    num_draft: int,
    temperature: float,
    seed: int,
) -> Simulated:
    generator = torch.Generator().manual_seed(seed)

    def drawn(logits: Tensor) -> tuple[Tensor, Tensor]:
        law = torch.softmax(logits / temperature, dim=-1)
        u = torch.rand(len(law), generator=generator, dtype=torch.float64)
        return sample_weights(law, u), law

    count, width = len(labels), 0 if verifier is None else num_draft
    prompt = prompts_of(labels)
    end = prompt.shape[1] + TOKENS_PER_IMAGE
    table = torch.zeros(count, end + width + 1, dtype=torch.int64)
    table[:, : prompt.shape[1]] = prompt
    big, small = CachedLlama(target, count, end + width), CachedLlama(draft, count, end + width)
    zero = torch.zeros(count, dtype=torch.int64)
    table[:, 2], _ = drawn(big(prompt, zero)[:, -1])
    small(prompt[:, :1], zero)
    result = Simulated(table[:, 2:end])
    # Texts still being written, and how many tokens each has.
    active, length = torch.arange(count), torch.full((count,), 3)
    while len(active):
        rows = torch.arange(len(active)).unsqueeze(1)
        here = table[active]
        last = here[rows, length.unsqueeze(1) - 1]
        result.rounds += int((length < end).sum())
        if verifier is None:
            tokens, _ = drawn(big(last, length - 1)[:, -1])
            table[active, length] = tokens
            length += 1
            result.tokens += len(active)
        else:
            drafts, laws = [], []
            recent = torch.cat([here[rows, length.unsqueeze(1) - 2], last], dim=1)
            logits = small(recent, length - 2)[:, -1]
            for step in range(num_draft):
                token, law = drawn(logits)
                drafts.append(token)
                laws.append(law)
                if step + 1 < num_draft:
                    logits = small(token.unsqueeze(1), length + step)[:, -1]
            block = torch.stack(drafts, dim=1)  # [B, K]
            logits = big(torch.cat([last, block], dim=1), length - 1) / temperature
            batch = _verify_input(
                logits, block, torch.stack(laws, dim=1), temperature, active + seed * 4096, length
            )
            verification = verifier.verify(batch)
            written = length.unsqueeze(1) + torch.arange(num_draft + 1)
            inside = (verification.token_ids >= 0) & (written < end)
            table[active.unsqueeze(1).expand_as(written)[inside], written[inside]] = (
                verification.token_ids[inside]
            )
            result.tokens += int(inside.sum())
            place = batch.index_in_draft
            seen = (place <= verification.accepted[batch.request_of]) & (
                length[batch.request_of] + place < end
            )
            result.looked_at += int(seen.sum())
            if verification.extra_acceptance is not None:
                result.price += float(verification.extra_acceptance[seen].sum())
            length += verification.accepted + 1
        length = length.clamp(max=end)
        going = length < end
        if going.double().mean() < 1 - _LEAST_FINISHED or not bool(going.any()):
            kept = going.nonzero().squeeze(1)
            active, length = active[kept], length[kept]
            big.keep(kept)
            small.keep(kept)
    return result


def _verify_input(
    logits: Tensor,
    block: Tensor,
    laws: Tensor,
    temperature: float,
    streams: Tensor,
    positions: Tensor,
) -> VerifyInput:
    texts, num_draft = block.shape
    return VerifyInput(
        [str(i) for i in range(texts)],
        logits[:, :-1].reshape(texts * num_draft, -1),
        logits[:, -1],
        block.flatten(),
        torch.full((texts,), num_draft),
        DraftProbabilities(laws.flatten(0, 1)),
        torch.full((texts,), temperature),
        streams,
        positions,
        max_num_draft=num_draft,
        all_greedy=False,
        any_greedy=False,
    )


@torch.inference_mode()
def exact_distance(
    verifier: AcceptanceRule, target: Llama, draft: Llama, texts: Tensor, temperature: float
) -> dict[str, float]:
    """Total variation that a round's first token costs, by enumerating every draft token.

    Args:
        verifier: Whose `acceptance` and `residual` are asked.
        target: p.
        draft: q.
        texts: `[B, 66]` prompts with images; a round begins somewhere inside each.
        temperature: Of both.

    Returns:
        Means over the texts: `distance` of the token's law to p, `acceptance`, and
        `extra_acceptance` over sum min(p, q).
    """
    generator = torch.Generator().manual_seed(0)
    ends = torch.randint(3, texts.shape[1], (len(texts),), generator=generator)
    totals = torch.zeros(3, dtype=torch.float64)
    for text, end in zip(texts, ends.tolist(), strict=True):
        context = text[None, :end]
        p_logits, q_logits = (
            (model(context)[-1][0, -1] @ model.head.T).double() / temperature
            for model in (target, draft)
        )
        p, q = p_logits.softmax(-1), q_logits.softmax(-1)
        every = torch.arange(len(p))  # one request for each draft token there could be
        logits, laws = p_logits.expand(len(p), 1, -1), q.expand(len(p), 1, -1)
        logits = torch.cat([logits, logits], dim=1)
        batch = _verify_input(logits, every.unsqueeze(1), laws, temperature, every, every)
        accept = verifier.acceptance(batch)
        after = verifier.residual(batch, every)
        after = after / after.sum(dim=1, keepdim=True)
        law = q * accept + ((q * (1 - accept)).unsqueeze(1) * after).sum(dim=0)
        accepted = (q * accept).sum()
        extra = accepted - torch.minimum(p, q).sum()
        totals += torch.stack([(law - p).abs().sum() / 2, accepted, extra])
    distance, acceptance, extra_acceptance = (totals / len(texts)).tolist()
    return {
        "distance": distance,
        "acceptance": acceptance,
        "extra_acceptance": extra_acceptance,
    }


def context_of(num_draft: int) -> EngineContext:
    """The engine a verifier is told it runs in."""
    shape = zoo.recipe("digits").architecture
    facts = ModelFacts(
        model="digits",
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden_size,
        num_layers=shape.num_layers,
        max_model_len=shape.max_positions,
        num_speculative_tokens=num_draft,
        image_token_range=IMAGE_TOKEN_RANGE,
    )
    return EngineContext(facts, torch.device("cpu"), max_num_requests=BATCH, seed=0)
