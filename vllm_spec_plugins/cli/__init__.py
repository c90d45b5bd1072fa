"""The `vllm-spec` command."""
