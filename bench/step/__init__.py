"""The GAD step of gadcore and of its opponents, a process each."""
