"""`python -m vllm_spec_plugins.cli`, the same as `vllm-spec`."""

from .main import app

if __name__ == "__main__":
    app()
