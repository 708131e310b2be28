"""The sampler beside stock vLLM and Hugging Face's generate(): processes of the suite `rollout`."""
