"""Whether a student with adapters learns as one whose weights are all trained: the default job under each."""
