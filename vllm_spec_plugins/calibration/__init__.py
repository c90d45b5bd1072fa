"""What `vllm-spec calibrate` measures and trains, on any local model in Hugging Face's format."""
